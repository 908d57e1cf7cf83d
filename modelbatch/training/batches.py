"""What a loader yields, made ready for a step."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ModelBatchError
from ..evaluation import to_device
from ..inputs import _Marked
from ..pytree import flatten

if TYPE_CHECKING:
    from ..batch import ModelBatch

__all__ = ["Batch", "Reader", "length_of", "shares"]


@dataclass(slots=True)
class Batch:
    """One batch on the bundle's device.

    Attributes:
        x: what `train_step` takes.
        y: likewise.
        weight: `[M, B]` or `[B]`, or None.
        size: B, samples of one model.
        count: what the samples count for: B, or their total weight (float64, `[M]` or `[]`).
    """

    x: Any
    y: Any
    weight: Tensor | None
    size: int
    count: int | Tensor


class Reader:
    """Takes apart what a loader yields.

    Args:
        mb: the bundle.
        router: its `route_batch` decides which samples each model sees; None for all.
    """

    def __init__(self, mb: "ModelBatch", router: Any = None):
        if router is not None and not callable(getattr(router, "route_batch", None)):
            raise ModelBatchError(f"router must be a DataRouter, got {type(router).__name__}")
        self.mb, self.router = mb, router

    def __call__(self, item: Any) -> Batch:
        """The batch that `item` stands for.

        Raises:
            ModelBatchError: it is none of (x, y), (x, y, sample_weight) and `RoutedBatch`.
        """
        mb = self.mb
        device = mb._streams.device
        if isinstance(item, tuple | list) and len(item) in (2, 3):
            x, y = item[0], item[1]
            weight = item[2] if len(item) == 3 else None
        elif callable(getattr(item, "arguments", None)):  # a RoutedBatch, or the like
            if self.router is not None:
                raise ModelBatchError("the loader's batches are routed already; drop router=")
            x, y, weight = item.arguments(mb)
        else:
            length = f" of {len(item)}" if isinstance(item, tuple | list) else ""
            raise ModelBatchError(
                "the loader must yield (x, y), (x, y, sample_weight) or a RoutedBatch, got "
                f"{type(item).__name__}{length}"
            )
        if isinstance(x, list):
            x = tuple(x)  # torch's DataLoader makes lists of tuples
        x, y = _moved(x, device), _moved(y, device)
        if self.router is not None:
            if weight is not None:
                raise ModelBatchError("a router cannot be combined with the loader's weights")
            x, y, weight = self.router.route_batch(x, y).arguments(mb)
            x, y = _moved(x, device), _moved(y, device)
        size = _size(mb, y) or _size(mb, x)
        if weight is None:
            return Batch(x, y, None, size, size)
        weight = torch.as_tensor(weight).to(device, non_blocking=True)
        return Batch(x, y, weight, size, weight.sum(-1, dtype=torch.float64))


def _moved(tree: Any, device: torch.device) -> Any:
    if type(tree) is Tensor:
        return tree if tree.device == device else tree.to(device, non_blocking=True)
    if isinstance(tree, tuple | Mapping | _Marked | list):
        return to_device(tree, device)
    return tree.to(device, non_blocking=True) if isinstance(tree, Tensor) else tree


def _size(mb: "ModelBatch", tree: Any) -> int:
    """B, from the first tensor that has a batch axis; 0 if there is none."""
    for leaf in (tree,) if type(tree) is Tensor else flatten(tree)[0]:
        has_model_axis = not mb.shared_input
        if isinstance(leaf, _Marked):
            has_model_axis, leaf = leaf.has_model_axis, leaf.value
        if isinstance(leaf, Tensor) and leaf.dim() > int(has_model_axis):
            return int(leaf.shape[int(has_model_axis)])
    return 0


def length_of(loader: Iterable[Any]) -> int | None:
    """How many batches a loader has, None where it does not say."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def shares(group: list[Batch]) -> list[float | Tensor]:
    """What each batch contributes to the mean over the samples of all of them; `[M]` or a number.

    A model without any sample in the group gets shares of 0.
    """
    counts = [batch.count for batch in group]
    if all(isinstance(count, int) for count in counts):
        whole = sum(counts)
        return [float(count) / max(float(whole), 1.0) for count in counts]
    total: Any = sum(counts)
    none = total == 0
    return [torch.where(none, 0.0, count / torch.where(none, 1.0, total)) for count in counts]
