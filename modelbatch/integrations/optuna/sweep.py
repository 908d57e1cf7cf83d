"""`OptunaSweep`: a study whose trials train side by side."""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import torch
import torch.nn.functional as F
from optuna.study import StudyDirection
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ...callbacks import Callback
from ...errors import ModelBatchError
from ...sweep.arguments import check_count
from ...sweep.progress import SweepProgress
from ...sweep.result import SweepResult
from ...sweep.weights import Weights
from .ledger import StudyLedger
from .link import Link, StudyCallback
from .plan import make_plan
from .pool import Pool
from .processes import new_mark, release
from .recovery import Heartbeat, recover
from .studies import Budget, open_study, optimize_loop, refuse_n_jobs, warn_of_sampler

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["OptunaSweep"]


class OptunaSweep:
    """Optimises an Optuna study with many trials alive at a time, which train in bundles.

    Optuna suggests and prunes as always: the sweep asks for trials, reports the metric of each
    after its epochs, asks whether to prune it, and tells what came of it. The place of a trial that
    has ended is given to a new one at once, which begins at its first step. Trials whose models
    have the same structure, and that share batch size, optimizer class and loss, share a bundle.

    What a trial's training gives depends on its configuration, its number and `seed`, and on
    nothing else. What Optuna suggests and prunes depends on the trials it knows at that moment.

    Args:
        study_or_storage: a study; or a storage, or the URL of one, or None for memory, with the
            next four arguments.
        space: `space(trial)` calls `trial.suggest_...` and returns the configuration, a dict as
            `run_sweep` takes it; or None if the parameters are the configuration.
        build: `build(config)` returns one model; see `run_sweep`.
        train_data: tensors `(x, y)` or `(x, y, sample_weight)`, or a `Dataset`. With an iterable of
            batches a trial cannot join a bundle that has begun.
        val_data: likewise, for a validation after every epoch.
        study_name: of the study in the storage; it is made if it is not there.
        sampler: by default `TPESampler(constant_liar=True, seed=seed)`.
        pruner: by default Optuna's, `MedianPruner()`.
        direction: `"minimize"` (by default) or `"maximize"`.
        epochs: how many for each trial, at most.
        batch_size: where a configuration does not say.
        bundle_size: trials alive at a time, at most. `"auto"`: a quarter of those to run, from 8 to
            256 (32 if nobody said how many), if 40 % of the free memory holds as many.
        metric: what Optuna is told: `"loss"`, `"val_loss"`, `"val_<name>"`; see `run_sweep`.
        value: which value of a trial counts: `"best"` of its epochs, or `"last"`.
        report_every: epochs between reports. A trial's last epoch is always reported.
        optimizer_cls: where a configuration does not say.
        loss_fn: where a configuration does not say.
        metric_fns: see `fit`.
        scheduler: `scheduler(optimizer, config)` returns one trial's learning rate schedule.
        scheduler_interval: `"epoch"` or `"step"`.
        callbacks: of ModelBatch, see `run_sweep`. Those of Optuna are given to `run`.
        seed: of the order of samples, and what the trials' seeds are derived from.
        keep_weights: `"last"`, `"best"` or None: what `SweepResult.export` gives.
        directory: for the weights, a file per trial; without one they stay in memory.
        device: where to train; by default where `build` puts the models.
        n_jobs: refused.

    Attributes:
        study: the study.

    Raises:
        ModelBatchError: a bad argument, or a study of several objectives.
    """

    def __init__(
        self,
        study_or_storage: optuna.Study | optuna.storages.BaseStorage | str | None,
        space: Callable[[optuna.Trial], Mapping[str, Any] | None],
        build: Callable[[dict[str, Any]], nn.Module],
        train_data: Any,
        val_data: Any = None,
        *,
        study_name: str | None = None,
        sampler: optuna.samplers.BaseSampler | None = None,
        pruner: optuna.pruners.BasePruner | None = None,
        direction: str | StudyDirection | None = None,
        epochs: int,
        batch_size: int = 64,
        bundle_size: int | str = "auto",
        metric: str | None = None,
        value: str = "best",
        report_every: int = 1,
        optimizer_cls: type[Optimizer] = torch.optim.Adam,
        loss_fn: Callable[..., Tensor] = F.cross_entropy,
        metric_fns: Mapping[str, Callable[..., Tensor]] | None = None,
        scheduler: Callable[[Optimizer, dict[str, Any]], LRScheduler] | None = None,
        scheduler_interval: str = "epoch",
        callbacks: Callable[[list[int]], Iterable[Callback]] | Iterable[Callback] | None = None,
        seed: int = 0,
        keep_weights: str | None = "last",
        directory: str | Path | None = None,
        device: torch.device | str | None = None,
        n_jobs: None = None,
    ) -> None:
        refuse_n_jobs(n_jobs)
        self._space = space
        self._plan = make_plan(
            space=space,
            build=build,
            train_data=train_data,
            val_data=val_data,
            epochs=epochs,
            batch_size=batch_size,
            bundle_size=bundle_size,
            metric=metric,
            value=value,
            report_every=report_every,
            optimizer_cls=optimizer_cls,
            loss_fn=loss_fn,
            metric_fns=metric_fns,
            scheduler=scheduler,
            scheduler_interval=scheduler_interval,
            callbacks=callbacks,
            seed=seed,
            keep_weights=keep_weights,
            directory=directory,
            device=device,
        )
        self.study = open_study(
            study_or_storage,
            study_name=study_name,
            sampler=sampler,
            pruner=pruner,
            direction=direction,
            seed=self._plan.settings.seed,
        )
        mode = "max" if self.study.direction == StudyDirection.MAXIMIZE else "min"
        self._ledger = StudyLedger(self._plan, mode)
        self._weights: Weights | None = None
        if keep_weights is not None:
            folder = self._plan.settings.directory
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            self._weights = Weights(folder)

    def run(
        self,
        n_trials: int | None = None,
        *,
        total: int | None = None,
        timeout: float | None = None,
        callbacks: Iterable[StudyCallback] = (),
        progress: bool = True,
        console: "Console | None" = None,
        take_over: bool = False,
        n_jobs: None = None,
    ) -> SweepResult:
        """Train trials until there are enough.

        First, trials that a killed process left behind are told as failed, and their parameters
        enqueued again. Trials that are enqueued come before those that the sampler makes up.

        Args:
            n_trials: so many more.
            total: until so many have ended in the study, those of earlier runs included; what a
                killed process left behind does not count. This is the one to give to a program
                that may be killed and started again.
            timeout: seconds after which no trial begins; those that are alive are trained to their
                end. Without any of the three, until `study.stop()` or Ctrl-C.
            callbacks: called as `callback(study, trial)` after each trial, as by `Study.optimize`.
            progress: show how the sweep goes on.
            console: where to; None for standard output.
            take_over: trials that run on another machine are nobody's either, and are enqueued
                again. Whether that machine, or container, is gone cannot be seen from here.
            n_jobs: refused.

        Returns:
            The results of all trials of the study, by their numbers. Of those that another run or
            process trained, it has what the storage knows. The first Ctrl-C ends the sweep after
            the current step, with `status` `"interrupted"`: the trials that were alive are told as
            failed, and enqueued for the next run.

        Raises:
            ModelBatchError: a bad argument.
        """
        start = time.perf_counter()
        refuse_n_jobs(n_jobs)
        for name, count in (("n_trials", n_trials), ("total", total)):
            if count is not None:
                check_count(name, count)
        if n_trials is not None and total is not None:
            raise ModelBatchError("give n_trials (so many more) or total (so many in all)")
        study, plan, ledger, mark = self.study, self._plan, self._ledger, new_mark()
        status = "finished"
        with contextlib.ExitStack() as stack:
            stack.callback(release, mark)
            stack.enter_context(optimize_loop(study))
            recover(study, take_over)
            ledger.take_all(study, self._space)
            budget = Budget(study, n_trials, total, timeout)
            limit = plan.most_alive(budget.left)
            if limit > 1:
                warn_of_sampler(study)
            link = Link(study, self._space, plan, ledger, mark, callbacks)
            stack.enter_context(Heartbeat(study, link.storage_ids))
            view = stack.enter_context(SweepProgress(ledger, console)) if progress else None
            show = _nothing if view is None else view.update
            try:
                Pool(link, plan, ledger, self._weights, budget, limit, show).run()
            except KeyboardInterrupt:
                status = "interrupted"
                link.abandon_all("interrupted by Ctrl-C")
            except BaseException:
                with contextlib.suppress(Exception):
                    link.abandon_all("the sweep raised an error")
                raise
            finally:
                ledger.to_come = 0
            ledger.take_all(study, self._space)
        return SweepResult(
            ledger,
            status=status,
            seconds=time.perf_counter() - start,
            build=plan.settings.build,
            weights=self._weights,
        )


def _nothing() -> None:
    pass
