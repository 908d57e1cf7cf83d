"""Losses, distances and products that vmap would loop over, in torch functions it knows.

A rewrite is code for one model. It runs where an argument differs between models, with the rules in
force, so that what it calls is computed as any other call.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _nn

from ..attributes import PerModelFloat
from .folds import any_batched, reduce
from .losses import cross_entropy as plain_cross_entropy
from .mode import RULES, Call, enter, handles_per_model_numbers, register


def rewrite(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register code for one model; it may return NotImplemented to leave a case to torch."""

    def add(body: Callable[..., Any]) -> Callable[..., Any]:
        def rule(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not any_batched(call, args, kwargs):
                return NotImplemented
            with call:
                return body(*args, **kwargs)

        register(*functions)(rule)
        return body

    return add


# The Python halves of these losses check arguments and warn; the torch calls inside have rules.
for _function in (
    F.kl_div,
    F.soft_margin_loss,
    F.margin_ranking_loss,
    F.triplet_margin_loss,
    F.multi_margin_loss,
    F.multilabel_margin_loss,
    F.ctc_loss,
):
    RULES[_function] = enter


# ---- losses


@rewrite(torch.kl_div)
def kl_div(input: Tensor, target: Tensor, reduction: int = 1, *, log_target: bool = False) -> Any:
    """`F.kl_div`, 0 where the target is 0."""
    if log_target:
        return reduce(target.exp() * (target - input), reduction)
    return reduce(torch.xlogy(target, target) - target * input, reduction)


@rewrite(_nn.soft_margin_loss)
def soft_margin_loss(input: Tensor, target: Tensor, reduction: int = 1) -> Any:
    """`log(1 + exp(-y x))`."""
    return reduce(torch.log1p(torch.exp(-input * target)), reduction)


@handles_per_model_numbers
@register(torch.margin_ranking_loss)
def margin_ranking_loss(
    call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`max(0, -y * (a - b) + margin)`; the margin may differ between models."""

    def unpack(
        input1: Tensor, input2: Tensor, target: Tensor, margin: Any = 0.0, reduction: int = 1
    ) -> Any:
        return input1, input2, target, margin, reduction

    a, b, target, margin, reduction = unpack(*args, **kwargs)
    if not any_batched(call, a, b, target) and not isinstance(margin, PerModelFloat):
        return NotImplemented
    offset = _number(call, margin, a)
    return reduce((-target * (a - b) + offset).clamp_min(0), reduction)


@handles_per_model_numbers
@register(torch.triplet_margin_loss)
def triplet_margin_loss(
    call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`max(0, d(anchor, positive) - d(anchor, negative) + margin)`."""

    def unpack(
        anchor: Tensor,
        positive: Tensor,
        negative: Tensor,
        margin: Any = 1.0,
        p: float = 2.0,
        eps: Any = 1e-6,
        swap: bool = False,
        reduction: int = 1,
    ) -> Any:
        return anchor, positive, negative, margin, p, eps, swap, reduction

    anchor, positive, negative, margin, p, eps, swap, reduction = unpack(*args, **kwargs)
    numbers = isinstance(margin, PerModelFloat) or isinstance(eps, PerModelFloat)
    if not any_batched(call, anchor, positive, negative) and not numbers:
        return NotImplemented
    if not anchor.dim() == positive.dim() == negative.dim():
        return NotImplemented

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.vector_norm(a - b + _number(call, eps, a), p, -1)

    far = distance(anchor, negative)
    if swap:
        far = torch.minimum(far, distance(positive, negative))
    near = distance(anchor, positive)
    return reduce((_number(call, margin, near) + near - far).clamp_min(0), reduction)


def _number(call: Call, value: Any, like: Tensor) -> Any:
    """A number, or one for each model as a scalar tensor of the user's view."""
    column = call.column(value, 1, like.dtype)
    return call.wrap(column) if isinstance(column, Tensor) else column


@rewrite(_nn.multi_margin_loss)
def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: float = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    reduction: int = 1,
) -> Any:
    """`F.multi_margin_loss` of `[C]` or `[B, C]`."""
    if p not in (1, 2) or input.dim() not in (1, 2) or target.numel() != input[..., 0].numel():
        return NotImplemented
    target = target.reshape(input.shape[:-1])
    own = target.unsqueeze(-1)
    losses = (margin - input.gather(-1, own) + input).clamp_min(0)
    if p == 2:
        losses = losses * losses
    if weight is not None:
        losses = losses * weight[target].unsqueeze(-1)
    others = torch.arange(input.shape[-1], device=input.device) != own
    losses = torch.where(others, losses, 0.0)
    return reduce(losses.sum(-1) / input.shape[-1], reduction)


@register(F.gaussian_nll_loss)
def gaussian_nll_loss(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The loss of a Gaussian with predicted variance.

    Raises:
        ValueError: if a variance is negative, for any model.
    """

    def unpack(
        input: Tensor,
        target: Tensor,
        var: Any,
        full: bool = False,
        eps: float = 1e-6,
        reduction: str = "mean",
    ) -> Any:
        return input, target, var, full, eps, reduction

    x, target, var, full, eps, reduction = unpack(*args, **kwargs)
    if not any_batched(call, var) or reduction not in ("none", "mean", "sum"):
        return NotImplemented
    values = call.unwrap(var)[0]
    if type(values) is Tensor and bool((values < 0).any()):
        raise ValueError("var has negative entry/entries")
    if var.shape != x.shape:
        if x.shape[:-1] == var.shape:
            var = var.unsqueeze(-1)
        elif (
            x.dim() != var.dim()
            or sum(a != b for a, b in zip(x.shape, var.shape)) > 1
            or any(a != b and b != 1 for a, b in zip(x.shape, var.shape))
        ):
            return NotImplemented
    # the gradient passes the floor as if it were not there
    var = var + (var.clamp_min(eps) - var).detach()
    losses = 0.5 * (torch.log(var) + (x - target) ** 2 / var)
    if full:
        losses = losses + 0.5 * math.log(2 * math.pi)
    return reduce(losses, {"none": 0, "mean": 1, "sum": 2}[reduction])


@register(F.cross_entropy)
def cross_entropy(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Cross entropy of shared outputs with label smoothing, whose kernel writes into them."""
    result = plain_cross_entropy(call, func, args, kwargs)
    if result is not NotImplemented or not args or call.is_batched(args[0]):
        return result
    smoothed = kwargs.get("label_smoothing", 0.0) or len(args) > 7
    if not smoothed or not any_batched(call, args, kwargs):
        return NotImplemented
    return func(call.wrap(call.physical(args[0])), *args[1:], **kwargs)


@register(F.mse_loss, F.smooth_l1_loss, F.huber_loss, torch.prelu)
def expanded_input(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Functions whose rule in torch resizes a result if only one argument is batched."""
    if len(args) < 2 or call.is_batched(args[0]) == call.is_batched(args[1]):
        return NotImplemented
    a, b = (call.wrap(call.physical(t)) for t in args[:2])
    return func(a, b, *args[2:], **kwargs)


# ---- distances and products


@register(torch.pdist)
def pdist(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Distances of all pairs of rows, by the kernel for two sets of rows."""

    def unpack(input: Tensor, p: float = 2.0) -> Any:
        return input, p

    x, p = unpack(*args, **kwargs)
    if not any_batched(call, x) or x.dim() != 2 or p < 0:
        return NotImplemented
    with call.lowered():
        rows = call.physical(x)
        distances = torch.cdist(rows, rows, p, "donot_use_mm_for_euclid_dist")
        i, j = torch.triu_indices(x.shape[0], x.shape[0], 1, device=rows.device)
        return call.wrap(distances[:, i, j])


@rewrite(F.bilinear)
def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """`F.bilinear` with a weight `[O, I, J]`."""
    if input1.shape[:-1] != input2.shape[:-1]:
        return NotImplemented
    out = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
    return out if bias is None else out + bias


@rewrite(torch._weight_norm)
def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Any:
    """`v * g / |v|`, the norm over all axes but `dim`, or all of them for -1."""
    dims = None if dim == -1 else [d for d in range(v.dim()) if d != dim]
    return v * (g / torch.linalg.vector_norm(v, 2, dims, keepdim=dim != -1))


@rewrite(F.normalize)
def normalize(
    input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Any:
    """`F.normalize(..., out=...)`; without `out` torch needs no help."""
    if out is None:
        return NotImplemented
    return out.copy_(F.normalize(input, p, dim, eps))


@rewrite(torch.conv_tbc)
def conv_tbc(input: Tensor, weight: Tensor, bias: Tensor, pad: int = 0) -> Any:
    """`torch.conv_tbc` of `[T, B, C]` as an ordinary convolution."""
    out = F.conv1d(input.permute(1, 2, 0), weight.permute(2, 1, 0), bias, padding=pad)
    return out.permute(2, 0, 1)


_MATMULS = (torch.matmul, torch.mm, torch.sparse.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


@register(*_MATMULS)
def sparse_matmul(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One sparse matrix for all models times dense matrices `[N, F]`."""
    if len(args) != 2 or args[0].layout is torch.strided or args[1].dim() != 2:
        return NotImplemented
    if call.is_batched(args[0]) or not call.is_batched(args[1]):
        return NotImplemented
    with call.lowered():
        dense = call.physical(args[1])  # [M, N, F]
        out = func(args[0], dense.transpose(0, 1).flatten(1), **kwargs)
        return call.wrap(out.unflatten(1, (dense.shape[0], dense.shape[2])).transpose(0, 1))
