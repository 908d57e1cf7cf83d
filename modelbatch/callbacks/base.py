"""What a callback is, and what it is told."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..change import Change

if TYPE_CHECKING:
    from ..batch import ModelBatch
    from .pack import CallbackPack

__all__ = ["EVENTS", "Callback", "Event"]

EVENTS = (
    "on_train_start",
    "on_epoch_start",
    "on_train_step",
    "on_validation_step",
    "on_epoch_end",
    "on_model_frozen",
    "on_train_end",
)


@dataclass(slots=True)
class Event:
    """What happened, for all models at once.

    Vectors stay on the device of the bundle: reading one waits for the device, so callbacks do that
    once in a while and never model by model.

    Attributes:
        mb: the bundle that trains.
        optimizer: what updates it.
        epoch: number of the epoch, from 0.
        epochs: how many there will be, None if unknown.
        step: optimizer steps done so far, the one that this event reports included.
        batch: number of the batch in this epoch (or validation), from 0.
        num_batches: how many batches an epoch (or validation) has, None if unknown.
        losses: `[M]`, detached: the losses of this training or validation step; None elsewhere.
        metrics: `[M]` each. At the end of an epoch `loss`, and `val_loss`, `val_<metric>` if there
            was a validation.
        batch_size: samples that one model saw in this step.
        models: in `on_model_frozen`, which models.
        reason: in `on_model_frozen`, why.
        stop: a callback sets it to end the training after this event.
        grad_scaler: the gradient scaler in use if it is not `mb.grad_scaler`.
        pack: the outermost `CallbackPack` that passes this event on.
    """

    mb: "ModelBatch"
    optimizer: Optimizer | None = None
    epoch: int = 0
    epochs: int | None = None
    step: int = 0
    batch: int = 0
    num_batches: int | None = None
    losses: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)
    batch_size: int = 0
    models: list[int] = field(default_factory=list)
    reason: str = ""
    stop: bool = False
    grad_scaler: Any = None
    pack: "CallbackPack | None" = None

    def models_changed(self, change: Change) -> None:
        """Follow a bundle whose models have changed, for the callbacks that are still to come."""
        if self.losses is not None:
            self.losses = change.rows(self.losses, torch.nan)
        self.metrics = {name: change.rows(own, torch.nan) for name, own in self.metrics.items()}
        self.models = change.renumber(self.models)


class Callback:
    """Something that follows the training of a bundle. Every method may be left out.

    A method gets one `Event` for all models. A callback of one's own overrides what it needs:

        class Median(Callback):
            def on_epoch_end(self, event):
                print(event.epoch, event.metrics["loss"].median().item())

    Attributes:
        reads_models: whether `on_train_step` has to be called before the next step, because it
            looks at the models, changes something or may set `event.stop`. Where no callback does,
            a loop may train several steps in one call, and tell of them afterwards: each event has
            its own losses and numbers, while the models are as they are after the last of these
            steps. True unless a class says otherwise about an `on_train_step` of its own.
    """

    reads_models: bool = True

    def on_train_start(self, event: Event) -> None:
        """Before the first step, or before the first after a resume."""

    def on_epoch_start(self, event: Event) -> None:
        """Before the first batch of an epoch."""

    def on_train_step(self, event: Event) -> None:
        """After an optimizer step.

        The gradients that it used are still there, unless the engine took the step: then there
        never were any, see `ModelBatch.enable_engine`.
        """

    def on_validation_step(self, event: Event) -> None:
        """After a batch of the validation."""

    def on_epoch_end(self, event: Event) -> None:
        """After an epoch and its validation, with both results in `event.metrics`."""

    def on_model_frozen(self, event: Event) -> None:
        """After a callback froze `event.models`."""

    def on_train_end(self, event: Event) -> None:
        """After the last step, also when training ended early or by an exception."""

    def models_changed(self, change: Change) -> None:
        """The bundle has other models now, see `ModelBatch.follow`.

        Whoever keeps something for each model carries it over here: `change.source` says for each
        slot where its model was before, or None.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs to know: plain containers, numbers, strings, tensors."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
