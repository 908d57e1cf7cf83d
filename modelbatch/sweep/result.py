"""What `run_sweep` returns."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import ModelBatchError
from .ledger import Ledger
from .trials import TrialResult, describe
from .weights import Weights, seeded

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["SweepResult"]

_COLUMNS = ("trial", "status", "value", "epoch", "epochs", "seconds", "seed", "error")


class SweepResult(Mapping[int, TrialResult]):
    """The results of a sweep by trial id: `result[3].value`, `len(result)`, `result.items()`.

    Args:
        ledger: what is known of all trials.
        status: `"finished"` or `"interrupted"`.
        seconds: the time that the call took.
        build: makes a model of a config.
        weights: what was kept.

    Attributes:
        metric: the name of the curve that the sweep is about.
        mode: `"min"` or `"max"`.
        status: `"finished"` or `"interrupted"`.
        seconds: the time that the call took.
    """

    def __init__(
        self,
        ledger: Ledger,
        *,
        status: str,
        seconds: float,
        build: Callable[[dict[str, Any]], nn.Module],
        weights: Weights | None,
    ) -> None:
        self.metric, self.mode = ledger.metric, ledger.mode
        self.status, self.seconds = status, seconds
        self._ledger, self._build, self._weights = ledger, build, weights

    def __getitem__(self, trial: int) -> TrialResult:
        if trial not in self._ledger.results:
            raise KeyError(f"there is no trial {trial!r} in a sweep of {len(self)}")
        return self._ledger.results[trial]

    def __iter__(self) -> Iterator[int]:
        return iter(self._ledger.results)

    def __len__(self) -> int:
        return len(self._ledger.results)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        best = self._ledger.best()
        text = "" if best is None else f"; best {self.metric} {best.value:.6g}, trial {best.id}"
        return f"SweepResult({len(self)} trials: {counts}{text})"

    @property
    def counts(self) -> dict[str, int]:
        """How many trials there are in each state."""
        return self._ledger.counts()

    @property
    def best(self) -> TrialResult:
        """The trial with the best value; those that diverged or failed never count.

        Raises:
            ModelBatchError: no trial has a value, with the error of the first that failed.
        """
        best = self._ledger.best()
        if best is None:
            errors = [f"; trial {r.id}: {r.error}" for r in self.values() if r.error][:1]
            raise ModelBatchError(f"no trial has a value of {self.metric!r}{''.join(errors)}")
        return best

    def ranking(self) -> list[TrialResult]:
        """All trials, the best first; those without a value, or that diverged or failed, last."""
        sign = 1.0 if self.mode == "min" else -1.0

        def key(result: TrialResult) -> tuple[bool, float, int]:
            lost = result.value is None or result.status in ("diverged", "failed")
            return lost, sign * (result.value or 0.0), result.id

        return sorted(self.values(), key=key)

    def export(self, trial: int | None = None) -> nn.Module:
        """The model of a trial with the weights that `keep_weights=` kept; by default the best's.

        Raises:
            ModelBatchError: there are no weights: nothing was kept, or the trial diverged, failed,
                or has not ended.
        """
        result = self.best if trial is None else self[trial]
        if self._weights is None:
            raise ModelBatchError("no weights were kept: the sweep had keep_weights=None")
        if result.status in ("diverged", "failed"):
            raise ModelBatchError(f"trial {result.id} {result.status}, so it has no weights")
        model = seeded(self._build, result.config, result.seed)
        self._weights.load(result.id, model)
        return model

    def to_dataframe(self, curves: bool = False) -> "pandas.DataFrame":
        """A pandas table with a row per trial: what came of it, and its config.

        A key of a config that has the name of another column becomes `config_<key>`.

        Args:
            curves: a row per trial and epoch instead: the columns are trial, epoch and the curves.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                'SweepResult.to_dataframe needs pandas: pip install "modelbatch[plot]"'
            ) from error
        if curves:
            rows = [
                {"trial": r.id, "epoch": epoch, **{n: c[epoch] for n, c in r.curves.items()}}
                for r in self.values()
                for epoch in range(r.epochs)
            ]
            return pandas.DataFrame(rows, columns=None if rows else ["trial", "epoch"])
        rows = [
            {
                "trial": r.id,
                **{name: getattr(r, name) for name in _COLUMNS[1:]},
                **{
                    f"config_{key}" if key in _COLUMNS else key: describe(value)
                    for key, value in r.config.items()
                },
            }
            for r in self.values()
        ]
        return pandas.DataFrame(rows)

    def plot_curves(self, path: str | Path | None = None, curve: str | None = None) -> "Figure":
        """Draw the curves of all trials with matplotlib, the better ones in stronger colours.

        Args:
            path: a file to write; without one the figure is that of `matplotlib.pyplot`.
            curve: by default the sweep's metric.

        Raises:
            ModelBatchError: no such curve.
            ImportError: matplotlib is not installed.
        """
        from .plots import plot_curves

        return plot_curves(self, path, curve or self.metric)

    def plot_parallel(self, path: str | Path | None = None) -> "Figure":
        """Draw a line per trial through what differs between the configs, and its value.

        Args:
            path: a file to write; without one the figure is that of `matplotlib.pyplot`.

        Raises:
            ModelBatchError: no trial has a value.
            ImportError: matplotlib is not installed.
        """
        from .plots import plot_parallel

        return plot_parallel(self, path)

    def report(self, path: str | Path) -> Path:
        """Write one HTML page about the sweep that needs nothing else, not even the internet.

        It has a table that can be sorted and filtered, the curves, and parallel coordinates.

        Args:
            path: of the file.

        Returns:
            The path.
        """
        from .report import write_report

        return write_report(self, Path(path))
