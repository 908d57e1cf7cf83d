"""Stacked copies of a bundle's weights, of a time of its own for each model."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..change import Change
from ..errors import ModelBatchError
from ..optim import PerModelOptimizer

if TYPE_CHECKING:
    from ..batch import ModelBatch

__all__ = ["StackedCopy", "forget_optimizer_state", "load_model", "rows_of_saved"]


def _tensors(mb: "ModelBatch") -> Iterator[tuple[str, Tensor]]:
    for slot in mb._stack.slots:
        yield slot.name, mb._stack.tensor(slot).detach()


class StackedCopy:
    """Copies of all parameters and buffers, `[M, ...]` each.

    Row i is what model i had when its row was last updated.

    Args:
        mb: the bundle; the first copy is what it has now.
    """

    def __init__(self, mb: "ModelBatch"):
        self._copies = {name: tensor.clone() for name, tensor in _tensors(mb)}

    @torch.no_grad()
    def update(self, mb: "ModelBatch", rows: Tensor) -> None:
        """Copy the models flagged in `rows`, bool `[M]`, again. Waits for nothing."""
        for name, now in _tensors(mb):
            copy = self._copies.get(name)
            if copy is None or copy.shape != now.shape:  # a forward gave the buffer another shape
                self._copies[name] = now.clone()
                continue
            if copy.dtype != now.dtype or copy.device != now.device:
                copy = self._copies[name] = copy.to(now.device, now.dtype)
            torch.where(rows.view(-1, *(1,) * (now.dim() - 1)), now, copy, out=copy)

    @torch.no_grad()
    def restore(self, mb: "ModelBatch", models: Sequence[int]) -> None:
        """Write the copies of these models into the bundle; no other model changes by one bit."""
        for name, now in _tensors(mb):
            copy = self._copies.get(name)
            if copy is None or copy.shape != now.shape:
                continue
            rows = torch.tensor(list(models), dtype=torch.int64, device=now.device)
            now.index_copy_(0, rows, copy.to(now.device, now.dtype).index_select(0, rows))
        torch.autograd.graph.increment_version(mb._stack.parameters())

    def models_changed(self, mb: "ModelBatch", change: Change) -> None:
        """Follow a bundle whose models have changed; a fresh one's copy is what it has now."""
        for name, now in _tensors(mb):
            copy = self._copies.get(name)
            if copy is None or copy.shape[1:] != now.shape[1:]:
                self._copies[name] = now.clone()
                continue
            rows = self._copies[name] = change.rows(copy)
            for slot in change.fresh:
                rows[slot].copy_(now[slot])

    def of_model(self, i: int) -> dict[str, Tensor]:
        """The copies of model i, by name."""
        return {name: copy[i].clone() for name, copy in self._copies.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The copies by name."""
        return dict(self._copies)

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ModelBatchError: it is of another number of models, or of other tensors.
        """
        for name, copy in self._copies.items():
            saved = state_dict.get(name)
            if saved is None or saved.shape != copy.shape:
                got = "nothing" if saved is None else f"shape {tuple(saved.shape)}"
                raise ModelBatchError(
                    f"kept weights: '{name}' has the shape {tuple(copy.shape)} in this bundle, "
                    f"the saved state has {got}"
                )
        for name, copy in self._copies.items():
            copy.copy_(state_dict[name])


def rows_of_saved(saved: dict[str, Any] | None, change: Change) -> dict[str, Any] | None:
    """A state of `StackedCopy` that waits to be loaded, after the models have changed."""
    if saved is None:
        return None
    return {name: change.rows(tensor) for name, tensor in saved.items()}


@torch.no_grad()
def load_model(mb: "ModelBatch", i: int, build: Callable[..., Any]) -> None:
    """Give model i the parameters and buffers of a model that `build(i)` makes.

    Raises:
        ModelBatchError: `build` returned something else than such a model.
    """
    fresh = build(i)
    if not isinstance(fresh, nn.Module):
        raise ModelBatchError(
            f"the function that builds model {i} returned a {type(fresh).__name__}, expected a "
            f"torch.nn.Module"
        )
    own = dict([*mb[i].named_parameters(), *mb[i].named_buffers()])
    new = dict([*fresh.named_parameters(), *fresh.named_buffers()])
    for name in sorted(own.keys() | new.keys()):
        shapes = [tuple(d[name].shape) if name in d else None for d in (own, new)]
        if shapes[0] != shapes[1]:
            raise ModelBatchError(
                f"'{name}' has the shape {shapes[0]} in model {i}, the fresh model has {shapes[1]}"
            )
    for name, tensor in own.items():
        tensor.data.copy_(new[name])
    torch.autograd.graph.increment_version(mb._stack.parameters())


@torch.no_grad()
def forget_optimizer_state(mb: "ModelBatch", optimizer: Optimizer | None, i: int) -> None:
    """Clear the momenta and step counts of model i; its options stay."""
    optimizer = optimizer if optimizer is not None else mb.optimizer
    if isinstance(optimizer, PerModelOptimizer):
        groups = optimizer.model_state_dict(i)["param_groups"]
        optimizer.load_model_state_dict(i, {"state": {}, "param_groups": groups})
    elif optimizer is not None:  # one of torch on the stacked parameters, [M, ...]
        for parameter, state in optimizer.state.items():
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value[i] = 0
