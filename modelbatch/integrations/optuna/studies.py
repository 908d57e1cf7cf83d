"""Opening a study, what a sweep cannot do with one, and how many trials are to come."""

import contextlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import optuna
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.trial import TrialState

from ...errors import ModelBatchError
from ...random import derive_seed
from .recovery import is_lost

__all__ = ["Budget", "open_study", "optimize_loop", "refuse_n_jobs", "warn_of_sampler"]

_DIRECTIONS = ("minimize", "maximize")


def refuse_n_jobs(n_jobs: Any) -> None:
    """Say why there are no jobs.

    Raises:
        ModelBatchError: always, unless there is nothing to refuse.
    """
    if n_jobs is not None:
        raise ModelBatchError(
            "n_jobs is refused: the trials of a sweep train side by side in one process already, "
            "as one bundle, and threads would only take turns with it. bundle_size= says how many "
            "there are at a time; for several devices start one process for each, on one storage"
        )


def open_study(
    given: optuna.Study | str | BaseStorage | None,
    *,
    study_name: str | None,
    sampler: BaseSampler | None,
    pruner: optuna.pruners.BasePruner | None,
    direction: Any,
    seed: int,
) -> optuna.Study:
    """The study itself, or the one of this name in a storage, which is made if need be.

    Raises:
        ModelBatchError: an argument does not go with another one, or there are several objectives.
    """
    if isinstance(given, optuna.Study):
        extra = {
            "study_name": study_name,
            "sampler": sampler,
            "pruner": pruner,
            "direction": direction,
        }
        for name, value in extra.items():
            if value is not None:
                raise ModelBatchError(f"{name} is the study's own; give it with a storage only")
        study = given
    elif given is None or isinstance(given, str | BaseStorage):
        study = _create(given, study_name, sampler, pruner, direction, seed)
    else:
        raise ModelBatchError(
            "the first argument must be an optuna.Study, a storage, or the URL of one, got "
            f"{type(given).__name__}"
        )
    if len(study.directions) > 1:
        raise ModelBatchError(
            f"the study has {len(study.directions)} objectives: Optuna prunes trials of one only, "
            "and a sweep watches one metric. Make a study of one direction"
        )
    return study


def _create(
    storage: str | BaseStorage | None,
    study_name: str | None,
    sampler: BaseSampler | None,
    pruner: optuna.pruners.BasePruner | None,
    direction: Any,
    seed: int,
) -> optuna.Study:
    study = optuna.create_study(
        storage=storage,
        study_name=study_name,
        sampler=optuna.samplers.RandomSampler() if sampler is None else sampler,
        pruner=pruner,
        direction="minimize" if direction is None else direction,
        load_if_exists=True,
    )
    words = str(getattr(direction, "name", direction)).lower()
    if direction is not None and study.direction.name.lower() != words:
        raise ModelBatchError(
            f"the study {study.study_name!r} is there already and wants its value to "
            f"{study.direction.name.lower()}, not to {words}"
        )
    if sampler is None:
        # a study that goes on must not draw again what it drew at first
        known = len(study.get_trials(deepcopy=False))
        own_seed = seed if known == 0 else derive_seed(known, seed)
        with warnings.catch_warnings():  # constant_liar was experimental once
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.sampler = TPESampler(constant_liar=True, seed=own_seed % (1 << 32))
    return study


def warn_of_sampler(study: optuna.Study) -> None:
    """Warn of a TPESampler that would suggest nearly the same to all trials of a bundle."""
    sampler = study.sampler
    sampler = getattr(sampler, "_base_sampler", sampler)  # of PartialFixedSampler
    if isinstance(sampler, TPESampler) and not getattr(sampler, "_constant_liar", True):
        warnings.warn(
            "the study's TPESampler has constant_liar=False: it does not know of the trials that "
            "are running, and will suggest nearly the same to all of them. Make it with "
            "TPESampler(constant_liar=True)",
            stacklevel=3,
        )


@contextlib.contextmanager
def optimize_loop(study: optuna.Study) -> Iterator[None]:
    """Be what `Study.optimize` is to samplers and callbacks, which may call `study.stop()`.

    Raises:
        ModelBatchError: within `Study.optimize`, or another sweep of the study.
    """
    local: Any = getattr(study, "_thread_local", None)
    if getattr(local, "in_optimize_loop", False):
        raise ModelBatchError("a sweep cannot run within Study.optimize or another sweep of it")
    if local is not None:
        local.in_optimize_loop = True
    try:
        yield
    finally:
        if local is not None:
            local.in_optimize_loop = False
        study._storage.remove_session()


class Budget:
    """Whether there is to be another trial.

    Args:
        study: the trials of which are counted.
        n_trials: so many more; None for any number.
        total: until so many have ended in the study, those of earlier runs and other processes
            included, and those that a killed process left behind not; None for any number.
        timeout: seconds after which no trial begins; None for any number.
    """

    def __init__(
        self,
        study: optuna.Study,
        n_trials: int | None,
        total: int | None,
        timeout: float | None,
    ) -> None:
        self.study, self.total = study, total
        self.left = n_trials
        self._deadline = None if timeout is None else time.monotonic() + timeout
        study._stop_flag = False
        self.count()

    def count(self) -> None:
        """Look at what other processes did meanwhile."""
        if self.total is None:
            return
        trials = self.study.get_trials(deepcopy=False)
        there = sum(
            t.state == TrialState.RUNNING or (t.state.is_finished() and not is_lost(t))
            for t in trials
        )
        self.left = max(0, self.total - there)

    def take(self) -> bool:
        """Whether to ask for a trial now; it counts as asked for then."""
        late = self._deadline is not None and time.monotonic() >= self._deadline
        if late or getattr(self.study, "_stop_flag", False) or self.left == 0:
            return False
        if _grid_is_taken(self.study):
            return False
        if self.left is not None:
            self.left -= 1
        return True


def _grid_is_taken(study: optuna.Study) -> bool:
    """Whether all points of a GridSampler are visited or running, and nothing is enqueued.

    The sampler itself stops the study when all have ended, which with several trials at a time is
    too late: it would have given out some twice.
    """
    find: Any = getattr(study.sampler, "_get_unvisited_grid_ids", None)
    if find is None:
        return False
    states = (TrialState.RUNNING, TrialState.WAITING)
    trials = study.get_trials(deepcopy=False, states=states)
    if any(trial.state == TrialState.WAITING for trial in trials):
        return False
    return set(find(study)) <= {trial.system_attrs.get("grid_id") for trial in trials}
