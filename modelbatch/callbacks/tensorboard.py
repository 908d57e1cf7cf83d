"""Writing event files for TensorBoard."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..change import Change
from .base import Callback, Event
from .report import (
    check_interval,
    check_runs,
    learning_rates,
    model_hparams,
    read,
    require,
    scalars,
    tell_of_many_runs,
)

if TYPE_CHECKING:
    from ..batch import ModelBatch

__all__ = ["TensorBoardCallback"]


class TensorBoardCallback(Callback):
    """Logs for TensorBoard (`pip install modelbatch[tensorboard]`).

    With `runs="bundle"` one writer logs `loss/best`, `loss/median` and `loss/worst` of the active
    models, a histogram over the models `loss/models`, the learning rates and how many models are
    active; at the end of an epoch the same for `epoch_loss`, `val_loss` and every metric. When the
    training ends, each model's hyper-parameters and results go to the HParams tab, as runs
    `model_000`, `model_001`, ...

    With `runs="per_model"` every model has a writer of its own with its `loss`, `lr`, `val_loss`
    and so on.

    Args:
        log_dir: directory of the event files.
        interval: log every so many steps; 0 for epochs alone.
        runs: `"bundle"` or `"per_model"`.
        hparams: M dicts of hyper-parameters beside those of the optimizer. A model that joins the
            bundle has none of these.

    Raises:
        ImportError: tensorboard is not installed.
        ModelBatchError: a bad argument.
    """

    reads_models = False

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        interval: int = 10,
        runs: str = "bundle",
        hparams: Sequence[Mapping[str, Any]] | None = None,
    ):
        check_runs(runs, hparams)
        self.interval = check_interval("interval", interval, least=0)
        require("tensorboard", "tensorboard", "TensorBoardCallback")
        self._writer_class = require(
            "torch.utils.tensorboard", "tensorboard", "TensorBoardCallback"
        ).SummaryWriter
        self.log_dir = Path(log_dir)
        self.runs = runs
        self.hparams = hparams
        self._writers: list[Any] = []
        self._hyper: list[dict[str, Any]] = []
        self._results: dict[str, list[float]] = {}
        self._resumed = False
        self._follows: tuple[ModelBatch, Optimizer | None] | None = None

    def on_train_start(self, event: Event) -> None:
        """Open the writers."""
        self._close()
        self._hyper, _ = model_hparams(event.mb, event.optimizer, self.hparams)
        self._results = {}
        directories = [self.log_dir]
        if self.runs == "per_model":
            tell_of_many_runs("TensorBoardCallback", len(event.mb))
            directories = [self._directory(i) for i in event.mb.model_ids]
        # a resumed training does again what came after its checkpoint: that is hidden
        purge = event.step + 1 if self._resumed else None
        self._writers = [self._writer_class(str(d), purge_step=purge) for d in directories]
        self._follows = event.mb, event.optimizer

    def _directory(self, model_id: int) -> Path:
        return self.log_dir / f"model_{model_id:03d}"

    def models_changed(self, change: Change) -> None:
        """Log the models that there are now; a run that has no model any more ends."""
        if self.hparams is not None:
            self.hparams = change.pick(list(self.hparams), lambda slot: {})
        if not self._writers or self._follows is None:
            return
        self._hyper, _ = model_hparams(*self._follows, self.hparams)
        self._results = {
            name: change.pick(values, lambda slot: math.nan)
            for name, values in self._results.items()
        }
        if self.runs == "per_model":
            for old in change.removed:
                self._writers[old].close()
            self._writers = change.pick(
                self._writers,
                lambda slot: self._writer_class(str(self._directory(change.ids[slot]))),
            )

    def on_train_step(self, event: Event) -> None:
        """Log this step."""
        if not self.interval or event.step % self.interval or event.losses is None:
            return
        values = read({"loss": event.losses})
        rates = learning_rates(event.mb, event.optimizer)
        if rates is not None:
            values["lr"] = rates
        self._log(event, values)

    def on_epoch_end(self, event: Event) -> None:
        """Log the results of this epoch."""
        self._results = read(event.metrics)
        named = {"epoch_loss" if k == "loss" else k: v for k, v in self._results.items()}
        self._log(event, named)
        for writer in self._writers:
            writer.flush()

    def on_train_end(self, event: Event) -> None:
        """Log hyper-parameters and results of each model, and close the writers."""
        if self._writers:
            results = self._results
            if not results and event.mb.latest_losses is not None:
                results = read({"loss": event.mb.latest_losses})
            self._log_hparams(event, results)
        self._close()

    def _log(self, event: Event, values: Mapping[str, Sequence[float]]) -> None:
        if not self._writers:
            self.on_train_start(event)
        if self.runs == "per_model":
            for name, numbers in values.items():
                for writer, number in zip(self._writers, numbers, strict=True):
                    writer.add_scalar(name, number, event.step)
            return
        (writer,) = self._writers
        flags = event.mb._active
        for name, numbers in values.items():
            for tag, number in scalars(name, numbers, flags).items():
                writer.add_scalar(tag, number, event.step)
            finite = _finite(numbers, flags)
            if name != "lr" and finite.numel():
                writer.add_histogram(f"{name}/models", finite, event.step)
        writer.add_scalar("models/active", sum(flags), event.step)

    def _log_hparams(self, event: Event, results: Mapping[str, Sequence[float]]) -> None:
        ids = event.mb.model_ids
        for i, hyper in enumerate(self._hyper):
            metrics = {f"result/{name}": values[i] for name, values in results.items()}
            metrics["result/active"] = float(event.mb._active[i])
            if self.runs == "per_model":
                self._writers[i].add_hparams(hyper, metrics, run_name=".", global_step=event.step)
            else:
                run = f"model_{ids[i]:03d}"
                self._writers[0].add_hparams(hyper, metrics, run_name=run, global_step=event.step)

    def _close(self) -> None:
        for writer in self._writers:
            writer.close()
        self._writers = []

    def state_dict(self) -> dict[str, Any]:
        """That there was a training to be resumed."""
        return {"log_dir": str(self.log_dir)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on in the same directory: TensorBoard hides what came after the checkpoint."""
        self._resumed = True


def _finite(numbers: Sequence[float], active: Sequence[bool]) -> Tensor:
    """The finite values of active models (of all, if none is); a histogram takes no others."""
    values = torch.tensor(numbers, dtype=torch.float64)
    keep = torch.isfinite(values)
    if any(active):
        keep &= torch.tensor(active)
    return values[keep]
