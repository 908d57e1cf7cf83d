"""ModelBatch's callbacks in a Lightning Trainer."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from ...callbacks import Callback as ModelCallback, CallbackPack, Event
from ...change import Change
from ...training.batches import _size
from .errors import BundleConfigurationError

__all__ = ["PackCallback"]


class PackCallback(Callback):
    """Lets callbacks that see every single model follow a `BundleModule`.

        Trainer(callbacks=[PackCallback([NaNCallback("freeze"), EarlyStopping("val_loss"), best])])

    They are told of optimizer steps, of validation batches and of epochs, with the means over the
    epoch in `event.metrics`: `loss`, `val_loss`, `val_<metric>` and what `log_per_model` was given.
    With `check_val_every_n_epoch=n` an epoch of theirs ends with every validation. `event.stop`
    ends the training, and so does the last model that freezes. Their states are part of the
    Trainer's checkpoints.

    Args:
        callbacks: callbacks of `modelbatch.callbacks`, or a `CallbackPack`.

    Raises:
        ModelBatchError: something that is none.
    """

    def __init__(self, callbacks: Iterable[ModelCallback] | ModelCallback | None) -> None:
        own = callbacks if isinstance(callbacks, CallbackPack) else CallbackPack(callbacks)
        self.pack = own
        self._event: Event | None = None
        self._losses: Tensor | None = None  # summed over the batches of an optimizer step
        self._batches = 0
        self._size = 0
        self._step = 0
        self._validated = False

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin.

        Raises:
            BundleConfigurationError: the module is no `BundleModule`.
        """
        from .module import BundleModule

        if not isinstance(pl_module, BundleModule):
            raise BundleConfigurationError(
                f"PackCallback follows a BundleModule, got {type(pl_module).__name__}"
            )
        bundle, batches, epochs = pl_module.bundle, trainer.num_training_batches, trainer.max_epochs
        self._event = Event(
            bundle,
            trainer.optimizers[0],
            epoch=trainer.current_epoch,
            epochs=epochs if epochs is not None and epochs >= 0 else None,
            step=trainer.global_step,
            num_batches=int(batches) if batches != float("inf") else None,
            grad_scaler=getattr(trainer.precision_plugin, "scaler", None),
        )
        self._step, self._validated = trainer.global_step, False
        self._forget()
        bundle.follow(self)
        self._tell("on_train_start", trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """An epoch begins. Lightning leaves this out where one goes on in its middle."""
        self._tell("on_epoch_start", trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell of the optimizer step, if there was one."""
        event = self._event
        losses = _losses(outputs, pl_module)
        if event is None or losses is None:
            return
        self._losses = losses if self._losses is None else self._losses + losses
        self._batches += 1
        self._size += _size(pl_module.bundle, batch)
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        event.losses, event.batch_size = self._losses / self._batches, self._size
        event.batch = batch_idx
        self._forget()
        self._tell("on_train_step", trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Tell of a batch of the validation."""
        event = self._event
        if (
            event is None
            or trainer.sanity_checking
            or not self.pack._listeners["on_validation_step"]
        ):
            return
        event.losses = _losses(outputs, None)
        event.batch, event.batch_size = batch_idx, _size(pl_module.bundle, batch)
        others = outputs.items() if isinstance(outputs, Mapping) else ()
        event.metrics = {
            f"val_{name}": own.clone()
            for name, own in others
            if name not in ("loss", "losses") and isinstance(own, Tensor)
        }
        self._tell("on_validation_step", trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Note that there are results."""
        self._validated = self._validated or not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Tell of the epoch and its results."""
        event = self._event
        if event is None or (trainer.enable_validation and not self._validated):
            return
        means = pl_module._means
        trained = means.means("train")
        event.losses = None
        event.metrics = {name.removeprefix("train_"): own for name, own in trained.items()}
        if self._validated:
            event.metrics |= means.means("val")
        self._validated = False
        self._tell("on_epoch_end", trainer)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """End."""
        event, self._event = self._event, None
        if event is not None:
            event.step = trainer.global_step
            event.losses = None
            self.pack.on_train_end(event)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """End: files get closed."""
        self.on_train_end(trainer, pl_module)

    def _tell(self, name: str, trainer: Trainer) -> None:
        event = self._event
        assert event is not None
        event.epoch, event.step = trainer.current_epoch, trainer.global_step
        with torch.inference_mode(False), torch.no_grad():
            getattr(self.pack, name)(event)
        if event.stop or not any(event.mb._active):
            trainer.should_stop = True

    def _forget(self) -> None:
        self._losses, self._batches, self._size = None, 0, 0

    def models_changed(self, change: Change) -> None:
        """Follow a bundle whose models have changed."""
        if self._losses is not None:
            self._losses = change.rows(self._losses, torch.nan)
        if self._event is not None:
            change.tell(self._event)

    def state_dict(self) -> dict[str, Any]:
        """The states of the callbacks."""
        return self.pack.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give every callback its state."""
        self.pack.load_state_dict(state_dict)


def _losses(outputs: Any, module: Any) -> Tensor | None:
    """The losses `[M]` that a step returned, or else those that it computed last."""
    losses = outputs.get("losses") if isinstance(outputs, Mapping) else None
    if losses is None and module is not None:
        losses = module.bundle.latest_losses
    return losses.detach().clone() if isinstance(losses, Tensor) else None
