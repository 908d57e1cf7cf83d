"""A growing CSV or JSON Lines file with one column per value and model."""

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from .._extension import format_rows
from ..errors import ModelBatchError

__all__ = ["TableFile"]

_FIRST = ("event", "epoch", "step")
_MOST_PENDING = 32
_NARROW = (torch.float32, torch.float16, torch.bfloat16)  # float32 holds all of them
_Row = tuple[tuple[str, int, int], Mapping[str, Tensor], list[float] | None]
_COLUMN = re.compile(r"(.+)_model_(\d+)")


class TableFile:
    """The file behind `MetricsLogger`.

    Args:
        path: of the file.
        format: `"csv"` or `"jsonl"`.
        columns: names of the values that a new file has columns for, each for every model.
        ids: of the models.
        keep_rows: drop what there is behind so many rows; None keeps all of them.
        flush_seconds: rows wait for others no longer than that.

    Raises:
        ModelBatchError: there is a file with other columns.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        columns: Sequence[str],
        ids: Sequence[int],
        keep_rows: int | None,
        flush_seconds: float,
    ):
        self.path = path
        self.flush_seconds = flush_seconds
        self._ids = list(ids)  # of the models whose numbers a row has
        self._all_ids = list(ids)  # of those that the file has columns for
        self.rows = 0
        self._csv = format == "csv"
        self._columns = list(columns)
        self._resumes = False
        self._templates: dict[str, str] = {}
        self._pending: list[_Row] = []
        self._rates: list[float] = []
        self._rates_text: tuple[list[float] | None, str] = (None, "")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size and keep_rows != 0:
            self._continue(keep_rows)
        else:
            path.write_bytes(self._header() if self._csv else b"")
        self._file: FileIO = path.open("ab", buffering=0)
        self._written = -math.inf  # the first row is written at once

    def close(self) -> None:
        """Write what is pending and close the file."""
        try:
            self.flush()
        finally:
            self._file.close()

    # ---- what is there already

    def _continue(self, keep_rows: int | None) -> None:
        """Look at the file, and cut off rows that are incomplete or not to be kept."""
        end = 0
        self._resumes = keep_rows is not None
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 0 if self._csv else 1):
                if not line.endswith(b"\n") or (keep_rows is not None and number > keep_rows):
                    break
                if end == 0:
                    self._check_columns(line)
                end += len(line)
                self.rows = number
        if end == 0:
            raise ModelBatchError(f"'{self.path}' is no file of MetricsLogger: it has no rows")
        os.truncate(self.path, end)

    def _check_columns(self, line: bytes) -> None:
        try:
            text = line.decode()
            names = text.rstrip("\r\n").split(",") if self._csv else list(json.loads(text))
        except ValueError:
            names = []
        found: dict[str, list[int]] = {}
        for name in names[len(_FIRST) :]:
            match = _COLUMN.fullmatch(name)
            if match is None:
                names = []
                break
            found.setdefault(match[1], []).append(int(match[2]))
        if tuple(names[: len(_FIRST)]) != _FIRST:
            raise ModelBatchError(
                f"'{self.path}' exists and is no file of MetricsLogger; choose another path, or "
                f"give overwrite=True"
            )
        other = [name for name, models in found.items() if not self._has_place(models)]
        missing = [name for name in self._columns if self._csv and name not in found]
        if other or missing:
            what = (
                f"columns '{other[0]}' of {len(found[other[0]])} models, this bundle has "
                f"{len(self._ids)}"
                if other
                else f"no columns '{missing[0]}'"
            )
            raise ModelBatchError(
                f"'{self.path}' exists and has {what}; choose another path, or give overwrite=True"
            )
        if self._csv:
            self._columns = list(found)
            self._all_ids = next(iter(found.values()), self._all_ids)

    def _has_place(self, models: list[int]) -> bool:
        """Whether columns of these models are those of the bundle.

        A training that is resumed may find those of models that have left since, or joined after
        the checkpoint.
        """
        return models == self._ids or (self._resumes and {*models} >= {*self._ids})

    def models_changed(self, ids: Sequence[int]) -> None:
        """Write rows of other models from now on."""
        self.flush()
        self._ids = list(ids)
        self._templates.clear()
        self._rates_text = (None, "")
        new = [model_id for model_id in ids if model_id not in self._all_ids]
        if self._csv and new:
            self._rewrite([], new)

    # ---- rows

    def add_row(
        self,
        first: tuple[str, int, int],
        vectors: Mapping[str, Tensor],
        rates: list[float] | None,
    ) -> None:
        """Take note of a row, and write what there is if it is time.

        Args:
            first: event, epoch and step.
            vectors: `[M]` each; they are not read now, and nobody may write into them.
            rates: the learning rates.

        Raises:
            ModelBatchError: the bundle has another number of models than the file.
        """
        for name, vector in vectors.items():
            self._check_length(name, vector.shape[0])
        if rates is not None and rates is not self._rates:
            self._check_length("lr", len(rates))
            if rates == self._rates:  # they seldom change
                rates = self._rates
            self._rates = rates
        self._pending.append((first, vectors, rates))
        now = time.monotonic()
        if len(self._pending) >= _MOST_PENDING or now - self._written >= self.flush_seconds:
            self.flush()

    def _check_length(self, name: str, length: int) -> None:
        if length != len(self._ids):
            raise ModelBatchError(
                f"'{self.path}' has columns for {len(self._ids)} models, '{name}' has {length} "
                f"values"
            )

    def flush(self) -> None:
        """Read what is pending, with one transfer from the device, and write it."""
        self._written = time.monotonic()
        pending, self._pending = self._pending, []
        if not pending:
            return
        tensors = [vector for _, vectors, _ in pending for vector in vectors.values()]
        lines = iter(_written(tensors))
        rows: list[str] = []
        for first, vectors, rates in pending:
            texts = {name: self._text(name, next(lines)) for name in vectors}
            if rates is not None:
                if rates is not self._rates_text[0]:
                    self._rates_text = (rates, self._text("lr", ",".join(map(repr, rates))))
                texts["lr"] = self._rates_text[1]
            if self._csv:
                if new := [name for name in texts if name not in self._columns]:
                    self._append(rows)
                    rows = []
                    self._rewrite(new, [])
                nothing = "," * (len(self._all_ids) - 1)
                cells = [texts.get(name, nothing) for name in self._columns]
                rows.append(",".join([*map(str, first), *cells]))
            else:
                kind, epoch, step = first
                start = f'{{"event": "{kind}", "epoch": {epoch}, "step": {step}'
                rows.append(", ".join([start, *texts.values()]) + "}")
        self._append(rows)

    def _append(self, rows: list[str]) -> None:
        if not rows:
            return
        rest = memoryview(("\n".join(rows) + "\n").encode())
        while rest:  # unbuffered: one call of the system, as a rule
            rest = rest[self._file.write(rest) :]
        self.rows += len(rows)

    def _text(self, name: str, line: str) -> str:
        """The cells of a value for all models, from its numbers with commas between them."""
        if self._csv and self._ids == self._all_ids:
            return line
        numbers = line.split(",")
        if self._csv:
            own = dict(zip(self._ids, numbers, strict=True))
            return ",".join(own.get(model_id, "") for model_id in self._all_ids)
        if "n" in line:  # inf or nan, which JSON does not have
            numbers = ["null" if "n" in number else number for number in numbers]
        template = self._templates.get(name)
        if template is None:
            keys = (json.dumps(f"{name}_model_{i}") for i in self._ids)
            # in one go, which takes a third of the time of one by one
            template = ", ".join(f"{key.replace('%', '%%')}: %s" for key in keys)
            self._templates[name] = template
        return template % tuple(numbers)

    # ---- the header of CSV

    def _header(self) -> bytes:
        names = (f"{name}_model_{i}" for name in self._columns for i in self._all_ids)
        return (",".join([*_FIRST, *names]) + "\n").encode()

    def _rewrite(self, names: Sequence[str], ids: Sequence[int]) -> None:
        """Write the file again with columns of further values or models, empty in its rows."""
        width, count = len(self._all_ids), len(self._columns)
        self._columns += names
        self._all_ids += ids
        self._file.close()
        temporary = self.path.with_name(f"{self.path.name}.new")
        padding = b"," * (len(names) * len(self._all_ids)) + b"\n"
        more = [b""] * len(ids)
        with temporary.open("wb") as file:
            file.write(self._header())
            for line in self._lines():
                row = line.rstrip(b"\r\n")
                if more:
                    cells = row.split(b",")
                    parts, start = cells[: len(_FIRST)], len(_FIRST)
                    for k in range(count):
                        parts += cells[start + k * width : start + (k + 1) * width] + more
                    row = b",".join(parts)
                file.write(row + padding)
        os.replace(temporary, self.path)
        self._file = self.path.open("ab", buffering=0)

    def _lines(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            next(file)
            yield from file


def _written(vectors: Sequence[Tensor]) -> list[str]:
    """The numbers of each vector with commas between them, after one transfer from the device."""
    if not vectors:
        return []
    if all(vector.dtype in _NARROW for vector in vectors):
        return format_rows(torch.stack([vector.float() for vector in vectors]).cpu())
    narrow = [vector.dtype in _NARROW for vector in vectors]
    rows = torch.stack([vector.double() for vector in vectors]).cpu()
    # the shortest text that is read back as the same float64; a float32 has a shorter one
    return [
        format_rows(row.float().unsqueeze(0))[0] if short else ",".join(map(repr, row.tolist()))
        for row, short in zip(rows, narrow, strict=True)
    ]
