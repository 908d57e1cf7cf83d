"""Scales and colours that the figures and the page of a sweep have in common."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .trials import TrialResult, describe

__all__ = ["Axis", "colours", "curve_limits", "parallel_axes", "varying_keys"]

# From the best trial to the worst.
_RAMP = ((209, 73, 91), (141, 108, 171), (111, 143, 175), (140, 150, 163))
_LOG_RATIO = 50.0
_MOST_LABELS = 12


@dataclass
class Axis:
    """One axis of parallel coordinates.

    Attributes:
        name: what it shows.
        places: from 0 (bottom) to 1 for each trial.
        ticks: (place, label).
    """

    name: str
    places: list[float]
    ticks: list[tuple[float, str]]


def varying_keys(results: Sequence[TrialResult]) -> list[str]:
    """The keys in which the configs differ."""
    keys = dict.fromkeys(key for result in results for key in result.config)
    missing = object()
    found = []
    for key in keys:
        values = [r.config.get(key, missing) for r in results]
        if len({repr(describe(v)) if v is not missing else "" for v in values}) > 1:
            found.append(key)
    return found


def parallel_axes(results: Sequence[TrialResult], keys: Sequence[str], metric: str) -> list[Axis]:
    """An axis per key and one for the value, whose far ends are clamped.

    `results` are trials that have one.
    """
    axes = [_axis(key, [describe(r.config.get(key)) for r in results]) for key in keys]
    low, high = curve_limits([[r.value or 0.0] for r in results])
    clamped = [min(max(r.value or 0.0, low), high) for r in results]
    return [*axes, _axis(metric, clamped)]


def _axis(name: str, values: list[Any]) -> Axis:
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == len(values) and len(set(numbers)) > 1:
        return _number_axis(name, [float(v) for v in numbers])
    words = ["-" if value is None else str(value) for value in values]
    distinct = list(dict.fromkeys(words))
    last = max(len(distinct) - 1, 1)
    places = {word: i / last for i, word in enumerate(distinct)}
    every = math.ceil(len(distinct) / _MOST_LABELS)
    return Axis(
        name, [places[w] for w in words], [(places[w], _short(w)) for w in distinct[::every]]
    )


def _short(text: str) -> str:
    return text if len(text) <= 24 else text[:23] + "…"


def _number_axis(name: str, values: list[float]) -> Axis:
    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low >= _LOG_RATIO
    scale = math.log10 if logarithmic else float
    bottom, top = scale(low), scale(high)
    distinct = sorted(set(values))
    if len(distinct) <= 6:
        marks = distinct
    elif logarithmic:
        step = math.ceil((top - bottom) / _MOST_LABELS)
        exponents = range(math.ceil(bottom - 1e-9), math.floor(top + 1e-9) + 1, step)
        marks = [10.0**e for e in exponents] or [low, high]
    else:
        marks = np.linspace(low, high, 5).tolist()
    return Axis(
        name,
        [(scale(v) - bottom) / (top - bottom) for v in values],
        [((scale(m) - bottom) / (top - bottom), f"{m:.4g}") for m in marks],
    )


def colours(ranking: Sequence[TrialResult]) -> Mapping[int, str]:
    """A colour for each trial by its place in the ranking."""
    last = max(len(ranking) - 1, 1)
    return {result.id: _colour(i / last) for i, result in enumerate(ranking)}


def _colour(share: float) -> str:
    place = min(share * (len(_RAMP) - 1), len(_RAMP) - 1 - 1e-9)
    i, part = int(place), place % 1
    mixed = (round((1 - part) * a + part * b) for a, b in zip(_RAMP[i], _RAMP[i + 1]))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def curve_limits(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    """What an axis of curves shows: all but the far ends of those that went astray."""
    values = np.array([v for curve in curves for v in curve if math.isfinite(v)])
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    inner_low, inner_high = (float(q) for q in np.quantile(values, [0.03, 0.85]))
    room = 0.5 * (inner_high - inner_low)
    low, high = max(low, inner_low - room), min(high, inner_high + room)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return low, high
