"""Cross entropy of all models by one call of torch's own kernels."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .mode import Call, register


@register(F.cross_entropy)
def cross_entropy(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.cross_entropy` with class numbers as targets and no options; the rest is left to vmap.

    vmap takes it apart into a dozen small operations.
    """
    return _cross_entropy(call, *args, **kwargs)


def _cross_entropy(
    call: Call,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if not call.is_batched(input) or target.is_floating_point() or weight is not None:
        return NotImplemented
    if size_average is not None or reduce is not None or label_smoothing != 0.0:
        return NotImplemented
    if input.dim() < 2 or target.dim() != input.dim() - 1 or target.shape[0] != input.shape[0]:
        return NotImplemented
    if input.shape[0] == 0 or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    logits = call.unwrap(input)[0].flatten(0, 1)  # [M * B, C, ...]
    classes = call.physical(target)  # [M, B, ...]
    with call.lowered():
        losses = F.cross_entropy(
            logits, classes.reshape(logits.shape[0], *classes.shape[2:]),
            ignore_index=ignore_index, reduction="none",
        )  # fmt: skip
        losses = losses.view(classes.shape)
        if reduction == "none":
            return call.wrap(losses)
        total = losses.flatten(1).sum(1)
        if reduction == "mean":
            total = total / (classes.flatten(1) != ignore_index).sum(1)
        return call.wrap(total)
