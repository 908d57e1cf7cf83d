"""The weights that each model had when its metric was best."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...batch import ModelBatch
from ...callbacks.weights import StackedCopy

__all__ = ["BestWeights"]


class BestWeights:
    """Keeps a stacked copy of the bundle, each row of the time when its model was best.

    Args:
        bundle: the bundle.
        greater_is_better: whether more of the metric is better.
    """

    def __init__(self, bundle: ModelBatch, greater_is_better: bool):
        self._bundle = bundle
        self._greater = greater_is_better
        self._copy: StackedCopy | None = None
        worst = float("-inf") if greater_is_better else float("inf")
        #: The best value of each model, float64 `[M]`.
        self.values = torch.full((bundle.num_models,), worst, dtype=torch.float64)
        #: After which step that was, int64 `[M]`; -1 where no value was any better than none.
        self.steps = torch.full((bundle.num_models,), -1, dtype=torch.int64)

    def update(self, values: Sequence[float] | Tensor, step: int) -> None:
        """Copy the models that are better than ever; a NaN is not."""
        new = torch.as_tensor(values, dtype=torch.float64)
        better = new > self.values if self._greater else new < self.values
        self.values = torch.where(better, new, self.values)
        self.steps = torch.where(better, step, self.steps)
        if self._copy is None:
            self._copy = StackedCopy(self._bundle)
        device = self._bundle.active.device
        self._copy.update(self._bundle, better.to(device))

    def restore(self) -> None:
        """Give every model that ever had a value its best weights back."""
        if self._copy is not None:
            self._copy.restore(self._bundle, (self.steps >= 0).nonzero().flatten().tolist())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        copies = None if self._copy is None else self._copy.state_dict()
        return {"values": self.values, "steps": self.steps, "weights": copies}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.values, self.steps = state_dict["values"], state_dict["steps"]
        self._copy = None
        if state_dict["weights"] is not None:
            self._copy = StackedCopy(self._bundle)
            self._copy.load_state_dict(state_dict["weights"])
