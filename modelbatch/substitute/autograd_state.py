"""What a forward asks of autograd: whether a tensor needs a gradient, hooks, checkpoints."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from threading import get_ident
from typing import Any

import torch
import torch._C._functorch as functorch
import torch.utils.checkpoint as checkpoint
from torch import Tensor

from .mode import Call, register

_PROPERTIES: list[Any] = [Tensor.requires_grad, Tensor.grad_fn, Tensor.is_leaf]
_DATA: Any = Tensor.data


@register(*(descriptor.__get__ for descriptor in _PROPERTIES))
def autograd_property(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Properties that the tensor of all models has and its wrapper hides."""
    if not call.is_batched(args[0]):
        return NotImplemented
    with call.lowered():
        return func(functorch.get_unwrapped(args[0]))


@register(_DATA.__get__)
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


# the function that runs a checkpoint without re-entrant autograd, by the version of torch
_GENERATOR = next(
    name
    for name in (
        "_checkpoint_without_reentrant_generator_impl",
        "_checkpoint_without_reentrant_generator",
    )
    if hasattr(checkpoint, name)
)
Resume = Callable[[], Callable[[], AbstractContextManager[Any]]]


@contextlib.contextmanager
def no_saved_tensor_hooks() -> Iterator[None]:
    """Refuse hooks on saved tensors, as `torch.utils.checkpoint` sets them, while all models run.

    In the backward, when the hooks are called, the models' vmap level is gone. The error makes the
    forward run model by model.
    """
    before = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    torch._C._autograd._saved_tensors_hooks_disable(
        "vmap: hooks on saved tensors (torch.utils.checkpoint) see one model at a time", False
    )
    try:
        yield
    finally:
        if before is None:
            torch._C._autograd._saved_tensors_hooks_enable()
        else:
            torch._C._autograd._saved_tensors_hooks_disable(before, False)


class _Reentrant:
    """In the place of torch's function for checkpoints with re-entrant autograd."""

    def __init__(self, original: Any, thread: int, resume: Resume):
        self.original, self.thread, self.resume = original, thread, resume

    def apply(self, function: Any, *args: Any) -> Any:
        if get_ident() == self.thread:
            function = _again(function, self.resume(), first=True)
        return self.original.apply(function, *args)


@contextlib.contextmanager
def replayed_checkpoints(resume: Resume) -> Iterator[None]:
    """Let checkpoints of one model's forward run again, in the backward, as they ran before.

    Args:
        resume: called where a checkpoint starts; what it returns is called for a context in which
            the model has the same tensors and random stream as at that place.
    """
    thread = get_ident()
    without_reentry = getattr(checkpoint, _GENERATOR)
    with_reentry = checkpoint.CheckpointFunction

    def generator(function: Any, *args: Any, **kwargs: Any) -> Any:
        if get_ident() == thread:
            function = _again(function, resume(), first=False)
        return without_reentry(function, *args, **kwargs)

    setattr(checkpoint, _GENERATOR, generator)
    replaying: Any = _Reentrant(with_reentry, thread, resume)
    checkpoint.CheckpointFunction = replaying  # type: ignore[misc]
    try:
        yield
    finally:
        setattr(checkpoint, _GENERATOR, without_reentry)
        checkpoint.CheckpointFunction = with_reentry  # type: ignore[misc]


def _again(
    function: Callable[..., Any], context: Callable[[], AbstractContextManager[Any]], first: bool
) -> Callable[..., Any]:
    """`function`, run in a context, except for its first call if that is the forward's own."""
    forward = [first]

    def run(*args: Any, **kwargs: Any) -> Any:
        if forward[0]:
            forward[0] = False
            return function(*args, **kwargs)
        with context():
            return function(*args, **kwargs)

    return run
