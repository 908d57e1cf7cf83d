"""Saving the bundle while it trains."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelBatchError
from .base import Callback, Event
from .report import check_interval

__all__ = ["Checkpoint"]


class Checkpoint(Callback):
    """Saves the bundle with `mb.save_all` every so many epochs or steps, and at the end.

    The states of all callbacks are saved with it (as `"callbacks"`), so this one comes last in the
    pack: what stands behind it has not seen the event yet.

        checkpoint = Checkpoint("runs/a", states={"scheduler": scheduler})
        pack = CallbackPack([EarlyStopping(), checkpoint])
        ...
        mb.load_all("runs/a", states={"scheduler": scheduler, "callbacks": pack})
        first = checkpoint.epoch + 1

    Args:
        directory: where to. `{epoch}` and `{step}` in it are filled in, which keeps one checkpoint
            of each; without, the new one takes the place of the old.
        every_epochs: after every so many epochs; None for never.
        every_steps: after every so many steps; None for never.
        per_model: write every model's weights as a file of its own too.
        states: further objects with `state_dict()` and `load_state_dict()`, by name.

    Attributes:
        epoch: number of the last epoch that the checkpoint has all of, -1 before the first.
        step: optimizer steps done when it was saved.
        path: where the last one was saved; None if none was.

    Raises:
        ModelBatchError: a bad argument.
        CheckpointError: in training, if it cannot be written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        every_epochs: int | None = 1,
        every_steps: int | None = None,
        per_model: bool = False,
        *,
        states: Mapping[str, Any] | None = None,
    ):
        for name, value in (("every_epochs", every_epochs), ("every_steps", every_steps)):
            if value is not None:
                check_interval(name, value)
        try:
            os.fspath(directory).format(epoch=0, step=0)
        except (LookupError, ValueError) as error:
            raise ModelBatchError(
                f"'{directory}': only {{epoch}} and {{step}} can be filled in ({error})"
            ) from error
        if states is not None and "callbacks" in states:
            raise ModelBatchError("states: 'callbacks' is the name of the callbacks' own state")
        self.directory = directory
        self.every_epochs = every_epochs
        self.every_steps = every_steps
        self.per_model = per_model
        self.states = dict(states or {})
        self.epoch = -1
        self.step = 0
        self.path: Path | None = None
        self._ended = -1  # the last epoch that ended

    @property
    def reads_models(self) -> bool:  # type: ignore[override]
        """Whether it saves between steps."""
        return self.every_steps is not None

    def on_train_step(self, event: Event) -> None:
        """Save if it is time."""
        if self.every_steps is not None and event.step % self.every_steps == 0:
            self._save(event, event.epoch - 1)

    def on_epoch_end(self, event: Event) -> None:
        """Save if it is time."""
        if self.every_epochs is not None and (event.epoch + 1) % self.every_epochs == 0:
            self._save(event, event.epoch)
        else:
            self._ended = event.epoch

    def on_train_end(self, event: Event) -> None:
        """Save what has been done since the last time."""
        ended = max(self.epoch, self._ended)
        if event.step > self.step or ended > self.epoch:
            self._save(event, ended)

    def _save(self, event: Event, epoch: int) -> None:
        before = self.epoch, self.step
        self.epoch, self.step = epoch, event.step  # part of what is saved
        states = dict(self.states)
        if event.pack is not None:
            states["callbacks"] = event.pack
        path = Path(os.fspath(self.directory).format(epoch=event.epoch, step=event.step))
        try:
            event.mb.save_all(path, per_model=self.per_model, states=states)
        except BaseException:
            self.epoch, self.step = before
            raise
        self.path = path

    def state_dict(self) -> dict[str, Any]:
        """Epoch and step of the last checkpoint."""
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.epoch, self.step = int(state_dict["epoch"]), int(state_dict["step"])
