"""`run_sweep`: a list of configurations in, the results of all of them out."""

import contextlib
import copy
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
from ..errors import ModelBatchError
from ..random import check_seeds
from ..training.validation import check_metrics
from .data import Data
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
    _check_numbers(epochs, batch_size, bundle_size, checkpoint_every)
    _check_words(mode, keep_weights, scheduler_interval)
    for name, function in (("build", build), ("loss_fn", loss_fn), ("scheduler", scheduler)):
        if not callable(function) and (name != "scheduler" or function is not None):
            raise ModelBatchError(f"{name} must be callable, got {type(function).__name__}")
    if pruner is not None and not (isinstance(pruner, Pruner) and not isinstance(pruner, type)):
        raise ModelBatchError(f"pruner must have a method prune(epoch, values), got {pruner!r}")
    metric = _check_metric(metric, val_data is not None, check_metrics(metric_fns))
    try:
        (seed,) = check_seeds([seed], 1) or [0]
    except ModelBatchError as error:
        raise ModelBatchError(f"seed: {error}") from error
    place = None if device is None else torch.empty(0, device=device).device
    train = Data("train_data", train_data, seed, place)
    val = None if val_data is None else Data("val_data", val_data, seed, place)
    trials = make_trials(
        expanded,
        seed=seed,
        seeds=seeds,
        epochs=epochs,
        batch_size=batch_size if train.loader is None else None,
        optimizer_cls=optimizer_cls,
        loss_fn=loss_fn,
    )
    folder = None if directory is None else Path(directory)
    settings = Settings(
        build=build,
        train=train,
        val=val,
        bundle_size=bundle_size if isinstance(bundle_size, int) else None,
        metric_fns=metric_fns,
        callbacks=_callback_maker(callbacks),
        scheduler=scheduler,
        scheduler_interval=scheduler_interval,
        pruner=pruner,
        keep_weights=keep_weights,
        seed=seed,
        device=place,
        checkpoint_every=checkpoint_every,
        directory=folder,
    )
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


# ---- checks


def _check_numbers(epochs: Any, batch_size: Any, bundle_size: Any, checkpoint_every: Any) -> None:
    numbers = {"epochs": epochs, "batch_size": batch_size, "checkpoint_every": checkpoint_every}
    if bundle_size != "auto":
        numbers["bundle_size"] = bundle_size
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            auto = ' or "auto"' if name == "bundle_size" else ""
            raise ModelBatchError(f"{name} must be a positive integer{auto}, got {value!r}")


def _check_words(mode: Any, keep_weights: Any, scheduler_interval: Any) -> None:
    for name, value, allowed in (
        ("mode", mode, ("min", "max")),
        ("keep_weights", keep_weights, ("last", "best", None)),
        ("scheduler_interval", scheduler_interval, ("epoch", "step")),
    ):
        if value not in allowed:
            words = ", ".join("None" if word is None else f'"{word}"' for word in allowed)
            raise ModelBatchError(f"{name} must be one of {words}, got {value!r}")


def _check_metric(metric: Any, validates: bool, metric_fns: Mapping[str, Any]) -> str:
    prefix = "val_" if validates else ""
    known = ["loss", *(["val_loss"] if validates else []), *(prefix + name for name in metric_fns)]
    if metric is None:
        return "val_loss" if validates else "loss"
    if metric not in known:
        hint = "" if validates else "; there is no val_data"
        raise ModelBatchError(f"metric must be one of {', '.join(known)}, got {metric!r}{hint}")
    return str(metric)


def _callback_maker(callbacks: Any) -> Callable[[list[int]], Sequence[Callback]]:
    if callbacks is None:
        return lambda trials: []
    if isinstance(callbacks, Callback):
        callbacks = [callbacks]
    if callable(callbacks):
        return lambda trials: list(callbacks(trials))
    if not isinstance(callbacks, Iterable) or isinstance(callbacks, str | Mapping):
        raise ModelBatchError(
            f"callbacks must be a list of callbacks or a function that makes one, got "
            f"{type(callbacks).__name__}"
        )
    given = list(callbacks)
    for callback in given:
        if not isinstance(callback, Callback):
            raise ModelBatchError(f"expected a Callback, got {callback!r}")
    return lambda trials: copy.deepcopy(given)
