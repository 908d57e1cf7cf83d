"""Training all models of one Ray trial, in one bundle for each structure."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ModelBatchError, StructureMismatchError
from ...sweep.bundle import Round, TrialBundle
from ...sweep.failing import halves, what_happened
from ...sweep.trials import Trial
from .arguments import Arguments
from .entries import Entry
from .forming import Former
from .pbt import Copy
from .table import Table

__all__ = ["ActorBundles"]

# Of a model that goes on from another one: how long it trains, and its random stream.
_STAYS = ("seed", "epochs")


class ActorBundles:
    """The bundles of one actor, which go through their epochs together.

    A model that cannot be built, or that raises in training, costs only itself: a bundle that
    raises is halved until the culprit is alone, and the halves are brought to where the bundle was.

    Args:
        entries: the models.
        arguments: for all of them.
        name: of the Ray trial.

    Attributes:
        table: the results.
        bundles: those that are training.
        epochs: how many they have done.
        weights: of models that have ended, or their best ones, by number.
        news: models that failed and of which there was no row yet.
        pruner: of this actor.
        former: makes bundles.
    """

    def __init__(self, entries: Sequence[Entry], arguments: Arguments, name: str) -> None:
        self.arguments, self.name = arguments, name
        self.pruner = copy.deepcopy(arguments.pruner)
        reset = getattr(self.pruner, "reset", None)
        if reset is not None:
            reset()
        self.table = Table(entries, arguments.metric, arguments.mode)
        self.weights: dict[int, dict[str, Any]] = {}
        self.epochs = 0
        self.news: list[int] = []
        self.former = Former(arguments, self.table, self._fail)
        self.bundles = self.former.first(entries)

    @property
    def done(self) -> bool:
        """Whether all models have ended."""
        return not self.bundles

    def close(self) -> None:
        """Tell the callbacks of models that have not ended that the training is over."""
        for bundle in self.bundles:
            bundle.close()

    def _fail(self, number: int, error: str) -> None:
        self.table.fail(number, error)
        self.weights.pop(number, None)
        self.news.append(number)

    def run_epoch(self) -> list[dict[str, Any]]:
        """Train all models for an epoch.

        Returns:
            A row for each of them.
        """
        rounds = []
        for bundle in list(self.bundles):
            self.bundles.remove(bundle)
            rounds += self._train(bundle)
        self.bundles = [bundle for bundle, _ in rounds]
        self.epochs += 1
        ended: dict[int, str] = {}
        told: dict[int, float] = {}
        for bundle, round_ in rounds:
            self._record(bundle, round_)
            ended |= round_.ended
            for number, value in zip(round_.trials, round_.values[self.arguments.metric]):
                if round_.ended.get(number) not in ("diverged", "stopped"):
                    told[number] = self.arguments.oriented(value)
        for number in self._ask(told):
            ended.setdefault(number, "pruned")
        numbers = [*self.news, *(number for _, r in rounds for number in r.trials)]
        self.news = []
        self._let_go(ended)
        copied = self._perturb({n: v for n, v in told.items() if n not in ended})
        rows = self.table.rows(numbers, copied)
        rows.sort(key=lambda row: row["number"])
        return rows

    def _train(self, bundle: TrialBundle) -> list[tuple[TrialBundle, Round]]:
        trials = bundle.trials
        try:
            return [(bundle, bundle.run_epoch())]
        except Exception as error:
            if any(self.table.lineage[trial.id] for trial in trials):
                raise  # where these models were cannot be found out again; Ray has the checkpoint
            failure = what_happened(error)
        if len(trials) == 1:
            self._fail(trials[0].id, failure)
            return []
        epochs = bundle.epochs_done(trials[0].id)
        del bundle
        formed = [b for half in halves(trials) for b in self.former.form(half, epochs)]
        return [pair for own in formed for pair in self._train(own)]

    def _record(self, bundle: TrialBundle, round_: Round) -> None:
        share = round_.seconds / len(round_.trials)
        for place, number in enumerate(round_.trials):
            values = {name: own[place] for name, own in round_.values.items()}
            best = self.table.add(number, values, share)
            if round_.ended.get(number) == "diverged":
                self.weights.pop(number, None)
            elif best and self.arguments.keep_weights == "best":
                self.weights[number] = bundle.state_dict_of(number)

    def _ask(self, told: Mapping[int, float]) -> list[int]:
        """Whom the pruner ends."""
        arguments, epoch = self.arguments, self.epochs - 1
        if not told:
            return []
        if arguments.board is not None:
            answer = arguments.board.ask(self.name, epoch, told)
        elif self.pruner is not None:
            answer = list(self.pruner.prune(epoch, dict(told)))
        else:
            return []
        for number in answer:
            if number not in told:
                raise ModelBatchError(
                    f"the pruner returned {number!r}, which is none of the models that it was "
                    f"asked about: {sorted(told)}"
                )
        return answer

    def _let_go(self, ended: Mapping[int, str]) -> None:
        for number, status in ended.items():
            self.table.results[number].status = status
        for bundle in list(self.bundles):
            leave = [trial.id for trial in bundle.trials if trial.id in ended]
            if self.arguments.keep_weights == "last":
                for number in leave:
                    if ended[number] != "diverged":
                        self.weights[number] = bundle.state_dict_of(number)
            if len(leave) == len(bundle):
                bundle.close()
                self.bundles.remove(bundle)
            elif leave:
                bundle.exchange(leave)

    def _perturb(self, values: Mapping[int, float]) -> list[int]:
        """Population based training in each bundle; returns which models were copied to."""
        pbt, seed = self.arguments.pbt, self.arguments.settings.seed
        if pbt is None or not pbt.due(self.epochs):
            return []
        copied = []
        for bundle in self.bundles:
            trials = {trial.id: trial for trial in bundle.trials}
            own = {number: values[number] for number in trials}
            configs = {number: trial.config for number, trial in trials.items()}
            for planned in pbt.plan(self.epochs, own, configs, seed):
                self._copy(bundle, planned, trials[planned.source], trials[planned.target])
                copied.append(planned.target)
        return copied

    def _copy(self, bundle: TrialBundle, planned: Copy, source: Trial, target: Trial) -> None:
        kept = {key: value for key, value in target.config.items() if key in _STAYS}
        operations = planned.operations
        for config in (planned.config, source.config):
            own = {key: value for key, value in config.items() if key not in _STAYS}
            try:
                trial = self.arguments.trial(target.id, own | kept, target.seed)
                if trial.key != target.key:
                    raise StructureMismatchError("batch size, optimizer class, loss or clipping")
                bundle.copy(source.id, target.id, trial)
                break
            except StructureMismatchError as error:
                raise ModelBatchError(
                    f"population based training cannot turn {source.config} into {own} in mid-"
                    f"training, because models of one bundle share what that changes: {error}"
                ) from error
            except Exception as error:
                if config is source.config:
                    raise
                operations = {"refused": what_happened(error)}  # then as the source is
        self.table.results[target.id].config = trial.config
        self.table.lineage[target.id].append(
            {"epochs": self.epochs, "source": source.id, "operations": operations}
        )
