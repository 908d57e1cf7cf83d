"""Embeddings with one table per model."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .mode import Call, register


def _flat_index(call: Call, index: Tensor, rows: int) -> Tensor:
    """Row numbers in the `[M * rows, D]` table of all models, from row numbers in a model's own.

    torch's own rule adds the offsets unchecked, so that a wrong index reads another model's row.

    Raises:
        IndexError: as one model alone would raise it (on the CPU; elsewhere the device asserts).
    """
    physical = call.physical(index)
    inside = ((index_range := call.unwrap(index)[0]) >= 0) & (index_range < rows)
    if index_range.is_cpu and type(index_range) is Tensor:
        if not bool(inside.all()):
            raise IndexError("index out of range in self")
    elif type(index_range) is Tensor:
        torch._assert_async(inside.all())
    offsets = torch.arange(call.num_models, device=physical.device, dtype=physical.dtype) * rows
    return physical + offsets.view(-1, *([1] * (physical.dim() - 1)))


@register(F.embedding)
def embedding(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.embedding` as one look-up in the table of all models."""
    return _embedding(call, *args, **kwargs)


def _embedding(
    call: Call,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not call.is_batched(weight):
        return NotImplemented
    table = call.unwrap(weight)[0]  # [M, V, D]
    rows = table.shape[1]
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise AssertionError("Padding_idx must be within num_embeddings")
    index = _flat_index(call, input, rows)
    flat = table.reshape(-1, table.shape[2])
    # dense gradients: a sparse one could not become part of a stacked gradient
    out = F.embedding(index, flat, None, max_norm, norm_type, scale_grad_by_freq)
    if padding_idx is not None and out.requires_grad:
        padding = (call.unwrap(input)[0] == padding_idx % rows).unsqueeze(-1)
        out = torch.where(padding, out.detach(), out)
    return call.wrap(out)
