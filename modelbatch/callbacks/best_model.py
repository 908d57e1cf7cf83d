"""Remembering the best weights of every model."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..change import Change
from ..errors import ModelBatchError
from .base import Callback, Event
from .early_stopping import check_count, check_mode, monitored
from .weights import StackedCopy, rows_of_saved

if TYPE_CHECKING:
    from ..batch import ModelBatch

__all__ = ["BestModel"]


class BestModel(Callback):
    """Keeps the weights that every model had at the end of its own best epoch.

    The copies take the memory of one more bundle. They are updated on the device, for all models at
    once, without waiting for it.

        best = BestModel("val_acc", mode="max")
        fit(mb, train, val, epochs=20, metric_fns={"acc": accuracy}, callbacks=[best])
        best.restore()

    Args:
        monitor: name of the metric at the end of an epoch: `"loss"`, `"val_loss"`,
            `"val_<metric>"`.
        mode: `"min"` or `"max"`.

    Attributes:
        best_values: the best value of each model, `[M]`; None before the first epoch.
        best_epochs: in which epoch that was, int64 `[M]`, -1 if no value was finite.

    Raises:
        ModelBatchError: a bad argument; in training, if there is no such metric.
    """

    best_values: Tensor | None = None
    best_epochs: Tensor | None = None

    def __init__(self, monitor: str = "val_loss", mode: str = "min"):
        self.monitor = monitor
        self.mode = check_mode(mode)
        self._mb: ModelBatch | None = None
        self._best: StackedCopy | None = None
        self._saved: dict[str, Any] | None = None

    def on_train_start(self, event: Event) -> None:
        """Remember the bundle, for `restore`."""
        self._mb = event.mb
        if self._saved is not None:
            self._best = StackedCopy(event.mb)
            self._best.load_state_dict(self._saved)
            self._saved = None

    @torch.no_grad()
    def on_epoch_end(self, event: Event) -> None:
        """Copy the models that are better than ever."""
        values = monitored(self, event, self.monitor)
        self._mb = event.mb
        if self.best_values is None or self.best_epochs is None:
            worst = torch.inf if self.mode == "min" else -torch.inf
            self.best_values = torch.full_like(values, worst)
            self.best_epochs = torch.full_like(values, -1, dtype=torch.int64)
        if self._best is None:
            self._best = StackedCopy(event.mb)
        check_count(self, self.best_values, event)
        best_values = self.best_values.to(values.device)
        better = values < best_values if self.mode == "min" else values > best_values
        better &= torch.isfinite(values)
        self.best_values = torch.where(better, values, best_values)
        self.best_epochs = torch.where(better, event.epoch, self.best_epochs.to(values.device))
        self._best.update(event.mb, better)

    def restore(self, models: int | Iterable[int] | None = None) -> list[int]:
        """Give models their best weights back.

        Args:
            models: their numbers; None for all.

        Returns:
            The models that got them: those that had a finite value at all.

        Raises:
            ModelBatchError: there has been no epoch yet, or no such model.
        """
        if self._best is None or self._mb is None or self.best_epochs is None:
            raise ModelBatchError("there are no best weights yet: no epoch has ended")
        if models is None:
            models = range(len(self._mb))
        numbers = [models] if isinstance(models, int) else list(models)
        epochs = self.best_epochs.tolist()
        known = [i for i in map(self._mb._number, numbers) if epochs[i] >= 0]
        self._best.restore(self._mb, known)
        return known

    def model_state_dict(self, i: int) -> dict[str, Tensor]:
        """The best weights of model i, copied, by its own parameter names.

        Raises:
            ModelBatchError: there has been no epoch yet, or no such model.
        """
        if self._best is None or self._mb is None:
            raise ModelBatchError("there are no best weights yet: no epoch has ended")
        return self._best.of_model(self._mb._number(i))

    def models_changed(self, change: Change) -> None:
        """Go on with the models that there are now; what others were worth is forgotten."""
        worst = torch.inf if self.mode == "min" else -torch.inf
        if self.best_values is not None and self.best_epochs is not None:
            self.best_values = change.rows(self.best_values, worst)
            self.best_epochs = change.rows(self.best_epochs, -1)
        if self._best is not None and self._mb is not None:
            self._best.models_changed(self._mb, change)
        self._saved = rows_of_saved(self._saved, change)

    def state_dict(self) -> dict[str, Any]:
        """The best values, epochs and weights."""
        if self._best is None:
            return {}
        return {
            "best_values": self.best_values,
            "best_epochs": self.best_epochs,
            "best": self._best.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.best_values = state_dict.get("best_values")
        self.best_epochs = state_dict.get("best_epochs")
        self._best, self._saved = None, state_dict.get("best")
