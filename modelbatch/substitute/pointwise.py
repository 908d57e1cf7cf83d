"""Activation functions whose kernels in torch are slow on a CPU."""

from typing import Any

import torch
from torch import Tensor

from ..ops.pointwise import tanh as fast_tanh
from .mode import Call, register


@register(torch.tanh, torch.nn.functional.tanh, Tensor.tanh)
def tanh(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.tanh` of float32 on a CPU; everything else is left to torch."""
    if kwargs or len(args) != 1 or call.tracing or not call.is_batched(args[0]):
        return NotImplemented
    x = call.unwrap(args[0])[0]
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.layout is not torch.strided:
        return NotImplemented
    with call.lowered():
        return call.wrap(fast_tanh(x))
