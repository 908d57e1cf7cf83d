"""A pruner that all bundles of an experiment share."""

import copy
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from ...errors import ModelBatchError
from ...sweep.arguments import check_pruner
from ...sweep.pruners import Pruner

__all__ = ["Answer", "Board", "Record", "RungBoard"]

_ATTEMPTS = 20


@dataclass(frozen=True)
class Record:
    """What a pruner was told of a bundle at one epoch, and whom it ended."""

    bundle: str
    epoch: int
    values: dict[int, float]
    pruned: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """What a board says: whom to end, or None if it does not know what the asker knows."""

    generation: str
    pruned: tuple[int, ...] | None
    news: tuple[Record, ...] = ()


class Board:
    """Holds the pruner; this is what runs as an actor.

    A question that was asked before has the answer that it had, so that a bundle which goes on from
    a checkpoint is told the same again.

    Args:
        pruner: fresh.
    """

    def __init__(self, pruner: Pruner) -> None:
        self._pruner = pruner
        self._generation = uuid.uuid4().hex
        self._records: list[Record] = []
        self._known: dict[tuple[str, int, int], bool] = {}

    def ask(
        self, bundle: str, epoch: int, values: dict[int, float], generation: str, seen: int
    ) -> Answer:
        """Ask whom to end.

        Args:
            bundle: who asks.
            epoch: the one that its models have done, from 0.
            values: by number of the model; small ones are good.
            generation: of the board that the asker knows; `""` for none.
            seen: how many of its records the asker has.
        """
        if generation != self._generation:
            return Answer(self._generation, None)
        fresh = {n: v for n, v in values.items() if (bundle, epoch, n) not in self._known}
        if fresh:
            self._add(Record(bundle, epoch, fresh, tuple(self._pruner.prune(epoch, dict(fresh)))))
        pruned = tuple(number for number in values if self._known[bundle, epoch, number])
        return Answer(self._generation, pruned, tuple(self._records[seen:]))

    def tell(self, records: list[Record]) -> str:
        """Take over what an asker knows, in its order; returns the generation."""
        for record in records:
            own = (record.bundle, record.epoch)
            fresh = {n: v for n, v in record.values.items() if (*own, n) not in self._known}
            if fresh:
                self._pruner.prune(record.epoch, dict(fresh))
                pruned = tuple(number for number in record.pruned if number in fresh)
                self._add(Record(*own, fresh, pruned))
        return self._generation

    def _add(self, record: Record) -> None:
        self._records.append(record)
        for number in record.values:
            self._known[record.bundle, record.epoch, number] = number in record.pruned


class RungBoard:
    """Makes all bundles of an experiment compare with each other, through one small Ray actor.

    Give it as `pruner` to `BundleTrainable`, around one of `modelbatch.sweep`: then a rung of
    `SuccessiveHalving` is that of all models of the experiment, as if there were one large bundle.
    A bundle asks once per epoch, with the values of all its models. Where a decision depends on who
    came first, as in asynchronous halving, it depends on how fast the actors are.

    Every bundle keeps what the board knew when it last asked. Should the board die, the next one
    who asks starts another and tells it all. A bundle that is restarted from a checkpoint asks
    what it asked before, and gets the same answers.

    Make it after `ray.init()`: then the board lives as long as this process, else as long as the
    first bundle that asks.

    Args:
        pruner: `MedianPruner`, `SuccessiveHalving`, or one of your own.
        name: of the actor; each experiment needs its own.

    Raises:
        ModelBatchError: the pruner is none.
    """

    def __init__(self, pruner: Pruner, name: str | None = None) -> None:
        check_pruner(pruner)
        self.pruner = copy.deepcopy(pruner)
        reset = getattr(self.pruner, "reset", None)
        if reset is not None:
            reset()
        self.name = name or f"modelbatch-rungs-{uuid.uuid4().hex[:12]}"
        self._records: list[Record] = []
        self._generation = ""
        self._actor: Any = None
        if ray.is_initialized():
            self._start()

    def __getstate__(self) -> dict[str, Any]:
        # Who gets a copy finds the actor by its name, and may have to start it anew.
        return {**self.__dict__, "_actor": None}

    def _start(self) -> Any:
        if self._actor is None:
            self._actor = (
                ray.remote(Board)
                .options(
                    name=self.name,
                    get_if_exists=True,
                    num_cpus=0,
                    max_restarts=-1,
                    max_task_retries=-1,
                )
                .remote(self.pruner)
            )
        return self._actor

    def _call(self, method: str, *arguments: Any) -> Any:
        for attempt in range(_ATTEMPTS):
            try:
                actor = self._start()
            except ValueError:  # somebody else is just starting it, or it is just going
                time.sleep(0.05 * attempt)
                continue
            try:
                return ray.get(getattr(actor, method).remote(*arguments))
            except RayActorError:
                self._actor = None
        raise ModelBatchError(f"the actor {self.name} does not stay alive")

    def ask(self, bundle: str, epoch: int, values: Mapping[int, float]) -> list[int]:
        """Which models of a bundle are to end now.

        Args:
            bundle: its name, which no other bundle has.
            epoch: the one that has ended, from 0.
            values: of the metric, by number of the model; small ones are good. No other bundle has
                models of these numbers.
        """
        while True:
            seen = len(self._records)
            question = (bundle, epoch, dict(values), self._generation, seen)
            answer: Answer = self._call("ask", *question)
            if answer.pruned is not None:
                self._records += answer.news
                return list(answer.pruned)
            # another board than the last time: it is told, and tells in its own order
            self._generation = self._call("tell", self._records)
            self._records = []

    def state_dict(self) -> dict[str, Any]:
        """What the board is known to know."""
        return {"records": list(self._records)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self._records, self._generation = list(state_dict["records"]), ""
