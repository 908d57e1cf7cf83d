"""Training one bundle after the other."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..callbacks import BestModel, Callback
from ..checkpoint import GlobalRandomState
from ..optim import OptimizerFactory
from ..training import fit
from ..training.position import generators_of
from .assembly import assemble, seed_generators
from .failing import halves, what_happened
from .follower import Follower
from .gather import Gatherer, Kind, Settings
from .journal import Journal
from .ledger import Ledger
from .sizing import is_out_of_memory
from .trials import Trial
from .watching import with_nan_callback
from .weights import Weights

__all__ = ["Runner"]


class Runner:
    """Trains all trials that have not ended.

    Args:
        trials: of the sweep.
        settings: for all of them.
        ledger: what is known already; kept up to date.
        journal: likewise, on disk.
        weights: where to keep weights, None for nowhere.
        report: called when there is something new.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        settings: Settings,
        ledger: Ledger,
        journal: Journal | None,
        weights: Weights | None,
        report: Callable[[], None],
    ) -> None:
        self.trials = {trial.id: trial for trial in trials}
        self.settings, self.ledger, self.journal = settings, ledger, journal
        self.weights, self.report = weights, report
        self.interrupted = False
        parts = (settings.train, settings.val)
        self._generators = generators_of([part.loader for part in parts if part is not None])
        self._beginning = [generator.get_state() for generator in self._generators]
        self.gatherer = Gatherer(self.trials, settings, ledger, self._fail)

    def run(self) -> None:
        """Train until every trial has ended, or Ctrl-C."""
        before = GlobalRandomState().state_dict()
        try:
            self._remove_old_checkpoints()
            if self.ledger.open is not None:
                self._go_on(self.ledger.open)
            while not self.interrupted and (gathered := self.gatherer.next()):
                kind, trials, models = gathered
                number = self.ledger.next_bundle
                ids = [trial.id for trial in trials]
                self._record({"kind": "bundle", "bundle": number, "trials": ids})
                self._train_or_split(number, trials, models, kind)
        finally:
            GlobalRandomState().load_state_dict(before)
            for generator, state in zip(self._generators, self._beginning):
                generator.set_state(state)

    def _record(self, record: Mapping[str, Any]) -> None:
        self.ledger.apply(record)
        if self.journal is not None:
            self.journal.write(record)

    def _fail(self, trial: int, error: BaseException) -> None:
        self._record({"kind": "failed", "trial": trial, "error": what_happened(error)})
        self.report()

    # ---- training them

    def _go_on(self, number: int) -> None:
        """Train on the bundle that was running when the sweep was interrupted."""
        trials = [self.trials[own] for own in self.ledger.bundles[number]]
        models = [self.gatherer.build(trial) for trial in trials]
        if any(model is None for model in models):  # it is another build than it was then
            self._abandon(number, [])
            return
        self._train_or_split(number, trials, [m for m in models if m is not None], None)

    def _train_or_split(
        self, number: int, trials: list[Trial], models: list[nn.Module], kind: Kind | None
    ) -> None:
        try:
            status = self._train(number, trials, models)
        except Exception as error:
            failure = error
        else:
            self.interrupted = status == "interrupted"
            if not self.interrupted:
                self._close(number, "closed")
            return
        ids = [trial.id for trial in trials]
        if len(ids) == 1:
            self._abandon(number, [])
            self._fail(ids[0], failure)
            return
        first, second = halves(ids)
        if is_out_of_memory(failure) and kind is not None:
            kind.size = len(first)
        self._abandon(number, [first, second])

    def _abandon(self, number: int, again: list[Sequence[int]]) -> None:
        if self.weights is not None:
            self.weights.forget(self.ledger.bundles[number])
        self._close(number, "void")
        self.gatherer.halves.extendleft(reversed(again))

    def _train(self, number: int, trials: list[Trial], models: list[nn.Module]) -> str:
        settings, first = self.settings, trials[0]
        mb, optimizer = assemble(trials, models, settings)
        models.clear()
        scheduler = None
        make = settings.scheduler
        if make is not None:
            scheduler = OptimizerFactory.create_lr_scheduler(
                optimizer, lambda own, i: make(own, dict(trials[i].config))
            )
        self._seed_generators()
        best = None
        if settings.keep_weights == "best":
            best = BestModel(self.ledger.metric, self.ledger.mode)
        follower = Follower(
            self.ledger,
            self._record,
            number,
            trials,
            settings.pruner,
            self.weights,
            best,
            self.report,
        )
        own = with_nan_callback(settings.callbacks([trial.id for trial in trials]))
        callbacks: list[Callback] = [*own, *([] if best is None else [best]), follower]
        directory = self._checkpoint(number)
        history = fit(
            mb,
            settings.train.training(first.batch_size),
            None if settings.val is None else settings.val.validation(first.batch_size),
            epochs=max(trial.epochs for trial in trials),
            loss_fn=first.loss_fn,
            metric_fns=settings.metric_fns,
            callbacks=callbacks,
            scheduler=scheduler,
            scheduler_interval=settings.scheduler_interval,
            checkpoint_dir=directory,
            checkpoint_every=settings.checkpoint_every,
            resume=directory is not None,
        )
        return history.status

    def _seed_generators(self) -> None:
        """What loaders and transforms draw does not depend on the bundles before this one."""
        seed_generators(self.settings.seed)
        for generator, state in zip(self._generators, self._beginning):
            generator.set_state(state)

    # ---- checkpoints

    def _checkpoint(self, number: int) -> Path | None:
        directory = self.settings.directory
        return None if directory is None else directory / f"bundle_{number:05d}"

    def _close(self, number: int, kind: str) -> None:
        self._record({"kind": kind, "bundle": number})
        if self.journal is not None:
            self.journal.sync()
        path = self._checkpoint(number)
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)
        self.report()

    def _remove_old_checkpoints(self) -> None:
        directory = self.settings.directory
        if directory is None:
            return
        open_one = None if self.ledger.open is None else self._checkpoint(self.ledger.open)
        for path in directory.glob("bundle_*"):
            if path != open_one:
                shutil.rmtree(path, ignore_errors=True)
