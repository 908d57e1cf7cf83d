"""What a `BundleTrainable` is told: the arguments of `run_sweep`, and some of its own."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ...callbacks import Callback
from ...errors import ModelBatchError
from ...sweep.arguments import check_count, check_pruner, check_settings
from ...sweep.gather import Settings
from ...sweep.pruners import Pruner
from ...sweep.trials import Trial, make_trial, oriented
from .pbt import BundlePBT
from .rungs import RungBoard

__all__ = ["Arguments", "read_arguments"]


@dataclass
class Arguments:
    """What holds for all models of a Ray trial, checked.

    Attributes:
        settings: for the bundles.
        metric: the name of the curve that is to become small or large.
        mode: `"min"` or `"max"`.
        defaults: of the configurations, for `make_trial`.
        pruner: of this actor, None for none.
        board: what stands for a pruner of all actors, None for none.
        pbt: population based training, None for none.
        keep_weights: `"last"`, `"best"` or None.
        epochs_per_step: epochs in one `step()`.
    """

    settings: Settings
    metric: str
    mode: str
    defaults: dict[str, Any]
    pruner: Pruner | None
    board: RungBoard | None
    pbt: BundlePBT | None
    keep_weights: str | None
    epochs_per_step: int

    def trial(self, number: int, config: dict[str, Any], seed: int) -> Trial:
        """Take one configuration apart.

        Raises:
            ModelBatchError: it cannot be used.
        """
        return make_trial(number, config, seed=seed, **self.defaults)

    def oriented(self, value: float) -> float:
        """A value of the metric, of which small ones are good; infinity if it is not finite."""
        return oriented(value, self.mode)


def read_arguments(
    *,
    build: Callable[[dict[str, Any]], nn.Module],
    train_data: Any,
    epochs: int,
    val_data: Any = None,
    batch_size: int = 64,
    metric: str | None = None,
    mode: str = "min",
    optimizer_cls: type[Optimizer] = torch.optim.Adam,
    loss_fn: Callable[..., Tensor] = F.cross_entropy,
    metric_fns: Mapping[str, Callable[..., Tensor]] | None = None,
    pruner: Pruner | RungBoard | None = None,
    pbt: BundlePBT | None = None,
    scheduler: Callable[[Optimizer, dict[str, Any]], LRScheduler] | None = None,
    scheduler_interval: str = "epoch",
    callbacks: Callable[[list[int]], Iterable[Callback]] | Iterable[Callback] | None = None,
    seed: int = 0,
    keep_weights: str | None = "last",
    epochs_per_step: int = 1,
    device: torch.device | str | None = None,
) -> Arguments:
    """Check the arguments of `BundleTrainable`, which see.

    Raises:
        ModelBatchError: naming the argument.
    """
    check_count("epochs_per_step", epochs_per_step)
    if not isinstance(pbt, BundlePBT | None):
        raise ModelBatchError(f"pbt must be a BundlePBT, got {type(pbt).__name__}")
    board = pruner if isinstance(pruner, RungBoard) else None
    own = None if isinstance(pruner, RungBoard) else pruner
    if own is not None:
        check_pruner(own, "be a RungBoard or ")
    settings, metric, defaults = check_settings(
        build=build,
        train_data=train_data,
        val_data=val_data,
        epochs=epochs,
        batch_size=batch_size,
        metric=metric,
        mode=mode,
        optimizer_cls=optimizer_cls,
        loss_fn=loss_fn,
        metric_fns=metric_fns,
        pruner=own,
        scheduler=scheduler,
        scheduler_interval=scheduler_interval,
        callbacks=callbacks,
        seed=seed,
        keep_weights=keep_weights,
        device=device,
    )
    settings.pruner = settings.keep_weights = None  # the actor's matter, not a bundle's
    return Arguments(
        settings, metric, mode, defaults, own, board, pbt, keep_weights, epochs_per_step
    )
