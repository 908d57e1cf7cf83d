"""What is known of the models of one Ray trial."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from ...sweep.trials import ENDED, TrialResult, best_of, is_better
from .entries import Entry

__all__ = ["Table"]


class Table:
    """The results so far, by number of the model, and the rows that tell Ray of them.

    Args:
        entries: the models.
        metric: the name of the curve that is to become small or large.
        mode: `"min"` or `"max"`.

    Attributes:
        results: by number.
        lineage: for population based training, by number, of every copy: after how many epochs,
            from which model, and what was done.
    """

    def __init__(self, entries: Sequence[Entry], metric: str, mode: str) -> None:
        self.metric, self.mode = metric, mode
        self.ids = {entry.number: entry.id for entry in entries}
        self.results = {e.number: TrialResult(e.number, e.config, 0, "running") for e in entries}
        self.lineage: dict[int, list[dict[str, Any]]] = {e.number: [] for e in entries}

    def add(self, number: int, values: dict[str, float], seconds: float) -> bool:
        """Take over an epoch of a model; returns whether its value is its best."""
        result = self.results[number]
        result.seconds += seconds
        for name, value in values.items():
            result.curves.setdefault(name, []).append(value)
        value = values[self.metric]
        if not math.isfinite(value):
            return False
        if result.value is not None and not is_better(value, result.value, self.mode):
            return False
        result.value, result.epoch = value, result.epochs - 1
        return True

    def fail(self, number: int, error: str) -> None:
        """A model cannot be trained."""
        self.results[number].status, self.results[number].error = "failed", error

    def running(self) -> list[int]:
        """The models that have not ended."""
        return [number for number, r in self.results.items() if r.status not in ENDED]

    def best(self) -> TrialResult | None:
        """The model with the best value, those that diverged or failed left out."""
        return best_of(self.results.values(), self.mode)

    def rows(self, numbers: Iterable[int], copied: Iterable[int] = ()) -> list[dict[str, Any]]:
        """What is told of models after an epoch, with the last number of each curve."""
        rows, copied = [], set(copied)
        for number in numbers:
            result = self.results[number]
            row: dict[str, Any] = {
                "id": self.ids[number],
                "number": number,
                "status": result.status,
                "training_iteration": result.epochs,
                **{name: curve[-1] for name, curve in result.curves.items()},
            }
            if result.error:
                row["error"] = result.error
            if number in copied:
                last = self.lineage[number][-1]
                row |= {"copied_from": self.ids[last["source"]], "config": dict(result.config)}
                row["operations"] = last["operations"]
            rows.append(row)
        return rows
