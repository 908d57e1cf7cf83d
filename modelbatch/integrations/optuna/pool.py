"""The trials that are alive, in bundles: an epoch of each, and new trials for those that ended."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from ...callbacks import BestModel
from ...errors import ModelBatchError
from ...structure import same_structure
from ...sweep.bundle import Round, TrialBundle
from ...sweep.failing import halves, what_happened
from ...sweep.sizing import is_out_of_memory
from ...sweep.weights import Weights
from ...training.interrupts import Interrupts
from .ledger import StudyLedger
from .link import Link, Live
from .plan import Plan
from .studies import Budget

__all__ = ["Pool", "same_structure"]

Member = tuple[Live, nn.Module]


@dataclass
class _Group:
    """A bundle, and who is in it, who is about to leave it, and who is to join it.

    `alone`: its trials were in a bundle that could not be trained, so that nobody joins them.
    """

    bundle: TrialBundle
    lives: dict[int, Live]
    alone: bool
    leave: list[int] = field(default_factory=list)
    join: list[Member] = field(default_factory=list)


class Pool:
    """Keeps as many trials alive as may be, and trains them until there are no more.

    In a round every bundle trains for one epoch. Then Optuna is told of all trials in the order of
    their numbers, whatever bundle they are in. Then the places of those that ended are given to new
    trials: in a bundle that they fit into, or else in one of their own.

    Args:
        link: to the study.
        plan: for all trials.
        ledger: kept up to date.
        weights: where to keep weights, None for nowhere.
        budget: whether there is to be another trial.
        limit: trials alive at most.
        show: called when there is something new.
    """

    def __init__(
        self,
        link: Link,
        plan: Plan,
        ledger: StudyLedger,
        weights: Weights | None,
        budget: Budget,
        limit: int,
        show: Callable[[], None],
    ) -> None:
        self.link, self.plan, self.ledger, self.weights = link, plan, ledger, weights
        self.budget, self.limit, self.show = budget, limit, show
        self._groups: list[_Group] = []
        self._apart: deque[Sequence[Live]] = deque()  # halves of bundles that could not be trained
        self._interrupts = Interrupts()

    def run(self) -> None:
        """Train until no trial is alive and there is to be no other.

        Raises:
            KeyboardInterrupt: Ctrl-C; the step, or what was told to Optuna, was finished.
        """
        try:
            while True:
                with self._interrupts:
                    self._refill()
                self._interrupts.check()
                if not self._groups and not self._apart:
                    return
                rounds = list(self._train())
                with self._interrupts:
                    self._tell(rounds)
                    self.show()
                self._interrupts.check()
        finally:
            for group in self._groups:
                group.bundle.close()

    # ---- a round

    def _train(self) -> Iterator[tuple[_Group, Round]]:
        for group in list(self._groups):
            try:
                yield group, group.bundle.run_epoch()
            except Exception as error:
                self._groups.remove(group)
                self._split(list(group.lives.values()), error)

    def _tell(self, rounds: list[tuple[_Group, Round]]) -> None:
        events = sorted(
            (
                (number, place, group, round_)
                for group, round_ in rounds
                for place, number in enumerate(round_.trials)
            ),
            key=lambda event: event[0],
        )
        for number, place, group, round_ in events:
            live = group.lives[number]
            values = {name: row[place] for name, row in round_.values.items()}
            self.ledger.add_epoch(number, values, round_.seconds / len(round_.trials))
            self._tell_one(live, round_, values[self.ledger.metric], round_.epochs[place] + 1)
            if number not in self.link.alive:
                self._keep(group, number)
                del group.lives[number]
                group.leave.append(number)

    def _tell_one(self, live: Live, round_: Round, value: float, step: int) -> None:
        number = live.trial.id
        ended, reason = round_.ended.get(number), round_.reasons.get(number, "")
        if ended == "diverged":
            self.link.fail(live.asked, reason, ended)
            return
        if ended is not None or step % self.plan.report_every == 0:
            self.link.report(live, value, step)
        if ended is not None and number in self.link.alive:
            self.link.finish(live.asked, ended)

    def _keep(self, group: _Group, number: int) -> None:
        lost = self.ledger.results[number].status in ("diverged", "failed")
        if self.weights is None or lost:
            return
        if any(trial.id == number for trial in group.bundle.trials):  # no callback removed it
            group.bundle.keep(number, self.weights)

    # ---- who comes

    def _refill(self) -> None:
        """Fill the free places, with one change of each bundle at most."""
        self._start_those_apart()
        fresh: list[list[Member]] = []
        self.budget.count()
        while not self._apart and self._alive(fresh) < self.limit and self.budget.take():
            self._interrupts.check()
            self.ledger.to_come = self.budget.left or 0
            member = self.link.ask()
            if member is not None:
                self._place(member, fresh)
            self.show()
        for group in list(self._groups):
            self._exchange(group)
        for members in fresh:
            self._start(members, alone=False)

    def _alive(self, fresh: list[list[Member]]) -> int:
        there = sum(len(group.lives) + len(group.join) for group in self._groups)
        return there + sum(map(len, fresh))

    def _place(self, member: Member, fresh: list[list[Member]]) -> None:
        live, model = member
        for group in self._groups:
            if not group.alone and group.bundle.fits(live.trial, model):
                group.join.append(member)
                return
        for members in fresh:
            other, reference = members[0]
            if other.trial.key == live.trial.key and same_structure(reference, model):
                members.append(member)
                return
        if self.plan.bundle_size is None:
            self.limit = min(self.limit, self.plan.measure(live.trial, model))
        fresh.append([member])

    def _exchange(self, group: _Group) -> None:
        leave, join = group.leave, group.join
        group.leave, group.join = [], []
        try:
            try:
                group.bundle.exchange(leave, join=[(live.trial, model) for live, model in join])
            except ModelBatchError:  # nothing has changed: those who wanted to join do not fit
                if not join:
                    raise
                group.bundle.exchange(leave)
                self._start(join, alone=True)
            else:
                group.lives.update((live.trial.id, live) for live, _ in join)
        except Exception as error:
            self._groups.remove(group)
            self._split([*group.lives.values(), *(live for live, _ in join)], error)
            return
        if not group.lives:
            self._groups.remove(group)
            group.bundle.close()

    def _start(self, members: list[Member], alone: bool) -> None:
        lives = [live for live, _ in members]
        ledger, best = self.ledger, None
        if self.weights is not None and self.plan.settings.keep_weights == "best":
            best = BestModel(ledger.metric, ledger.mode)
        try:
            trials, models = [live.trial for live in lives], [model for _, model in members]
            bundle = TrialBundle(trials, models, self.plan.settings, best)
        except Exception as error:
            self._split(lives, error)
            return
        self._groups.append(_Group(bundle, {live.trial.id: live for live in lives}, alone))

    # ---- bundles that cannot be trained

    def _split(self, lives: list[Live], error: Exception) -> None:
        """Let trials begin anew in two halves; or the only one fail."""
        if len(lives) <= 1:
            for live in lives:
                self.link.fail(live.asked, what_happened(error))
            return
        first, second = halves(lives)
        if is_out_of_memory(error):
            self.limit = max(1, min(self.limit, self._alive([]) + len(first)))
        for live in lives:
            self.ledger.restart(live.trial.id)
        self._apart.extend([first, second])

    def _start_those_apart(self) -> None:
        while self._apart:
            room = self.limit - self._alive([])
            if len(self._apart[0]) > room and self._groups:
                return
            built = [(live, self.link.build(live)) for live in self._apart.popleft()]
            members = [(live, model) for live, model in built if model is not None]
            if members:
                self._start(members, alone=True)
