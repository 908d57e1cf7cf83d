"""Forming bundles out of trials, by the structure of their models."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..callbacks import Callback
from ..structure import analyse, same_structure
from .data import Data
from .ledger import Ledger
from .pruners import Pruner
from .sizing import measured_size
from .trials import Trial
from .weights import seeded

__all__ = ["Gatherer", "Kind", "Settings"]


@dataclass
class Settings:
    """What holds for all trials; see `run_sweep`."""

    build: Callable[[dict[str, Any]], nn.Module]
    train: Data
    val: Data | None
    bundle_size: int | None
    metric_fns: Mapping[str, Callable[..., Tensor]] | None
    callbacks: Callable[[list[int]], Sequence[Callback]]
    scheduler: Callable[[Optimizer, dict[str, Any]], LRScheduler] | None
    scheduler_interval: str
    pruner: Pruner | None
    keep_weights: str | None
    seed: int
    device: torch.device | None
    checkpoint_every: int
    directory: Path | None


@dataclass
class Kind:
    """Trials whose models share a structure, and whatever else a bundle shares."""

    key: tuple[Any, ...]
    reference: nn.Module
    size: int
    trials: set[int] = field(default_factory=set)


class Gatherer:
    """Chooses the trials of the next bundle, and builds their models.

    A trial whose model cannot be built fails at once.

    Args:
        trials: of the sweep, by id.
        settings: for all of them.
        ledger: says which trials have not begun.
        fail: records that a trial failed.
    """

    def __init__(
        self,
        trials: Mapping[int, Trial],
        settings: Settings,
        ledger: Ledger,
        fail: Callable[[int, BaseException], None],
    ) -> None:
        self.trials, self.settings, self.ledger = trials, settings, ledger
        self.halves: deque[Sequence[int]] = deque()  # of bundles that could not be trained
        self._fail = fail
        self._kinds: list[Kind] = []

    def next(self) -> tuple[Kind | None, list[Trial], list[nn.Module]] | None:
        """The next bundle; None if no trial is left."""
        while self.halves:
            trials = [self.trials[number] for number in self.halves.popleft()]
            built = [(trial, self.build(trial)) for trial in trials]
            alive = [(trial, model) for trial, model in built if model is not None]
            if alive:
                kind = next((k for k in self._kinds if alive[0][0].id in k.trials), None)
                return kind, [trial for trial, _ in alive], [model for _, model in alive]
        kind, chosen, models = None, [], []
        for number in self.ledger.pending():
            trial = self.trials[number]
            if kind is not None and (len(chosen) >= kind.size or trial.key != kind.key):
                continue
            known = next((k for k in self._kinds if number in k.trials), None)
            if kind is not None and known is not None and known is not kind:
                continue
            model = self.build(trial)
            own = known if model is None or known is not None else self._classify(trial, model)
            if model is None or own is None:
                continue
            kind = kind or own
            if own is kind:
                chosen.append(trial)
                models.append(model)
        return None if kind is None else (kind, chosen, models)

    def build(self, trial: Trial) -> nn.Module | None:
        """The model of a trial with its first weights; None if it failed."""
        try:
            return seeded(self.settings.build, trial.config, trial.seed)
        except Exception as error:
            self._fail(trial.id, error)
            return None

    def _classify(self, trial: Trial, model: nn.Module) -> Kind | None:
        """The kind that a model belongs to, a new one if need be; None if there is something wrong.

        Kinds compare with a model of their own, which is never trained.
        """
        try:
            for kind in self._kinds:
                if kind.key == trial.key and same_structure(kind.reference, model):
                    kind.trials.add(trial.id)
                    return kind
            reference = seeded(self.settings.build, trial.config, trial.seed)
            analyse([reference, model])
        except Exception as error:
            self._fail(trial.id, error)
            return None
        kind = Kind(trial.key, reference, self._size(trial, reference), {trial.id})
        self._kinds.append(kind)
        return kind

    def _size(self, trial: Trial, reference: nn.Module) -> int:
        settings = self.settings
        if settings.bundle_size is not None:
            return settings.bundle_size
        return measured_size(reference, trial, settings.train, settings.device)
