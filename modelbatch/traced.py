"""Turning what a bundle does into one plain graph over the stacked tensors."""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from .errors import BatchingError
from .forward import Forward
from .pytree import Spec
from .random import Streams
from .stack import Stack
from .structure import Slot
from .substitute import Call

__all__ = ["TracedForward", "TracedStack", "described", "loss_identity", "trace"]

_PLAIN = (bool, int, float, str, type(None), FunctionType)


class TracedStack:
    """Stands in for a bundle's stack while its forward is traced.

    Args:
        stack: the bundle's.
        tensors: what takes the place of the stacked tensors, in the order of the slots.
    """

    def __init__(self, stack: Stack, tensors: Sequence[Tensor]):
        self.models, self.modules = stack.models, stack.modules
        self.num_models, self.structure, self.slots = stack.num_models, stack.structure, stack.slots
        self.places = stack.places
        self._tensors = {slot.name: tensor for slot, tensor in zip(stack.slots, tensors)}

    def tensor(self, slot: Slot) -> Tensor:
        """What stands for the stacked tensor of a slot."""
        return self._tensors[slot.name]

    def replace_buffer(self, slot: Slot, tensor: Tensor) -> None:
        """Write what the forward assigned to a buffer.

        Raises:
            BatchingError: it has another shape or dtype.
        """
        old = self.tensor(slot)
        if old.shape != tensor.shape or old.dtype != tensor.dtype:
            raise BatchingError(f"buffer '{slot.name}' changes its shape or dtype in the forward")
        old.copy_(tensor)

    def add_buffer(self, index: int, attribute: str, tensor: Tensor) -> None:
        """Refuse: the graph has no place for it.

        Raises:
            BatchingError: always.
        """
        raise BatchingError(f"buffer '{attribute}' is created in the forward")


class TracedForward(Forward):
    """A forward that is traced, not run: it may not leave anything behind in Python."""

    def _spread(self, call: Call, index: int, name: str, value: Any) -> None:
        raise BatchingError(f"the forward sets the attribute '{name}'")

    def _call(self, num_models: int, level: int | None, streams: Streams, check: bool) -> Call:
        call = super()._call(num_models, level, streams, False)
        call.grad_memory = None
        call.trace()
        return call


def trace(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a maker of its own graph: call the result with example arguments."""
    # an empty table keeps detach() in the graph; the default one drops it, and gradients with it
    traced: Callable[..., Any] = make_fx(function, {}, tracing_mode="fake")
    return traced


def described(
    values: list[Any], batched: list[bool], spec: Spec, device: torch.device
) -> tuple[Any, ...]:
    """What a graph depends on in its arguments and in the modes of torch, to be hashed.

    Args:
        values: the flattened arguments.
        batched: for each of them whether it has a model axis.
        spec: their structure.
        device: of the bundle.
    """
    leaves = tuple(
        (tuple(v.shape), v.dtype, v.device, v.requires_grad, v.stride())
        if isinstance(v, Tensor)
        else (type(v), repr(v))
        for v in values
    )
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return leaves, tuple(batched), repr(spec.spec), torch.is_grad_enabled(), autocast


def loss_identity(loss_fn: Any) -> Any:
    """What tells one loss from another, to be hashed.

    A lambda that is written in the training loop is a new function at every step, but still the
    same code with the same plain values; it must not be compiled at every step.

    Raises:
        TypeError: it cannot be hashed.
    """
    if type(loss_fn) is FunctionType and not loss_fn.__kwdefaults__:
        try:
            values = [cell.cell_contents for cell in loss_fn.__closure__ or ()]
        except ValueError:  # an empty cell
            values = [loss_fn]
        values += loss_fn.__defaults__ or ()
        if all(type(value) in _PLAIN and value is not loss_fn for value in values):
            named = tuple((type(value), repr(value), value) for value in values)
            return loss_fn.__code__, id(loss_fn.__globals__), named
    hash(loss_fn)
    return loss_fn
