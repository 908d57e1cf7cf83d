"""Selecting, writing in place and laying out, where vmap has no rule or a wrong one."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _nn

from .folds import any_batched
from .mode import Call, NeedsBatchedFactories, register
from .rewrites import rewrite

# ---- out of place


@rewrite(torch.isin)
def isin(
    elements: Any, test_elements: Any, *, assume_unique: bool = False, invert: bool = False
) -> Any:
    """`torch.isin` by comparing every pair."""
    if not isinstance(elements, Tensor):
        return NotImplemented
    if isinstance(test_elements, Tensor):
        found = (elements.unsqueeze(-1) == test_elements.reshape(-1)).any(-1)
    else:
        found = elements == test_elements
    return ~found if invert else found


@rewrite(torch.take, Tensor.take)
def take(input: Tensor, index: Tensor) -> Any:
    """`torch.take` as an index into the flattened tensor."""
    return input.reshape(-1)[index]


@rewrite(torch.put, Tensor.put)
def put(input: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Any:
    """`torch.put` as an index into the flattened tensor."""
    if input.dtype != source.dtype or index.numel() != source.numel():
        return NotImplemented
    rows = (index.reshape(-1),)
    flat = input.reshape(-1).index_put(rows, source.reshape(-1), accumulate=accumulate)
    return flat.view(input.shape)


@rewrite(torch.masked_scatter, Tensor.masked_scatter)
def masked_scatter(input: Tensor, mask: Tensor, source: Tensor) -> Any:
    """`torch.masked_scatter`: the k-th true place of the mask takes the k-th source value."""
    if input.dtype != source.dtype or mask.dtype != torch.bool:
        return NotImplemented
    input, mask = torch.broadcast_tensors(input, mask)
    position = (mask.reshape(-1).cumsum(0) - 1).clamp_min(0)
    return torch.where(mask, source.reshape(-1)[position].view(input.shape), input)


@rewrite(torch.renorm, Tensor.renorm)
def renorm(input: Tensor, p: float, dim: int, maxnorm: float) -> Any:
    """`torch.renorm` by the norms it is defined with."""
    others = [d for d in range(input.dim()) if d != dim % input.dim()]
    norm = torch.linalg.vector_norm(input, p, others, keepdim=True)
    return input * torch.where(norm > maxnorm, maxnorm / (norm + 1e-7), torch.ones_like(norm))


@rewrite(torch.index_reduce, Tensor.index_reduce)
def index_reduce(
    input: Tensor,
    dim: int,
    index: Tensor,
    source: Tensor,
    reduce: str,
    *,
    include_self: bool = True,
) -> Any:
    """`torch.index_reduce` as a scatter of whole slices."""
    shape = [1] * source.dim()
    shape[dim] = -1
    rows = index.view(shape).expand(source.shape)
    return torch.scatter_reduce(input, dim, rows, source, reduce, include_self=include_self)


@rewrite(torch.column_stack)
def column_stack(tensors: Any) -> Any:
    """`torch.column_stack` as a concatenation."""
    return torch.cat([t.reshape(-1, 1) if t.dim() < 2 else t for t in tensors], 1)


@rewrite(_nn.pad_sequence)
def pad_sequence(
    sequences: Any,
    batch_first: bool = False,
    padding_value: float = 0.0,
    padding_side: str = "right",
) -> Any:
    """`nn.utils.rnn.pad_sequence` of sequences `[T_i, ...]`."""
    if padding_side not in ("left", "right"):
        return NotImplemented
    longest = max(s.shape[0] for s in sequences)
    padded = []
    for s in sequences:
        missing = longest - s.shape[0]
        sides = (missing, 0) if padding_side == "left" else (0, missing)
        padded.append(F.pad(s, (0, 0) * (s.dim() - 1) + sides, value=padding_value))
    return torch.stack(padded, 0 if batch_first else 1)


@register(torch.where, Tensor.where)
def where(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.where` of tensors of two dtypes, of which a scalar one does not count as much."""
    if func is Tensor.where:
        args = (args[1], args[0], *args[2:]) if len(args) == 3 else args
    if len(args) != 3 or kwargs:
        return NotImplemented
    condition, a, b = args
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.dtype == b.dtype:
        return NotImplemented
    dtype = torch.result_type(a, b)
    return torch.where(condition, a.to(dtype), b.to(dtype))


@register(torch._assert_async)
def assert_async(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An assertion about every model."""
    if not any_batched(call, args[:1]):
        return NotImplemented
    with call.lowered():
        return func(call.physical(args[0]).all(), *args[1:], **kwargs)


# ---- memory layout, which the user's view of one model does not have


@register(Tensor.contiguous, Tensor.to, torch.clone, Tensor.clone)
def without_format(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A layout such as channels_last changes no value: it is left as it is."""
    if "memory_format" not in kwargs or not any_batched(call, args[:1]):
        return NotImplemented
    options = {k: v for k, v in kwargs.items() if k != "memory_format"}
    if func is Tensor.to and len(args) == 1 and not options:
        return args[0]
    return func(*args, **options)


# ---- in place


def in_place(*functions: Any, safe: bool = False) -> Callable[..., Any]:
    """Register the out-of-place form of functions that change their first argument.

    Args:
        functions: torch functions whose name ends in an underscore.
        safe: whether the gradient of the form does not need its first argument.
    """

    def add(body: Callable[..., Any]) -> Callable[..., Any]:
        def rule(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not any_batched(call, args, kwargs):
                return NotImplemented
            x = args[0]
            if not call.is_batched(x):
                raise NeedsBatchedFactories
            with call:
                out = body(x if safe else x.clone(), *args[1:], **kwargs)
            if out is NotImplemented or out.dtype != x.dtype or out.shape != x.shape:
                return NotImplemented
            return x.copy_(out)

        register(*functions)(rule)
        return body

    return add


in_place(torch.clamp_, Tensor.clamp_, Tensor.clip_, torch.clip_)(torch.clamp)
in_place(Tensor.lerp_)(torch.lerp)
in_place(Tensor.addcmul_)(torch.addcmul)
in_place(Tensor.addcdiv_)(torch.addcdiv)
in_place(Tensor.put_, safe=True)(put)
in_place(Tensor.scatter_add_, safe=True)(torch.scatter_add)
in_place(Tensor.masked_scatter_, safe=True)(masked_scatter)
in_place(Tensor.renorm_)(renorm)
in_place(Tensor.index_reduce_)(index_reduce)


@in_place(Tensor.scatter_, safe=True)
def scatter(input: Tensor, dim: int, index: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`x.scatter_(dim, index, value or source)`."""
    source = args[0] if args else kwargs.get("value", kwargs.get("src"))
    if source is None or "reduce" in kwargs:
        return NotImplemented
    return input.scatter(dim, index, source)


@register(Tensor.fill_diagonal_)
def fill_diagonal_(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`x.fill_diagonal_(value, wrap=False)`."""

    def unpack(input: Tensor, fill_value: Any, wrap: bool = False) -> Any:
        return input, fill_value, wrap

    x, value, wrap = unpack(*args, **kwargs)
    if not any_batched(call, x):
        return NotImplemented
    mask = torch.zeros(x.shape, dtype=torch.bool, device=x.device).fill_diagonal_(True, wrap)
    return x.masked_fill_(mask, value)
