"""Asking a study for trials and telling it what came of them."""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from torch import nn

from ...sweep.failing import what_happened
from ...sweep.trials import Trial
from ...sweep.weights import seeded
from .ledger import StudyLedger
from .plan import Plan
from .processes import Mark
from .recovery import ENDED_AS, ERROR, RUN, abandon, enqueue_lost

__all__ = ["Link", "Live", "StudyCallback", "ask_marked"]

StudyCallback = Callable[[optuna.Study, FrozenTrial], None]


@dataclass
class Live:
    """A trial that is being trained.

    Attributes:
        asked: as Optuna knows it.
        trial: as bundles know it.
        reported: the last step that Optuna was told of.
    """

    asked: optuna.Trial
    trial: Trial
    reported: int = 0


class Link:
    """Talks to a study.

    Args:
        study: which one.
        space: what a trial suggests; returns a configuration, or None for its parameters.
        plan: how models are built.
        ledger: kept up to date.
        mark: of this run.
        callbacks: called with the study and each trial that was told.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: Callable[[optuna.Trial], Mapping[str, Any] | None],
        plan: Plan,
        ledger: StudyLedger,
        mark: Mark,
        callbacks: Iterable[StudyCallback],
    ) -> None:
        self.study, self.space, self.plan = study, space, plan
        self.ledger, self.mark = ledger, mark
        self.callbacks = list(callbacks)
        self.alive: dict[int, optuna.Trial] = {}  # asked for, and not told

    # ---- asking

    def ask(self) -> tuple[Live, nn.Module] | None:
        """The next trial with its model; None if it failed or pruned itself, which Optuna knows."""
        asked = ask_marked(self.study, self.mark)
        self.alive[asked.number] = asked
        self.ledger.asked(asked.number)
        try:
            given = self.space(asked)
            config = asked.params if given is None else given
            self.ledger.results[asked.number].config = dict(config)
            trial = self.plan.make_trial(asked.number, dict(config))
        except optuna.TrialPruned:
            self.prune(asked)
            return None
        except Exception as error:
            self.fail(asked, what_happened(error))
            return None
        self.ledger.begin(trial)
        live = Live(asked, trial)
        model = self.build(live)
        return None if model is None else (live, model)

    def build(self, live: Live) -> nn.Module | None:
        """The model of a trial with its first weights; None if it failed."""
        try:
            return seeded(self.plan.settings.build, live.trial.config, live.trial.seed)
        except Exception as error:
            self.fail(live.asked, what_happened(error))
            return None

    # ---- telling

    def report(self, live: Live, value: float, step: int) -> None:
        """Report a value, unless the trial did so before it began anew, and prune if need be."""
        if step <= live.reported:
            return
        live.reported = step
        asked = live.asked
        try:
            asked.report(value, step)
        except optuna.exceptions.UpdateFinishedTrialError:
            self._tell(asked, "failed", "ended by somebody else", state=TrialState.FAIL)
            return
        if asked.should_prune():
            self.prune(asked)

    def finish(self, asked: optuna.Trial, status: str) -> None:
        """The trial has done its epochs, or a callback has stopped it."""
        value = self.ledger.results[asked.number].value
        if value is None:
            self.fail(asked, f"no value of {self.ledger.metric} was finite")
            return
        if status != "finished":
            self._note(asked, ENDED_AS, status)
        self._tell(asked, status, value=value)

    def prune(self, asked: optuna.Trial) -> None:
        """The trial is not to go on."""
        self._tell(asked, "pruned", state=TrialState.PRUNED)

    def fail(self, asked: optuna.Trial, error: str, status: str = "failed") -> None:
        """The trial cannot go on."""
        self._note(asked, ERROR, error)
        if status != "failed":
            self._note(asked, ENDED_AS, status)
        self._tell(asked, status, error, state=TrialState.FAIL)

    def _note(self, asked: optuna.Trial, name: str, text: str) -> None:
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            asked.set_user_attr(name, text)

    def _tell(
        self,
        asked: optuna.Trial,
        status: str,
        error: str = "",
        *,
        value: float | None = None,
        state: TrialState | None = None,
    ) -> None:
        # a trial that somebody else has ended meanwhile stays as it is
        told = self.study.tell(asked, value, state=state, skip_if_finished=True)
        self.alive.pop(asked.number, None)
        self.ledger.end(asked.number, status, error)
        for callback in self.callbacks:
            callback(self.study, told)

    def abandon_all(self, note: str) -> None:
        """Tell Optuna of the trials that this run leaves, and enqueue them for the next one."""
        for asked in list(self.alive.values()):
            abandon(self.study, asked._trial_id, asked.number, note)
            self.ledger.end(asked.number, "failed", note)
            del self.alive[asked.number]
        enqueue_lost(self.study)

    def storage_ids(self) -> list[int]:
        """The storage's numbers of the trials that are being trained."""
        return [asked._trial_id for asked in list(self.alive.values())]


def ask_marked(study: optuna.Study, mark: Mark) -> optuna.Trial:
    """`study.ask()`, without a moment in which a trial runs and nobody knows where."""
    waiting = (TrialState.WAITING,)
    first = next(iter(study.get_trials(deepcopy=False, states=waiting)), None)
    if first is None:
        study.add_trial(optuna.create_trial(state=TrialState.WAITING, user_attrs={RUN: mark}))
    else:
        # another process may have begun, and even ended, it meanwhile
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            study._storage.set_trial_user_attr(first._trial_id, RUN, mark)
    asked = study.ask()
    if asked.user_attrs.get(RUN) != mark:
        asked.set_user_attr(RUN, mark)
    return asked
