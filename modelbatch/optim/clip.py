"""Gradient clipping that never lets one model's gradients decide about another's."""

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import ModelBatchError
from ..ops import finite, optim as ops
from .base import PerModelOptimizer

if TYPE_CHECKING:
    from ..bundle import Bundle

__all__ = [
    "clip_factor",
    "clip_grad_norm_",
    "clip_grad_value_",
    "grad_stats",
    "nonfinite",
    "scale_slices_",
]

PerModel = float | Sequence[float] | Tensor

# What torch.nn.utils.clip_grad_norm_ adds to a norm before dividing by it.
_EPSILON = 1e-6


@torch.no_grad()
def clip_grad_norm_(
    bundle: "Bundle | Optimizer",
    max_norm: PerModel,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clips every model's gradients, in place, by the norm of that model's gradients.

    For each model this is `torch.nn.utils.clip_grad_norm_` on its parameters alone: all of its
    gradients are multiplied by `min(1, max_norm / (norm + 1e-6))`. The gradients of a frozen model
    stay as they are.

    Args:
        bundle: the `ModelBatch`, or its optimizer.
        max_norm: the largest norm allowed, one for all models or M of them.
        norm_type: order of the norm; `float("inf")` is the largest absolute value.
        error_if_nonfinite: raise if the norm of an active model is infinite or NaN, before
            anything has been changed. Otherwise that model's gradients become zero or NaN, as in
            torch, and the other models' are clipped as ever. Copies the norms to the host.
        foreach: accepted for the signature's sake; all models are clipped at once anyway.

    Returns:
        The norms before clipping, `[M]`, frozen models included; 0 where there is no gradient.
        float64 if a gradient is, otherwise float32.

    Raises:
        ModelBatchError: this is no bundle, `max_norm` is negative or NaN or not one or M numbers,
            or a norm is not finite and `error_if_nonfinite` is given; the message names the models.
    """
    params, active = _parameters(bundle)
    num_models, device = params[0].shape[0], params[0].device
    limit = _limit("max_norm", max_norm, num_models, device)
    norm_type = float(norm_type)
    if math.isnan(norm_type):
        raise ModelBatchError("norm_type must be a number, got nan")
    grads = [param.grad for param in params if param.grad is not None]
    if not grads:
        return torch.zeros(num_models, device=device)
    wide = any(grad.dtype in (torch.float64, torch.complex128) for grad in grads)
    dtype = torch.float64 if wide else torch.float32
    if norm_type == 2.0:
        norms, factor = clip_factor(grad_stats(grads, num_models)[0], limit, dtype=dtype)
        norms = norms.to(dtype)
    else:
        norms = _norms(grads, num_models, norm_type, dtype)
        factor = torch.clamp(limit / (norms + _EPSILON), max=1.0).to(dtype)
    if error_if_nonfinite:
        finite = torch.isfinite(norms).tolist()
        bad = [i for i in range(num_models) if active[i] and not finite[i]]
        if bad:
            raise ModelBatchError(
                f"the gradient norm of order {norm_type} of {_named(bad)} is not finite, so it "
                f"cannot be clipped; without error_if_nonfinite the gradients are multiplied by "
                f"the factor that comes of it anyway"
            )
    scale_slices_(grads, factor, active)
    return norms


@torch.no_grad()
def clip_grad_value_(
    bundle: "Bundle | Optimizer", clip_value: PerModel, foreach: bool | None = None
) -> None:
    """Clamps the gradients of every model to `[-clip_value, clip_value]`, in place.

    For each model this is `torch.nn.utils.clip_grad_value_`; NaN stays NaN. The gradients of a
    frozen model stay as they are.

    Args:
        bundle: the `ModelBatch`, or its optimizer.
        clip_value: the largest absolute value allowed, one for all models or M of them.
        foreach: accepted for the signature's sake.

    Raises:
        ModelBatchError: this is no bundle, `clip_value` is negative or NaN or not one or M numbers,
            or a gradient is sparse or complex, which torch cannot clamp either.
    """
    params, active = _parameters(bundle)
    num_models, device = params[0].shape[0], params[0].device
    limit = _limit("clip_value", clip_value, num_models, device)
    grads = [param.grad for param in params if param.grad is not None]
    for grad in grads:
        if grad.is_sparse or grad.is_complex():
            kind = "sparse" if grad.is_sparse else "complex"
            raise ModelBatchError(f"{kind} gradients cannot be clipped by value")
    if isinstance(limit, float) and all(active):
        for grad in grads:
            grad.clamp_(-limit, limit)
        return
    if isinstance(limit, float):
        limit = torch.full((num_models,), limit, dtype=torch.float64, device=device)
    if not all(active):
        mine = torch.tensor(active, device="cpu").to(device, non_blocking=True)
        limit = torch.where(mine, limit, math.inf)
    for grad in grads:
        # Rounded to the gradient's own dtype first, which is what torch's clamp does with a number.
        bound = _column(limit.to(grad.device, grad.dtype, non_blocking=True), grad)
        grad.clamp_(-bound, bound)


def clip_factor(
    sq_norm: Tensor,
    max_norm: float | Tensor,
    inv_scale: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """What clipping by norm multiplies every model's unscaled gradients by. Waits for nothing.

    Args:
        sq_norm: squared norms of the models' gradients as they are, float64 `[M]`.
        max_norm: the largest norm allowed, a number or float64 `[M]`.
        inv_scale: `[M]`, by which the gradients are still to be multiplied before that.
        dtype: of the factors.

    Returns:
        The norms of the unscaled gradients, float64 `[M]`, and the factors `[M]`, at most 1; NaN
        where a norm is.
    """
    norms = sq_norm.sqrt()
    if inv_scale is not None:
        norms = norms * inv_scale
    return norms, torch.clamp(max_norm / (norms + _EPSILON), max=1.0).to(dtype)


def grad_stats(grads: Sequence[Tensor], num_models: int) -> tuple[Tensor, Tensor]:
    """Squared norms and overflows of stacked gradients, which may be of several dtypes and layouts.

    Args:
        grads: at least one gradient, `[M, ...]` each, all on one device.
        num_models: M.

    Returns:
        The sums of squares of each model's gradients, float64 `[M]`, and whether any of them is
        infinite or NaN, bool `[M]`.
    """
    kinds: dict[torch.dtype, list[Tensor]] = {}
    others = []
    for grad in grads:
        if grad.is_sparse or grad.is_complex():
            others.append(grad)
        else:
            kinds.setdefault(grad.dtype, []).append(grad)
    stats = [_dense_stats(same, num_models) for same in kinds.values()]
    for grad in others:
        norms = _norms([grad], num_models, 2.0, torch.float64)
        stats.append((norms.square(), _nonfinite(grad, num_models)))
    if len(stats) == 1:
        return stats[0]
    return torch.stack([s for s, _ in stats]).sum(0), torch.stack([n for _, n in stats]).any(0)


def nonfinite(tensors: Sequence[Tensor], num_models: int) -> Tensor:
    """The flags of `grad_stats` alone, which cost less.

    Args:
        tensors: at least one, `[M, ...]` each, all on one device.
        num_models: M.

    Returns:
        Whether a model has an infinite or NaN element in any of them, bool `[M]`.
    """
    kind, device = tensors[0].dtype, tensors[0].device.type
    alike = all(t.dtype is kind and t.layout is torch.strided for t in tensors)
    if alike and not kind.is_complex and _has_operator(device):
        return finite.nonfinite(tensors)
    kinds: dict[torch.dtype, list[Tensor]] = {}
    flags = []
    for tensor in tensors:
        if tensor.is_sparse or tensor.is_complex() or not _has_operator(tensor.device.type):
            flags.append(_nonfinite(tensor, num_models))
        else:
            kinds.setdefault(tensor.dtype, []).append(tensor)
    flags += [finite.nonfinite(same) for same in kinds.values()]
    return flags[0] if len(flags) == 1 else torch.stack(flags).any(0)


def scale_slices_(grads: Iterable[Tensor], factor: Tensor, active: Sequence[bool]) -> None:
    """Multiplies every active model's slice of stacked gradients by a number of its own, in place.

    Args:
        grads: `[M, ...]` each.
        factor: `[M]`.
        active: M flags; the other models' gradients keep their bits.
    """
    if not all(active):
        mine = torch.tensor(active, device="cpu").to(factor.device, non_blocking=True)
        factor = torch.where(mine, factor, torch.ones_like(factor))
    for grad in grads:
        own = factor.to(grad.device, non_blocking=True)
        if grad.is_sparse:
            values = grad._values()  # [nnz, ...]; the product is linear, so they may be uncoalesced
            values.mul_(_column(own[grad._indices()[0]], values))
        else:
            grad.mul_(_column(own, grad))


def _dense_stats(grads: list[Tensor], num_models: int) -> tuple[Tensor, Tensor]:
    if _has_operator(grads[0].device.type):
        return ops.grad_stats(grads)
    norms = _norms(grads, num_models, 2.0, torch.float64)
    return norms.square(), torch.stack([_nonfinite(g, num_models) for g in grads]).any(0)


@cache
def _has_operator(device_type: str) -> bool:
    # CUDA may be there without the library's CUDA part.
    key = device_type.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key("modelbatch::grad_stats", key)


def _nonfinite(grad: Tensor, num_models: int) -> Tensor:
    """Which models have an infinite or NaN entry, bool `[M]`."""
    if not grad.is_sparse:
        return torch.isfinite(grad).reshape(num_models, -1).all(1).logical_not()
    # Adding up entries of one index may overflow in half precision, so that is done first.
    grad = grad.coalesce() if grad.dtype == torch.float16 else grad
    values = grad._values()
    bad = torch.isfinite(values).reshape(values.shape[0], values[:1].numel()).all(1).logical_not()
    counts = torch.zeros(num_models, dtype=torch.int64, device=grad.device)
    return counts.index_add(0, grad._indices()[0], bad.long()) > 0


def _norms(
    grads: Iterable[Tensor], num_models: int, norm_type: float, dtype: torch.dtype
) -> Tensor:
    """The norm of the norms of each model's gradients, `[M]`, computed in `dtype`."""
    by_tensor = []
    for grad in grads:
        wide = _complex(dtype) if grad.is_complex() else dtype
        if grad.numel() == 0:
            norms = torch.zeros(num_models, dtype=dtype, device=grad.device)
        elif grad.is_sparse:
            grad = grad.coalesce()  # sorted by model, therefore
            counts = torch.bincount(grad.indices()[0], minlength=num_models).tolist()
            pieces = [
                torch.linalg.vector_norm(piece, norm_type, dtype=wide)
                if piece.numel()
                else torch.zeros((), dtype=dtype, device=grad.device)
                for piece in grad.values().split(counts)
            ]
            norms = torch.stack(pieces)
        else:
            flat = grad.reshape(num_models, -1)
            norms = torch.linalg.vector_norm(flat, norm_type, dim=1, dtype=wide)
        by_tensor.append(norms)
    return torch.linalg.vector_norm(torch.stack(by_tensor), norm_type, dim=0)


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def _column(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape(-1, *(1,) * (like.dim() - 1))


def _parameters(bundle: Any) -> tuple[list[nn.Parameter], Sequence[bool]]:
    """The stacked parameters, and which models are active."""
    from ..bundle import Bundle  # it imports this package

    if isinstance(bundle, PerModelOptimizer):
        params, active = bundle._views.stacked, bundle._views.active_flags()
    elif isinstance(bundle, Bundle):
        params, active = [param for _, param in bundle.named_parameters()], bundle._is_active()
    else:
        raise ModelBatchError(
            f"expected a ModelBatch or its optimizer, got {type(bundle).__name__}; one norm over "
            f"stacked parameters would couple the models"
        )
    if not params:
        raise ModelBatchError("the models of this bundle have no parameters")
    return params, active


def _limit(name: str, value: PerModel, num_models: int, device: torch.device) -> float | Tensor:
    """A bound that is not negative: a number for all models, or float64 `[M]` on the device."""
    if hasattr(value, "__array__") and not isinstance(value, Tensor):
        value = torch.as_tensor(value)  # of NumPy
    single = isinstance(value, int | float) or (isinstance(value, Tensor) and value.dim() == 0)
    try:
        if isinstance(value, Tensor):
            numbers = value.detach().double().reshape(-1).tolist()
        elif isinstance(value, int | float):
            numbers = [float(value)]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            numbers = [float(number) for number in value]
        else:
            raise TypeError
    except (TypeError, ValueError):
        raise ModelBatchError(f"{name} must be a number or M numbers, got {value!r}") from None
    if not single and (len(numbers) != num_models or getattr(value, "ndim", 1) != 1):
        got = tuple(value.shape) if isinstance(value, Tensor) else len(numbers)
        raise ModelBatchError(f"{name}: expected a number or {num_models} numbers, got {got}")
    bad = [i for i, number in enumerate(numbers) if not number >= 0]
    if bad:
        where = "" if single else f" of {_named(bad)}"
        raise ModelBatchError(f"{name}{where} must not be negative or NaN, got {numbers[bad[0]]}")
    if single:
        return numbers[0]
    return torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True)


def _named(models: Sequence[int]) -> str:
    numbers = ", ".join(str(i) for i in models)
    return f"model {numbers}" if len(models) == 1 else f"models {numbers}"
