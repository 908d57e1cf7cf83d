"""An optimizer of torch that takes the stacked parameters of a bundle for those of one model."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..change import Change
from ..errors import ModelBatchError

__all__ = ["WholeOptimizer"]


class WholeOptimizer:
    """Follows a bundle for an optimizer of torch that knows nothing of models.

    Models can leave where the state consists of tensors of the parameters' own shape, as that of
    elementwise rules. None can join once there is a state: its step count is that of all models.

    Args:
        optimizer: `mb.optimizer`, if it is none of a bundle.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._shapes: dict[Any, torch.Size] = {}

    def check_models_change(self, change: Change) -> None:
        """Refuses what cannot be.

        Raises:
            ModelBatchError: a fresh model beside others that have taken steps, options for one
                model, or a state whose parts are not those of single models.
        """
        name = type(self._optimizer).__name__
        advice = "build the bundle's optimizer with OptimizerFactory"
        if any(change.hyper.values()):
            raise ModelBatchError(f"this {name} has no options for single models; {advice}")
        if change.fresh and self._optimizer.state:
            raise ModelBatchError(
                f"this {name} counts the steps of all models together, so none can join; {advice}"
            )
        for parameter, state in self._optimizer.state.items():
            for key, value in state.items():
                tensor = isinstance(value, Tensor) and value.numel() != 1
                if tensor and value.shape != parameter.shape:
                    raise ModelBatchError(
                        f"the state '{key}' of this {name} has no parts of single models; {advice}"
                    )
                if isinstance(value, list | tuple | dict):
                    raise ModelBatchError(
                        f"the state '{key}' of this {name} is no tensor, so it cannot be told "
                        f"which part is which model's; {advice}"
                    )
            self._shapes[parameter] = parameter.shape

    def models_changed(self, change: Change) -> None:
        """Follows a bundle whose models, and stacked parameters, have changed."""
        for parameter, shape in self._shapes.items():
            state = self._optimizer.state[parameter]
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == shape:
                    state[key] = change.rows(value)
