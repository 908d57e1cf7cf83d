"""Per-model results over a data set, and the numbers a logger wants."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .errors import ModelBatchError
from .inputs import _Marked
from .pytree import flatten
from .weights import moved, shared_tensors

if TYPE_CHECKING:
    from .batch import ModelBatch


def to_device(tree: Any, device: torch.device) -> Any:
    """The same structure with all tensors on `device`, markers kept."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, _Marked):
            return _Marked(moved(leaf.value, device), leaf.has_model_axis)
        return moved(leaf, device) if isinstance(leaf, Tensor) else leaf

    return tree_map(move, tree)


def _batch_size(bundle: "ModelBatch", targets: Any) -> int:
    for leaf in tree_flatten(targets)[0]:
        has_axis = not bundle.shared_input
        if isinstance(leaf, _Marked):
            has_axis, leaf = leaf.has_model_axis, leaf.value
        if isinstance(leaf, Tensor) and leaf.dim() > int(has_axis):
            return int(leaf.shape[int(has_axis)])
    return 1


def evaluate(
    bundle: "ModelBatch",
    loader: Iterable[Any],
    loss_fn: Callable[..., Tensor],
    metric_fns: Mapping[str, Callable[..., Tensor]],
) -> dict[str, Tensor]:
    """See `ModelBatch.evaluate`."""
    if "loss" in metric_fns:
        raise ModelBatchError("a metric must not be called 'loss'")
    functions = {"loss": loss_fn, **metric_fns}
    for name, function in functions.items():
        if not callable(function):
            raise ModelBatchError(f"'{name}' must be callable, got {type(function).__name__}")
    modes = [module.training for module in bundle._stack.modules[0]]
    sums: dict[str, Tensor] = {}
    count: Any = 0
    latest = bundle._latest_losses
    _set_modes(bundle, [False] * len(modes))
    try:
        with torch.no_grad():
            for batch in loader:
                x, y, weight = to_device(unpack(bundle, batch), bundle._streams.device)
                with bundle._weighing(
                    weight, shared_tensors(flatten(x)[0], not bundle.shared_input)
                ) as weights:
                    outputs = bundle._forward_of(x)
                size: Any = _batch_size(bundle, y)
                if weights is not None:
                    size, weight = weights.expanded().sum(1), weights.given
                for name, function in functions.items():
                    values = bundle._losses(outputs, y, function, weight)
                    values = values * (size if weights is None else size.to(values.dtype))
                    sums[name] = sums[name] + values if name in sums else values
                count = count + size
    finally:
        _set_modes(bundle, modes)
        bundle._latest_losses = latest
    if not sums or (isinstance(count, int) and count == 0):
        raise ModelBatchError("the loader yielded no samples")
    counts = torch.as_tensor(count)
    return {name: total / counts.to(total) for name, total in sums.items()}


def unpack(bundle: "ModelBatch", batch: Any) -> tuple[Any, Any, Any]:
    """Inputs, targets and sample weights (or None) of what a loader yields.

    Args:
        bundle: who will be given them.
        batch: `(x, y)`, `(x, y, sample_weight)` or a `RoutedBatch`.

    Raises:
        ModelBatchError: it is something else.
    """
    arguments = getattr(batch, "arguments", None)
    if callable(arguments):
        x, y, weight = arguments(bundle)
        return x, y, weight
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        raise ModelBatchError(
            f"the loader must yield (x, y) or (x, y, sample_weight), got {type(batch).__name__}"
        )
    return batch[0], batch[1], batch[2] if len(batch) == 3 else None


def _set_modes(bundle: "ModelBatch", modes: list[bool]) -> None:
    for modules in (bundle._stack.nodes, *bundle._stack.modules):
        for module, mode in zip(modules, modes):
            if module.training is not mode:
                if (
                    "training" in module.__dict__
                    and type(module).__setattr__ is nn.Module.__setattr__
                ):
                    module.__dict__["training"] = mode  # nn.Module's way takes most of the time
                else:
                    module.training = mode


def metrics(bundle: "ModelBatch") -> dict[str, float]:
    """See `ModelBatch.metrics`."""
    result: dict[str, float] = {}
    losses, ids = bundle._latest_losses, bundle._ids
    if losses is not None:
        values = losses.tolist()
        result.update({f"loss_model_{i}": value for i, value in zip(ids, values, strict=True)})
    if bundle.optimizer is not None:
        for i, group in zip(ids, bundle.optimizer.param_groups):
            result[f"lr_model_{i}"] = float(group["lr"])
    norms = grad_norms(bundle)
    if norms is not None:
        result.update({f"grad_norm_model_{i}": v for i, v in zip(ids, norms.tolist())})
    if losses is not None:
        good = torch.isfinite(losses) & bundle.active
        if bundle._without_samples:
            good[sorted(bundle._without_samples)] = False
        best = torch.where(good, losses, torch.inf)
        any_good = bool(good.any())
        result["loss_mean"] = float(losses[good].mean()) if any_good else float("nan")
        result["loss_best"] = float(best.min()) if any_good else float("nan")
        result["best_model"] = float(ids[int(best.argmin())]) if any_good else -1.0
    result["active_models"] = float(sum(bundle._active))
    return result


def grad_norms(bundle: "ModelBatch") -> Tensor | None:
    """The 2-norm of each model's whole gradient, `[M]`; None where there are no gradients.

    As it was before clipping, and without the scale of mixed precision, if the optimizer knows.
    """
    known: Tensor | None = getattr(bundle.optimizer, "last_grad_norms", None)
    if known is not None:
        return known
    squares = [
        torch.linalg.vector_norm(p.grad.flatten(1).float(), dim=1) ** 2
        if p.grad.dtype in (torch.float16, torch.bfloat16)
        else torch.linalg.vector_norm(p.grad.flatten(1), dim=1) ** 2
        for p in bundle.parameters()
        if p.grad is not None
    ]
    if not squares:
        return None
    norms = torch.stack(squares).sum(0).sqrt()
    inv_scale: Tensor | None = getattr(bundle.optimizer, "last_inv_scale", None)
    return norms if inv_scale is None else norms * inv_scale
