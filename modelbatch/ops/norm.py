"""Batch normalisation of stacked models, every model with its own batch statistics.

On the CPU one kernel computes the statistics of a channel and normalises it while it is in cache.
Sums are float64 for every dtype, and each channel's additions have one fixed order, so the result
of a model depends neither on the other models nor on the number of threads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modelbatch import _extension as _extension  # Registers the operators.
from modelbatch.errors import ModelBatchError
from modelbatch.ops.autograd import register_autograd
from modelbatch.ops.conv import _empty_stacked, _has_channels_last_slices

_batch_norm_train = torch.ops.modelbatch.batch_norm_train.default
_batch_norm_train_backward = torch.ops.modelbatch.batch_norm_train_backward.default


def batch_norm_train(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: Tensor,
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises every channel of every model by its statistics over the batch.

    The statistics are not differentiable outputs: they are for the running averages, which the
    caller keeps. Weight and bias may be wider than the input, as under autocast.

    A sample of weight 2 counts as if it were in the batch twice. A sample of weight 0 is normalised
    by the statistics of the others and has no part in them, and no gradient passes through it: it
    may hold anything. A model whose weights are all 0 has mean and variance 0.

    Args:
        input: ``[M, B, C, *S]``; float32, float64, bfloat16 or float16.
        weight: ``[M, C]`` or None.
        bias: ``[M, C]`` or None.
        eps: float64 ``[M]``.
        sample_weight: ``[M, B]`` of any real dtype, not negative, or None for ones; it is not
            differentiated. With it, a channel with one element is not refused.

    Returns:
        The output, of the shape, dtype and slice layout of ``input``, and the mean and the biased
        variance, ``[M, C]``, float64 for float64 and float32 for all others.

    Raises:
        ModelBatchError: a channel has one element only, which has no variance.
        RuntimeError: a wrong shape or dtype.
    """
    if sample_weight is not None:
        return _batch_norm_train(input, weight, bias, eps, sample_weight)
    if input.dim() >= 3 and _element_count(input) == 1:
        raise ModelBatchError(
            "Expected more than 1 value per channel when training, got input size "
            f"{input.shape[1:]}"
        )
    return _batch_norm_train(input, weight, bias, eps)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _reduced_dims(input: Tensor) -> list[int]:
    return [1, *range(3, input.dim())]


def _per_channel(tensor: Tensor, input: Tensor) -> Tensor:
    """``[M, C]`` or ``[M]`` in the shape that broadcasts over ``[M, B, C, *S]``."""
    channels = tensor.shape[1] if tensor.dim() == 2 else 1
    return tensor.reshape([tensor.shape[0], 1, channels, *[1] * (input.dim() - 3)])


def _element_count(input: Tensor) -> int:
    count = input.shape[1]
    for length in input.shape[3:]:
        count *= length
    return count


# ---- the same in torch's operators: other devices, and the truth for derivatives -----------------


