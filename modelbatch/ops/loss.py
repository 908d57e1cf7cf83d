"""Losses of all models by one operator, which computes the slope along with the value."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modelbatch import _extension as _extension  # Registers the operators.

_cross_entropy = torch.ops.modelbatch.cross_entropy.default


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """The mean cross entropy of every model, `F.cross_entropy` without its further options.

    Differentiable with respect to the logits, any number of times.

    Args:
        logits: `[M, B, C]`, float32 or float64.
        target: int64 `[B]` for all models or `[M, B]`, class numbers or `ignore_index`.
        ignore_index: samples with this target do not count.

    Returns:
        The losses `[M]`; NaN for a model none of whose samples count.

    Raises:
        RuntimeError: wrong shapes, dtypes or devices, or (on the CPU only, since reading it from
            another device would wait for it) a target that is no class.
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        result: Tensor = _CrossEntropy.apply(logits, target, ignore_index)
        return result
    return _cross_entropy(logits, target, ignore_index, False)[0]


class _CrossEntropy(torch.autograd.Function):
    """See `cross_entropy`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        losses, slope = _cross_entropy(logits, target, ignore_index, True)
        ctx.save_for_backward(logits, target, slope)
        ctx.ignore_index = ignore_index
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        logits, target, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            slope = _slope(logits, target, ctx.ignore_index)
        return slope * grads[0].view(-1, 1, 1), None, None


def _slope(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    counts = target.ne(ignore_index)
    hits = F.one_hot(torch.where(counts, target, 0), logits.shape[2])
    slope = torch.where(counts.unsqueeze(-1), torch.softmax(logits, 2) - hits, 0.0)
    return slope / counts.sum(-1).view(-1, 1, 1)


@torch.library.register_fake("modelbatch::cross_entropy")
def _cross_entropy_fake(
    logits: Tensor, target: Tensor, ignore_index: int, need_slope: bool
) -> tuple[Tensor, Tensor]:
    losses = logits.new_empty(logits.shape[0])
    return losses, logits.new_empty(logits.shape if need_slope else (0,))
