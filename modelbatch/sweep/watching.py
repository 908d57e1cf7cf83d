"""Why models of a sweep stopped training."""

import copy
from collections.abc import Iterable
from typing import Any

from ..callbacks import Callback, Event, NaNCallback

__all__ = ["Reasons", "diverged", "with_nan_callback"]

# How NaNCallback begins its reasons.
_NOT_FINITE = "not finite"


def with_nan_callback(callbacks: Iterable[Callback]) -> list[Callback]:
    """Callbacks of which one stops the models that are no longer finite.

    One of the user's own that removes them freezes them instead: the sweep, which has to know what
    became of a trial, removes it at the end of the epoch.
    """
    own = list(callbacks)
    if not any(isinstance(callback, NaNCallback) for callback in own):
        return [NaNCallback("freeze"), *own]
    for place, callback in enumerate(own):
        if isinstance(callback, NaNCallback) and callback.action == "prune":
            own[place] = copy.copy(callback)
            own[place].action = "freeze"  # type: ignore[attr-defined]
    return own


def diverged(reason: str) -> bool:
    """Whether a model was frozen because something was not finite."""
    return reason.startswith(_NOT_FINITE)


class Reasons(Callback):
    """Remembers why models were frozen, by their ids."""

    reads_models = False

    def __init__(self) -> None:
        self.known: dict[int, str] = {}

    def on_model_frozen(self, event: Event) -> None:
        """Note the reason."""
        ids = event.mb.model_ids
        for slot in event.models:
            self.known.setdefault(ids[slot], event.reason)

    def state_dict(self) -> dict[str, Any]:
        """The reasons."""
        return {"reasons": [[own, reason] for own, reason in self.known.items()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.known = {int(own): str(reason) for own, reason in state_dict["reasons"]}
