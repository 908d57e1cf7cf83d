"""Logging to Weights & Biases."""

import math
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from ..change import Change
from ..errors import ModelBatchError
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

__all__ = ["WandbCallback"]


class WandbCallback(Callback):
    """Logs to Weights & Biases (`pip install modelbatch[wandb]`).

    With `runs="bundle"` one run logs `loss/best`, `loss/median` and `loss/worst` of the active
    models, a histogram over the models, the learning rates and how many models are active; at the
    end of an epoch the same for `epoch_loss`, `val_loss` and every metric. When the training ends,
    a table `models` with one row per model gets its hyper-parameters and results.

    With `runs="per_model"` every model has a run of its own with its `loss`, `lr`, `val_loss` and
    so on and its hyper-parameters as config, all in one group, as for a sweep.

    The runs are independent of any other run in the process: `wandb.run` and `wandb.log` are left
    alone. Works offline with `mode="offline"` or `WANDB_MODE=offline`.

    Args:
        project: handed to `wandb.init`.
        name: of the run; with `"per_model"` what the names of the runs begin with.
        group: of the run; with `"per_model"` it is `name`, or made up if there is none.
        config: what to note beside the hyper-parameters of the optimizer.
        interval: log every so many steps; 0 for epochs alone.
        runs: `"bundle"` or `"per_model"`.
        hparams: M dicts of hyper-parameters beside those of the optimizer. A model that joins the
            bundle has none of these.
        **options: further arguments of `wandb.init`: `mode`, `dir`, `entity`, `tags`, ...

    Attributes:
        run_list: the runs that are open.

    Raises:
        ImportError: wandb is not installed.
        ModelBatchError: a bad argument.
    """

    reads_models = False

    def __init__(
        self,
        project: str | None = None,
        name: str | None = None,
        group: str | None = None,
        config: Mapping[str, Any] | None = None,
        interval: int = 10,
        runs: str = "bundle",
        hparams: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ):
        check_runs(runs, hparams)
        if refused := {"reinit", "id", "resume"} & options.keys():
            raise ModelBatchError(f"{', '.join(sorted(refused))}: WandbCallback sets this itself")
        self.interval = check_interval("interval", interval, least=0)
        self._wandb = require("wandb", "wandb", "WandbCallback")
        if not hasattr(self._wandb, "init"):  # a directory ./wandb of earlier runs looks like it
            raise ImportError(
                f"WandbCallback needs wandb, but 'import wandb' finds a plain directory "
                f"{os.path.abspath('wandb')}: pip install 'modelbatch[wandb]'"
            )
        self.name, self.group = name, group
        self.config = dict(config or {})
        self.runs = runs
        self.hparams = hparams
        self.options = {"project": project, **options}
        self.run_list: list[Any] = []
        self._ids: list[str] = []  # of the latest runs
        self._resumes = False
        self._hyper: list[dict[str, Any]] = []
        self._results: dict[str, list[float]] = {}
        self._defined: set[str] = set()
        self._follows: tuple[ModelBatch, Optimizer | None] | None = None
        self._names: dict[str, Any] = {}  # what the runs of models have in common

    def on_train_start(self, event: Event) -> None:
        """Begin the runs."""
        self._finish(0)
        self._hyper, shared = model_hparams(event.mb, event.optimizer, self.hparams)
        self._results, self._defined = {}, set()
        self._follows = event.mb, event.optimizer
        config = {**shared, "num_models": len(event.mb), **self.config}
        if self.runs == "bundle":
            rates = [hyper["lr"] for hyper in self._hyper if "lr" in hyper]
            if rates:
                config.update({"lr_min": min(rates), "lr_max": max(rates)})
            self._begin(0, config, name=self.name, group=self.group)
            return
        tell_of_many_runs("WandbCallback", len(event.mb))
        group = self.group or self.name or f"bundle-{uuid.uuid4().hex[:8]}"
        self._names = {"prefix": self.name or group, "group": group, "config": config}
        ids = event.mb.model_ids
        for i, hyper in enumerate(self._hyper):
            self._begin_model(i, ids[i], hyper)

    def _begin_model(self, number: int, model_id: int, hyper: Mapping[str, Any]) -> None:
        common = self._names
        own = {**common["config"], "model": model_id, **hyper}
        name = f"{common['prefix']}-model_{model_id:03d}"
        self._begin(number, own, name=name, group=common["group"])

    def models_changed(self, change: Change) -> None:
        """Log the models that there are now; a run that has no model any more ends."""
        if self.hparams is not None:
            self.hparams = change.pick(list(self.hparams), lambda slot: {})
        if self._resumes and self.runs == "per_model" and len(self._ids) == change.old_num_models:
            self._ids = change.pick(self._ids, lambda slot: uuid.uuid4().hex[:8])
        if not self.run_list or self._follows is None:
            return
        self._hyper, _ = model_hparams(*self._follows, self.hparams)
        self._results = {
            name: change.pick(values, lambda slot: math.nan)
            for name, values in self._results.items()
        }
        if self.runs != "per_model":
            return
        old_runs = list(self.run_list)
        for old in change.removed:
            old_runs[old].finish(exit_code=0)
        self._resumes, self._defined, self.run_list = False, set(), []
        for slot, source in enumerate(change.source):
            if source is None:
                self._begin_model(slot, change.ids[slot], self._hyper[slot])
            else:
                self.run_list.append(old_runs[source])

    def _begin(self, number: int, config: dict[str, Any], **names: str | None) -> None:
        more: dict[str, Any] = {}
        if self._resumes and number < len(self._ids):
            more = {"id": self._ids[number], "resume": "allow", "allow_val_change": True}
        run = self._wandb.init(
            reinit="create_new", config=config, **{**self.options, **names, **more}
        )
        run.define_metric("step", hidden=True)
        run.define_metric("*", step_metric="step")
        self.run_list.append(run)

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
        self._log(event, {"epoch_loss" if k == "loss" else k: v for k, v in self._results.items()})

    def on_train_end(self, event: Event) -> None:
        """Log the table of models, and end the runs."""
        if self.run_list:
            results = self._results
            if not results and event.mb.latest_losses is not None:
                results = read({"loss": event.mb.latest_losses})
            if self.runs == "bundle":
                self.run_list[0].log({"step": event.step, "models": self._table(event, results)})
            else:
                for run, active in zip(self.run_list, event.mb._active, strict=True):
                    run.summary["active"] = active
        # called while an exception is on its way, the runs did not end well
        self._finish(0 if sys.exc_info()[0] is None else 1)

    def _log(self, event: Event, values: Mapping[str, Sequence[float]]) -> None:
        if not self.run_list:
            self.on_train_start(event)
        first = {"step": event.step, "epoch": event.epoch}
        if self.runs == "per_model":
            for i, run in enumerate(self.run_list):
                own = {name: numbers[i] for name, numbers in values.items()}
                self._define(run, own, f"{i}/")
                run.log({**first, **own})
            return
        (run,) = self.run_list
        flags = event.mb._active
        row: dict[str, Any] = {**first, "models/active": sum(flags)}
        for name, numbers in values.items():
            own = scalars(name, numbers, flags)
            self._define(run, own)
            row.update(own)
            if own and name != "lr":
                row[f"{name}/models"] = self._wandb.Histogram(_finite(numbers, flags))
        run.log(row)

    def _define(self, run: Any, names: Mapping[str, Any], key: str = "") -> None:
        """Let the summary of a loss be its lowest value, not its last."""
        for name in names:
            if key + name in self._defined or not name.removesuffix("/best").endswith("loss"):
                continue
            self._defined.add(key + name)
            run.define_metric(name, step_metric="step", summary="min")

    def _table(self, event: Event, results: Mapping[str, Sequence[float]]) -> Any:
        options = list(dict.fromkeys(name for hyper in self._hyper for name in hyper))
        columns = ["model", "active", *options, *results]
        ids = event.mb.model_ids
        rows = [
            [
                ids[i],
                event.mb._active[i],
                *(hyper.get(name) for name in options),
                *(values[i] for values in results.values()),
            ]
            for i, hyper in enumerate(self._hyper)
        ]
        return self._wandb.Table(columns=columns, data=rows)

    def _finish(self, exit_code: int) -> None:
        if not self.run_list:
            return
        self._ids, self._resumes = [run.id for run in self.run_list], False
        runs, self.run_list = self.run_list, []
        for run in runs:
            run.finish(exit_code=exit_code)

    def state_dict(self) -> dict[str, Any]:
        """The ids of the runs."""
        return {"ids": [run.id for run in self.run_list] or list(self._ids)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the same runs."""
        self._ids, self._resumes = list(state_dict["ids"]), True


def _finite(numbers: Sequence[float], active: Sequence[bool]) -> list[float]:
    """The finite values of active models; of all, if none is."""
    everyone = not any(active)
    big = float("inf")
    return [v for v, on in zip(numbers, active, strict=True) if (on or everyone) and abs(v) < big]
