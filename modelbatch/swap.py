"""Putting other tensors into a user's modules for the time of one call."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch._C._functorch as functorch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .stack import Stack
from .substitute.attention import padded_encoder
from .substitute.norm import cumulative_batch_norm

_MISSING: Any = object()


@contextlib.contextmanager
def swapped(
    stack: Stack,
    i: int,
    tensors: Sequence[Tensor],
    level: int | None,
    tensor_attributes: Mapping[tuple[int, str], tuple[Tensor, bool]],
) -> Iterator[list[dict[str, Any]]]:
    """Run model i's modules with other tensors.

    Args:
        stack: the bundle's stack.
        i: whose modules.
        tensors: one for each slot of the stack.
        level: the vmap level that carries the models; None for one model alone.
        tensor_attributes: plain attributes that an earlier forward set to tensors.

    Yields:
        For each module, its `__dict__` as it stands at the start of the call.
    """
    modules = stack.modules[i]
    undo: list[tuple[dict[str, Any], str, Any]] = []
    lent: list[tuple[dict[str, Any], str, Any, Any]] = []

    def put(state: dict[str, Any], key: str, value: Any) -> None:
        undo.append((state, key, state.get(key, _MISSING)))
        state[key] = value

    try:
        for holder, attribute, position in stack.places(i):
            undo.append((holder, attribute, holder[attribute]))
            holder[attribute] = tensors[position]
        for index, module in enumerate(modules):
            if isinstance(module, nn.RNNBase):
                flat = [getattr(module, n, None) for n in module._flat_weights_names]
                put(module.__dict__, "_flat_weights", flat)
                # unset, or the module would notice other weights and collect them again
                put(module.__dict__, "_flat_weight_refs", [None] * len(flat))
            elif level is not None and _is_cumulative(stack, index, module):
                put(module.__dict__, "forward", functools.partial(cumulative_batch_norm, module))  # type: ignore[arg-type]
            elif level is not None and type(module) is nn.TransformerEncoder:
                put(module.__dict__, "forward", functools.partial(padded_encoder, module))
        if level is not None:
            for (index, name), number in stack.structure.per_model.items():
                put(modules[index].__dict__, name, number)
            for (index, name), (value, has_axis) in tensor_attributes.items():
                inside = functorch._add_batch_dim(value, 0, level) if has_axis else value
                state = modules[index].__dict__
                lent.append((state, name, inside, state.get(name)))
                state[name] = inside
        yield [dict(module.__dict__) for module in modules]
    finally:
        for state, name, inside, before in lent:
            if state.get(name) is inside:  # else the forward has set it anew
                state[name] = before
        for state, key, value in reversed(undo):
            if value is _MISSING:
                state.pop(key, None)
            else:
                state[key] = value


def _is_cumulative(stack: Stack, index: int, module: nn.Module) -> bool:
    """Whether a batch norm keeps a cumulative average, whose factor differs between models."""
    if not isinstance(module, _BatchNorm) or type(module).forward is not _BatchNorm.forward:
        return False
    number = stack.structure.per_model.get((index, "momentum"))
    return module.momentum is None or (number is not None and None in number.values)
