"""`fit`: training over epochs, with validation, callbacks, checkpoints and resume."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..callbacks import Callback, CallbackPack
from ..checkpoint.format import MANIFEST
from ..errors import ModelBatchError
from .history import History
from .loop import Loop

if TYPE_CHECKING:
    from ..batch import ModelBatch

__all__ = ["fit"]


def fit(
    mb: "ModelBatch",
    train_loader: Iterable[Any],
    val_loader: Iterable[Any] | None = None,
    *,
    epochs: int,
    optim: Optimizer | None = None,
    loss_fn: Callable[..., Tensor] = F.cross_entropy,
    metric_fns: Mapping[str, Callable[..., Tensor]] | None = None,
    callbacks: CallbackPack | Callback | Iterable[Callback] | None = None,
    router: Any = None,
    scheduler: LRScheduler | None = None,
    scheduler_interval: str = "epoch",
    accumulate: int = 1,
    grad_scaler: torch.amp.GradScaler | None = None,
    amp_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 1,
    resume: bool = False,
) -> History:
    """Train all models for some epochs.

    The first Ctrl-C ends the training after the current step: a checkpoint is written if there is a
    directory for it, and the history so far is returned. A second one raises `KeyboardInterrupt` at
    once. Training also ends when a callback sets `event.stop`, or when all models are frozen.

    Args:
        mb: the bundle; put into train mode if it is in eval mode.
        train_loader: yields `(x, y)`, `(x, y, sample_weight)` with weights `[B]` or `[M, B]`, or
            `RoutedBatch`; as often as there are epochs. `x` is a tensor, a tuple (or list) of
            positional or a dict of keyword arguments. Batches are moved to the bundle's device. If
            it or its sampler has a `set_epoch`, that is called.
        val_loader: likewise, for a validation in eval mode after every epoch; never routed.
        epochs: how many in all, those before a resume included.
        optim: an optimizer made for the bundle, by default `mb.optimizer`, which it becomes.
        loss_fn: one model's (outputs, targets) to one number, a mean over the batch.
        metric_fns: further such functions by name, computed in the validation; without one, on the
            training batches before the step on them.
        callbacks: in the order in which they are called.
        router: a `DataRouter`: which samples of a training batch each model sees.
        scheduler: of `OptimizerFactory.create_lr_scheduler`, or one of torch made for the bundle's
            optimizer. What watches a metric gets each model's own validation loss, or training loss
            without a validation. A single `ReduceLROnPlateau` of torch gets the mean over active
            models.
        scheduler_interval: `"epoch"` or `"step"`: after what the scheduler takes a step. With
            `"step"` the watched metric is the loss of the step.
        accumulate: batches per optimizer step. Their gradient is that of one batch with all their
            samples, if the loss is a mean over samples (class weights and `ignore_index` make it a
            mean of another kind, and batch normalisation sees the single batches). Fewer batches
            than that at the end of an epoch make a step of their own.
        grad_scaler: a `BundleGradScaler` or `torch.amp.GradScaler`; becomes `mb.grad_scaler`.
        amp_dtype: `torch.bfloat16` or `torch.float16` for `torch.autocast`; float16 without a
            scaler makes a `BundleGradScaler`.
        device: where to train; the bundle is moved there first. By default it stays where it is.
        progress: show a `ProgressBar`.
        checkpoint_dir: where `mb.save_all` keeps the latest state, which `mb.load_all` reads too.
        checkpoint_every: epochs between checkpoints; there is always one at the end.
        resume: go on from the checkpoint in `checkpoint_dir`, if there is one, as if training had
            never stopped. Give the same arguments and data as before (`epochs` may differ), and a
            bundle built as before: models that have left since leave it, and models that joined
            are made anew.

    Returns:
        The curves of all models, those before a resume included.

    Raises:
        ModelBatchError: a bad argument, or a loader that yields nothing or something else.
        CheckpointError: a checkpoint cannot be written, or does not fit.
        KeyboardInterrupt: a second Ctrl-C.
    """
    for name, value in (("epochs", epochs), ("checkpoint_every", checkpoint_every)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelBatchError(f"{name} must be a positive integer, got {value!r}")
    if resume and checkpoint_dir is None:
        raise ModelBatchError("resume needs checkpoint_dir=, where the checkpoint is")
    loop = Loop(
        mb,
        train_loader,
        val_loader,
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
    checkpoint = _Checkpoint(loop, checkpoint_dir)
    if resume:
        checkpoint.load()
    loop.event.epochs = epochs
    history = loop.position.history
    try:
        with loop.interrupts:
            try:
                _train(loop, checkpoint, epochs, checkpoint_every)
            except KeyboardInterrupt:
                if loop.interrupts.count > 1:
                    raise
                history.status = "interrupted"
            # before on_train_end, where callbacks may put other weights in place
            checkpoint.save()
    finally:
        loop.tell("on_train_end")
    return history


def _train(loop: Loop, checkpoint: "_Checkpoint", epochs: int, checkpoint_every: int) -> None:
    position, history = loop.position, loop.position.history
    history.status = "finished"
    loop.tell("on_train_start")
    position.resume()
    while position.epoch < epochs and (position.trained or not loop.ended()):
        loop.run_epoch()
        if position.epoch % checkpoint_every == 0:
            checkpoint.save()
        loop.interrupts.check()
    if not any(loop.mb._active):
        history.status = "frozen"
    elif loop.event.stop:
        history.status = "stopped"


class _Checkpoint:
    """The checkpoint of a training, if it has a directory for one."""

    def __init__(self, loop: Loop, directory: str | Path | None) -> None:
        self.loop = loop
        self.directory = None if directory is None else Path(directory)
        self._saved: tuple[object, ...] | None = None

    def save(self) -> None:
        """Write the state, unless it is there already."""
        position = self.loop.position
        place = (position.epoch, position.batch, position.begun, position.trained)
        if self.directory is None or self._saved == place:
            return
        self.loop.mb.save_all(self.directory, states=self.loop.states())
        self._saved = place

    def load(self) -> None:
        """Take over the state, if there is one."""
        if self.directory is not None and (self.directory / MANIFEST).exists():
            # callbacks may have removed models, or taken in others, since the script built them
            self.loop.mb.load_all(self.directory, states=self.loop.states(), resize=True)
