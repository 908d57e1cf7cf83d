"""What is known of all trials of a sweep, as the sum of the records that its journal holds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .trials import ENDED, Trial, TrialResult, best_of, is_better, oriented

__all__ = ["Ledger"]

Record = Mapping[str, Any]


class Ledger:
    """The results so far.

    Every change is a record, a dict that goes to the journal as well, so that reading the journal
    gives the same results. The kinds of records:

    * `bundle`: the bundle `bundle` begins with `trials`.
    * `epoch`: an epoch of a bundle has ended: `values` by name for its running `trials`, and which
      of these `ended`, and how. It takes the place of what is known of this and later epochs: those
      were trained after the checkpoint that the bundle went on from.
    * `closed`: the bundle is done; who had not ended was stopped by a callback.
    * `void`: the bundle could not be trained; its trials wait again.
    * `failed`: a trial cannot be trained.

    Args:
        trials: of the sweep.
        metric: the name of the curve that is to become small or large.
        mode: `"min"` or `"max"`.
    """

    def __init__(self, trials: Sequence[Trial], metric: str, mode: str) -> None:
        self.results = {t.id: TrialResult(t.id, t.config, t.seed) for t in trials}
        self.metric, self.mode = metric, mode
        self.bundles: dict[int, list[int]] = {}
        self.epochs: dict[int, list[Record]] = {}  # of the bundles, in the order of their beginning
        self.open: int | None = None  # the bundle that is running
        self.next_bundle = 0  # no number is given twice
        self._planned = {t.id: t.epochs for t in trials}

    def apply(self, record: Record) -> None:
        """Take over what a record says."""
        kind = record["kind"]
        if kind == "bundle":
            self.open = record["bundle"]
            self.next_bundle = max(self.next_bundle, record["bundle"] + 1)
            self.bundles[record["bundle"]] = list(record["trials"])
            self.epochs[record["bundle"]] = []
            for trial in record["trials"]:
                self.results[trial].status = "running"
        elif kind == "epoch":
            self.rewind(record["bundle"], record["epoch"])
            self.epochs[record["bundle"]].append(record)
            self._add(record)
        elif kind == "closed":
            for trial in self.running(record["bundle"]):
                self.results[trial].status = "stopped"
            self.open = None
        elif kind == "void":
            self.rewind(record["bundle"], 0)
            for trial in self.bundles.pop(record["bundle"]):
                self.results[trial].status = "pending"
            del self.epochs[record["bundle"]]
            self.open = None
        elif kind == "failed":
            result = self.results[record["trial"]]
            result.status, result.error = "failed", record["error"]

    def rewind(self, bundle: int, epoch: int) -> None:
        """Forget what a bundle did from an epoch on."""
        kept = self.epochs[bundle][:epoch]
        if len(kept) == len(self.epochs[bundle]):
            return
        self.epochs[bundle] = kept
        for trial in self.bundles[bundle]:
            result = self.results[trial]
            result.status, result.seconds = "running", 0.0
            result.value = result.epoch = None
            result.curves = {}
        for record in kept:
            self._add(record)

    def _add(self, record: Record) -> None:
        trials = record["trials"]
        for place, trial in enumerate(trials):
            result = self.results[trial]
            result.seconds += record["seconds"] / len(trials)
            for name, values in record["values"].items():
                result.curves.setdefault(name, []).append(float(values[place]))
            self._look_at(result)
        for trial, status in record["ended"].items():
            self.results[int(trial)].status = status

    def _look_at(self, result: TrialResult) -> None:
        """Note the last value if it is the best."""
        value = result.curves[self.metric][-1]
        if math.isfinite(value) and (
            result.value is None or is_better(value, result.value, self.mode)
        ):
            result.value, result.epoch = value, result.epochs - 1

    # ---- questions to it

    def running(self, bundle: int) -> list[int]:
        """The trials of a bundle that have not ended."""
        return [t for t in self.bundles[bundle] if self.results[t].status not in ENDED]

    def pending(self) -> list[int]:
        """The trials that have not begun."""
        return [result.id for result in self.results.values() if result.status == "pending"]

    def oriented(self, record: Record) -> dict[int, float]:
        """What a pruner is told of an epoch: values of which small ones are good."""
        told = {}
        for trial, value in zip(record["trials"], map(float, record["values"][self.metric])):
            if record["ended"].get(str(trial)) not in ("diverged", "stopped"):
                told[trial] = oriented(value, self.mode)
        return told

    def best(self) -> TrialResult | None:
        """The trial with the best value, those that diverged or failed left out."""
        return best_of(self.results.values(), self.mode)

    def counts(self) -> dict[str, int]:
        """How many trials there are in each state."""
        counts: dict[str, int] = {}
        for result in self.results.values():
            counts[result.status] = counts.get(result.status, 0) + 1
        return counts

    def work(self) -> tuple[int, int]:
        """Epochs of trials that were trained, and those that may still come."""
        done = left = 0
        for result in self.results.values():
            done += result.epochs
            if result.status not in ENDED:
                left += self._planned[result.id] - result.epochs
        return done, left
