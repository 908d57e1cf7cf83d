"""Functions of single elements that are faster here than in torch."""

from typing import Any

import torch
from torch import Tensor

from modelbatch import _extension as _extension  # Registers the operators.

_tanh = torch.ops.modelbatch.tanh.default


def tanh(input: Tensor) -> Tensor:
    """`torch.tanh` of float32, right to two units in the last place.

    Differentiable any number of times.

    Args:
        input: float32, of any shape and strides.

    Returns:
        A contiguous tensor of the same shape.

    Raises:
        RuntimeError: another dtype.
    """
    if torch.is_grad_enabled() and input.requires_grad:
        result: Tensor = _Tanh.apply(input)
        return result
    return _tanh(input)


class _Tanh(torch.autograd.Function):
    """See `tanh`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        output = _tanh(input)
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        (output,) = ctx.saved_tensors
        # The saved output is this function's own, so that a further derivative finds its way back.
        return torch.ops.aten.tanh_backward.default(grads[0], output)


@torch.library.register_fake("modelbatch::tanh")
def _tanh_fake(input: Tensor) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)
