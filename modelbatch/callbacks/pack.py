"""Several callbacks in a row."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from ..change import Change
from ..errors import ModelBatchError
from .base import EVENTS, Callback, Event

__all__ = ["CallbackPack", "freeze", "prune"]


class CallbackPack(Callback):
    """Callbacks in an order, to be used as one.

    Args:
        callbacks: callbacks, or packs of them; None for none.

    Raises:
        ModelBatchError: something that is no `Callback`.
    """

    def __init__(self, callbacks: Iterable[Callback] | Callback | None = None) -> None:
        if callbacks is None:
            callbacks = ()
        elif isinstance(callbacks, Callback):
            callbacks = (callbacks,)
        self._callbacks: list[Callback] = []
        self._listeners: dict[str, list[Callable[[Event], None]]] = {name: [] for name in EVENTS}
        self._event: Event | None = None  # that is being passed on
        for callback in callbacks:
            self.append(callback)

    def check_models_change(self, change: Change) -> None:
        """Ask every callback whether it can follow.

        Raises:
            ModelBatchError: one cannot.
        """
        for callback in self._callbacks:
            change.check(callback)

    def models_changed(self, change: Change) -> None:
        """Tell every callback, and carry over the event that is on its way to them."""
        if self._event is not None:
            change.tell(self._event)
        for callback in self._callbacks:
            change.tell(callback)

    def append(self, callback: Callback) -> None:
        """Add a callback at the end.

        Raises:
            ModelBatchError: it is no `Callback`, or it is this pack itself.
        """
        if not isinstance(callback, Callback) or callback is self:
            hint = " (make an instance of it)" if isinstance(callback, type) else ""
            raise ModelBatchError(f"expected a Callback, got {callback!r}{hint}")
        self._callbacks.append(callback)
        for name, listeners in self._listeners.items():
            listener = getattr(callback, name)
            # a step is short: whoever does not listen is not called
            if getattr(listener, "__func__", None) is not getattr(Callback, name):
                listeners.append(listener)

    def __iter__(self) -> Iterator[Callback]:
        return iter(self._callbacks)

    def __len__(self) -> int:
        return len(self._callbacks)

    def __getitem__(self, index: int) -> Callback:
        return self._callbacks[index]

    def __repr__(self) -> str:
        return f"CallbackPack([{', '.join(type(c).__name__ for c in self._callbacks)}])"

    def _tell(self, name: str, event: Event) -> None:
        if event.pack is None:
            event.pack = self
        event.mb._followers.add(self)
        outer, self._event = self._event, event
        try:
            for listener in self._listeners[name]:
                listener(event)
        finally:
            self._event = outer

    def on_train_start(self, event: Event) -> None:
        """Passed on to every callback."""
        self._tell("on_train_start", event)

    def on_epoch_start(self, event: Event) -> None:
        """Passed on to every callback."""
        self._tell("on_epoch_start", event)

    def on_train_step(self, event: Event) -> None:
        """Passed on to every callback."""
        self._tell("on_train_step", event)

    def on_validation_step(self, event: Event) -> None:
        """Passed on to every callback."""
        self._tell("on_validation_step", event)

    def on_epoch_end(self, event: Event) -> None:
        """Passed on to every callback."""
        self._tell("on_epoch_end", event)

    def on_model_frozen(self, event: Event) -> None:
        """Passed on to every callback."""
        self._tell("on_model_frozen", event)

    def on_train_end(self, event: Event) -> None:
        """Passed on to every callback, even if one of them fails: files get closed.

        Raises:
            BaseException: the first that a callback raised.
        """
        if event.pack is None:
            event.pack = self
        first: BaseException | None = None
        for listener in self._listeners["on_train_end"]:
            try:
                listener(event)
            except BaseException as error:
                first = first or error
        if first is not None:
            raise first

    def _names(self) -> list[str]:
        """A name for every callback: its class, numbered from the second of a class on."""
        names: list[str] = []
        counts: dict[str, int] = {}
        for callback in self._callbacks:
            name = type(callback).__name__
            count = counts[name] = counts.get(name, 0) + 1
            names.append(name if count == 1 else f"{name}_{count}")
        return names

    def state_dict(self) -> dict[str, Any]:
        """The states of the callbacks by class name, `_2`, `_3` ... for more of one class."""
        states = zip(self._names(), self._callbacks, strict=True)
        return {name: state for name, callback in states if (state := callback.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give every callback its state.

        A callback that was not there when the state was saved starts anew; the state of one that
        is there no longer is dropped.
        """
        for name, callback in zip(self._names(), self._callbacks, strict=True):
            if name in state_dict:
                callback.load_state_dict(state_dict[name])


def freeze(event: Event, models: Iterable[int], reason: str) -> list[int]:
    """Freeze models and tell every callback so.

    Args:
        event: what made a callback do this.
        models: their numbers; those frozen already are left out.
        reason: why, for `Event.reason`.

    Returns:
        The models that were active until now.
    """
    flags = event.mb.active.tolist()
    numbers = [i for i in dict.fromkeys(models) if flags[i]]
    if not numbers:
        return []
    event.mb.freeze(numbers)
    if event.pack is not None:
        frozen = replace(event, models=numbers, reason=reason, stop=False)
        event.pack.on_model_frozen(frozen)
        event.stop = event.stop or frozen.stop
    return numbers


def prune(event: Event, models: Iterable[int], reason: str) -> None:
    """Remove models from the bundle; frozen instead if no model would be left.

    Args:
        event: what made a callback do this; its vectors are then of the models that are left.
        models: their numbers.
        reason: why.
    """
    mb, numbers = event.mb, list(models)
    if len(numbers) == len(mb):
        freeze(event, numbers, reason)
        return
    follower = _EventFollower(event)  # where no pack passes it on
    mb._followers.add(follower)
    mb.prune(numbers)


class _EventFollower:
    def __init__(self, event: Event) -> None:
        self._event = event

    def models_changed(self, change: Change) -> None:
        change.tell(self._event)
