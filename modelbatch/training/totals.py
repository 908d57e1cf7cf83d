"""Means over the samples of an epoch, summed up on the device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..change import Change
from .batches import Batch

__all__ = ["Totals"]


class Totals:
    """Sums `[M]` in float64 by name, and what the samples count for.

    Nothing here waits for the device.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count: int | Tensor = 0

    def add(self, name: str, values: Tensor, batch: Batch) -> None:
        """Add means over a batch, `[M]`. Every name is to be added for every batch."""
        total = self.sums.get(name)
        if total is None:
            total = torch.zeros(values.shape, dtype=torch.float64, device=values.device)
            self.sums[name] = total
        if isinstance(batch.count, int):
            total.add_(values, alpha=batch.count)
        else:
            total.add_(values * batch.count)

    def add_count(self, batch: Batch) -> None:
        """Count the samples of a batch."""
        self.count = self.count + batch.count

    def models_changed(self, change: Change) -> None:
        """Follow a bundle whose models have changed; a fresh one has seen no sample yet."""
        self.sums = {name: change.rows(total) for name, total in self.sums.items()}
        if change.fresh or (isinstance(self.count, Tensor) and self.count.dim()):
            device = next((total.device for total in self.sums.values()), None)
            count = torch.as_tensor(self.count, dtype=torch.float64, device=device)
            self.count = change.rows(count.expand(change.old_num_models))

    def means(self, prefix: str = "") -> dict[str, Tensor]:
        """`[M]` by name; NaN for a model that saw no sample."""
        return {prefix + name: total / self.count for name, total in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, cloned."""
        count = self.count.clone() if isinstance(self.count, Tensor) else self.count
        return {"sums": {name: s.clone() for name, s in self.sums.items()}, "count": count}

    def load_state_dict(self, state_dict: Mapping[str, Any], device: torch.device) -> None:
        """Take over what `state_dict` returned."""
        count = state_dict["count"]
        self.count = count.to(device, copy=True) if isinstance(count, Tensor) else count
        sums = state_dict["sums"].items()
        self.sums = {name: total.to(device, copy=True) for name, total in sums}