def _weights_and_count(input: Tensor, sample_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weights as ``[M, B, 1, ...]`` and their sum over a channel as ``[M, 1, 1, ...]``."""
    ones = [1] * (input.dim() - 3)
    weights = sample_weight.to(_wide(input.dtype))
    positions = _element_count(input) // max(input.shape[1], 1)
    count = sample_weight.double().sum(1) * positions
    count = torch.where(count == 0, 1.0, count).to(weights.dtype)
    return weights.reshape([*weights.shape, 1, *ones]), count.reshape([-1, 1, 1, *ones])


def _forward_formula(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: Tensor,
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(input.dtype)
    x, dims = input.to(wide), _reduced_dims(input)
    if sample_weight is None:
        var, mean = torch.var_mean(x, dim=dims, correction=0)
    else:
        w, count = _weights_and_count(x, sample_weight)
        # selected, never multiplied: a sample of weight 0 may be NaN
        mean = torch.where(w != 0, x * w, 0.0).sum(dims, keepdim=True) / count
        var = torch.where(w != 0, (x - mean).square() * w, 0.0).sum(dims, keepdim=True) / count
        mean, var = (t.reshape(x.shape[0], x.shape[2]) for t in (mean, var))
    scale = (var + eps.to(wide).unsqueeze(1)).rsqrt()
    if weight is not None:
        scale = scale * weight.to(wide)
    output = (x - _per_channel(mean, x)) * _per_channel(scale, x)
    if bias is not None:
        output = output + _per_channel(bias.to(wide), x)
    return output.to(input.dtype), mean, var


def _backward_formula(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    eps: Tensor,
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of input, weight and bias in the accumulation dtype, differentiable.

    The statistics are computed again, so that their own dependence on the input is differentiated
    too.
    """
    wide = _wide(input.dtype)
    x, grad = input.to(wide), grad_output.to(wide)
    dims = _reduced_dims(x)
    w: Tensor | float = 1.0
    count: Tensor | float = _element_count(x)
    taking: Tensor | None = None
    if sample_weight is not None:
        w, count = _weights_and_count(x, sample_weight)
        taking = w != 0
        x, grad = torch.where(taking, x, 0.0), torch.where(taking, grad, 0.0)
    centered = x - (x * w).sum(dims, keepdim=True) / count
    var = (centered * centered * w).sum(dims, keepdim=True) / count
    inverse = (var + _per_channel(eps.to(wide), x)).rsqrt()
    normalized = centered * inverse
    grad_bias = grad.sum(dims, keepdim=True)
    grad_weight = (grad * normalized).sum(dims, keepdim=True)
    scale = inverse if weight is None else inverse * _per_channel(weight.to(wide), x)
    grad_input = (grad - (grad_bias + normalized * grad_weight) * w / count) * scale
    if taking is not None:
        grad_input = torch.where(taking, grad_input, 0.0)
    flat = (x.shape[0], x.shape[2])
    return grad_input, grad_weight.reshape(flat), grad_bias.reshape(flat)


def _forward_composite(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: Tensor,
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    output, mean, var = _forward_formula(input, weight, bias, eps, sample_weight)
    channels_last = _has_channels_last_slices(input, 1)
    return _empty_stacked(input, input.shape, channels_last).copy_(output), mean, var


def _backward_composite(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: Tensor,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _backward_formula(grad_output, input, weight, eps, sample_weight)
    fakes = _backward_fake(
        grad_output, input, weight, mean, var, eps, need_input, need_weight, need_bias
    )
    needs = (need_input, need_weight, need_bias)
    for target, gradient, need in zip(fakes, gradients, needs, strict=True):
        if need:
            target.copy_(gradient)
    return fakes


# ---- fakes --------------------------------------------------------------------------------------


def _forward_fake(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: Tensor,
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    output = _empty_stacked(input, input.shape, _has_channels_last_slices(input, 1))
    mean = input.new_empty([input.shape[0], input.shape[2]], dtype=_wide(input.dtype))
    return output, mean, torch.empty_like(mean)


def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: Tensor,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    channels_last = _has_channels_last_slices(input, 1)
    dtype = _wide(input.dtype) if weight is None else weight.dtype
    flat = [input.shape[0], input.shape[2]]
    none = input.new_empty([0])
    return (
        _empty_stacked(input, input.shape, channels_last) if need_input else none,
        input.new_empty(flat, dtype=dtype) if need_weight else input.new_empty([0]),
        input.new_empty(flat, dtype=dtype) if need_bias else input.new_empty([0]),
    )


torch.library.register_fake("modelbatch::batch_norm_train", _forward_fake)
torch.library.register_fake("modelbatch::batch_norm_train_backward", _backward_fake)


# ---- autograd -----------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    # an argument left at its default is not handed on
    input, weight, bias, eps, *sample_weight = inputs
    _, mean, var = output
    ctx.save_for_backward(input, weight, mean, var, eps, *sample_weight)
    ctx.num_inputs = len(inputs)
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    rest = [None] * (ctx.num_inputs - 3)
    if grad is None:
        return None, None, None, *rest
    input, weight, mean, var, eps, *sample_weight = ctx.saved_tensors
    need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_input, grad_weight, grad_bias = _batch_norm_train_backward(
        grad, input, weight, mean, var, eps, need_input, need_weight, need_bias, *sample_weight
    )
    return (
        grad_input if need_input else None,
        grad_weight if need_weight else None,
        grad_bias.to(ctx.bias_dtype) if need_bias else None,
        *rest,
    )


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_output, input, weight, _, _, eps, *rest = inputs
    ctx.needs = rest[:3]
    ctx.save_for_backward(grad_output, input, weight, eps, *rest[3:])
    ctx.num_inputs = len(inputs)
    ctx.set_materialize_grads(False)


def _backward_of_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_output, input, weight, eps, *sample_weight = ctx.saved_tensors
    wide = _wide(input.dtype)

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        own_weight = tensors[2] if len(tensors) > 2 else None
        return _backward_formula(tensors[0], tensors[1], own_weight, eps, *sample_weight)

    variables = [grad_output, input] + ([] if weight is None else [weight])
    results, vjp = torch.func.vjp(gradients, *variables)  # type: ignore[misc]
    cotangents = tuple(
        torch.zeros_like(result) if grad is None or not need else grad.to(wide)
        for result, grad, need in zip(results, grads, ctx.needs, strict=True)
    )
    from_grad_output, from_input, *from_weight = vjp(cotangents)
    return from_grad_output, from_input, *(from_weight or [None]), *[None] * (ctx.num_inputs - 3)


register_autograd("batch_norm_train", _backward, setup_context=_setup_context)
register_autograd(
    "batch_norm_train_backward", _backward_of_backward, setup_context=_setup_backward_context
)


# ---- vmap: the outer axis is folded into the model axis -----------------------------------------


def _fold(tensor: Tensor | None, dim: int | None, batch_size: int) -> Tensor | None:
    if tensor is None:
        return None
    if dim is None:
        tensor = tensor.unsqueeze(0).expand(batch_size, *tensor.shape)
    else:
        tensor = tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def _make_vmap(op: Any) -> Any:
    def vmap(
        info: Any, in_dims: Sequence[int | None], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        folded = [
            value if isinstance(value, bool) else _fold(value, dim, info.batch_size)
            for value, dim in zip(args, in_dims, strict=True)
        ]
        outputs = op(*folded)
        # A gradient that is not needed has the shape [0].
        unfolded = tuple(
            t.unflatten(0, (info.batch_size, -1)) if t.dim() > 1 else t.view(info.batch_size, 0)
            for t in outputs
        )
        return unfolded, (0, 0, 0)

    return vmap


torch.library.register_vmap("modelbatch::batch_norm_train", _make_vmap(_batch_norm_train))
torch.library.register_vmap(
    "modelbatch::batch_norm_train_backward", _make_vmap(_batch_norm_train_backward)
)


# ---- other devices ------------------------------------------------------------------------------

_library = torch.library.Library("modelbatch", "IMPL")
_library.impl("batch_norm_train", _forward_composite, "CompositeExplicitAutograd")
_library.impl("batch_norm_train_backward", _backward_composite, "CompositeExplicitAutograd")
