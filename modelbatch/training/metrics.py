"""Metrics for classification."""

import torch
from torch import Tensor

from ..errors import ModelBatchError

__all__ = ["accuracy"]


def accuracy(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """The share of right predictions of one model, for `metric_fns={"accuracy": accuracy}`.

    Args:
        outputs: logits of classes, `[B, C]` or `[B, C, ...]` as for `F.cross_entropy` (or
            `[B, ..., C]`); or logits of yes and no, of the targets' own shape.
        targets: class numbers `[B]` or `[B, ...]`; or probabilities of the outputs' shape, of which
            the largest counts; or yes and no, as numbers from 0 to 1 or bools.
        reduction: `"mean"`, or `"none"` for a number per prediction (what weighted samples need).

    Returns:
        A number from 0 to 1, or as many numbers 0 or 1 as there are predictions.

    Raises:
        ModelBatchError: the shapes fit none of these, or another reduction.
    """
    if reduction not in ("mean", "none"):
        raise ModelBatchError(f'reduction must be "mean" or "none", got {reduction!r}')
    right = _right(outputs, targets).to(_dtype(outputs))
    return right if reduction == "none" else right.mean()


def _dtype(outputs: Tensor) -> torch.dtype:
    # A mean over thousands of samples has no place in 16 bits.
    wide = outputs.dtype in (torch.float32, torch.float64)
    return outputs.dtype if wide else torch.float32


def _right(outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs.dim() > 1 and targets.shape == outputs.shape[:1] + outputs.shape[2:]:
        if outputs.shape[1] > 1:
            return outputs.argmax(1) == targets
        outputs = outputs.squeeze(1)  # [B, 1] against [B]
    elif outputs.dim() > 1 and targets.shape == outputs.shape[:-1]:
        return outputs.argmax(-1) == targets
    if outputs.shape != targets.shape:
        raise ModelBatchError(
            f"accuracy: outputs of shape {tuple(outputs.shape)} and targets of shape "
            f"{tuple(targets.shape)} do not fit"
        )
    if outputs.dim() > 1 and outputs.shape[1] > 1 and targets.is_floating_point():
        return outputs.argmax(1) == targets.argmax(1)
    return (outputs > 0) == (targets > 0.5)
