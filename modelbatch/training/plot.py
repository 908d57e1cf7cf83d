"""Figures of a history."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ModelBatchError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .history import Best, History

__all__ = ["plot_history"]

_ALL, _BAND, _MEDIAN, _BEST, _LOST = "#8c96a3", "#6fa8dc", "#1f5fa8", "#d1495b", "#b8860b"
_NAMES = {"loss": "training loss", "val_loss": "validation loss", "lr": "learning rate"}
_Array = Any


def plot_history(
    history: "History", path: str | Path | None, metric: str, best: "Best | None"
) -> "Figure":
    """See `History.plot`."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            'History.plot needs matplotlib: pip install "modelbatch[plot]"'
        ) from error
    if not history.epochs:
        raise ModelBatchError("there is nothing to plot: no epoch has ended")
    curves = history[metric].double().numpy()
    rates = _first_rates(history)
    column = -1 if best is None else history.model_ids.index(best.model)
    rated = bool(np.isfinite(rates).any())
    size = (11.0 if rated else 6.2, 4.4)
    if path is None:
        import matplotlib.pyplot

        figure = matplotlib.pyplot.figure(figsize=size, layout="constrained")
    else:
        # Drawn by Agg (or what the format needs); the figures of pyplot are left alone.
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, 2 if rated else 1, squeeze=False, width_ratios=[3, 2][: 1 + rated])
    label = _NAMES.get(metric, metric.replace("val_", "validation ", 1).replace("_", " "))
    limits = _limits(curves)
    _draw_curves(panels[0, 0], curves, best, column, label)
    if rated:
        last = (
            curves[-1] if limits is None else np.where(curves[-1] > limits[2], np.nan, curves[-1])
        )
        _draw_last(panels[0, 1], rates, last, best, column, label)
    for axes in panels[0]:
        _finish(axes, limits)
    if path is not None:
        figure.savefig(path, dpi=110)
    return figure


def _first_rates(history: "History") -> _Array:
    """The learning rate that each model began with; NaN for those that have left."""
    rates = history["lr"].numpy()
    first = rates[np.isfinite(rates).argmax(0), np.arange(rates.shape[1])]
    gone = np.ones(rates.shape[1], dtype=bool)
    gone[history._columns] = False
    return np.where(gone, np.nan, first)


def _draw_curves(
    axes: "Axes", curves: _Array, best: "Best | None", column: int, label: str
) -> None:
    epochs = np.arange(1, len(curves) + 1)
    marker = "o" if len(curves) == 1 else ""
    finite = np.where(np.isfinite(curves), curves, np.nan)
    alpha = float(np.clip(25 / max(curves.shape[1], 1), 0.15, 0.7))
    axes.plot(epochs, finite, color=_ALL, linewidth=0.8, alpha=alpha, marker=marker, zorder=1)
    counted = np.isfinite(curves).any(1)
    if counted.any():
        low, middle, high = np.nanpercentile(finite[counted], [25, 50, 75], axis=1)
        at = epochs[counted]
        axes.fill_between(
            at, low, high, color=_BAND, alpha=0.35, linewidth=0, zorder=2, label="quartiles"
        )
        axes.plot(at, middle, color=_MEDIAN, linewidth=2, marker=marker, zorder=3, label="median")
    if best is not None:
        name = f"best: model {best.model}, {best.value:.4g}"
        axes.plot(epochs, finite[:, column], color=_BEST, linewidth=2, marker=marker, zorder=4)
        spot = ([best.epoch + 1], [best.value])
        axes.plot(*spot, "o-", color=_BEST, markersize=7, linewidth=2, zorder=5, label=name)
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.set_title(f"{curves.shape[1]} models", loc="left")
    axes.locator_params(axis="x", integer=True)
    margin = max(0.02 * len(curves), 0.2)
    axes.set_xlim(1 - margin, len(curves) + margin)
    if len(axes.get_legend_handles_labels()[0]):
        axes.legend(frameon=False, fontsize="small")


def _draw_last(
    axes: "Axes", rates: _Array, last: _Array, best: "Best | None", column: int, label: str
) -> None:
    good = np.isfinite(last) & np.isfinite(rates)
    axes.scatter(rates[good], last[good], s=22, color=_MEDIAN, alpha=0.6, linewidth=0, zorder=2)
    lost = ~np.isfinite(last) & np.isfinite(rates)
    if lost.any():
        # At the upper edge: they have a learning rate, but no place on the other axis.
        axes.scatter(
            rates[lost],
            np.full(lost.sum(), 0.97),
            s=30,
            marker="x",
            color=_LOST,
            transform=axes.get_xaxis_transform(),
            label=f"diverged: {lost.sum()}",
            zorder=2,
        )
    if best is not None and good[column]:
        spot = (rates[column], last[column])
        axes.scatter(*spot, s=64, color=_BEST, zorder=3, label=f"model {best.model}")
    if (rates[np.isfinite(rates)] > 0).all():
        axes.set_xscale("log")
        if np.ptp(rates[np.isfinite(rates)]) == 0:
            axes.set_xlim(rates[0] / 10, rates[0] * 10)
    axes.set_xlabel("learning rate at the start")
    axes.set_ylabel(f"{label} at the end")
    axes.set_title("learning rates", loc="left")
    if len(axes.get_legend_handles_labels()[0]):
        axes.legend(frameon=False, fontsize="small")


def _limits(curves: _Array) -> tuple[bool, float, float] | None:
    """Whether the axis is logarithmic, and its ends: a few huge values must not hide the rest."""
    values = curves[np.isfinite(curves)]
    if not values.size:
        return None
    low, high = float(values.min()), float(values.max())
    if low > 0 and high / low > 20:
        # A diverging model passes 1e30 before it is NaN: far above any median it is out of sight.
        rows = [row[np.isfinite(row)] for row in curves]
        high = min(high, 30 * max(float(np.median(row)) for row in rows if row.size))
        return True, low / 1.3, high * 1.3
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    return False, low - margin, high + margin


def _finish(axes: "Axes", limits: tuple[bool, float, float] | None) -> None:
    if limits is not None:
        logarithmic, low, high = limits
        if logarithmic:
            axes.set_yscale("log")
        axes.set_ylim(low, high)
    axes.grid(True, which="major", color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
