"""Numbers of all models: means over an epoch, and the few that stand for all of them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...change import Change

__all__ = ["Means", "is_loss", "mean_of", "spread"]

Count = int | Tensor


class Means:
    """Sums over an epoch by stage (`"train"`, `"val"`, `"test"`) and name; nothing waits.

    Everything is a tensor of its own, no matter that Lightning validates in inference mode.
    """

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor]] = {}
        self._counts: dict[str, dict[str, Count]] = {}

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, stage: str, name: str, values: Tensor, count: Count) -> None:
        """Add means over a batch, `[M]`.

        Args:
            stage: where this is about.
            name: of the number.
            values: `[M]`.
            count: what the samples of the batch count for, one number or `[M]`.
        """
        sums = self._sums.setdefault(stage, {})
        counts = self._counts.setdefault(stage, {})
        if name not in sums:
            sums[name] = torch.zeros(values.shape, dtype=_wide(values), device=values.device)
            counts[name] = 0
        total = sums[name]
        if isinstance(count, Tensor):
            # a model without samples may have any number for them
            count = count.to(total)
            part = torch.where(count != 0, values * count, 0.0)
            sums[name] = total + part
        else:
            sums[name] = total + values.to(total.dtype) * count
        counts[name] = counts[name] + count

    @torch.inference_mode(False)
    def means(self, stage: str) -> dict[str, Tensor]:
        """`[M]` by name; NaN for a model that saw no sample."""
        counts = self._counts.get(stage, {})
        return {name: total / counts[name] for name, total in self._sums.get(stage, {}).items()}

    def clear(self, stage: str) -> None:
        """Begin an epoch."""
        self._sums.pop(stage, None)
        self._counts.pop(stage, None)

    def models_changed(self, change: Change) -> None:
        """Follow a bundle whose models have changed; a fresh one has seen no sample."""
        for stage, sums in self._sums.items():
            for name, total in sums.items():
                count = self._counts[stage][name]
                count = torch.as_tensor(count, dtype=total.dtype, device=total.device)
                self._counts[stage][name] = change.rows(count.expand(change.old_num_models))
                sums[name] = change.rows(total)

    def state_dict(self, stage: str) -> dict[str, Any]:
        """The sums of a stage so far: plain numbers and tensors."""
        return {
            "sums": dict(self._sums.get(stage, {})),
            "counts": dict(self._counts.get(stage, {})),
        }

    def load_state_dict(
        self, stage: str, state_dict: Mapping[str, Any], device: torch.device
    ) -> None:
        """Take over what `state_dict` returned."""

        def moved(own: Any) -> Any:
            return own.to(device) if isinstance(own, Tensor) else own

        self._sums[stage] = {name: moved(own) for name, own in state_dict["sums"].items()}
        self._counts[stage] = {name: moved(own) for name, own in state_dict["counts"].items()}

    def to(self, device: torch.device) -> None:
        """Follow the bundle to another device."""
        for stage in list(self._sums):
            self.load_state_dict(stage, self.state_dict(stage), device)


def _wide(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64


def is_loss(name: str) -> bool:
    """Whether the lowest value of a number is the best."""
    return name.split("/", 1)[0].removesuffix("_epoch").endswith("loss")


def _counted(values: Tensor, active: Tensor | None) -> Tensor:
    """The finite values of models that train, and NaN for the others; of all, if none trains."""
    finite = torch.isfinite(values)
    if active is not None:
        finite = finite & (active | ~active.any())
    return torch.where(finite, values, torch.nan)


def mean_of(values: Tensor, active: Tensor | None) -> Tensor:
    """The mean over active models with a finite value; NaN if there is none."""
    return _counted(values.detach(), active).nanmean()


def spread(name: str, values: Tensor, active: Tensor | None) -> dict[str, Tensor]:
    """What stands for `[M]` numbers of active models; waits for nothing.

    Args:
        name: of the number. The lowest value of a loss is its best, of anything else the highest.
        values: `[M]`.
        active: bool `[M]`, None if all models are active.

    Returns:
        `name/best`, `name/median` and `name/worst` of a loss, else `name/max`, `name/median` and
        `name/min`; NaN if no value is finite.
    """
    counted = _counted(values.detach(), active)
    known = torch.isfinite(counted)
    none = ~known.any()
    low = torch.where(none, torch.nan, torch.where(known, counted, torch.inf).amin())
    high = torch.where(none, torch.nan, torch.where(known, counted, -torch.inf).amax())
    wide = counted if counted.dtype in (torch.float32, torch.float64) else counted.float()
    median = torch.nanquantile(wide, 0.5)
    if is_loss(name):
        return {f"{name}/best": low, f"{name}/median": median, f"{name}/worst": high}
    return {f"{name}/max": high, f"{name}/median": median, f"{name}/min": low}
