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
from ...errors import ModelBatchError
from ...random import derive_seed
from ...sweep.arguments import check_count, check_functions, check_settings
from ...sweep.gather import Settings
from ...sweep.sizing import measured_size
from ...sweep.trials import Trial, make_trial

__all__ = ["Plan", "make_plan"]

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
        return measured_size(model, trial, self.settings.train, self.settings.device)


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
    check_count("report_every", report_every)
    if value not in ("best", "last"):
        raise ModelBatchError(f'value must be "best" or "last", got {value!r}')
    check_functions(space=space)
    settings, metric, defaults = check_settings(
        build=build,
        train_data=train_data,
        val_data=val_data,
        epochs=epochs,
        batch_size=batch_size,
        bundle_size=bundle_size,
        metric=metric,
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
    size, settings.bundle_size = settings.bundle_size, None
    return Plan(settings, metric, value, report_every, size, defaults)
