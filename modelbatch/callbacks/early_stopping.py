"""Ending the training of models that no longer improve."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..change import Change
from ..errors import ModelBatchError
from .base import Callback, Event
from .pack import freeze as freeze_models
from .weights import StackedCopy, rows_of_saved

if TYPE_CHECKING:
    from ..batch import ModelBatch

__all__ = ["EarlyStopping", "monitored"]


def monitored(callback: Callback, event: Event, name: str) -> Tensor:
    """The metric `[M]` of this epoch that a callback watches.

    Raises:
        ModelBatchError: there is none of this name.
    """
    value = event.metrics.get(name)
    if value is None:
        there = ", ".join(f"'{key}'" for key in event.metrics) or "no metrics"
        hint = " (a validation set is needed)" if name.startswith("val_") else ""
        raise ModelBatchError(
            f"{type(callback).__name__} monitors '{name}'{hint}, but the epoch gave {there}"
        )
    return value.detach()


def check_count(callback: Callback, values: Tensor, event: Event) -> None:
    """Refuse the state of another number of models.

    Raises:
        ModelBatchError: naming both numbers.
    """
    if len(values) != len(event.mb):
        raise ModelBatchError(
            f"{type(callback).__name__} has the state of {len(values)} models, the bundle has "
            f"{len(event.mb)}"
        )


def check_mode(mode: str) -> str:
    """`"min"` or `"max"`.

    Raises:
        ModelBatchError: anything else.
    """
    if mode not in ("min", "max"):
        raise ModelBatchError(f'mode must be "min" or "max", got {mode!r}')
    return mode


class EarlyStopping(Callback):
    """Stops every model that has not improved for a while, and the training when all have stopped.

    A value that is not finite is no improvement.

    Args:
        monitor: name of the metric at the end of an epoch: `"loss"`, `"val_loss"`,
            `"val_<metric>"`.
        patience: epochs without improvement after which a model stops; one number or M.
        min_delta: by how much a value must be better to count; one number or M.
        mode: `"min"` or `"max"`.
        restore_best: give a model that stops the weights of its best epoch. Models that never stop
            keep their last; see `BestModel`.
        freeze: freeze the models that stop. Without, they train on until all have stopped.

    Attributes:
        best_values: the best value of each model, `[M]`; None before the first epoch.
        best_epochs: in which epoch that was, int64 `[M]`, -1 if never.
        stopped_epochs: in which epoch each model was stopped, int64 `[M]`, -1 if it was not.

    Raises:
        ModelBatchError: a bad argument; in training, if there is no such metric.
    """

    best_values: Tensor | None = None
    best_epochs: Tensor | None = None
    stopped_epochs: Tensor | None = None

    def __init__(
        self,
        monitor: str = "val_loss",
        patience: int | Sequence[int] = 5,
        min_delta: float | Sequence[float] = 0.0,
        mode: str = "min",
        restore_best: bool = False,
        freeze: bool = True,
    ):
        self.monitor = monitor
        self.patience = _per_model("patience", patience, least=1)
        self.min_delta = _per_model("min_delta", min_delta, least=0)
        self.mode = check_mode(mode)
        self.restore_best = restore_best
        self.freeze = freeze
        self._waited: Tensor | None = None  # int64 [M]
        self._best: StackedCopy | None = None
        self._mb: ModelBatch | None = None
        self._saved: dict[str, Any] | None = None

    def on_train_start(self, event: Event) -> None:
        """Refuse a `patience` or `min_delta` of another number of models."""
        for name in ("patience", "min_delta"):
            own = getattr(self, name)
            if isinstance(own, list) and len(own) != len(event.mb):
                raise ModelBatchError(
                    f"{name} has {len(own)} values for a bundle of {len(event.mb)} models"
                )

    @torch.no_grad()
    def on_epoch_end(self, event: Event) -> None:
        """Compare, and stop who has waited long enough."""
        mb = event.mb
        values = monitored(self, event, self.monitor)
        self._prepare(event, values)
        assert self.best_values is not None and self.best_epochs is not None
        assert self.stopped_epochs is not None and self._waited is not None
        patience = torch.as_tensor(self.patience, device=values.device)
        delta = torch.as_tensor(self.min_delta, dtype=values.dtype, device=values.device)
        if self.mode == "min":
            better = values < self.best_values - delta
        else:
            better = values > self.best_values + delta
        better &= torch.isfinite(values)
        active = mb.active
        if self.freeze:  # somebody let a stopped model train again: it gets another chance
            again = active & (self.stopped_epochs >= 0)
            self._waited = torch.where(again, 0, self._waited)
            self.stopped_epochs = torch.where(again, -1, self.stopped_epochs)
        better &= self.stopped_epochs < 0
        self.best_values = torch.where(better, values, self.best_values)
        self.best_epochs = torch.where(better, event.epoch, self.best_epochs)
        self._waited = torch.where(better, 0, self._waited + 1)
        if self._best is not None:
            self._best.update(mb, better)
        stops = active & (self._waited >= patience) & (self.stopped_epochs < 0)
        self.stopped_epochs = torch.where(stops, event.epoch, self.stopped_epochs)
        left = active & (self.stopped_epochs < 0)
        restorable = stops & (self.best_epochs >= 0)
        flags = torch.stack([stops, left, restorable]).tolist()  # the one read of the device
        models = [i for i, flag in enumerate(flags[0]) if flag]
        if models and self._best is not None:
            self._best.restore(mb, [i for i in models if flags[2][i]])
        if models and self.freeze:
            freeze_models(event, models, f"'{self.monitor}' did not improve for a while")
        if not any(flags[1]):
            event.stop = True

    def _prepare(self, event: Event, values: Tensor) -> None:
        if self.best_values is None:
            worst = torch.inf if self.mode == "min" else -torch.inf
            self.best_values = torch.full_like(values, worst)
            never = torch.full_like(values, -1, dtype=torch.int64)
            self.best_epochs, self.stopped_epochs = never, never.clone()
            self._waited = torch.zeros_like(never)
        check_count(self, self.best_values, event)
        if self.best_values.device != values.device:
            for name in ("best_values", "best_epochs", "stopped_epochs", "_waited"):
                setattr(self, name, getattr(self, name).to(values.device))
        if self.restore_best and self._best is None:
            self._best, self._mb = StackedCopy(event.mb), event.mb
            if self._saved is not None:
                self._best.load_state_dict(self._saved)
        self._saved = None

    def check_models_change(self, change: Change) -> None:
        """Refuse a model of which it is not known when to stop it.

        Raises:
            ModelBatchError: `patience` or `min_delta` differs between the models.
        """
        for name in ("patience", "min_delta"):
            own = getattr(self, name)
            added = [slot for slot in change.fresh if change.replaced(slot) is None]
            if added and isinstance(own, list) and any(value != own[0] for value in own):
                raise ModelBatchError(
                    f"model {added[0]} (new): EarlyStopping has a {name} for each model, and none "
                    "for this one"
                )

    def models_changed(self, change: Change) -> None:
        """Go on with the models that there are now; a fresh one begins to count."""
        for name in ("patience", "min_delta"):
            own = getattr(self, name)
            if isinstance(own, list):
                fresh = [own[change.replaced(slot) or 0] for slot in range(change.num_models)]
                setattr(self, name, change.pick(own, fresh))
        worst = torch.inf if self.mode == "min" else -torch.inf
        for name, first in (
            ("best_values", worst),
            ("best_epochs", -1),
            ("stopped_epochs", -1),
            ("_waited", 0),
        ):
            values = getattr(self, name)
            if values is not None:
                setattr(self, name, change.rows(values, first))
        if self._best is not None and self._mb is not None:
            self._best.models_changed(self._mb, change)
        self._saved = rows_of_saved(self._saved, change)

    def state_dict(self) -> dict[str, Any]:
        """The best values and weights, and how long each model has waited."""
        if self.best_values is None:
            return {}
        state: dict[str, Any] = {
            "best_values": self.best_values,
            "best_epochs": self.best_epochs,
            "stopped_epochs": self.stopped_epochs,
            "waited": self._waited,
        }
        if self._best is not None:
            state["best"] = self._best.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.best_values = state_dict.get("best_values")
        self.best_epochs = state_dict.get("best_epochs")
        self.stopped_epochs = state_dict.get("stopped_epochs")
        self._waited = state_dict.get("waited")
        self._best, self._saved = None, state_dict.get("best")


def _per_model(name: str, value: Any, least: float) -> Any:
    values = list(value) if isinstance(value, Sequence) else [value]
    for number in values:
        if isinstance(number, bool) or not isinstance(number, int | float) or not number >= least:
            raise ModelBatchError(f"{name} must be at least {least}, got {number!r}")
    return list(value) if isinstance(value, Sequence) else value
