"""Convolutions of stacked models: every model's own convolution inside one operator.

`torch.vmap` turns a convolution with stacked weights into one grouped convolution, which on a CPU
is slower than the models one after another. `convolution` runs each model's own convolution, one
thread per model, and writes the results into one stacked tensor.

On the CPU the result of a model depends neither on the other models, nor on its slot, nor on the
number of threads: torch computes it with the same single-threaded plan every time. It equals what
torch computes for that model alone to rounding; torch alone may plan for several threads, which
splits the sums of the weight gradient differently.

On other devices the convolution is written in torch's own operators; see `_uses_grouped`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modelbatch import _extension as _extension  # Registers the operators.
from modelbatch.errors import ModelBatchError
from modelbatch.ops.autograd import register_autograd

_convolution = torch.ops.modelbatch.convolution.default
_convolution_backward = torch.ops.modelbatch.convolution_backward.default

Ints = Sequence[int]


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Ints = 1,
    padding: int | Ints | str = 0,
    dilation: int | Ints = 1,
    transposed: bool = False,
    output_padding: int | Ints = 0,
    groups: int = 1,
) -> Tensor:
    """Convolves every model's input with that model's weight.

    The options are those of `torch.nn.functional.conv1d` to ``conv3d`` and, with
    ``transposed=True``, of ``conv_transpose1d`` to ``conv_transpose3d``; the weight's rank tells
    the number of spatial dimensions. Under autocast the tensors are cast as torch casts them for a
    single model.

    Args:
        input: ``[M, B, C, *S]``, or ``[B, C, *S]`` for one input that all models share.
        weight: ``[M, O, C / groups, *K]``; transposed: ``[M, C, O / groups, *K]``.
        bias: ``[M, O]`` or None.
        stride: one number or one for each spatial dimension.
        padding: the same, or ``"valid"`` or ``"same"``.
        dilation: the same as ``stride``.
        transposed: whether this is the transposed convolution.
        output_padding: the same as ``stride``; used by the transposed convolution only.
        groups: into how many groups channels are split, within each model.

    Returns:
        ``[M, B, O, *S']``; the slices of the models are channels_last where those of ``input`` are.

    Raises:
        ModelBatchError: the ranks of the tensors, or the number of values of an option, do not fit,
            or ``padding`` is a string that is unknown or does not go with the other options.
        RuntimeError: other shapes, dtypes or values do not fit.
    """
    spatial_dims = weight.dim() - 3
    if spatial_dims not in (1, 2, 3):
        raise ModelBatchError(
            "convolution: weight must have shape [M, O, C / groups, *K] with 1 to 3 kernel "
            f"dimensions, got {list(weight.shape)}"
        )
    if input.dim() not in (spatial_dims + 2, spatial_dims + 3):
        raise ModelBatchError(
            "convolution: input must have shape [M, B, C, *S] or, shared by all models, [B, C, *S] "
            f"with {spatial_dims} spatial dimensions for weight {list(weight.shape)}, got "
            f"{list(input.shape)}"
        )
    strides = _per_dimension(stride, "stride", spatial_dims)
    dilations = _per_dimension(dilation, "dilation", spatial_dims)
    if isinstance(padding, str):
        input, paddings = _pad_by_name(input, weight, padding, strides, dilations, transposed)
    else:
        paddings = _per_dimension(padding, "padding", spatial_dims)
    output_paddings = _per_dimension(output_padding, "output_padding", spatial_dims)
    return _convolution(
        input, weight, bias, strides, paddings, dilations, transposed, output_paddings, groups
    )


def _per_dimension(value: int | Ints, name: str, spatial_dims: int) -> list[int]:
    if isinstance(value, Sequence):
        values = list(value)
        if len(values) == 1:
            values = values * spatial_dims
        if len(values) != spatial_dims:
            raise ModelBatchError(
                f"convolution: {name} must be one number or {spatial_dims}, got {tuple(values)}"
            )
        return values
    return [value] * spatial_dims


def _pad_by_name(
    input: Tensor,
    weight: Tensor,
    padding: str,
    stride: list[int],
    dilation: list[int],
    transposed: bool,
) -> tuple[Tensor, list[int]]:
    """Returns the input, padded where the two sides differ, and the remaining padding."""
    if transposed:
        raise ModelBatchError(
            f"convolution: a transposed convolution takes no padding by name, got {padding!r}"
        )
    if padding == "valid":
        return input, [0] * len(stride)
    if padding != "same":
        raise ModelBatchError(
            f"convolution: padding must be numbers, 'valid' or 'same', got {padding!r}"
        )
    if any(step != 1 for step in stride):
        raise ModelBatchError(
            "convolution: padding='same' is not supported for strided convolutions, got stride "
            f"{tuple(stride)}"
        )
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[3:], strict=True)]
    left = [t // 2 for t in total]
    extra = [t - 2 * side for t, side in zip(total, left, strict=True)]
    if any(extra):  # An odd total: torch, too, puts the extra zero behind the last element.
        input = F.pad(input, [side for e in reversed(extra) for side in (0, e)])
    return input, left


# ---- fakes --------------------------------------------------------------------------------------


def _has_channels_last_slices(input: Tensor, first: int) -> bool:
    """Whether the CPU operator sees slices ``[B, C, *S]`` as channels_last (csrc/conv/slices.h)."""
    spatial_dims = input.dim() - first - 2
    if spatial_dims not in (2, 3) or input.shape[first + 1] == 1 or input.stride(first + 1) != 1:
        return False
    expected = input.shape[first + 1]
    positions = 1
    for dim in range(input.dim() - 1, first + 1, -1):
        if input.shape[dim] != 1 and input.stride(dim) != expected:
            return False
        expected = expected * input.shape[dim]
        positions = positions * input.shape[dim]
    return positions > 1 and (input.shape[first] == 1 or input.stride(first) == expected)


def _empty_stacked(like: Tensor, sizes: Sequence[Any], channels_last_slices: bool) -> Tensor:
    if not channels_last_slices:
        return like.new_empty(sizes)
    innermost_last = [0, 1, *range(3, len(sizes)), 2]
    order = [innermost_last.index(dim) for dim in range(len(sizes))]
    return like.new_empty([sizes[dim] for dim in innermost_last]).permute(order)


def _output_sizes(
    input: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    transposed: bool,
    output_padding: Ints,
    groups: int,
) -> list[Any]:
    spatial_dims = weight.dim() - 3
    batch = input.shape[-spatial_dims - 2]
    sizes = [weight.shape[0], batch, weight.shape[2] * groups if transposed else weight.shape[1]]
    for i in range(spatial_dims):
        length = input.shape[i - spatial_dims]
        reach = dilation[i] * (weight.shape[3 + i] - 1) + 1
        if transposed:
            positions = (length - 1) * stride[i] - 2 * padding[i] + reach + output_padding[i]
        else:
            positions = (length + 2 * padding[i] - reach) // stride[i] + 1
        sizes.append(positions)
    return sizes


@torch.library.register_fake("modelbatch::convolution")
def _convolution_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    transposed: bool,
    output_padding: Ints,
    groups: int,
) -> Tensor:
    options = (stride, padding, dilation, transposed, output_padding, groups)
    sizes = _output_sizes(input, weight, *options)
    first = 0 if input.dim() < weight.dim() else 1
    return _empty_stacked(input, sizes, _has_channels_last_slices(input, first))


@torch.library.register_fake("modelbatch::convolution_backward")
def _convolution_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    transposed: bool,
    output_padding: Ints,
    groups: int,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    is_shared = input.dim() < weight.dim()
    grad_input = input.new_empty([0])
    if need_input:
        sizes = [weight.shape[0], *input.shape] if is_shared else list(input.shape)
        channels_last = _has_channels_last_slices(input, 0 if is_shared else 1)
        grad_input = _empty_stacked(input, sizes, channels_last)
        if is_shared:
            grad_input = grad_input.sum(0)
    return (
        grad_input,
        weight.new_empty(weight.shape if need_weight else [0]),
        weight.new_empty([grad_output.shape[0], grad_output.shape[2]] if need_bias else [0]),
    )


# ---- autograd -----------------------------------------------------------------------------------
# The derivatives of a convolution are convolutions, so both formulas call the operators themselves
# and can be differentiated any number of times.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, weight, bias, *options = inputs
    ctx.save_for_backward(input, weight)
    ctx.has_bias = bias is not None
    ctx.options = options


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight = ctx.saved_tensors
    needs = (*ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2])
    grads = _convolution_backward(grad, input, weight, *ctx.options, *needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 6


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_output, input, weight, *options = inputs
    ctx.save_for_backward(grad_output, input, weight)
    ctx.options, ctx.needs = options[:6], options[6:]


def _backward_of_backward(
    ctx: Any, grad_input_grad: Tensor, grad_weight_grad: Tensor, grad_bias_grad: Tensor
) -> tuple[Tensor | None, ...]:
    grad_output, input, weight = ctx.saved_tensors
    has_input, has_weight, has_bias = ctx.needs
    need_grad_output, need_input, need_weight = ctx.needs_input_grad[:3]
    terms = []
    if need_grad_output:
        if has_input:
            terms.append(_convolution(grad_input_grad, weight, None, *ctx.options))
        if has_weight:
            terms.append(_convolution(input, grad_weight_grad, None, *ctx.options))
        if has_bias:
            shape = [*grad_bias_grad.shape, *[1] * (weight.dim() - 3)]
            terms.append(grad_bias_grad.view(shape).unsqueeze(1).expand_as(grad_output))
    from_input = from_weight = None
    if need_input and has_weight:
        from_input = _convolution_backward(
            grad_output, input, grad_weight_grad, *ctx.options, True, False, False
        )[0]
    if need_weight and has_input:
        from_weight = _convolution_backward(
            grad_output, grad_input_grad, weight, *ctx.options, False, True, False
        )[1]
    from_grad_output = sum(terms[1:], terms[0]) if terms else None
    return from_grad_output, from_input, from_weight, *[None] * 9


register_autograd("convolution", _backward, setup_context=_setup_context)
register_autograd(
    "convolution_backward", _backward_of_backward, setup_context=_setup_backward_context
)


# ---- vmap: an outer axis is a loop over bundles -------------------------------------------------


def _slices(tensors: Sequence[Any], in_dims: Sequence[int | None], index: int) -> list[Any]:
    return [
        t if dim is None else t.select(dim, index) for t, dim in zip(tensors, in_dims, strict=True)
    ]


def _convolution_vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    outputs = [
        _convolution(*_slices(args[:3], in_dims[:3], index), *args[3:])
        for index in range(info.batch_size)
    ]
    return torch.stack(outputs), 0


def _convolution_backward_vmap(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    results = [
        _convolution_backward(*_slices(args[:3], in_dims[:3], index), *args[3:])
        for index in range(info.batch_size)
    ]
    return tuple(torch.stack(grads) for grads in zip(*results, strict=True)), (0, 0, 0)


torch.library.register_vmap("modelbatch::convolution", _convolution_vmap)
torch.library.register_vmap("modelbatch::convolution_backward", _convolution_backward_vmap)


# ---- autocast: the tensors are cast as torch casts those of conv2d -------------------------------


def _make_autocast_kernel(device_type: str, key: torch._C.DispatchKey) -> Any:
    def cast(tensor: Tensor | None) -> Tensor | None:
        is_eligible = (
            tensor is not None
            and tensor.is_floating_point()
            and tensor.device.type == device_type
            and tensor.dtype != torch.float64
        )
        if tensor is None or not is_eligible:
            return tensor
        return tensor.to(torch.get_autocast_dtype(device_type))

    def convolution_autocast(
        input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any
    ) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return _convolution(cast(input), cast(weight), cast(bias), *options)

    return convolution_autocast


_library = torch.library.Library("modelbatch", "IMPL")
for _device_type, _key in (
    ("cpu", torch._C.DispatchKey.AutocastCPU),
    ("cuda", torch._C.DispatchKey.AutocastCUDA),
):
    _kernel = _make_autocast_kernel(_device_type, _key)
    _library.impl("convolution", _kernel, f"Autocast{_device_type.upper()}")


# ---- other devices: torch's own operators -------------------------------------------------------

# Multiply-adds of one model above which a GPU is taken to be busy with one model at a time.
# Derived, not measured: 2**28 take some 10 us at 25 T multiply-adds/s, about as long as launching a
# kernel.
_BUSY_MULTIPLY_ADDS = 2**28


def _uses_grouped(
    input: Tensor, weight: Tensor, output_sizes: Sequence[int], transposed: bool
) -> bool:
    """Whether all models become one grouped convolution; otherwise they follow one another.

    Grouped convolution needs one launch for all models but has slower kernels, so it is for models
    that are too small to fill the device alone. The limit has not been measured on a GPU.
    """
    kernel = weight.shape[2:].numel()
    positions = input.shape[input.dim() - weight.dim() + 3 :] if transposed else output_sizes[3:]
    multiply_adds = output_sizes[1] * weight.shape[1] * kernel
    for length in positions:
        multiply_adds *= length
    return multiply_adds < _BUSY_MULTIPLY_ADDS


def _own_input(input: Tensor, weight: Tensor, model: int) -> Tensor:
    return input if input.dim() < weight.dim() else input[model]


def _side_by_side(input: Tensor, weight: Tensor) -> Tensor:
    """``[M, B, C, *S]``, or a shared ``[B, C, *S]``, as ``[B, M * C, *S]``."""
    if input.dim() < weight.dim():
        input = input.unsqueeze(0).expand(weight.shape[0], *input.shape)
    return input.transpose(0, 1).flatten(1, 2)


def _convolution_composite(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    transposed: bool,
    output_padding: Ints,
    groups: int,
) -> Tensor:
    num_models = weight.shape[0]
    options = (stride, padding, dilation, transposed, output_padding)
    sizes = _output_sizes(input, weight, *options, groups)
    first = 0 if input.dim() < weight.dim() else 1
    output = _empty_stacked(input, sizes, _has_channels_last_slices(input, first))
    if _uses_grouped(input, weight, sizes, transposed):
        flat_bias = None if bias is None else bias.flatten()
        result = torch.convolution(
            _side_by_side(input, weight),
            weight.flatten(0, 1),
            flat_bias,
            *options,
            num_models * groups,
        )
        return output.copy_(result.unflatten(1, (num_models, sizes[2])).transpose(0, 1))
    for model in range(num_models):
        own_bias = None if bias is None else bias[model]
        own_input = _own_input(input, weight, model)
        output[model] = torch.convolution(own_input, weight[model], own_bias, *options, groups)
    return output


def _convolution_backward_composite(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    transposed: bool,
    output_padding: Ints,
    groups: int,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_models = weight.shape[0]
    options = (stride, padding, dilation, transposed, output_padding)
    needs = (need_input, need_weight, need_bias)
    is_shared = input.dim() < weight.dim()
    sizes = grad_output.shape
    channels_last = _has_channels_last_slices(input, 0 if is_shared else 1)
    input_sizes = [num_models, *input.shape] if is_shared else list(input.shape)
    grad_input = weight.new_empty([0])
    if need_input:
        grad_input = _empty_stacked(input, input_sizes, channels_last)
    grad_weight = weight.new_empty(weight.shape if need_weight else [0])
    grad_bias = weight.new_empty([num_models, sizes[2]] if need_bias else [0])
    targets = (grad_input, grad_weight, grad_bias)
    aten_backward = torch.ops.aten.convolution_backward.default
    if _uses_grouped(input, weight, sizes, transposed):
        grads = aten_backward(
            _side_by_side(grad_output, weight),
            _side_by_side(input, weight),
            weight.flatten(0, 1),
            [num_models * sizes[2]],
            *options,
            num_models * groups,
            needs,
        )
        if need_input:
            grad_input.copy_(grads[0].unflatten(1, (num_models, -1)).transpose(0, 1))
        for target, grad, need in zip(targets[1:], grads[1:], needs[1:], strict=True):
            if need:
                target.copy_(grad.view_as(target))
    else:
        for model in range(num_models):
            own_input = _own_input(input, weight, model)
            grads = aten_backward(
                grad_output[model], own_input, weight[model], [sizes[2]], *options, groups, needs
            )
            for target, grad, need in zip(targets, grads, needs, strict=True):
                if need:
                    target[model] = grad
    if need_input and is_shared:
        grad_input = grad_input.sum(0)
    return grad_input, grad_weight, grad_bias


_library.impl("convolution", _convolution_composite, "CompositeExplicitAutograd")
_library.impl("convolution_backward", _convolution_backward_composite, "CompositeExplicitAutograd")
