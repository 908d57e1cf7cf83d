"""Writing the numbers of all models to a file, one row per step or epoch."""

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..change import Change
from ..errors import ModelBatchError
from ..evaluation import grad_norms
from .base import Callback, Event
from .report import check_interval, learning_rates
from .table_file import TableFile

__all__ = ["MetricsLogger"]

_FORMATS = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}


class MetricsLogger(Callback):
    """Writes losses, learning rates and metrics of all models to a CSV or JSON Lines file.

    A row is about a step (`event` is `"step"`) or an epoch (`"epoch"`). Beside `event`, `epoch` and
    `step` it has `loss_model_0`, `lr_model_0`, ... and, for an epoch, `val_loss_model_0`,
    `val_acc_model_0` and whatever else was measured; `loss` is then the mean over the epoch. A CSV
    file leaves empty what a row does not have, and gets further columns when a metric turns up
    that it has none for. Numbers are written so that reading them gives the same bits; in JSON
    Lines, which has no infinity or NaN, those are `null`.

    Rows are written together, at the latest after `flush_seconds` and at the end of an epoch, so
    another program may follow the file; when a training ends, by an exception too, none is missing.
    The number in a column's name is the model's id (`mb.model_ids`). What has left the bundle has
    empty cells from then on, and in JSON Lines no entries; a model that joins gets further columns.
    A resumed training continues the file behind the last row that its checkpoint knows of; a new
    one appends to a file of the same columns.

    Args:
        path: of the file; missing directories are made.
        format: `"csv"` or `"jsonl"`; None goes by the suffix.
        interval: write a row every so many steps; 0 for epochs alone.
        fields: what to write: `"loss"`, `"lr"`, `"grad_norm"`, `"active"`, `"val_loss"`,
            `"val_<metric>"`. None for the losses, learning rates and all metrics.
        flush_seconds: how long a row may wait for others, that all be read from the device at
            once; 0 writes every row at once.
        overwrite: begin anew where a new training finds a file.

    Raises:
        ModelBatchError: a bad argument; at the start of the training, if the file that is there
            has other columns.
    """

    reads_models = False

    def __init__(
        self,
        path: str | os.PathLike[str],
        format: str | None = None,
        interval: int = 1,
        fields: Sequence[str] | None = None,
        *,
        flush_seconds: float = 1.0,
        overwrite: bool = False,
    ):
        self.path = Path(path)
        if format is None:
            format = _FORMATS.get(self.path.suffix.lower())
            if format is None:
                raise ModelBatchError(
                    f"the suffix of '{self.path}' is neither .csv nor .jsonl; give format="
                )
        if format not in _FORMATS.values():
            raise ModelBatchError(f'format must be "csv" or "jsonl", got {format!r}')
        if isinstance(fields, str):
            raise ModelBatchError(f"fields must be a sequence of names, got the string {fields!r}")
        if fields is not None and not fields:
            raise ModelBatchError("fields names nothing to write")
        self.format = format
        self.interval = check_interval("interval", interval, least=0)
        self.fields = None if fields is None else list(dict.fromkeys(fields))
        if not flush_seconds >= 0:
            raise ModelBatchError(f"flush_seconds must not be negative, got {flush_seconds}")
        self.flush_seconds = flush_seconds
        self.overwrite = overwrite
        self._file: TableFile | None = None
        self._close: weakref.finalize[[], MetricsLogger] | None = None
        self._begun = False
        self._resume_rows: int | None = None

    def on_train_start(self, event: Event) -> None:
        """Open the file, so that what is wrong with it shows now."""
        self._open(event)

    def on_train_step(self, event: Event) -> None:
        """Note a row about this step."""
        if self.interval and event.step % self.interval == 0:
            losses = {} if event.losses is None else {"loss": event.losses}
            self._add(event, "step", losses)

    def on_epoch_end(self, event: Event) -> None:
        """Write a row about this epoch."""
        self._add(event, "epoch", event.metrics)
        if self._file is not None:
            self._file.flush()

    def on_train_end(self, event: Event) -> None:
        """Close the file."""
        if self._close is not None:
            self._close()
        self._file, self._close, self._resume_rows = None, None, None

    def _open(self, event: Event) -> TableFile:
        if self._file is None:
            keep = self._resume_rows
            if keep is None and self.overwrite and not self._begun:
                keep = 0
            columns = ["loss", "lr"] if self.fields is None else self.fields
            if learning_rates(event.mb, event.optimizer) is None:
                columns = [name for name in columns if name != "lr"]
            self._file = TableFile(
                self.path, self.format, columns, event.mb.model_ids, keep, self.flush_seconds
            )
            # a loop that never says it has ended loses nothing
            self._close = weakref.finalize(self, self._file.close)
            self._begun = True
        return self._file

    def _add(self, event: Event, kind: str, metrics: dict[str, Tensor]) -> None:
        wanted = self.fields
        # copies: a loop may write the next losses into the same tensor
        vectors = {
            k: v.detach().clone() for k, v in metrics.items() if wanted is None or k in wanted
        }
        rates = None
        if wanted is None or "lr" in wanted:
            rates = learning_rates(event.mb, event.optimizer)
        if wanted is not None and kind == "step" and "grad_norm" in wanted:
            norms = grad_norms(event.mb)
            if norms is not None:
                vectors["grad_norm"] = norms.clone()
        if wanted is not None and "active" in wanted:
            vectors["active"] = event.mb.active.float()
        file = self._file or self._open(event)
        if vectors or rates is not None:
            file.add_row((kind, event.epoch, event.step), vectors, rates)

    def models_changed(self, change: Change) -> None:
        """Write the numbers of the models that there are now; each has columns by its id."""
        if self._file is not None:
            self._file.models_changed(change.ids)

    def state_dict(self) -> dict[str, Any]:
        """How many rows there are."""
        if self._file is not None:
            self._file.flush()
            return {"rows": self._file.rows}
        return {} if self._resume_rows is None else {"rows": self._resume_rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue behind that many rows."""
        self._resume_rows = state_dict.get("rows")
