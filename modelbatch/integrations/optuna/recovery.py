"""Trials whose process is gone: told as failed, and their parameters enqueued again."""

import contextlib
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from .processes import still_runs

__all__ = [
    "ENDED_AS",
    "ERROR",
    "NOTE",
    "RETRIES",
    "RUN",
    "Heartbeat",
    "enqueue_lost",
    "is_lost",
    "note_of",
    "recover",
]

# User attributes of trials.
RUN = "modelbatch_run"  # who trains it: see processes.Mark
ERROR = "modelbatch_error"  # why it failed by itself
ENDED_AS = "modelbatch_status"  # "diverged" or "stopped", which Optuna has no states for
NOTE = "modelbatch_note"  # why it was told as failed although it had not
RETRIES = "modelbatch_retries"  # the number of the failed trial whose parameters it has

_OURS = (RUN, ERROR, ENDED_AS, NOTE)


def is_lost(trial: FrozenTrial) -> bool:
    """Whether a trial of a sweep was told as failed because nobody trained it any longer."""
    attributes = trial.user_attrs
    return trial.state == TrialState.FAIL and RUN in attributes and ERROR not in attributes


def note_of(trial: FrozenTrial) -> str:
    """What is known of why a trial was lost."""
    return str(trial.user_attrs.get(NOTE, "its process ended"))


def recover(study: optuna.Study, take_over: bool) -> None:
    """Tell Optuna of trials that a killed process left behind, and enqueue them again.

    Trials of processes that run, and those of another machine, are left alone; the latter unless
    the storage has a heartbeat that has stopped.

    Args:
        study: where to look.
        take_over: those of other machines are nobody's either.
    """
    stale = _stale_trials(study)
    elsewhere: dict[str, list[int]] = {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        mark = trial.user_attrs.get(RUN)
        if not isinstance(mark, Mapping):
            continue
        runs = still_runs(mark)
        place = f"process {mark.get('pid')} on {mark.get('host')}"
        if runs is None and not take_over and trial._trial_id not in stale:
            elsewhere.setdefault(place, []).append(trial.number)
        elif not runs:
            abandon(study, trial._trial_id, trial.number, f"{place} ended before the trial did")
    if _heartbeat_interval(study) is not None:  # those of others, as Study.optimize does
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)
    enqueue_lost(study)
    for place, numbers in elsewhere.items():
        warnings.warn(
            f"trials {', '.join(map(str, numbers))} are being trained by {place}, as far as can be "
            "seen from here. If that process is gone, run(take_over=True) enqueues them again.",
            stacklevel=4,
        )


def abandon(study: optuna.Study, trial_id: int, number: int, note: str) -> None:
    """Tell Optuna that nobody trains a trial any longer; `enqueue_lost` will find it."""
    with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError, ValueError):
        study._storage.set_trial_user_attr(trial_id, NOTE, note)
        study.tell(number, state=TrialState.FAIL)


def enqueue_lost(study: optuna.Study) -> list[int]:
    """Enqueue the parameters of lost trials again, once each.

    Returns:
        The numbers of those that were enqueued.
    """
    trials = study.get_trials(deepcopy=False)
    retried = {trial.user_attrs.get(RETRIES) for trial in trials}
    for trial in trials:  # Optuna's own callback for heartbeats may have been faster
        retried.update(trial.system_attrs.get("retry_history", ()))
    enqueued = []
    for trial in trials:
        fixed = trial.params or trial.system_attrs.get("fixed_params")
        if not fixed or trial.number in retried or not is_lost(trial):
            continue
        own = {name: value for name, value in trial.user_attrs.items() if name not in _OURS}
        # with the attributes of the system, in which samplers note where a trial belongs
        again = optuna.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={**own, RETRIES: trial.number},
            system_attrs=trial.system_attrs,
        )
        study.add_trial(again)
        enqueued.append(trial.number)
    return enqueued


# ---- heartbeats


def _heartbeat_interval(study: optuna.Study) -> float | None:
    interval = getattr(study._storage, "get_heartbeat_interval", None)
    return None if interval is None else interval()


def _stale_trials(study: optuna.Study) -> set[int]:
    """The trials whose heartbeat has stopped."""
    find: Any = getattr(study._storage, "_get_stale_trial_ids", None)
    if find is None or _heartbeat_interval(study) is None:
        return set()
    return set(find(study._study_id))


class Heartbeat:
    """Tells a storage that wants to know it that the trials are still being trained.

    Args:
        study: of the trials.
        alive: gives the storage's ids of them.
    """

    def __init__(self, study: optuna.Study, alive: Callable[[], list[int]]) -> None:
        self._storage: Any = study._storage
        self._interval, self._alive = _heartbeat_interval(study), alive
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Heartbeat":
        if self._interval is not None:
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def _beat(self) -> None:
        while True:
            for trial_id in self._alive():
                with contextlib.suppress(Exception):  # the next one may come through
                    self._storage.record_heartbeat(trial_id)
            self._storage.remove_session()
            if self._end.wait(self._interval):
                return
