"""Several training steps in one call."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ModelBatchError
from ..inputs import _Marked
from ..pytree import flatten, unflatten

if TYPE_CHECKING:
    from ..steps import Steps

__all__ = ["several_steps"]


def several_steps(
    mb: "Steps",
    x: Any,
    y: Any,
    loss_fn: Callable[..., Tensor],
    sample_weight: Any,
    lr: Any,
) -> Tensor:
    """See `ModelBatch.train_steps`."""
    trees = (x, y, sample_weight)
    flat = [flatten(tree) for tree in trees]
    count = _count([leaf for leaves, _ in flat for leaf in leaves])
    rates = _rates(lr, count, mb.num_models)

    def batch(k: int) -> tuple[Any, ...]:
        return tuple(unflatten([_take(leaf, k) for leaf in leaves], spec) for leaves, spec in flat)

    first_x, first_y, _ = batch(0)
    whole = [leaf.value if isinstance(leaf, _Marked) else leaf for (leaf, *_), _ in flat[:2]]
    weights = None
    if sample_weight is not None:
        weights = [_take(sample_weight, k) for k in range(count)]
    if mb._without_samples:
        mb._without_samples = frozenset()
    if all(isinstance(tensor, Tensor) for tensor in whole):
        all_x, all_y = whole
        losses = mb._engine.steps(mb, (first_x, first_y), all_x, all_y, loss_fn, weights, rates)
        if losses is not None:
            return losses
    return _one_by_one(mb, [batch(k) for k in range(count)], loss_fn, rates)


def _one_by_one(
    mb: "Steps", batches: list[Any], loss_fn: Callable[..., Tensor], rates: Tensor | None
) -> Tensor:
    if rates is None:
        return torch.stack(
            [mb.train_step(x, y, loss_fn=loss_fn, sample_weight=w) for x, y, w in batches]
        )
    assert mb.optimizer is not None
    groups = mb.optimizer.param_groups
    kept = [group["lr"] for group in groups]
    losses = []
    try:
        for (x, y, weight), row in zip(batches, rates.tolist()):
            for group, value in zip(groups, row):
                group["lr"] = value
            losses.append(mb.train_step(x, y, loss_fn=loss_fn, sample_weight=weight))
    finally:
        for group, value in zip(groups, kept):
            group["lr"] = value
    return torch.stack(losses)


def _take(leaf: Any, k: int) -> Any:
    if isinstance(leaf, _Marked):
        return _Marked(leaf.value[k], leaf.has_model_axis)
    return leaf[k] if isinstance(leaf, Tensor) else leaf


def _count(leaves: list[Any]) -> int:
    """K."""
    tensors = [leaf.value if isinstance(leaf, _Marked) else leaf for leaf in leaves]
    tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    if not tensors or any(tensor.dim() == 0 for tensor in tensors):
        raise ModelBatchError("train_steps needs tensors with a leading axis of K steps")
    counts = sorted({len(tensor) for tensor in tensors})
    if len(counts) > 1 or counts[0] == 0:
        found = ", ".join(str(count) for count in counts)
        raise ModelBatchError(
            f"the tensors given to train_steps have leading axes of {found}; each must have one "
            "and the same number of steps, at least 1"
        )
    return counts[0]


def _rates(lr: Any, count: int, num_models: int) -> Tensor | None:
    """Learning rates as float64 `[K, M]`."""
    if lr is None:
        return None
    try:
        rates = torch.as_tensor(lr, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelBatchError(f"lr must be [K] or [K, M] numbers, got {lr!r}") from error
    if rates.shape == (count,):
        rates = rates.unsqueeze(1).expand(count, num_models)
    if rates.shape != (count, num_models):
        raise ModelBatchError(
            f"lr must be of shape [{count}] or [{count}, {num_models}], got {tuple(rates.shape)}"
        )
    bad = ~(rates >= 0)
    if bad.any():
        k, i = bad.nonzero()[0].tolist()
        raise ModelBatchError(
            f"lr[{k}] of model {i} must not be negative or NaN, got {rates[k, i].item()}"
        )
    return rates.contiguous()
