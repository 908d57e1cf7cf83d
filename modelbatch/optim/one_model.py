"""A bundle's optimizer as the scheduler of one model sees it."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NoReturn
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ModelBatchError
from .base import PerModelOptimizer

__all__ = ["OneModelOptimizer", "kept_group", "put_back", "track_steps"]


class OneModelOptimizer(Optimizer):
    """What a scheduler of torch sees: an optimizer with one parameter group, that of one model.

    Args:
        optimizer: the bundle's optimizer, whose group this is.
        i: the model's index.
        group: of a model that is about to join; the optimizer's own group otherwise.
    """

    # Torch's own constructor is not called: the group and the state are the bundle's.
    def __init__(
        self, optimizer: PerModelOptimizer, i: int, group: dict[str, Any] | None = None
    ) -> None:
        self._bundle = optimizer
        self._index = i
        self._joining = group
        own = self.param_groups[0]
        self.defaults = {
            option: own.get(option, default) for option, default in optimizer.defaults.items()
        }

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The group itself, no copy; read anew, for loading a state dict replaces it."""
        if self._joining is not None:
            return [self._joining]
        # Past the property of the bundle's optimizer, which looks at the gradients of all models.
        return [self._bundle.__dict__["param_groups"][self._index]]

    def move(self, i: int) -> None:
        """Be that of the model in another slot."""
        self._index, self._joining = i, None

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """The state of this model's parameters."""
        state = self._bundle.state
        return {param: state[param] for param in self.param_groups[0]["params"] if param in state}

    @property
    def step(self) -> Callable[..., NoReturn]:
        """Refused when called; shows torch whether the steps of the bundle are tracked."""

        def refuse(*args: Any, **kwargs: Any) -> NoReturn:
            self._refuse()

        if hasattr(self._bundle.step, "_wrapped_by_lr_sched"):
            refuse._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
        return refuse

    @property
    def _opt_called(self) -> bool:
        # Where torch's schedulers note, and look, whether the optimizer has taken a step.
        return getattr(self._bundle, "_opt_called", False)

    def state_dict(self) -> dict[str, Any]:
        """The state of this model, as its own torch optimizer would save it."""
        return self._bundle.model_state_dict(self._index)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes the state of this model from a stock state dict."""
        self._bundle.load_model_state_dict(self._index, state_dict)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ModelBatchError(
            f"this is the view that the scheduler of model {self._index} has of the bundle's "
            f"optimizer; use the bundle's optimizer itself"
        )

    zero_grad = add_param_group = _refuse

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._bundle.__reduce_ex__(protocol)  # which refuses


def track_steps(optimizer: Optimizer) -> None:
    """Notes on the optimizer that it has taken a step, the way torch's schedulers do.

    They do it by wrapping the step of the optimizer that they are made for. Those of a bundle are
    made for others, whose step is never called.
    """
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return
    weak = ref(optimizer)  # the optimizer holds the wrapper
    step: Any = optimizer.step
    function = getattr(step, "__func__", None)

    @wraps(function or step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        own: Any = weak()
        own._opt_called = True
        bound = function.__get__(own, type(own)) if function else step
        return bound(*args, **kwargs)

    wrapper._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = wrapper  # type: ignore[method-assign]


def kept_group(group: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Every option of a group, and a copy of its value where schedulers write in place."""
    return {
        option: (value, value.clone() if isinstance(value, Tensor) else None)
        for option, value in group.items()
    }


@torch.no_grad()
def put_back(group: dict[str, Any], before: Mapping[str, tuple[Any, Any]]) -> None:
    """Makes a group what it was when `kept_group` looked at it, tensors included."""
    for option in [option for option in group if option not in before]:
        del group[option]
    for option, (value, content) in before.items():
        if group.get(option) is not value:
            group[option] = value
        if content is not None:
            value.copy_(content)
