"""The arguments that all kinds of sweeps share, checked."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..callbacks import Callback
from ..errors import ModelBatchError
from ..random import check_seeds
from ..training.validation import check_metrics
from .data import Data
from .gather import Settings
from .pruners import Pruner

__all__ = ["check_count", "check_functions", "check_pruner", "check_settings"]


def check_settings(
    *,
    build: Any,
    train_data: Any,
    val_data: Any,
    epochs: Any,
    batch_size: Any,
    metric: Any,
    optimizer_cls: Any,
    loss_fn: Any,
    metric_fns: Any,
    scheduler: Any,
    scheduler_interval: Any,
    callbacks: Any,
    seed: Any,
    keep_weights: Any,
    device: Any,
    mode: Any = "min",
    bundle_size: Any = "auto",
    pruner: Any = None,
    checkpoint_every: Any = 1,
    directory: str | Path | None = None,
) -> tuple[Settings, str, dict[str, Any]]:
    """Check arguments as `run_sweep` takes them.

    Returns:
        The settings of bundles; the name of the metric's curve; and what holds where a
        configuration does not say, for `make_trial`.

    Raises:
        ModelBatchError: naming the argument.
    """
    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    check_count("checkpoint_every", checkpoint_every)
    if bundle_size != "auto":
        check_count("bundle_size", bundle_size, ' or "auto"')
    _check_words(mode, keep_weights, scheduler_interval)
    check_functions(build=build, loss_fn=loss_fn)
    if scheduler is not None:
        check_functions(scheduler=scheduler)
    if pruner is not None:
        check_pruner(pruner)
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
        directory=None if directory is None else Path(directory),
    )
    defaults = {
        "epochs": epochs,
        "batch_size": batch_size if train.loader is None else None,
        "optimizer_cls": optimizer_cls,
        "loss_fn": loss_fn,
    }
    return settings, metric, defaults


def check_count(name: str, value: Any, otherwise: str = "") -> None:
    """Refuse what is no positive integer.

    Args:
        name: of the argument.
        value: given.
        otherwise: what else it could have been, for the message.

    Raises:
        ModelBatchError: naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelBatchError(f"{name} must be a positive integer{otherwise}, got {value!r}")


def check_functions(**functions: Any) -> None:
    """Refuse what cannot be called.

    Raises:
        ModelBatchError: naming the argument.
    """
    for name, function in functions.items():
        if not callable(function):
            raise ModelBatchError(f"{name} must be callable, got {type(function).__name__}")


def check_pruner(pruner: Any, otherwise: str = "") -> None:
    """Refuse what is no pruner.

    Args:
        pruner: given.
        otherwise: what else it could have been, for the message.

    Raises:
        ModelBatchError: it has no `prune`, or is a class.
    """
    if isinstance(pruner, type) or not isinstance(pruner, Pruner):
        raise ModelBatchError(
            f"pruner must {otherwise}have a method prune(epoch, values), got {pruner!r}"
        )


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
