"""Cross entropy of all models as one operator and one autograd node."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ._extension import has_cuda_library
from .ops import loss as ops


def ignore_index_of(loss_fn: Callable[..., Tensor]) -> int | None:
    """The ignored class of a mean cross entropy without further options; None for other losses."""
    if loss_fn is F.cross_entropy:
        return -100
    if type(loss_fn) is not nn.CrossEntropyLoss or loss_fn.reduction != "mean":
        return None
    if loss_fn.weight is not None or loss_fn.label_smoothing != 0.0:
        return None
    hooks = loss_fn._forward_hooks or loss_fn._forward_pre_hooks or loss_fn._backward_hooks
    return None if hooks else loss_fn.ignore_index


def cross_entropy(
    loss_fn: Callable[..., Tensor], outputs: Any, targets: Any, targets_have_models: bool
) -> Tensor | None:
    """Cross entropy `[M]` of outputs `[M, B, C]`, where it can be computed as one node.

    Args:
        loss_fn: the user's loss function.
        outputs: what the bundle returned.
        targets: class numbers, `[B]` or `[M, B]`.
        targets_have_models: which of the two.

    Returns:
        The losses, or None where the general way is needed; it also says what is wrong.
    """
    ignore_index = ignore_index_of(loss_fn)
    if ignore_index is None or not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    if outputs.dim() != 3 or targets.dim() != 1 + targets_have_models:
        return None
    if targets.shape != outputs.shape[1 - targets_have_models : 2] or outputs.numel() == 0:
        return None
    if targets.dtype != torch.int64 or outputs.device != targets.device:
        return None
    if outputs.device.type == "cuda" and not has_cuda_library():
        return None
    if outputs.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(
        outputs.device.type
    ):
        return None
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    if type(outputs) is not Tensor or torch._C._len_torch_function_stack() > 0:
        return None
    try:
        return ops.cross_entropy(outputs, targets, ignore_index)
    except RuntimeError:  # such as a class that does not exist
        return None
