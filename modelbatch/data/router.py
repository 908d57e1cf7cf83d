"""Giving every model of a bundle its own samples of a batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ModelBatchError
from ..inputs import per_model, shared
from ..weights import moved

if TYPE_CHECKING:
    from ..batch import ModelBatch


@dataclass
class RoutedBatch:
    """A batch of which each model has its own samples.

    Attributes:
        inputs: a tensor, a tuple of positional or a dict of keyword arguments; tensors `[B, ...]`,
            or `[M, B, ...]` if `batched`.
        targets: the same for targets.
        sample_weight: float `[M, B]`, what each sample counts for; None where all count alike.
        batched: whether inputs and targets have the model axis.
    """

    inputs: Any
    targets: Any
    sample_weight: Tensor | None = None
    batched: bool = False

    def arguments(self, mb: "ModelBatch") -> tuple[Any, Any, Tensor | None]:
        """(x, y, sample_weight) on the bundle's device, as `mb.train_step` takes them.

        Args:
            mb: the bundle; tensors are marked where their model axis is not what it expects.
        """
        device = mb._streams.device
        mark: Any = None
        if self.batched == mb.shared_input:
            mark = per_model if self.batched else shared

        def prepare(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            leaf = moved(leaf, device)
            return leaf if mark is None else mark(leaf)

        x, y = tree_map(prepare, (self.inputs, self.targets))
        weight = self.sample_weight
        return x, y, None if weight is None else moved(weight, device)

    def to(self, device: torch.device | str) -> "RoutedBatch":
        """The same batch on another device."""

        def move(leaf: Any) -> Any:
            return moved(leaf, device) if isinstance(leaf, Tensor) else leaf

        parts = (self.inputs, self.targets, self.sample_weight)
        inputs, targets, weight = tree_map(move, parts)
        return RoutedBatch(inputs, targets, weight, self.batched)

    def __iter__(self) -> Iterator[Any]:
        yield from (self.inputs, self.targets, self.sample_weight)


def batch_size_of(*trees: Any) -> tuple[int, torch.device]:
    """B and the device of the first tensor.

    Raises:
        ModelBatchError: there is none, or another tensor has another number of samples.
    """
    tensors = [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]
    if not tensors or any(leaf.dim() == 0 for leaf in tensors):
        raise ModelBatchError("a batch consists of tensors with one entry per sample")
    sizes = sorted({leaf.shape[0] for leaf in tensors})
    if len(sizes) > 1:
        raise ModelBatchError(f"the tensors of a batch have different numbers of samples: {sizes}")
    return sizes[0], tensors[0].device


def take(tree: Any, positions: Tensor) -> Any:
    """Rows `[M, K]` of every tensor `[B, ...]`, as `[M, K, ...]`."""

    def rows(leaf: Any) -> Any:
        return leaf[positions.to(leaf.device)] if isinstance(leaf, Tensor) else leaf

    return tree_map(rows, tree)


class DataRouter:
    """Decides which samples of a batch each model sees.

    Args:
        mode: `"passthrough"`: every model sees the whole batch. `"mask"`: `route_batch` is given
            masks or weights `[M, B]`; all models share the inputs. `"indices"`: it is given each
            model's samples by number, in the model's own order; each gets inputs of its own.

    Raises:
        ModelBatchError: another mode.
    """

    def __init__(self, mode: str = "passthrough"):
        if mode not in ("passthrough", "mask", "indices"):
            raise ModelBatchError(f'mode must be "passthrough", "mask" or "indices", got {mode!r}')
        self.mode = mode

    def route_batch(
        self,
        inputs: Any,
        targets: Any,
        masks: Tensor | Sequence[Tensor] | None = None,
        indices: Tensor | Sequence[Any] | None = None,
    ) -> RoutedBatch:
        """Give every model its own samples.

        Args:
            inputs: tensors `[B, ...]`, in a tuple or dict if the models take several.
            targets: likewise.
            masks: mode `"mask"`: bool, 0/1 or any weights that are not negative, `[M, B]` or M of
                `[B]`.
            indices: mode `"indices"`: int `[M, K]`, or M lists or tensors of row numbers of any
                length, empty ones included. A number may occur more than once.

        Returns:
            The batch. Where models have different numbers of samples, the missing ones are repeats
            of one that the model does have, with weight 0.

        Raises:
            ModelBatchError: what the mode needs is missing or does not fit the batch.
        """
        size, device = batch_size_of(inputs, targets)
        for name, value in (("masks", masks), ("indices", indices)):
            needed = self.mode == {"masks": "mask"}.get(name, name)
            if needed != (value is not None):
                verb = "needs" if needed else "does not take"
                raise ModelBatchError(f'mode "{self.mode}" {verb} {name}')
        if masks is not None:
            return RoutedBatch(inputs, targets, _as_weights(masks, size, device))
        if indices is None:
            return RoutedBatch(inputs, targets)
        positions, weight = _as_positions(indices, size, device)
        return RoutedBatch(take(inputs, positions), take(targets, positions), weight, True)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes back: plain numbers and strings."""
        return {"mode": self.mode}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where the saved router was.

        Raises:
            ModelBatchError: it is the state of a router that was made differently.
        """
        if state_dict.get("mode") != self.mode:
            raise ModelBatchError(
                f"this is the state of a router of mode {state_dict.get('mode')!r}, not "
                f"{self.mode!r}"
            )


def _as_weights(masks: Any, size: int, device: torch.device) -> Tensor:
    try:
        weight = masks if isinstance(masks, Tensor) else torch.stack([*map(torch.as_tensor, masks)])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelBatchError(f"masks must be [M, B] or M of [B]: {error}") from error
    if weight.dim() != 2 or weight.shape[1] != size or weight.is_complex():
        raise ModelBatchError(
            f"masks must be real of shape [M, {size}], got {weight.dtype} of shape "
            f"{tuple(weight.shape)}"
        )
    if not weight.is_floating_point():
        weight = weight.to(torch.get_default_dtype())
    return moved(weight, device)


def _as_positions(indices: Any, size: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Rows int64 `[M, K]`, and their weights where models have different numbers of them."""
    if isinstance(indices, Tensor):
        rows = [indices.reshape(-1)]
        fits = indices.dim() == 2
    else:
        rows = [torch.as_tensor(row) for row in indices]
        fits = bool(rows) and all(row.dim() == 1 for row in rows)
        rows = [row.long() if row.numel() == 0 else row for row in rows]
    kinds = {row.dtype for row in rows}
    if not fits or any(k.is_floating_point or k.is_complex or k == torch.bool for k in kinds):
        raise ModelBatchError("indices must be whole numbers [M, K], or M lists of them")
    flat = torch.cat([row.long() for row in rows])
    # on an accelerator the gather itself checks, without a transfer
    if flat.device.type == "cpu" and bool(((flat < 0) | (flat >= size)).any()):
        bad = flat[(flat < 0) | (flat >= size)][0].item()
        raise ModelBatchError(f"index {bad} is not in a batch of {size} samples")
    if isinstance(indices, Tensor) and indices.shape[1]:
        return moved(indices.long(), device), None
    if size == 0:
        raise ModelBatchError("there is nothing to choose from in a batch of 0 samples")
    if isinstance(indices, Tensor):
        rows = list(indices)
    lengths = torch.tensor([len(row) for row in rows])
    # one column at least: a batch of which nobody has anything is a batch of weight 0
    padded = torch.zeros(len(rows), max(int(lengths.max()), 1), dtype=torch.int64)
    filled = pad_sequence([row.long() for row in rows], batch_first=True)
    padded = padded.to(filled.device)
    padded[:, : filled.shape[1]] = filled
    return own_rows(padded, lengths.to(padded.device), device)


def own_rows(
    positions: Tensor, lengths: Tensor, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Rows of which each model's first `lengths[i]` are its own; the others repeat the first.

    Args:
        positions: int64 `[M, K]`; valid numbers everywhere.
        lengths: int64 `[M]`, on the same device.
        device: where the results go.

    Returns:
        The rows, and weights of 0 and 1; None for the weights if they are known to be all 1.
    """
    valid = torch.arange(positions.shape[1], device=positions.device) < lengths.unsqueeze(1)
    positions = moved(torch.where(valid, positions, positions[:, :1]), device)
    if valid.device.type == "cpu" and bool(valid.all()):
        return positions, None
    return positions, moved(valid, device).to(torch.get_default_dtype())
