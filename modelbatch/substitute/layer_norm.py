"""Layer, group and instance normalisation per model, in the precision of one model."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attributes import PerModelFloat
from .mode import Call, NeedsBatchedFactories, handles_per_model_numbers, register

_LOW = (torch.bfloat16, torch.float16)


def _precision(x: Tensor, *others: Tensor | None) -> torch.dtype | None:
    """The dtype to compute in, None if torch would refuse the mixture of dtypes."""
    wide = torch.float32 if x.dtype in _LOW else x.dtype
    if not x.is_floating_point():
        return None
    return wide if all(t is None or t.dtype in (x.dtype, wide) for t in others) else None


def _result_dtype(x: Tensor) -> torch.dtype:
    """On CUDA, autocast gives layer and group norm a float32 result; elsewhere it leaves them."""
    if x.dtype in _LOW and x.is_cuda and torch.is_autocast_enabled("cuda"):
        return torch.float32
    return x.dtype


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """`x * weight + bias`; both `[M, ...]` and broadcastable against `x`."""
    if weight is not None and bias is not None:
        return torch.addcmul(bias.to(x.dtype), x, weight.to(x.dtype))
    if weight is not None:
        return x * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)


@register(F.layer_norm, torch.layer_norm)
def layer_norm(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.layer_norm` with a weight and bias per model."""

    def unpack(
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enable: bool = True,
    ) -> Any:
        return input, list(normalized_shape), weight, bias, eps

    x, shape, weight, bias, eps = unpack(*args, **kwargs)
    if not any(call.is_batched(t) for t in (x, weight, bias)):
        return NotImplemented
    wide = _precision(x, weight, bias)
    count = len(shape)
    if wide is None or list(x.shape[x.dim() - count :]) != shape or not count:
        return NotImplemented
    if any(t is not None and list(t.shape) != shape for t in (weight, bias)):
        return NotImplemented
    dtype = _result_dtype(x)
    with call.lowered(), torch.autocast(x.device.type, enabled=False):
        values, own = call.unwrap(x)
        out = F.layer_norm(values.to(wide), shape, None, None, eps)
        if not own:
            out = out.unsqueeze(0)
        ones = [1] * (x.dim() - count)
        w, b = (
            None if t is None else call.physical(t).reshape(call.num_models, *ones, *shape)
            for t in (weight, bias)
        )
        return call.wrap(_affine(out, w, b).to(dtype))


@register(torch.group_norm)
def group_norm(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.group_norm` (once its arguments are checked) with a weight and bias per model."""

    def unpack(
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enabled: bool = True,
    ) -> Any:
        return input, num_groups, weight, bias, eps

    x, groups, weight, bias, eps = unpack(*args, **kwargs)
    if not any(call.is_batched(t) for t in (x, weight, bias)):
        return NotImplemented
    wide = _precision(x, weight, bias)
    if wide is None or x.dim() < 2:
        return NotImplemented
    channels = x.shape[1]
    if any(t is not None and list(t.shape) != [channels] for t in (weight, bias)):
        return NotImplemented
    dtype = _result_dtype(x)
    with call.lowered(), torch.autocast(x.device.type, enabled=False):
        values, own = call.unwrap(x)
        flat = values.flatten(0, 1) if own else values
        out = F.group_norm(flat.to(wide), groups, None, None, eps)
        out = out.view(values.shape) if own else out.unsqueeze(0)
        w, b = (
            None if t is None else _by_channel(call.physical(t), out.dim()) for t in (weight, bias)
        )
        return call.wrap(_affine(out, w, b).to(dtype))


def _by_channel(tensor: Tensor, dims: int) -> Tensor:
    """`[M, C]` as `[M, 1, C, 1, ...]`."""
    return tensor.reshape(tensor.shape[0], 1, tensor.shape[1], *([1] * (dims - 3)))


@handles_per_model_numbers
@register(torch.instance_norm)
def instance_norm(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.instance_norm` (once its arguments are checked); momentum and eps may differ too."""

    def unpack(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        use_input_stats: bool,
        momentum: Any,
        eps: Any,
        cudnn_enabled: bool,
    ) -> Any:
        return input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps

    x, weight, bias, mean, var, own_stats, momentum, eps = unpack(*args, **kwargs)
    numbers = isinstance(eps, PerModelFloat) or isinstance(momentum, PerModelFloat)
    tensors = (x, weight, bias, mean, var)
    if not numbers and not any(call.is_batched(t) for t in tensors):
        return NotImplemented
    if call.level is None or x.dim() < 3 or _precision(x, weight, bias) is None:
        return NotImplemented
    if (mean is None) != (var is None) or (mean is None and not own_stats):
        return NotImplemented
    if own_stats and mean is not None and not (call.is_batched(mean) and call.is_batched(var)):
        raise NeedsBatchedFactories
    physical = call.physical(x)  # [M, B, C, *S]
    wide = torch.float32 if x.dtype in _LOW else x.dtype
    with call.lowered(), torch.autocast(x.device.type, enabled=False):
        values = physical.to(wide)
        dims = values.dim()
        rows = [None if t is None else call.physical(t) for t in (weight, bias, mean, var)]
        w, b = (None if t is None else _by_channel(t, dims) for t in rows[:2])
        if own_stats:
            spread, centre = torch.var_mean(
                values, tuple(range(3, dims)), correction=0, keepdim=True
            )
            if rows[2] is not None and rows[3] is not None:
                count = values[0, 0, 0].numel()
                factor = call.column(momentum, 2, rows[2].dtype)
                samples = call.sample_weight_of(values.shape[1])
                _update(rows[2], centre, factor, samples)
                _update(rows[3], spread * (count / max(count - 1, 1)), factor, samples)
        else:
            centre, spread = (_by_channel(t, dims).to(wide) for t in rows[2:] if t is not None)
        out = (values - centre) * (spread + call.column(eps, dims, wide)).rsqrt()
        return call.wrap(_affine(out, w, b).to(x.dtype))


@torch.no_grad()
def _update(running: Tensor, batch: Tensor, factor: Any, samples: Tensor | None) -> None:
    """Move running statistics `[M, C]` towards the mean over samples of `[M, B, C, 1, ...]`."""
    each = batch.flatten(2)
    if samples is None:
        mean = each.mean(1).to(running.dtype)
    else:
        weight = samples.to(each.dtype).unsqueeze(2)
        total = torch.where(weight != 0, each * weight, 0.0).sum(1)
        mean = (total / weight.sum(1).clamp(min=torch.finfo(each.dtype).tiny)).to(running.dtype)
    running.copy_((1 - factor) * running + factor * mean)


@register(F.group_norm, F.instance_norm)
def _checked(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Python functions that check their arguments before they call torch."""
    from .mode import enter

    return enter(call, func, args, kwargs)


handles_per_model_numbers(_checked)
