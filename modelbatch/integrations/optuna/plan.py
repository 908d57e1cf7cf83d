"""The arguments of a sweep, checked, in the form that bundles take them."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ...callbacks import Callback
from ...checkpoint import GlobalRandomState
from ...errors import ModelBatchError
from ...random import check_seeds, derive_seed
from ...sweep.data import Data
from ...sweep.gather import Settings
from ...sweep.run import _callback_maker, _check_metric, _check_numbers, _check_words
from ...sweep.sizing import automatic_size
from ...sweep.trials import Trial, make_trial
from ...training.position import _generators
from ...training.validation import check_metrics

__all__ = ["Plan", "check_count", "make_plan"]

# With "auto": a sampler learns from trials that have ended only.
_SHARE, _LEAST, _MOST, _UNKNOWN = 4, 8, 256, 32


@dataclass
class Plan:
    """What holds for all trials.

    Attributes:
        settings: for bundles.
        metric: the name of the curve that Optuna is told.
        value: `"best"` or `"last"`.
        report_every: epochs between reports.
        bundle_size: trials alive at a time, None for `"auto"`.
        defaults: what holds where a configuration does not say.
    """

    settings: Settings
    metric: str
    value: str
    report_every: int
    bundle_size: int | None
    defaults: dict[str, Any]

    def make_trial(self, number: int, config: dict[str, Any]) -> Trial:
        """Take a configuration apart.

        Raises:
            ModelBatchError: a key that cannot be used.
        """
        for key in config:
            if not isinstance(key, str):
                raise ModelBatchError(f"the key {key!r} is not a string")
        seed = derive_seed(number, self.settings.seed)
        return make_trial(number, config, seed=seed, **self.defaults)

    def most_alive(self, to_run: int | None) -> int:
        """How many trials may be alive at a time, if there are so many to run."""
        if self.bundle_size is not None:
            return self.bundle_size
        if to_run is None:
            return _UNKNOWN
        return min(_MOST, max(_LEAST, math.ceil(to_run / _SHARE)))

    def measure(self, trial: Trial, model: nn.Module) -> int:
        """How many models like this one the memory holds."""
        train, device = self.settings.train, self.settings.device
        if device is None:
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
        generators = _generators([train.loader])
        before = GlobalRandomState().state_dict()
        states = [generator.get_state() for generator in generators]
        try:
            batch = next(iter(train.training(trial.batch_size)), None)
        finally:
            GlobalRandomState().load_state_dict(before)
            for generator, state in zip(generators, states):
                generator.set_state(state)
        return automatic_size(model, trial, batch, device)


def make_plan(
    *,
    space: Any,
    build: Callable[[dict[str, Any]], nn.Module],
    train_data: Any,
    val_data: Any,
    epochs: int,
    batch_size: int,
    bundle_size: int | str,
    metric: str | None,
    value: str,
    report_every: int,
    optimizer_cls: type[Optimizer],
    loss_fn: Callable[..., Tensor],
    metric_fns: Mapping[str, Callable[..., Tensor]] | None,
    scheduler: Callable[[Optimizer, dict[str, Any]], LRScheduler] | None,
    scheduler_interval: str,
    callbacks: Callable[[list[int]], Iterable[Callback]] | Iterable[Callback] | None,
    seed: int,
    keep_weights: str | None,
    directory: str | Path | None,
    device: torch.device | str | None,
) -> Plan:
    """Check the arguments of `OptunaSweep`.

    Raises:
        ModelBatchError: one that cannot be.
    """
    _check_numbers(epochs, batch_size, bundle_size, 1)
    check_count("report_every", report_every)
    if value not in ("best", "last"):
        raise ModelBatchError(f'value must be "best" or "last", got {value!r}')
    _check_words("min", keep_weights, scheduler_interval)
    functions = {"space": space, "build": build, "loss_fn": loss_fn, "scheduler": scheduler}
    for name, function in functions.items():
        if not callable(function) and (name != "scheduler" or function is not None):
            raise ModelBatchError(f"{name} must be callable, got {type(function).__name__}")
    metric = _check_metric(metric, val_data is not None, check_metrics(metric_fns))
    try:
        (seed,) = check_seeds([seed], 1) or [0]
    except ModelBatchError as error:
        raise ModelBatchError(f"seed: {error}") from error
    place = None if device is None else torch.empty(0, device=device).device
    train = Data("train_data", train_data, seed, place)
    settings = Settings(
        build=build,
        train=train,
        val=None if val_data is None else Data("val_data", val_data, seed, place),
        bundle_size=None,
        metric_fns=metric_fns,
        callbacks=_callback_maker(callbacks),
        scheduler=scheduler,
        scheduler_interval=scheduler_interval,
        pruner=None,
        keep_weights=keep_weights,
        seed=seed,
        device=place,
        checkpoint_every=1,
        directory=None if directory is None else Path(directory),
    )
    defaults = {
        "epochs": epochs,
        "batch_size": batch_size if train.loader is None else None,
        "optimizer_cls": optimizer_cls,
        "loss_fn": loss_fn,
    }
    size = bundle_size if isinstance(bundle_size, int) else None
    return Plan(settings, metric, value, report_every, size, defaults)


def check_count(name: str, value: Any) -> None:
    """Refuse what is no positive integer.

    Raises:
        ModelBatchError: naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelBatchError(f"{name} must be a positive integer, got {value!r}")
