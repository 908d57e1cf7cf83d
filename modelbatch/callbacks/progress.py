"""Showing how the training goes on."""

import time
from typing import TYPE_CHECKING, Any

from ..errors import ModelBatchError
from .base import Callback, Event
from .report import Spread, read, spread

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

__all__ = ["ProgressBar"]


class ProgressBar(Callback):
    """Shows progress, best, median and worst loss, frozen models, speed and the time left.

    On a terminal this is a few lines that are redrawn; elsewhere (a file, a pipe) a line of text
    from time to time.

    Args:
        console: where to show it; None for standard output.
        refresh_seconds: redraw at most so often; the losses are read from the device then.
        line_seconds: without a terminal, print an epoch's line only if the last is so old. The
            first and the last epoch always have one.

    Raises:
        ModelBatchError: a negative number of seconds.
    """

    reads_models = False

    def __init__(
        self,
        console: "Console | None" = None,
        refresh_seconds: float = 0.1,
        line_seconds: float = 10.0,
    ):
        if not (refresh_seconds >= 0 and line_seconds >= 0):
            raise ModelBatchError(
                f"refresh_seconds and line_seconds must not be negative, got {refresh_seconds} "
                f"and {line_seconds}"
            )
        self.refresh_seconds = refresh_seconds
        self.line_seconds = line_seconds
        self._console = console
        self._live: Live | None = None
        self._bar: Any = None
        self._clear()

    def _clear(self) -> None:
        self._shown: dict[str, Spread] = {}
        self._begin = self._clock = self._drawn = time.perf_counter()
        self._line: float | None = None
        self._train_seconds = 0.0
        self._samples = 0
        self._batches: int | None = None  # in an epoch
        self._first_batch: int | None = None  # the first of this run, counted over all epochs
        self._done = 0.0
        self._pending = ""  # the line of an epoch that was not shown

    # ---- events

    def on_train_start(self, event: Event) -> None:
        """Begin to show."""
        from rich.console import Console

        self._stop()
        self._clear()
        self._console = self._console or Console()
        if self._console.is_terminal:
            self._start_live()
            self._draw(event)

    def on_epoch_start(self, event: Event) -> None:
        """Start the clock: what comes between two epochs does not count as training."""
        self._clock = time.perf_counter()

    def on_train_step(self, event: Event) -> None:
        """Count, and redraw now and then."""
        now = time.perf_counter()
        self._train_seconds += now - self._clock
        self._clock = now
        self._samples += event.batch_size * sum(event.mb._active)
        self._batches = event.num_batches or max(self._batches or 0, event.batch + 1)
        self._done = event.epoch * self._batches + event.batch + 1
        if self._first_batch is None:
            self._first_batch = int(self._done) - 1
        if self._live is not None and now - self._drawn >= self.refresh_seconds:
            self._note(event)
            self._draw(event)

    def on_validation_step(self, event: Event) -> None:
        """Show that a validation is going on."""
        if self._live is not None and time.perf_counter() - self._drawn >= self.refresh_seconds:
            self._draw(event, validating=True)

    def on_epoch_end(self, event: Event) -> None:
        """Show the results of the epoch."""
        flags = event.mb._active
        self._shown = {k: spread(v, flags, event.mb._ids) for k, v in read(event.metrics).items()}
        if self._live is not None:
            self._draw(event)
            return
        now = time.perf_counter()
        last = event.epochs is not None and event.epoch + 1 >= event.epochs
        self._pending = self._text(event)
        if self._line is None or last or now - self._line >= self.line_seconds:
            self._print()

    def on_train_end(self, event: Event) -> None:
        """Show the last state and let go of the terminal."""
        if self._live is not None:
            self._draw(event)
            self._stop()
        elif self._pending:
            self._print()

    def _note(self, event: Event) -> None:
        if event.losses is not None:
            losses = read({"loss": event.losses})["loss"]
            self._shown["loss"] = spread(losses, event.mb._active, event.mb._ids)

    # ---- what is shown

    def _epoch(self, event: Event) -> str:
        of = "" if event.epochs is None else f"/{event.epochs}"
        return f"epoch {event.epoch + 1}{of}"

    def _left(self, event: Event) -> str:
        if event.epochs is None or self._batches is None or self._first_batch is None:
            return ""
        todo = event.epochs * self._batches - self._done
        seconds = (time.perf_counter() - self._begin) / (self._done - self._first_batch) * todo
        return f"{_duration(seconds)} left"

    def _speed(self) -> str:
        if self._train_seconds == 0 or self._samples == 0:
            return ""
        return f"{_short(self._samples / self._train_seconds)} model-samples/s"

    def _models(self, event: Event) -> str:
        active = sum(event.mb._active)
        frozen = len(event.mb) - active
        return f"{active} active, {frozen} frozen"

    def _text(self, event: Event) -> str:
        parts = [f"{self._epoch(event)}, step {event.step}"]
        for name, own in self._shown.items():
            parts.append(f"{name} {_words(name, own)}" if own.known else f"{name} not finite")
        parts += [self._models(event), self._speed(), self._left(event)]
        return "; ".join(part for part in parts if part)

    def _print(self) -> None:
        assert self._console is not None
        self._console.print(self._pending, markup=False, highlight=False, soft_wrap=True)
        self._line, self._pending = time.perf_counter(), ""

    def _start_live(self) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        assert self._console is not None
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._bar = Progress(*columns, console=self._console, auto_refresh=False)
        self._bar.add_task("", total=None, left="")
        self._live = Live(console=self._console, auto_refresh=False)
        self._live.start()

    def _draw(self, event: Event, validating: bool = False) -> None:
        from rich.console import Group
        from rich.table import Table

        assert self._live is not None
        self._drawn = time.perf_counter()
        total = self._batches if event.num_batches is None or validating else event.num_batches
        done = event.batch + 1 if event.losses is not None else total or 0
        if validating:
            total, done = event.num_batches, event.batch + 1
        elif self._first_batch is None:
            done = 0
        self._bar.update(
            self._bar.task_ids[0],
            description=self._epoch(event) + (" validation" if validating else ""),
            total=total,
            completed=done,
            left=self._left(event),
        )
        table = Table.grid(padding=(0, 3))
        for name, own in self._shown.items():
            cells = _words(name, own).split(", ") if own.known else ["[red]not finite"]
            table.add_row(f"[bold]{name}", *cells)
        models = self._models(event).split(", ")
        table.add_row("[bold]models", *models, self._speed())
        self._live.update(Group(self._bar, table), refresh=True)

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _words(name: str, own: Spread) -> str:
    """Losses have a best and a worst; of another metric nobody knows which end is good."""
    if name.endswith("loss"):
        return (
            f"best {own.low:.4g} (model {own.lowest}), median {own.median:.4g}, "
            f"worst {own.high:.4g}"
        )
    return f"min {own.low:.4g}, median {own.median:.4g}, max {own.high:.4g}"


def _duration(seconds: float) -> str:
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G"):
        if number < 999.5 or unit == "G":
            break
        number /= 1000
    return f"{number:.3g}{unit}"
