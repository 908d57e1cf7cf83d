"""What `mb.explain()` says of the path of a training step."""

from typing import TYPE_CHECKING, Any

import torch

from .encoding import Loss
from .guards import obstacle
from .plan import argument, check_bundle, check_input, compile_forward
from .program import LossSpec, Refusal

if TYPE_CHECKING:
    from ..steps import Steps

__all__ = ["step_path"]


def step_path(mb: "Steps", args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """How `train_step` would run on such an input; a loss that the engine knows is assumed."""
    why = _why_not(mb, args, kwargs)
    if why is None:
        return "engine: whole steps in one call, with the losses that it knows"
    return f"vmap with the operators of modelbatch; not the engine: {why}"


def _why_not(mb: "Steps", args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if not mb._engine.enabled:
        return "it is switched off"
    if mb._optimizer is None:
        return "the bundle has no optimizer"
    given = None if args and kwargs else argument(mb, kwargs or args)
    if given is None:
        return "more than one input, or none that is a plain tensor"
    x, own, keyword = given
    try:
        check_bundle(mb)
        check_input(x, next(iter(mb._stack.parameters())).dtype)
        shape = tuple(x.shape[1:] if own else x.shape)
        _, watch = compile_forward(mb, x.dtype, shape, keyword, _some_loss, None)
    except Refusal as refusal:
        return str(refusal)
    if watch.hooked():
        return "hooks on the parameters"
    with torch.enable_grad():
        return obstacle(mb)


def _some_loss(outputs: tuple[int, ...]) -> LossSpec:
    return LossSpec(Loss.MSE)
