"""The file that a sweep can be resumed from."""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ModelBatchError
from .trials import Trial, describe

__all__ = ["FILE", "Journal"]

FILE = "sweep.jsonl"
_VERSION = 1


class Journal:
    """JSON lines, one for each record of a `Ledger`, each flushed before the sweep goes on.

    The first line has the settings of the sweep, and there is one for each trial. A line that was
    not finished, because the process was killed, is as if it had never been.

    Args:
        directory: made if need be.
        settings: what must be the same in a sweep that goes on.
        trials: likewise; further ones may have come at the end.
        resume: go on where the journal ends.

    Raises:
        ModelBatchError: there is a journal of another sweep, one that is not to be resumed, or
            another process writes to it.
        CheckpointError: it cannot be read or written.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        trials: Sequence[Trial],
        resume: bool,
    ) -> None:
        self.path = directory / FILE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
            self._lock()
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error}") from error
        try:
            self.records = self._read()
            if self.records and not resume:
                raise ModelBatchError(
                    f"{directory} holds a sweep already: resume=True goes on with it, or choose "
                    "another directory"
                )
            self._check(settings, trials)
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise ModelBatchError(f"another process is running the sweep {self.path}") from error

    def _read(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        data = self._file.read()
        end = data.rfind(b"\n") + 1
        self._file.truncate(end)
        records = []
        for number, line in enumerate(data[:end].splitlines(), 1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise CheckpointError(f"{self.path}, line {number} was altered: {error}") from error
        return records

    def _check(self, settings: Mapping[str, Any], trials: Sequence[Trial]) -> None:
        """Compare with what the journal says, and write what it does not say yet."""
        head = {"kind": "sweep", "version": _VERSION, **describe(settings)}
        if not self.records:
            self.write(head)
        else:
            for name, value in head.items():
                found = self.records[0].get(name)
                if found != value:
                    raise ModelBatchError(
                        f"{self.path} is that of another sweep: {name} is {found!r} there and "
                        f"{value!r} here"
                    )
        known = {r["trial"]: r for r in self.records if r["kind"] == "trial"}
        if len(known) > len(trials):
            raise ModelBatchError(
                f"{self.path} is that of another sweep: it has {len(known)} trials, not "
                f"{len(trials)}"
            )
        for trial in trials:
            own = {
                "kind": "trial",
                "trial": trial.id,
                "seed": trial.seed,
                "config": describe(trial.config),
            }
            if trial.id not in known:
                self.write(own)
            elif known[trial.id] != own:
                raise ModelBatchError(
                    f"{self.path} is that of another sweep: {_difference(known[trial.id], own)}"
                )

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record.

        Raises:
            CheckpointError: the file cannot be written.
        """
        try:
            self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error}") from error

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _difference(known: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    number = own["trial"]
    if known["seed"] != own["seed"]:
        return f"trial {number} has the seed {known['seed']} there and {own['seed']} here"
    for key in (*known["config"], *own["config"]):
        there, here = known["config"].get(key), own["config"].get(key)
        if there != here:
            return f"trial {number} has {key!r} = {there!r} there and {here!r} here"
    return f"trial {number} differs"
