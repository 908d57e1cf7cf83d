"""The HTML page of a sweep."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..callbacks.progress import _duration
from ..errors import ModelBatchError
from .axes import colours, curve_limits, parallel_axes, varying_keys
from .page import SCRIPT, STYLE
from .trials import TrialResult, describe

if TYPE_CHECKING:
    from .result import SweepResult

__all__ = ["write_report"]

_WIDTH, _HEIGHT = 960, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 30, 40


def write_report(result: "SweepResult", path: Path) -> Path:
    """See `SweepResult.report`."""
    try:
        path.write_text(_page(result), encoding="utf-8")
    except OSError as error:
        raise ModelBatchError(f"{path} cannot be written: {error}") from error
    return path


def _page(result: "SweepResult") -> str:
    ranking = result.ranking()
    keys = varying_keys(list(result.values()))
    colour = colours(ranking)
    curves = dict.fromkeys(name for own in result.values() for name in own.curves)
    names = sorted(curves, key=lambda name: name != result.metric)
    charts = [_curves(ranking, colour, name, i) for i, name in enumerate(names)]
    lost = ("diverged", "failed")
    valued = [own for own in ranking if own.value is not None and own.status not in lost]
    if valued:
        charts.insert(1, _parallel(valued, colour, keys, result.metric))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Sweep of {len(result)} trials</title>\n<style>\n{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>Sweep of {len(result)} trials</h1>\n{_summary(result)}\n"
        f"{''.join(charts)}{_table(result, ranking, colour)}"
        f"<script>\n{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _summary(result: "SweepResult") -> str:
    items = [("metric", f"{result.metric}, {result.mode}"), ("status", result.status)]
    items += [(name, str(count)) for name, count in result.counts.items()]
    items.append(("time", _duration(sum(own.seconds for own in result.values()))))
    top = result.ranking()[0]
    if top.value is not None and top.status not in ("diverged", "failed"):
        config = ", ".join(f"{k} = {_text(v)}" for k, v in top.config.items())
        value = f"{top.value:.6g} by trial {top.id} in epoch {top.epoch} ({config})"
        items.append((f"best {result.metric}", value))
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in items)
    return f'<dl class="summary">{cells}</dl>'


def _text(value: Any) -> str:
    value = describe(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# ---- charts


def _line(own: TrialResult, points: str, colour: str) -> str:
    return (
        f'<path class="line" data-trial="{own.id}" d="{points}" stroke="{colour}">'
        f"<title>trial {own.id}</title></path>\n"
    )


def _chart(title: str, note: str, body: str) -> str:
    return (
        f'<section><h2>{escape(title)}</h2><p class="note">{note}</p>\n'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">\n'
        f"{body}</svg></section>\n"
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    """A path through points; a gap where a number is not finite, a dot for a lonely one."""
    parts, pen = [], False
    for i, (x, y) in enumerate(points):
        if not math.isfinite(y):
            pen = False
            continue
        alone = not pen and (i + 1 == len(points) or not math.isfinite(points[i + 1][1]))
        parts.append(f"{'L' if pen else 'M'}{x:.1f} {y:.1f}" + ("h0.1" if alone else ""))
        pen = True
    return "".join(parts)


def _curves(ranking: Sequence[TrialResult], colour: Any, name: str, number: int) -> str:
    low, high = curve_limits([own.curves.get(name, []) for own in ranking])
    most = max((len(own.curves.get(name, [])) for own in ranking), default=1)
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(epoch: float) -> float:
        return _LEFT + width * (epoch - 1) / max(most - 1, 1)

    def y(value: float) -> float:
        if not math.isfinite(value):
            return math.nan
        # far outside is as good as anywhere outside
        return _TOP + height * min(max((high - value) / (high - low), -9.0), 9.0)

    clip = f"clip-{number}"
    parts = [
        f'<clipPath id="{clip}"><rect x="{_LEFT}" y="{_TOP - 2}" width="{width}" '
        f'height="{height + 4}"/></clipPath>\n'
    ]
    for i in range(5):
        value = low + (high - low) * i / 4
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" '
            f'y2="{y(value):.1f}"/><text class="end" x="{_LEFT - 8}" y="{y(value) + 4:.1f}">'
            f"{value:.4g}</text>\n"
        )
    for epoch in sorted({1, most, *(round(1 + (most - 1) * i / 8) for i in range(9))}):
        parts.append(f'<text class="mid" x="{x(epoch):.1f}" y="{_HEIGHT - 18}">{epoch}</text>\n')
    parts.append(f'<g class="lines" clip-path="url(#{clip})">\n')
    for own in reversed(ranking):  # the best on top
        values = own.curves.get(name, [])
        points = _path([(x(i + 1), y(value)) for i, value in enumerate(values)])
        if points:
            parts.append(_line(own, points, colour[own.id]))
    parts.append("</g>\n")
    note = "By epoch. Red is the best trial, grey the worst; what lies far outside is cut off."
    return _chart(name, note, "".join(parts))


def _parallel(ranking: Sequence[TrialResult], colour: Any, keys: Sequence[str], metric: str) -> str:
    axes = parallel_axes(ranking, keys, metric)
    width, height = _WIDTH - _LEFT - 110, _HEIGHT - _TOP - _BOTTOM

    def x(column: int) -> float:
        return _LEFT + width * column / max(len(axes) - 1, 1)

    def y(place: float) -> float:
        return _TOP + 10 + (height - 10) * (1 - place)

    parts = ['<g class="lines">\n']
    for i in reversed(range(len(ranking))):
        points = _path([(x(column), y(axis.places[i])) for column, axis in enumerate(axes)])
        parts.append(_line(ranking[i], points, colour[ranking[i].id]))
    parts.append("</g>\n")
    for column, axis in enumerate(axes):
        parts.append(
            f'<line class="axis" x1="{x(column):.1f}" x2="{x(column):.1f}" y1="{y(0):.1f}" '
            f'y2="{y(1):.1f}"/><text class="mid name" x="{x(column):.1f}" y="{_TOP - 8}">'
            f"{escape(axis.name)}</text>\n"
        )
        parts += [
            f'<text class="tick" x="{x(column) + 6:.1f}" y="{y(place) + 4:.1f}">'
            f"{escape(label)}</text>\n"
            for place, label in axis.ticks
        ]
    note = "A line per trial through what differs between the configurations, and its best value; "
    note += "those that diverged are left out."
    return _chart("Configurations", note, "".join(parts))


# ---- table


def _table(result: "SweepResult", ranking: Sequence[TrialResult], colour: Any) -> str:
    keys = list(dict.fromkeys(key for own in result.values() for key in own.config))
    heads = ["trial", "status", result.metric, "epoch", "epochs", "seconds", *keys, "error"]
    cells = "".join(
        f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in heads
    )
    states = "".join(f"<option>{escape(name)}</option>" for name in result.counts)
    rows = "".join(_row(own, keys, colour[own.id]) for own in ranking)
    return (
        '<section><h2>Trials</h2><p class="tools">'
        '<label>Filter <input id="filter" type="search" placeholder="relu lr&lt;0.01"></label> '
        f'<label>Status <select id="status"><option value="">all</option>{states}</select></label> '
        f'<span id="count" aria-live="polite">{len(ranking)} trials</span></p>\n'
        '<p class="note">Words that a row must have, and comparisons such as '
        "<code>lr&lt;0.01</code> or <code>width=64</code>. Click on a head to sort, on a row or a "
        "line to mark a trial.</p>\n"
        f'<div class="scroll"><table id="trials"><thead><tr>{cells}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody></table></div></section>\n"
    )


def _row(own: TrialResult, keys: Sequence[str], colour: str) -> str:
    value = "" if own.value is None else f"{own.value:.6g}"
    epoch = "" if own.epoch is None else str(own.epoch)
    cells = [
        f'<td><i style="background:{colour}"></i>{own.id}</td>',
        f'<td class="{own.status}">{own.status}</td>',
        f"<td>{value}</td><td>{epoch}</td><td>{own.epochs}</td><td>{own.seconds:.3g}</td>",
        *(f"<td>{escape(_text(own.config[k])) if k in own.config else ''}</td>" for k in keys),
        f"<td>{escape(own.error)}</td>",
    ]
    return f'<tr data-trial="{own.id}" tabindex="0">{"".join(cells)}</tr>\n'
