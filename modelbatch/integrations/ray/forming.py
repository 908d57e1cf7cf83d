"""Bundles out of the models of one Ray trial."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from ...random import derive_seed
from ...structure import same_structure
from ...sweep.bundle import TrialBundle
from ...sweep.failing import halves, what_happened
from ...sweep.trials import Trial
from ...sweep.weights import seeded
from .arguments import Arguments
from .entries import Entry
from .table import Table

__all__ = ["Former"]


@dataclass
class _Kind:
    """Models that may share a bundle."""

    reference: nn.Module
    trials: list[Trial]


class Former:
    """Makes bundles; a model that cannot be trained fails alone.

    Args:
        arguments: for all models.
        table: is told the configurations and seeds.
        fail: records that a model failed.
    """

    def __init__(
        self, arguments: Arguments, table: Table, fail: Callable[[int, str], None]
    ) -> None:
        self.arguments, self.table, self._fail = arguments, table, fail

    def first(self, entries: Sequence[Entry]) -> list[TrialBundle]:
        """The bundles at the beginning, one for each structure."""
        kinds: list[_Kind] = []
        for entry in entries:
            try:
                trial = self._read(entry)
                model = seeded(self.arguments.settings.build, trial.config, trial.seed)
                kind = next((k for k in kinds if _fits(k, trial, model)), None)
            except Exception as error:
                self._fail(entry.number, what_happened(error))
                continue
            if kind is None:
                kinds.append(_Kind(model, [trial]))
            else:
                kind.trials.append(trial)
        return [bundle for kind in kinds for bundle in self.form(kind.trials, 0)]

    def _read(self, entry: Entry) -> Trial:
        seed, pbt = self.arguments.settings.seed, self.arguments.pbt
        result = self.table.results[entry.number]
        if pbt is not None:
            result.config = pbt.fill(entry.config, entry.number, seed)
        result.seed = derive_seed(entry.number, seed)
        trial = self.arguments.trial(entry.number, result.config, result.seed)
        result.seed = trial.seed
        return trial

    def form(self, trials: Sequence[Trial], epochs: int) -> list[TrialBundle]:
        """Bundles of these trials that have done so many epochs.

        It is one bundle; where that raises, its halves.
        """
        try:
            bundle = self.make(trials)
            for _ in range(epochs):
                bundle.run_epoch()
            return [bundle]
        except Exception as error:
            failure = what_happened(error)
        if len(trials) == 1:
            self._fail(trials[0].id, failure)
            return []
        return [bundle for half in halves(trials) for bundle in self.form(half, epochs)]

    def make(self, trials: Sequence[Trial]) -> TrialBundle:
        """A bundle of trials at their beginning."""
        settings = self.arguments.settings
        models = [seeded(settings.build, trial.config, trial.seed) for trial in trials]
        return TrialBundle(trials, models, settings)


def _fits(kind: _Kind, trial: Trial, model: nn.Module) -> bool:
    return trial.key == kind.trials[0].key and same_structure(kind.reference, model)
