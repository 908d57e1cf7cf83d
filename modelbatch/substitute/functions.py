"""What kinds of torch functions there are."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["FACTORIES", "READS", "computes", "name_of"]

READS: frozenset[Any] = frozenset(
    {
        Tensor.__bool__,
        Tensor.__int__,
        Tensor.__float__,
        Tensor.__index__,
        Tensor.__complex__,
        Tensor.is_nonzero,
        Tensor.item,
        Tensor.tolist,
    }
)
"""What gives Python values of a tensor."""

FACTORIES: frozenset[Any] = frozenset(
    {
        torch.zeros,
        torch.ones,
        torch.empty,
        torch.full,
        torch.zeros_like,
        torch.ones_like,
        torch.empty_like,
        torch.full_like,
        torch.arange,
        torch.eye,
        torch.tensor,
        Tensor.new_zeros,
        Tensor.new_ones,
        Tensor.new_empty,
        Tensor.new_full,
        Tensor.new_tensor,
        Tensor.clone,
    }
)
"""What makes tensors, which may have to be filled per model."""

_QUERIES = frozenset(
    ["size", "dim", "numel", "stride", "is_floating_point", "is_complex", "is_contiguous"]
)


def computes(func: Any) -> bool:
    """Whether a call is an operation rather than a look at a tensor's shape or properties."""
    name = getattr(func, "__name__", "")
    return name not in _QUERIES and not name.startswith("__")


def name_of(func: Any) -> str:
    """The name a user would know a torch function by."""
    name = getattr(func, "__name__", None)
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name or str(func)
