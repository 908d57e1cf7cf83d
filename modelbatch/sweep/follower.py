"""The callback that takes a sweep's trials through the training of a bundle."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..callbacks import BestModel, Event
from ..errors import ModelBatchError
from .ledger import Ledger
from .pruners import Pruner
from .trials import Trial
from .watching import Reasons, diverged
from .weights import Weights

__all__ = ["Follower"]


class Follower(Reasons):
    """Records every epoch, asks the pruner, and lets trials that have ended leave the bundle.

    It comes last in the list of callbacks, so it sees what the others froze. Its state says how
    many epochs belong to the checkpoint; what the ledger knows beyond them is trained again.

    Args:
        ledger: what is known of all trials.
        record: writes a record to ledger and journal.
        bundle: number of the bundle.
        trials: those of the bundle, in the order of its models.
        pruner: None for none.
        weights: where to keep weights, None for nowhere.
        best: what has the best weights, None to keep the last ones.
        report: called after each epoch.
    """

    def __init__(
        self,
        ledger: Ledger,
        record: Callable[[Mapping[str, Any]], None],
        bundle: int,
        trials: Sequence[Trial],
        pruner: Pruner | None,
        weights: Weights | None,
        best: BestModel | None,
        report: Callable[[], None],
    ) -> None:
        super().__init__()
        self.ledger, self.record, self.bundle = ledger, record, bundle
        self.trials, self.pruner = list(trials), pruner
        self.weights, self.best, self.report = weights, best, report
        self._epochs = 0
        self._clock = time.perf_counter()

    def on_train_start(self, event: Event) -> None:
        """Go back to what the checkpoint knows, and tell the pruner of it."""
        self.ledger.rewind(self.bundle, self._epochs)
        if self.pruner is not None:
            for known in self.ledger.epochs[self.bundle]:
                self._ask(known)
        if not self.ledger.running(self.bundle):
            event.stop = True
        self._clock = time.perf_counter()

    def on_epoch_end(self, event: Event) -> None:
        """Record, ask, and prune."""
        mb = event.mb
        running = set(self.ledger.running(self.bundle))
        slots = {
            self.trials[own].id: slot
            for slot, own in enumerate(mb.model_ids)
            if self.trials[own].id in running
        }
        metric = self.ledger.metric
        if metric not in event.metrics:
            raise ModelBatchError(
                f"there is no metric {metric!r}; there are: {', '.join(event.metrics)}"
            )
        rows = torch.stack([own.double() for own in event.metrics.values()]).cpu()
        picked = rows[:, list(slots.values())].tolist()
        now = time.perf_counter()
        record: dict[str, Any] = {
            "kind": "epoch",
            "bundle": self.bundle,
            "epoch": event.epoch,
            "seconds": round(now - self._clock, 6),
            "trials": list(slots),
            "values": {
                name: [v if abs(v) < float("inf") else str(v) for v in own]
                for name, own in zip(event.metrics, picked)
            },
        }
        self._clock = now
        ended = record["ended"] = self._ended(event, slots)
        if self.pruner is not None:
            ended.update({str(t): "pruned" for t in self._ask(record) if str(t) not in ended})
        if self.weights is not None:
            for trial in map(int, ended):
                if ended[str(trial)] != "diverged":
                    self.weights.keep(trial, mb, slots[trial], self.best)
        self._epochs = event.epoch + 1
        self.record(record)
        if len(ended) == len(slots):
            event.stop = True
        elif ended:
            # so that models frozen by the end of a training stay: a bundle is never empty
            mb.prune([slots[int(trial)] for trial in ended])
        self.report()

    def _ended(self, event: Event, slots: Mapping[int, int]) -> dict[str, str]:
        active, ids = event.mb.active.tolist(), event.mb.model_ids
        epochs = {trial.id: trial.epochs for trial in self.trials}
        ended = {}
        for trial, slot in slots.items():
            if not active[slot]:
                reason = self.known.get(ids[slot], "")
                ended[str(trial)] = "diverged" if diverged(reason) else "stopped"
            elif event.epoch + 1 >= epochs[trial]:
                ended[str(trial)] = "finished"
            elif event.stop:
                ended[str(trial)] = "stopped"
        return ended

    def _ask(self, record: Mapping[str, Any]) -> list[int]:
        told = self.ledger.oriented(record)
        if self.pruner is None or not told:
            return []
        answer = list(self.pruner.prune(record["epoch"], dict(told)))
        for trial in answer:
            if trial not in told:
                raise ModelBatchError(
                    f"{type(self.pruner).__name__}.prune returned {trial!r}, which is none of the "
                    f"trials that it was asked about: {sorted(told)}"
                )
        return answer

    # ---- resume

    def state_dict(self) -> dict[str, Any]:
        """How far the training was, and why models are frozen."""
        return {"epochs": self._epochs, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._epochs = int(state_dict["epochs"])
        super().load_state_dict(state_dict)
