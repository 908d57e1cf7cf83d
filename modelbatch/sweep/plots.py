"""Figures of a sweep, with matplotlib."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelBatchError
from .axes import colours, curve_limits, parallel_axes, varying_keys

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .result import SweepResult

__all__ = ["plot_curves", "plot_parallel"]


def _figure(name: str, path: str | Path | None, size: tuple[float, float]) -> "Figure":
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            f'SweepResult.{name} needs matplotlib: pip install "modelbatch[plot]"'
        ) from error
    if path is None:
        import matplotlib.pyplot

        return matplotlib.pyplot.figure(figsize=size, layout="constrained")
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _finish(figure: "Figure", path: str | Path | None) -> "Figure":
    if path is not None:
        figure.savefig(path)
    return figure


def plot_curves(result: "SweepResult", path: str | Path | None, curve: str) -> "Figure":
    """See `SweepResult.plot_curves`."""
    known = dict.fromkeys(name for own in result.values() for name in own.curves)
    if curve not in known:
        raise ModelBatchError(f"there is no curve {curve!r}; there are: {', '.join(known)}")
    figure = _figure("plot_curves", path, (7.0, 4.4))
    axes = figure.subplots()
    ranking = result.ranking()
    colour = colours(ranking)
    for place, own in enumerate(reversed(ranking)):
        values = own.curves.get(curve, [])
        best = place == len(ranking) - 1
        width, alpha = (2.2, 1.0) if best else (0.9, 0.6)
        marker = "o" if len(values) == 1 else None
        epochs = range(1, len(values) + 1)
        label = f"trial {own.id}" if best and values else None
        axes.plot(
            epochs,
            values,
            color=colour[own.id],
            linewidth=width,
            alpha=alpha,
            marker=marker,
            markersize=3,
            label=label,
        )
    low, high = curve_limits([own.curves.get(curve, []) for own in ranking])
    axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    axes.set_xlabel("epochs")
    axes.set_ylabel(curve)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return _finish(figure, path)


def plot_parallel(result: "SweepResult", path: str | Path | None) -> "Figure":
    """See `SweepResult.plot_parallel`."""
    lost = ("diverged", "failed")
    ranking = [r for r in result.ranking() if r.value is not None and r.status not in lost]
    if not ranking:
        raise ModelBatchError(f"no trial has a value of {result.metric!r}")
    scales = parallel_axes(ranking, varying_keys(list(result.values())), result.metric)
    figure = _figure("plot_parallel", path, (max(5.0, 2.0 * len(scales)), 4.4))
    axes = figure.subplots()
    colour = colours(ranking)
    columns = range(len(scales))
    for place in reversed(range(len(ranking))):
        heights = [scale.places[place] for scale in scales]
        style: dict[str, Any] = {"linewidth": 2.2} if place == 0 else {"alpha": 0.55}
        axes.plot(columns, heights, color=colour[ranking[place].id], **({"linewidth": 0.9} | style))
    for column, scale in enumerate(scales):
        axes.axvline(column, color="#555555", linewidth=0.8)
        for height, label in scale.ticks:
            axes.annotate(
                label,
                (column, height),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=8,
                va="center",
                bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5},
            )
    axes.set_xticks(list(columns), [scale.name for scale in scales])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlim(-0.1, len(scales) - 0.6)
    return _finish(figure, path)
