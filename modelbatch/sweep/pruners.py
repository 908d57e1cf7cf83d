"""Which trials of a sweep are not worth going on with."""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from ..errors import ModelBatchError

__all__ = ["MedianPruner", "Pruner", "SuccessiveHalving"]


@runtime_checkable
class Pruner(Protocol):
    """What `run_sweep` asks after every epoch of a bundle.

    A pruner may remember what it was told. If it has a method `reset()`, that is called before the
    first epoch of a sweep. A sweep that is resumed tells it again what it had been told, and
    ignores the answers.
    """

    def prune(self, epoch: int, values: Mapping[int, float]) -> Iterable[int]:
        """Choose trials that are to end now.

        Args:
            epoch: the one that has ended, from 0.
            values: of the sweep's metric, by trial, for the trials of one bundle; small is good
                (with `mode="max"` they are negated), and what is not finite is infinity.

        Returns:
            Ids of trials among these. Those that have done all their epochs anyway are finished,
            not pruned.
        """
        ...


class MedianPruner:
    """Ends trials that are worse than the median of all trials so far, at the same epoch.

    A trial that ended before this epoch counts with its last value. So in the first epoch that is
    looked at, half of the trials go, and later those that fall behind.

    Args:
        warmup_epochs: nothing is pruned in these first epochs.
        min_trials: nor before so many trials are known.

    Raises:
        ModelBatchError: a bad argument.
    """

    def __init__(self, warmup_epochs: int = 1, min_trials: int = 4) -> None:
        self.warmup_epochs = whole_number("warmup_epochs", warmup_epochs, 0)
        self.min_trials = whole_number("min_trials", min_trials, 2)
        self.reset()

    def reset(self) -> None:
        """Forget all trials."""
        self._curves: dict[int, list[float]] = {}

    def prune(self, epoch: int, values: Mapping[int, float]) -> list[int]:
        """See `Pruner.prune`."""
        for trial, value in values.items():
            self._curves.setdefault(trial, []).append(value)
        if epoch < self.warmup_epochs or len(self._curves) < self.min_trials:
            return []
        known = [curve[min(epoch, len(curve) - 1)] for curve in self._curves.values()]
        median = statistics.median(known)
        return [trial for trial, value in values.items() if value > median]


class SuccessiveHalving:
    """Lets only the best part of the trials go on at rungs whose distance grows.

    The rungs are after `min_epochs`, `min_epochs * reduction_factor`, `min_epochs *
    reduction_factor**2`, ... epochs. At each, a trial goes on if it is among the best
    1/`reduction_factor` of all trials that have come to this rung so far, those of earlier bundles
    included (at least one of them goes on). This is the asynchronous form: a trial that was kept is
    not ended at the same rung when better ones follow.

    Args:
        min_epochs: epochs that every trial has.
        reduction_factor: what share goes on, from 2 on.

    Raises:
        ModelBatchError: a bad argument.
    """

    def __init__(self, min_epochs: int = 1, reduction_factor: int = 3) -> None:
        self.min_epochs = whole_number("min_epochs", min_epochs, 1)
        self.reduction_factor = whole_number("reduction_factor", reduction_factor, 2)
        self.reset()

    def reset(self) -> None:
        """Forget all trials."""
        self._rungs: dict[int, dict[int, float]] = {}

    def prune(self, epoch: int, values: Mapping[int, float]) -> list[int]:
        """See `Pruner.prune`."""
        if not self._is_rung(epoch + 1):
            return []
        rung = self._rungs.setdefault(epoch + 1, {})
        rung.update(values)
        order = sorted(rung, key=lambda trial: (rung[trial], trial))
        kept = set(order[: max(1, len(order) // self.reduction_factor)])
        return [t for t in values if t not in kept or math.isinf(values[t])]

    def _is_rung(self, epochs: int) -> bool:
        rung = self.min_epochs
        while rung < epochs:
            rung *= self.reduction_factor
        return rung == epochs


def whole_number(name: str, value: int, least: int) -> int:
    """The value itself.

    Raises:
        ModelBatchError: it is no integer, or smaller than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ModelBatchError(f"{name} must be an integer from {least} on, got {value!r}")
    return value
