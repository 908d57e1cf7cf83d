"""What a forward asks of autograd: whether a tensor needs a gradient, hooks, checkpoints."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch._C._functorch as functorch
from torch import Tensor

from ..errors import BatchingError
from .mode import Call, register


@register(
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.grad_fn.__get__,  # type: ignore[attr-defined]
    Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
)
def autograd_property(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Properties that the tensor of all models has and its wrapper hides."""
    if not call.is_batched(args[0]):
        return NotImplemented
    with call.lowered():
        return func(functorch.get_unwrapped(args[0]))


@register(Tensor.data.__get__)  # type: ignore[attr-defined]
def data(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`x.data`: the value alone."""
    return args[0].detach() if call.is_batched(args[0]) else NotImplemented


@register(Tensor.register_hook)
def register_hook(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`x.register_hook(hook)`: the hook sees one model's gradient, all models under vmap."""
    if not call.is_batched(args[0]) or len(args) != 2:
        return NotImplemented
    hook = args[1]
    dim = functorch.maybe_get_bdim(args[0])

    def one(grad: Tensor) -> Tensor:
        result = hook(grad)
        return grad if result is None else result

    def all_models(grad: Tensor) -> Tensor:
        result: Tensor = torch.vmap(one, dim, dim)(grad)
        return result

    with call.lowered():
        return functorch.get_unwrapped(args[0]).register_hook(all_models)


def _checkpoint_frame() -> Any:
    """The frame of torch's checkpoint that is just being set up, None if there is none."""
    frame: Any = sys._getframe(1)
    for _ in range(8):
        frame = frame.f_back
        if frame is None:
            return None
        if frame.f_code.co_name == "_checkpoint_without_reentrant_generator":
            return frame
    return None


@register(torch.empty, random=True)
def empty(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Notices `torch.utils.checkpoint`, which starts by making an empty leaf.

    Its second forward runs in the backward, when the models' vmap level and streams are gone. So
    the models run one by one, and the second forward gets the random stream of the first.
    """
    if not kwargs.get("requires_grad") or args != ((0,),):
        return NotImplemented
    frame = _checkpoint_frame()
    if frame is None:
        return NotImplemented
    if call.level is not None:
        raise BatchingError("torch.utils.checkpoint runs the forward again in the backward")
    recompute = frame.f_locals.get("recompute_fn")
    cells = dict(zip(recompute.__code__.co_freevars, recompute.__closure__)) if recompute else {}
    if "fn" not in cells and "function" not in cells:
        raise BatchingError("this version of torch.utils.checkpoint cannot follow random streams")
    cell = cells["fn"] if "fn" in cells else cells["function"]
    cell.cell_contents = _with_stream(call, cell.cell_contents)
    return NotImplemented


def _with_stream(call: Call, function: Callable[..., Any]) -> Callable[..., Any]:
    start = copy.copy(call.streams)

    def again(*args: Any, **kwargs: Any) -> Any:
        with Call(1, None, copy.copy(start), device=call.device):
            return function(*args, **kwargs)

    return again
