"""Several steps in one call, where nobody looks at the models in between."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..callbacks import Callback, CallbackPack, NaNCallback
from ..data import DataRouter, PerModelLoader
from ..inputs import _Marked
from .batches import Batch
from .stepper import Stepper
from .totals import Totals

if TYPE_CHECKING:
    from ..batch import ModelBatch

__all__ = ["Blocks", "Step"]

# A call takes about so long at most, so that Ctrl-C and a progress bar do not feel it.
_SECONDS = 0.05
# The same where weights and states come from memory, which a call with many steps saves.
_SECONDS_BEYOND_CACHES = 0.2
_CACHES = 1 << 25
_MAX_STEPS = 32
# Batches are copied next to each other.
_MAX_BYTES = 1 << 26


@dataclass(slots=True)
class Step:
    """A step that has been done.

    Attributes:
        batch: what was trained on.
        losses: `[M]`.
        shown: its number in the last call of the engine; None if it was a call of its own.
        left: how many further steps have been done already.
    """

    batch: Batch
    losses: Tensor
    shown: int | None = None
    left: int = 0


class Blocks:
    """Trains on batches one by one or several at a time, with the same results.

    Several at a time if the engine takes them and every callback is content to hear of the steps
    afterwards.

    Args:
        mb: the bundle.
        stepper: trains on one batch.
        pack: the callbacks.
        loader: what yields the batches.
        router: what routes them.
    """

    def __init__(
        self, mb: "ModelBatch", stepper: Stepper, pack: CallbackPack, loader: Any, router: Any
    ) -> None:
        self.mb, self.stepper = mb, stepper
        self.possible = (
            not stepper.searches
            and not stepper.metric_fns
            and stepper.amp_dtype is None
            and _looks_at_no_model(loader)
            and type(router) in (type(None), *_own_routers())
            and not any(_reads_models(callback) for callback in _each(pack))
        )
        self.stops = any(isinstance(c, NaNCallback) and c.action == "freeze" for c in _each(pack))
        size = sum(p.numel() * p.element_size() for p in mb.parameters())
        self._beyond_caches = 3 * size > _CACHES  # with two states, as Adam has
        self._seconds: float | None = None  # of a step

    @property
    def size(self) -> int:
        """How many batches to fetch for the next steps."""
        if not self.possible or self._seconds is None:
            return 1
        seconds = _SECONDS_BEYOND_CACHES if self._beyond_caches else _SECONDS
        return max(1, min(_MAX_STEPS, int(seconds / self._seconds)))

    def steps(self, batches: list[Batch], totals: Totals) -> Iterator[Step]:
        """Train on batches in order; who takes no further step trains on no further batch."""
        place = 0
        while place < len(batches):
            run = _alike(batches[place:])
            losses = self._together(run) if len(run) > 1 else None
            if losses is None:
                yield self._alone(run[0], totals)
                place += 1
                continue
            count = self._effective(len(run))
            for batch, own in zip(run[:count], losses):
                totals.add("loss", own, batch)
                totals.add_count(batch)
            for k in range(count):
                yield Step(run[k], losses[k], k, count - 1 - k)
            place += len(run)

    def _alone(self, batch: Batch, totals: Totals) -> Step:
        start = time.perf_counter()
        losses = self.stepper([batch], totals)
        engine = self.mb._engine
        self._seconds = time.perf_counter() - start if engine.status is not None else None
        return Step(batch, losses)

    def _together(self, run: list[Batch]) -> Tensor | None:
        mb, engine, first = self.mb, self.mb._engine, run[0]
        loss_fn, weighted = self.stepper.loss_fn, first.weight is not None
        if not engine.takes(mb, first.x, first.y, loss_fn, weighted):
            return None
        x, y = (torch.stack([_tensor(tree) for tree in trees]) for trees in _columns(run))
        weights = [batch.weight for batch in run] if weighted else None
        engine.stop_nonfinite = self.stops
        start = time.perf_counter()
        try:
            losses = engine.steps(mb, (first.x, first.y), x, y, loss_fn, weights)
        finally:
            engine.stop_nonfinite = False
        self._seconds = (time.perf_counter() - start) / len(run)
        return losses

    def _effective(self, count: int) -> int:
        """How many of the steps of the last call there are: until all models have stopped."""
        status = self.mb._engine.call_status
        if not self.stops or status is None:
            return count
        bad = (status & 7) != 0
        frozen = ~self.mb.active
        if not bool((bad.any(0) | frozen).all()) or not bool(bad.any()):
            return count
        return int(bad.to(torch.int8).argmax(0).max()) + 1


def _columns(run: list[Batch]) -> tuple[list[Any], list[Any]]:
    return [batch.x for batch in run], [batch.y for batch in run]


def _tensor(tree: Any) -> Any:
    """The one tensor of what the engine takes as one."""
    if isinstance(tree, tuple):
        (tree,) = tree
    elif isinstance(tree, dict):
        (tree,) = tree.values()
    return tree.value if isinstance(tree, _Marked) else tree


def _alike(batches: list[Batch]) -> list[Batch]:
    """As many of the batches as can be put next to each other."""
    first = _form(batches[0])
    if first is None:
        return batches[:1]
    size = 0
    run: list[Batch] = []
    for batch in batches:
        if _form(batch) != first:
            break
        size += sum(t.numel() * t.element_size() for t in _tensors(batch))
        if run and size > _MAX_BYTES:
            break
        run.append(batch)
    return run


def _tensors(batch: Batch) -> list[Tensor]:
    return [t for t in (_tensor(batch.x), _tensor(batch.y)) if isinstance(t, Tensor)]


def _form(batch: Batch) -> Any:
    form: list[Any] = []
    for tree in (batch.x, batch.y):
        names = tuple(tree) if isinstance(tree, dict) else None
        if isinstance(tree, tuple | dict):
            if len(tree) != 1:
                return None
            (tree,) = tree.values() if isinstance(tree, dict) else tree
        marked = tree.has_model_axis if isinstance(tree, _Marked) else None
        tensor = tree.value if isinstance(tree, _Marked) else tree
        if type(tensor) is not Tensor:
            return None
        form.append((tensor.shape, tensor.dtype, marked, names))
    form.append(None if batch.weight is None else batch.weight.shape)
    return form


def _looks_at_no_model(loader: Iterable[Any]) -> bool:
    """Whether a loader is known to yield what it yields whatever becomes of the models."""
    known = (list, tuple, PerModelLoader, torch.utils.data.DataLoader)
    return type(loader) in known or type(loader).__dict__.get("reads_models") is False


def _own_routers() -> tuple[type, ...]:
    from ..data import StratifiedDataRouter

    return DataRouter, StratifiedDataRouter


def _each(callback: Callback) -> Iterator[Callback]:
    """A callback, or those in a pack."""
    if isinstance(callback, CallbackPack):
        for inner in callback:
            yield from _each(inner)
        if type(callback) is CallbackPack:
            return
    yield callback


def _reads_models(callback: Callback) -> bool:
    """Whether a callback has to hear of a step before the next one.

    What a class says by `reads_models` is about its own `on_train_step`, not about that of a class
    derived from it.
    """
    mro = type(callback).__mro__
    hears = next(i for i, cls in enumerate(mro) if "on_train_step" in cls.__dict__)
    if mro[hears] is Callback and "on_train_step" not in vars(callback):
        return False
    says = next(i for i, cls in enumerate(mro) if "reads_models" in cls.__dict__)
    if "on_train_step" in vars(callback):
        return True
    return says > hears or bool(callback.reads_models)
