"""Where a training stands, so that it can go on from there bit for bit."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..change import Change
from ..checkpoint import GlobalRandomState
from .history import History
from .totals import Totals

__all__ = ["Position", "generators_of"]


class Position:
    """The place within a training: epoch, step, batch, the sums of the epoch so far, the history.

    What order a loader yields its batches in depends on the state of generators at the time the
    epoch began. That state is kept, and a resumed epoch begins with it again and passes over the
    batches that have been trained on already. So any loader of torch is resumable whose order comes
    from torch's, Python's or numpy's global generators, a generator of its own, or a `state_dict`.

    Args:
        num_models: M.
        device: of the bundle.
        loaders: of training and validation, whose generators matter.
        model_ids: of the models.
    """

    def __init__(
        self,
        num_models: int,
        device: torch.device,
        loaders: Sequence[Any],
        model_ids: Sequence[int] | None = None,
    ) -> None:
        self.device = device
        self.history = History(num_models, model_ids)
        self.epoch = self.step = self.batch = 0
        self.begun = False  # on_epoch_start has been called for this epoch
        self.trained = False  # the steps of this epoch are done, its validation is not
        self.seconds = 0.0  # of this epoch, before the last interruption
        self.rates: list[float] = []
        self.totals = Totals()
        self.fetching = False
        self._loaders = list(loaders)
        self._generators = generators_of(loaders)
        self._shared = GlobalRandomState()
        self._beginning: dict[str, Any] | None = None  # of this epoch
        self._before_validation: dict[str, Any] | None = None
        self._loaded: dict[str, Any] | None = None

    def begin_batches(self) -> None:
        """Remember the generators before the loader makes up the order of this epoch."""
        self._beginning = self._snapshot()

    def begin_validation(self) -> None:
        """Remember the generators after the last batch of training."""
        self._before_validation = self._shared.state_dict()

    def next_epoch(self) -> None:
        """Go on to the next epoch."""
        self.epoch += 1
        self.batch, self.begun, self.trained, self.seconds = 0, False, False, 0.0
        self.rates, self.totals = [], Totals()
        self._beginning = self._before_validation = None

    def replayed(self) -> None:
        """The loader has passed over the batches of the first part of this epoch."""
        if self._loaded is not None and self.batch and self._loaded["now"] is not None:
            self._shared.load_state_dict(self._loaded["now"])
        self._loaded = None

    def resume(self) -> None:
        """Put the generators back once more: a callback may have drawn from them at the start."""
        if self._loaded is not None:
            self._restore(self._loaded["beginning"])

    def models_changed(self, change: Change, rates: Sequence[float]) -> None:
        """Follow a bundle whose models have changed.

        Args:
            change: what has changed.
            rates: the learning rates after it.
        """
        self.history.models_changed(change)
        self.totals.models_changed(change)
        if self.rates:
            self.rates = change.pick(self.rates, lambda slot: rates[slot])

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Everything in plain containers and tensors."""
        if self._loaded is not None:  # interrupted again before the replay was done
            now: dict[str, Any] | None = self._loaded["now"]
        elif self._before_validation is not None:
            now = self._before_validation
        elif self.fetching:
            # Interrupted amid a batch, which the resumed training fetches again: only the replay
            # knows what the generators were before.
            now = None
        else:
            now = self._shared.state_dict()
        return {
            "epoch": self.epoch,
            "step": self.step,
            "batch": self.batch,
            "begun": self.begun,
            "trained": self.trained,
            "seconds": self.seconds,
            "rates": list(self.rates),
            "totals": self.totals.state_dict(),
            "history": self.history.state_dict(),
            "beginning": self._snapshot() if self._beginning is None else self._beginning,
            "now": now,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned, generators included."""
        self.history.load_state_dict(state_dict["history"])
        for name in ("epoch", "step", "batch", "begun", "trained", "seconds"):
            setattr(self, name, state_dict[name])
        self.rates = list(state_dict["rates"])
        self.totals.load_state_dict(state_dict["totals"], self.device)
        self._loaded = {name: state_dict[name] for name in ("beginning", "now")}
        self._beginning = self._loaded["beginning"]
        self._restore(self._loaded["beginning"])

    def _snapshot(self) -> dict[str, Any]:
        return {
            "shared": self._shared.state_dict(),
            "own": [generator.get_state() for generator in self._generators],
            "loaders": [
                loader.state_dict() if hasattr(loader, "state_dict") else None
                for loader in self._loaders
            ],
        }

    def _restore(self, snapshot: Mapping[str, Any]) -> None:
        self._shared.load_state_dict(snapshot["shared"])
        for generator, state in zip(self._generators, snapshot["own"]):
            generator.set_state(state.cpu())
        for loader, state in zip(self._loaders, snapshot["loaders"]):
            if state is not None and hasattr(loader, "load_state_dict"):
                loader.load_state_dict(state)


def generators_of(loaders: Sequence[Any]) -> list[torch.Generator]:
    """The generators that loaders and their samplers hold, each once."""
    found: dict[int, torch.Generator] = {}
    seen: set[int] = set()
    waiting = list(loaders)
    while waiting:
        part = waiting.pop(0)
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator):
            found.setdefault(id(generator), generator)
        waiting += [getattr(part, name, None) for name in ("batch_sampler", "sampler")]
    return list(found.values())
