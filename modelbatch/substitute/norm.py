"""Batch normalisation with weights and statistics per model."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..attributes import PerModelFloat
from ..ops.norm import batch_norm_train
from .mode import Call, NeedsBatchedFactories, Refused, handles_per_model_numbers, register


def cumulative_batch_norm(module: _BatchNorm, input: Tensor) -> Tensor:
    """`BatchNorm.forward` with a cumulative average, whose factor differs between models.

    The original turns the count of batches into a Python float, which only works for one model.
    """
    module._check_input_dim(input)
    tracks = module.running_mean is not None
    factor: Any = 0.0
    if module.training and module.track_running_stats and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        factor = (module.num_batches_tracked, module.momentum)
    updates = module.training and module.track_running_stats
    result: Tensor = F.batch_norm(
        input,
        module.running_mean if not module.training or updates else None,
        module.running_var if not module.training or updates else None,
        module.weight,
        module.bias,
        module.training or not tracks,
        factor,
        module.eps,
    )
    return result


@handles_per_model_numbers
@register(F.batch_norm, weighed=True)
def batch_norm(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.batch_norm`; momentum and eps may differ between models."""
    return _batch_norm(call, *args, **kwargs)


def _batch_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: Any = 0.1,
    eps: Any = 1e-5,
) -> Any:
    if input.dim() < 2 or not input.is_floating_point():
        return NotImplemented
    if (running_mean is None) != (running_var is None) or (not training and running_mean is None):
        return NotImplemented
    x = call.physical(input)  # [M, B, C, *S]
    w, b, mean, var = (
        None if t is None else call.physical(t) for t in (weight, bias, running_mean, running_var)
    )
    values = eps.values if isinstance(eps, PerModelFloat) else (float(eps),) * call.num_models
    eps_vector = call.streams.constant(tuple(values))
    with call.lowered(), torch.autocast(x.device.type, enabled=False):
        if not training:
            assert mean is not None and var is not None
            return call.wrap(_normalise(x, mean, var, w, b, eps_vector))
        samples = call.sample_weight_of(x.shape[1])  # [M, B]
        count: Any = x.numel() // max(x.shape[0] * x.shape[2], 1)
        if samples is not None:
            count = _own_count(call, samples, x)
        out, batch_mean, batch_var = batch_norm_train(x, w, b, eps_vector, samples)
        if mean is not None and var is not None:
            assert running_mean is not None and running_var is not None
            if call.level is not None and not (
                call.is_batched(running_mean) and call.is_batched(running_var)
            ):
                raise NeedsBatchedFactories
            if samples is None:
                unbiased = batch_var * (count / max(count - 1, 1))
            else:
                # below 2 there is nothing that fractional weights could be corrected by
                factor = count.clamp(min=1) / (count - 1).clamp(min=1)
                unbiased = batch_var * factor.to(batch_var.dtype).unsqueeze(1)
            _update(call, mean, batch_mean, momentum)
            _update(call, var, unbiased, momentum)
        return call.wrap(out)


def _own_count(call: Call, samples: Tensor, x: Tensor) -> Tensor:
    """How many values each model has per channel, `[M]`.

    Raises:
        Refused: a model that trains has one, which has no variance.
    """
    assert call.weights is not None
    positions = x.numel() // max(x.shape[0] * x.shape[1] * x.shape[2], 1)
    if positions == 1:
        weights = call.weights
        for i, used, total in zip(weights.models, weights.used, weights.totals):
            if used == 1 and total <= 1 and i not in weights.resting:
                raise Refused(
                    f"model {i}: Expected more than 1 value per channel when training, but one "
                    f"sample of the batch of {x.shape[1]} is all that this model has"
                )
    return samples.sum(1) * positions


def _normalise(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: Tensor
) -> Tensor:
    """`x * alpha + beta` with the running statistics, in their precision and the input's dtype."""
    wide = torch.promote_types(x.dtype, mean.dtype)
    alpha = (var.to(wide) + eps.to(wide).unsqueeze(1)).rsqrt()  # [M, C]
    if weight is not None:
        alpha = alpha * weight
    beta = -mean * alpha
    if bias is not None:
        beta = beta + bias
    shape = [*x.shape[:1], 1, x.shape[2], *([1] * (x.dim() - 3))]
    out = torch.addcmul(beta.reshape(shape).to(wide), x.to(wide), alpha.reshape(shape).to(wide))
    return out.to(x.dtype)


@torch.no_grad()
def _update(call: Call, running: Tensor, batch: Tensor, momentum: Any) -> None:
    """`running = (1 - factor) * running + factor * batch`, in place; tensors `[M, C]`."""
    if isinstance(momentum, tuple):  # cumulative average: 1 / number of batches so far
        counts, numbers = momentum
        factor: Any = call.physical(counts).to(running.dtype).reciprocal().unsqueeze(1)
        if isinstance(numbers, PerModelFloat):
            fixed = torch.tensor(
                [float("nan") if v is None else v for v in numbers.values],
                dtype=running.dtype,
                device=running.device,
            ).unsqueeze(1)
            factor = torch.where(torch.isnan(fixed), factor, fixed)
    elif isinstance(momentum, PerModelFloat):
        factor = call.streams.constant(momentum.values).to(running.dtype).unsqueeze(1)
    else:
        factor = momentum
    running.copy_((1 - factor) * running + factor * batch.to(running.dtype))
