"""`train_one_epoch`: one pass over the data."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..callbacks import Callback, CallbackPack
from ..errors import ModelBatchError
from .batches import length_of
from .loop import Loop

if TYPE_CHECKING:
    from ..batch import ModelBatch

__all__ = ["train_one_epoch"]


def train_one_epoch(
    mb: "ModelBatch",
    loader: Iterable[Any],
    optim: Optimizer | None = None,
    *,
    loss_fn: Callable[..., Tensor] = F.cross_entropy,
    callbacks: CallbackPack | Callback | Iterable[Callback] | None = None,
    router: Any = None,
    grad_scaler: torch.amp.GradScaler | None = None,
    amp_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    scheduler: LRScheduler | None = None,
    scheduler_interval: str = "epoch",
    accumulate: int = 1,
    metric_fns: Mapping[str, Callable[..., Tensor]] | None = None,
    epoch: int = 0,
) -> dict[str, Tensor]:
    """Train all models on every batch of a loader once.

    For several epochs, validation and checkpoints there is `fit`, whose arguments of the same names
    mean the same.

    Args:
        mb: the bundle; put into train mode if it is in eval mode.
        loader: see `fit`.
        optim: see `fit`.
        loss_fn: see `fit`.
        callbacks: told of this epoch as of a training of its own, from `on_train_start` to
            `on_train_end`.
        router: see `fit`.
        grad_scaler: see `fit`.
        amp_dtype: see `fit`.
        device: see `fit`.
        progress: see `fit`.
        scheduler: see `fit`.
        scheduler_interval: see `fit`.
        accumulate: see `fit`.
        metric_fns: computed on the training batches, before the step on them.
        epoch: the number of this epoch in a loop of one's own, for callbacks and samplers.

    Returns:
        `"loss"` and every metric, `[M]` in float64 on the bundle's device: means over the samples,
        by weight, as the models were when they saw them. NaN for a model that saw none.

    Raises:
        ModelBatchError: a bad argument, or a loader that yields nothing or something else.
    """
    if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
        raise ModelBatchError(f"epoch must be an integer from 0 on, got {epoch!r}")
    loop = Loop(
        mb,
        loader,
        None,
        optim=optim,
        loss_fn=loss_fn,
        metric_fns=metric_fns,
        callbacks=callbacks,
        router=router,
        scheduler=scheduler,
        scheduler_interval=scheduler_interval,
        accumulate=accumulate,
        grad_scaler=grad_scaler,
        amp_dtype=amp_dtype,
        device=device,
        progress=progress,
    )
    position = loop.position
    position.epoch = epoch
    position.step = epoch * -(-(length_of(loader) or 0) // accumulate)
    try:
        loop.tell("on_train_start")
        if not loop.event.stop:
            loop.run_epoch()
    finally:
        loop.tell("on_train_end")
    return loop.results
