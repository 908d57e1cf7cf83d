"""`run_sweep`: a list of configurations in, the results of all of them out."""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..callbacks import Callback
from .arguments import check_settings
from .gather import Settings
from .journal import Journal
from .ledger import Ledger
from .progress import SweepProgress
from .pruners import Pruner
from .result import SweepResult
from .runner import Runner
from .trials import Trial, expand, make_trials
from .weights import Weights

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["run_sweep"]


def run_sweep(
    build: Callable[[dict[str, Any]], nn.Module],
    configs: Sequence[Mapping[str, Any]] | Mapping[str, Any],
    train_data: Any,
    val_data: Any = None,
    *,
    epochs: int,
    batch_size: int = 64,
    bundle_size: int | str = "auto",
    metric: str | None = None,
    mode: str = "min",
    optimizer_cls: type[Optimizer] = torch.optim.Adam,
    loss_fn: Callable[..., Tensor] = F.cross_entropy,
    metric_fns: Mapping[str, Callable[..., Tensor]] | None = None,
    pruner: Pruner | None = None,
    scheduler: Callable[[Optimizer, dict[str, Any]], LRScheduler] | None = None,
    scheduler_interval: str = "epoch",
    callbacks: Callable[[list[int]], Iterable[Callback]] | Iterable[Callback] | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    keep_weights: str | None = "last",
    directory: str | Path | None = None,
    resume: bool = True,
    checkpoint_every: int = 1,
    device: torch.device | str | None = None,
    progress: bool = True,
    console: "Console | None" = None,
) -> SweepResult:
    """Train a model for every configuration, in bundles, each as it would be trained alone.

    Trials whose models have the same structure, and that share batch size, optimizer class and
    loss, are trained together. Which these are is found out by building the models. A trial's
    result does not depend on the others (unless a pruner compares them), nor on `bundle_size`, nor
    on interruptions.

    Args:
        build: `build(config)` returns one model. It is called under the trial's own seed, perhaps
            several times.
        configs: a list of dicts; or a dict whose lists stand for choices: then all combinations.
            Some keys mean something here, all are there for `build`: the options of the optimizer
            class (`lr`, `weight_decay`, `betas`, `momentum`, ...), `clip_grad_norm`,
            `clip_grad_value`, `seed`, `epochs`, `batch_size`, `loss_fn` and `optimizer_cls` (a
            class, or the name of one of `torch.optim`).
        train_data: tensors `(x, y)` or `(x, y, sample_weight)`, or a `Dataset`: then the order of
            an epoch depends on `seed` and the epoch alone. Or an iterable of batches, as `fit`
            takes it, which every bundle goes through from the same state of the generators.
        val_data: likewise, for a validation after every epoch.
        epochs: how many.
        batch_size: where a config does not say; no matter with an iterable of batches.
        bundle_size: models in a bundle at most; `"auto"` lets as many in as 40 % of the free
            memory holds, by the size of the model and what its forward keeps, and 1024 at most.
        metric: `"loss"`, `"val_loss"`, `"val_<name>"` (or `"<name>"` without `val_data`) for the
            names of `metric_fns`; by default `"val_loss"`, or `"loss"` without `val_data`.
        mode: `"min"` or `"max"`: what is good.
        optimizer_cls: where a config does not say; any class of `torch.optim` but LBFGS.
        loss_fn: where a config does not say.
        metric_fns: see `fit`.
        pruner: asked after every epoch which trials shall end: `MedianPruner`,
            `SuccessiveHalving`, or a `Pruner` of your own.
        scheduler: `scheduler(optimizer, config)` returns one trial's learning rate schedule.
        scheduler_interval: `"epoch"` or `"step"`.
        callbacks: of your own: a function of the trials' ids (in the order of the bundle's models)
            that makes those of one bundle, or a list that is copied for each.
        seed: of the order of samples, and what the trials' seeds are derived from.
        seeds: for each config one, in place of those derived ones.
        keep_weights: `"last"`, `"best"` (by the metric) or None: what `SweepResult.export` gives.
        directory: for results, weights and checkpoints; without one nothing is written.
        resume: go on with what is in the directory. Give the same arguments and data as before;
            further configs may be added at the end.
        checkpoint_every: epochs between checkpoints.
        device: where to train; by default where `build` puts the models.
        progress: show how the sweep goes on.
        console: where to; None for standard output.

    Returns:
        The results by trial id, which is the place in the list of configs. The first Ctrl-C ends
        the sweep after the current step, with `status` `"interrupted"`.

    Raises:
        ModelBatchError: a bad argument, or a key of a config that cannot be used, naming the trial;
            nothing has run then. The directory is that of another sweep.
        CheckpointError: the directory cannot be written, or was altered.
    """
    start = time.perf_counter()
    expanded = expand(configs)
    settings, metric, defaults = check_settings(
        build=build,
        train_data=train_data,
        val_data=val_data,
        epochs=epochs,
        batch_size=batch_size,
        bundle_size=bundle_size,
        metric=metric,
        mode=mode,
        optimizer_cls=optimizer_cls,
        loss_fn=loss_fn,
        metric_fns=metric_fns,
        pruner=pruner,
        scheduler=scheduler,
        scheduler_interval=scheduler_interval,
        callbacks=callbacks,
        seed=seed,
        keep_weights=keep_weights,
        directory=directory,
        checkpoint_every=checkpoint_every,
        device=device,
    )
    trials = make_trials(expanded, seed=settings.seed, seeds=seeds, **defaults)
    folder = settings.directory
    ledger = Ledger(trials, metric, mode)
    with contextlib.ExitStack() as stack:
        journal = None
        if folder is not None:
            journal = Journal(folder, _head(settings, ledger, trials), trials, resume)
            stack.callback(journal.close)
        _restore(ledger, journal, pruner)
        weights = None if keep_weights is None else Weights(folder)
        view = stack.enter_context(SweepProgress(ledger, console)) if progress else None
        report = _nothing if view is None else view.update
        runner = Runner(trials, settings, ledger, journal, weights, report)
        runner.run()
    return SweepResult(
        ledger,
        status="interrupted" if runner.interrupted else "finished",
        seconds=time.perf_counter() - start,
        build=build,
        weights=weights,
    )


def _nothing() -> None:
    pass


def _head(settings: Settings, ledger: Ledger, trials: Sequence[Trial]) -> dict[str, Any]:
    """What must stay as it is in a sweep that goes on."""
    first = trials[0]
    return {
        "metric": ledger.metric,
        "mode": ledger.mode,
        "seed": settings.seed,
        "samples": settings.train.length,
        "epochs": first.epochs,
        "batch_size": first.batch_size,
        "optimizer_cls": first.optimizer_cls,
        "loss_fn": first.loss_fn,
        "metrics": sorted(settings.metric_fns or ()),
        "keep_weights": settings.keep_weights,
        "pruner": None if settings.pruner is None else type(settings.pruner),
    }


def _restore(ledger: Ledger, journal: Journal | None, pruner: Any) -> None:
    """Take over what the journal knows."""
    if hasattr(pruner, "reset"):
        pruner.reset()
    if journal is None:
        return
    for known in journal.records:
        ledger.apply(known)
    if pruner is None:
        return
    for bundle, epochs in ledger.epochs.items():
        if bundle == ledger.open:
            continue  # the checkpoint decides what it is told of this one
        for record in epochs:
            told = ledger.oriented(record)
            if told:
                pruner.prune(record["epoch"], told)
