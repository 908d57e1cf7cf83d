"""Showing how a sweep goes on."""

import time
from typing import TYPE_CHECKING, Any

from ..callbacks.progress import _duration
from .ledger import Ledger
from .trials import TrialResult

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["SweepProgress", "config_words"]

_STATES = ("running", "finished", "stopped", "pruned", "diverged", "failed")
_COLOURS = {"finished": "green", "pruned": "yellow", "diverged": "red", "failed": "red"}


class SweepProgress:
    """A view of a sweep: lines that are redrawn on a terminal, else a line from time to time.

    Args:
        ledger: of the sweep.
        console: where to show it; None for standard output.
        refresh_seconds: redraw at most so often.
        line_seconds: without a terminal, print a line at most so often.
    """

    def __init__(
        self,
        ledger: Ledger,
        console: "Console | None" = None,
        refresh_seconds: float = 0.1,
        line_seconds: float = 10.0,
    ) -> None:
        from rich.console import Console

        self.ledger = ledger
        self.console = console or Console()
        self.every = refresh_seconds if self.console.is_terminal else line_seconds
        self._live: Any = None
        self._begin = self._shown = time.perf_counter()
        self._before = ledger.work()[0]

    def __enter__(self) -> "SweepProgress":
        if self.console.is_terminal:
            from rich.live import Live

            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
        self._begin, self._before = time.perf_counter(), self.ledger.work()[0]
        self._show()
        return self

    def __exit__(self, *_: object) -> None:
        self._show()
        if self._live is not None:
            self._live.stop()

    def update(self) -> None:
        """Show the state if it was not shown just now."""
        if time.perf_counter() - self._shown >= self.every:
            self._show()

    def _show(self) -> None:
        self._shown = time.perf_counter()
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
        else:
            self.console.print(self.text(), markup=False, highlight=False, soft_wrap=True)

    # ---- what is shown

    def text(self) -> str:
        """The state in one line."""
        counts, total = self.ledger.counts(), len(self.ledger.results)
        over = total - counts.get("running", 0) - counts.get("pending", 0)
        states = ", ".join(f"{counts[name]} {name}" for name in _STATES if name in counts)
        parts = [f"{over}/{total} trials" + (f": {states}" if states else "")]
        best = self.ledger.best()
        if best is not None:
            parts.append(self._best(best))
        parts.append(self._left())
        return "; ".join(part for part in parts if part)

    def _best(self, best: TrialResult) -> str:
        return (
            f"best {self.ledger.metric} {best.value:.5g} (trial {best.id}, epoch {best.epoch}: "
            f"{config_words(best.config)})"
        )

    def _left(self) -> str:
        done, left = self.ledger.work()
        if done == self._before or not left:
            return ""
        rate = (time.perf_counter() - self._begin) / (done - self._before)
        return f"{_duration(rate * left)} left at most"

    def _table(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        counts, total = self.ledger.counts(), len(self.ledger.results)
        done, left = self.ledger.work()
        over = total - counts.get("running", 0) - counts.get("pending", 0)
        bar = Table.grid(padding=(0, 2))
        share = done / max(done + left, 1)
        bar.add_row(
            Text("sweep", style="bold"),
            ProgressBar(total=1.0, completed=share, width=30),
            Text(f"{over}/{total} trials"),
            Text(self._left()),
        )
        states = Text("  ").join(
            Text(f"{counts[name]} {name}", style=_COLOURS.get(name, ""))
            for name in _STATES
            if name in counts
        )
        best = self.ledger.best()
        return Group(bar, states, Text("" if best is None else self._best(best)))


def config_words(config: dict[str, Any]) -> str:
    """A configuration in a few words."""
    return ", ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={_short(value)}"
        for name, value in config.items()
    )


def _short(value: Any) -> str:
    return str(getattr(value, "__name__", value))
