"""What is known of the trials of a study, in the form that results and progress views read."""

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.trial import FixedTrial, FrozenTrial, TrialState

from ...random import derive_seed
from ...sweep.ledger import Ledger
from ...sweep.trials import Trial, TrialResult
from .plan import Plan
from .recovery import ENDED_AS, ERROR, is_lost, note_of

__all__ = ["StudyLedger"]

_STATUS = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "pending",
}


class StudyLedger(Ledger):
    """The results of a study's trials by number, those of earlier runs included.

    Args:
        plan: says what the metric is, which value of a trial counts, and what seeds are.
        mode: `"min"` or `"max"`, as the study wants it.

    Attributes:
        to_come: how many trials the run will ask for yet.
    """

    def __init__(self, plan: Plan, mode: str) -> None:
        super().__init__([], plan.metric, mode)
        self.value, self.seed = plan.value, plan.settings.seed
        self.to_come = 0
        self._epochs_each: int = plan.defaults["epochs"]
        self._own: set[int] = set()

    # ---- trials of this sweep

    def asked(self, number: int) -> None:
        """Optuna has given a trial this number."""
        seed = derive_seed(number, self.seed)
        self.results[number] = TrialResult(number, {}, seed, status="running")
        self._planned[number] = self._epochs_each
        self._own.add(number)

    def begin(self, trial: Trial) -> None:
        """The trial is known."""
        result = self.results[trial.id]
        result.config, result.seed = trial.config, trial.seed
        self._planned[trial.id] = trial.epochs

    def add_epoch(self, number: int, values: Mapping[str, float], seconds: float) -> None:
        """A trial has trained for one more epoch."""
        result = self.results[number]
        result.seconds += seconds
        for name, value in values.items():
            result.curves.setdefault(name, []).append(value)
        self._choose(result)

    def _choose(self, result: TrialResult) -> None:
        if self.value == "best":
            self._look_at(result)
            return
        value = result.curves[self.metric][-1]
        found = math.isfinite(value)
        result.value, result.epoch = (value, result.epochs - 1) if found else (None, None)

    def restart(self, number: int) -> None:
        """A trial begins anew."""
        result = self.results[number]
        result.value = result.epoch = None
        result.curves, result.seconds = {}, 0.0

    def end(self, number: int, status: str, error: str = "") -> None:
        """A trial has ended."""
        self.results[number].status, self.results[number].error = status, error

    def work(self) -> tuple[int, int]:
        """Epochs of trials that were trained, and those that may still come."""
        done, left = super().work()
        return done, left + self.to_come * self._epochs_each

    # ---- what the storage knows

    def take_all(self, study: optuna.Study, space: Callable[..., Any]) -> None:
        """Take over the trials of a study that this object did not train.

        Args:
            study: which one.
            space: makes configurations of their parameters.
        """
        for trial in study.get_trials(deepcopy=False):
            if trial.number not in self._own:
                self._take(trial, space)
        self.results = dict(sorted(self.results.items()))

    def _take(self, trial: FrozenTrial, space: Callable[..., Any]) -> None:
        status = _STATUS[trial.state]
        if trial.state.is_finished():
            status = trial.user_attrs.get(ENDED_AS, status)
        known = self.results.get(trial.number)
        if known is not None and known.status == status:
            return
        config = _config(trial, space)
        seed = config.get("seed", derive_seed(trial.number, self.seed))
        error = note_of(trial) if is_lost(trial) else str(trial.user_attrs.get(ERROR, ""))
        result = TrialResult(trial.number, config, seed, status, error=error)
        values = trial.intermediate_values
        for step in range(1, max(values, default=0) + 1):
            result.curves.setdefault(self.metric, []).append(values.get(step, math.nan))
            self._choose(result)
        if trial.state == TrialState.COMPLETE:
            result.value = trial.value
        if trial.duration is not None:
            result.seconds = trial.duration.total_seconds()
        self.results[trial.number] = result
        self._planned[trial.number] = self._epochs_each


def _config(trial: FrozenTrial, space: Callable[..., Any]) -> dict[str, Any]:
    """What `space` makes of the parameters of an earlier trial, if it can."""
    parameters = dict(trial.params)
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        return dict(space(FixedTrial(parameters, trial.number)) or parameters)
    return parameters
