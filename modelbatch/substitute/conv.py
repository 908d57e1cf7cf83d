"""Convolutions with one kernel per model, each computed as that model's own."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..ops.conv import convolution
from .mode import Call, register


@register(F.conv1d, F.conv2d, F.conv3d)
def conv(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.conv1d` to `F.conv3d` with a kernel per model."""

    def unpack(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        return input, weight, bias, stride, padding, dilation, False, 0, groups

    return _convolve(call, *unpack(*args, **kwargs))


@register(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def conv_transpose(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.conv_transpose1d` to `F.conv_transpose3d` with a kernel per model."""

    def unpack(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        return input, weight, bias, stride, padding, dilation, True, output_padding, groups

    return _convolve(call, *unpack(*args, **kwargs))


def _convolve(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Any:
    if not call.is_batched(weight) or (bias is not None and not call.is_batched(bias)):
        return NotImplemented
    kernels = call.unwrap(weight)[0]
    images, own = call.unwrap(x)
    single = x.dim() == weight.dim() - 1  # [C, *S]: no batch axis
    if not single and x.dim() != weight.dim():
        return NotImplemented
    if single:
        images = images.unsqueeze(1 if own else 0)
    with call.lowered():
        out = convolution(images, kernels, None if bias is None else call.unwrap(bias)[0], *options)
        return call.wrap(out.squeeze(1) if single else out)
