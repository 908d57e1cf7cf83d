"""Callbacks of ModelBatch under Trainer: one `TrainerCallback` for them all."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...callbacks import Callback, CallbackPack, Event
from ...errors import ModelBatchError

if TYPE_CHECKING:
    from .trainer import HFTrainerMixin

__all__ = ["BundleCallback"]


class BundleCallback(TrainerCallback):
    """Passes Trainer's events on to callbacks of ModelBatch, with the vectors of all models.

    `BundledTrainer(callbacks=[NaNCallback()])` makes one by itself. Where nothing is evaluated,
    `on_epoch_end` comes at the end of every epoch.

    | event | when |
    |---|---|
    | `on_train_start` | training begins |
    | `on_epoch_start` | an epoch begins |
    | `on_train_step` | the optimizer has stepped; the gradients are still there |
    | `on_validation_step` | a batch was evaluated |
    | `on_epoch_end` | an evaluation is over: `val_loss`, `val_accuracy` ... are in `metrics` |
    | `on_train_end` | training is over |

    Args:
        callbacks: a `CallbackPack`, a `Callback` or several.
    """

    def __init__(self, callbacks: CallbackPack | Callback | Iterable[Callback]):
        self.pack = callbacks if isinstance(callbacks, CallbackPack) else CallbackPack(callbacks)
        self._trainer: HFTrainerMixin | None = None
        self._sum: Tensor | None = None
        self._steps = 0
        self._batch = 0

    def setup(self, trainer: "HFTrainerMixin") -> None:
        """Learn whose events these are; the trainer calls it."""
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """The callbacks' states."""
        return self.pack.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.pack.load_state_dict(state_dict)

    # ---- Trainer's events

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Passed on as `on_train_start`."""
        self._sum, self._steps = None, 0
        self._tell("on_train_start", args, state, control)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Passed on as `on_epoch_start`."""
        self._batch = 0
        self._tell("on_epoch_start", args, state, control)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Passed on as `on_train_step`."""
        losses = self._known().losses_of_step
        if losses is not None:
            self._sum = losses if self._sum is None else self._sum + losses
            self._steps += 1
        event = self._event(args, state)
        event.step, event.losses, event.batch = state.global_step + 1, losses, self._batch
        event.batch_size = args.train_batch_size * args.gradient_accumulation_steps
        self._batch += 1
        self._pass("on_train_step", event, control)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Passed on as `on_validation_step`."""
        event = self._event(args, state)
        event.losses, event.batch_size = self._known().losses_of_batch, args.eval_batch_size
        self._pass("on_validation_step", event, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Passed on as `on_epoch_end`, with the metrics of the evaluation."""
        if self._known().is_in_train:
            found = {f"val_{name}": own for name, own in self._known().metrics_of_each.items()}
            self._end_of_epoch(args, state, control, found)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Passed on as `on_epoch_end` where nothing is evaluated."""
        if str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
            self._end_of_epoch(args, state, control, {})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Passed on as `on_train_end`."""
        self._tell("on_train_end", args, state, control)

    # ---- how

    def _known(self) -> "HFTrainerMixin":
        if self._trainer is None:
            raise ModelBatchError(
                "BundleCallback belongs to a BundledTrainer (or another Trainer with "
                "HFTrainerMixin)"
            )
        return self._trainer

    def _event(self, args: TrainingArguments, state: TrainerState) -> Event:
        trainer = self._known()
        return Event(
            trainer.model,
            optimizer=trainer.inner_optimizer,
            # an evaluation at the end of an epoch finds the next one's number there
            epoch=max(0, int((state.epoch or 0.0) - 1e-9)),
            epochs=int(state.num_train_epochs) or None,
            step=state.global_step,
            num_batches=None,
            grad_scaler=trainer.accelerator.scaler,
        )

    def _tell(self, name: str, args: Any, state: Any, control: TrainerControl) -> None:
        self._pass(name, self._event(args, state), control)

    def _end_of_epoch(self, args: Any, state: Any, control: Any, found: dict[str, Any]) -> None:
        event = self._event(args, state)
        device = event.mb.active.device
        if self._sum is not None:
            event.metrics["loss"] = self._sum / self._steps
            self._sum, self._steps = None, 0
        for name, own in found.items():
            if all(isinstance(value, int | float) for value in own):
                event.metrics[name] = torch.tensor(own, dtype=torch.float64, device=device)
        self._pass("on_epoch_end", event, control)

    def _pass(self, name: str, event: Event, control: TrainerControl) -> None:
        getattr(self.pack, name)(event)
        if event.stop or not any(event.mb._is_active()):
            control.should_training_stop = True
