"""Metrics of all models as one flat dict: each model's own, the best and the mean."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "EvalLosses",
    "direction_of",
    "index_nested",
    "map_nested",
    "model_first",
    "model_key",
    "of_model",
    "summarise",
]

_KEY_OF_MODEL = re.compile(r"_?model_\d{3,}_")


def model_key(model_id: int) -> str:
    """How a model is called in the keys of metrics and logs: `model_007`."""
    return f"model_{model_id:03d}"


def map_nested(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to the arrays in nested tuples, lists and dicts, as models return them."""
    if isinstance(tree, Mapping):
        return type(tree)({k: map_nested(function, v) for k, v in tree.items()})  # type: ignore[call-arg]
    if isinstance(tree, tuple | list):
        return type(tree)(map_nested(function, item) for item in tree)
    return function(tree) if isinstance(tree, Tensor | np.ndarray) else tree


def index_nested(tree: Any, i: int) -> Any:
    """Model i's part of arrays `[N, ..., M]`."""
    return map_nested(lambda array: array[..., i] if array.ndim > 1 else array, tree)


def model_first(tree: Any) -> Any:
    """Arrays `[N, ..., M]` as `[M, N, ...]`."""
    return map_nested(lambda a: np.moveaxis(a, -1, 0) if a.ndim > 1 else a, tree)


class EvalLosses:
    """The losses of an evaluation's batches, `[M]` each, which count by their samples."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._sizes: list[int] = []

    def add(self, losses: Tensor, size: int) -> None:
        """Take the losses `[M]` of a batch of `size` samples."""
        self._losses.append(losses.detach())
        self._sizes.append(size)

    def means(self, finite_only: bool) -> list[float] | None:
        """The mean loss of each model; None without batches.

        Args:
            finite_only: leave out batches whose loss is not finite where others are, as Trainer
                does with `logging_nan_inf_filter`.
        """
        if not self._losses:
            return None
        losses, weights = self._stacked()
        kept = np.isfinite(losses) | (not finite_only)
        kept |= ~kept.any(0)
        weights = np.where(kept, weights[:, None], 0.0)
        with np.errstate(invalid="ignore"):
            total = np.where(kept, losses, 0.0) * weights
        return [float(mean) for mean in total.sum(0) / weights.sum(0)]

    def of_samples(self, i: int) -> Any:
        """For each sample the loss of model i in its batch, as `compute_metrics` may ask for."""
        losses, weights = self._stacked()
        return np.repeat(losses[:, i], weights.astype(np.int64))

    def _stacked(self) -> tuple[Any, Any]:
        losses = torch.stack(self._losses).to("cpu", torch.float64).numpy()  # [batches, M]
        return losses, np.asarray(self._sizes, dtype=np.float64)


def direction_of(name: str, watched: str | None, greater_is_better: bool | None) -> bool:
    """Whether more of a metric is better.

    Args:
        name: of the metric, without `eval_`.
        watched: `args.metric_for_best_model`, for which `args.greater_is_better` speaks.
        greater_is_better: that. For other metrics Trainer's own rule decides: less is better for
            what ends in `loss`, more for everything else.
    """
    if greater_is_better is not None and name == (watched or "").removeprefix("eval_"):
        return greater_is_better
    return not name.endswith("loss")


def summarise(
    values: Mapping[str, Sequence[Any]],
    model_ids: Sequence[int],
    prefix: str,
    greater: Callable[[str], bool],
    summary: str,
) -> dict[str, Any]:
    """One flat dict of metrics.

    Args:
        values: M values of each metric.
        model_ids: of the models.
        prefix: of all keys, such as `eval`.
        greater: whether more of a metric is better.
        summary: `"best"` or `"mean"`, which of them stands at the metric's own key.

    Returns:
        `eval_accuracy`, `eval_accuracy_best`, `eval_accuracy_mean`, over the models whose value is
        finite, and `eval_model_007_accuracy` for each model.
    """
    result: dict[str, Any] = {}
    for name, own in values.items():
        if all(isinstance(value, bool | int | float | np.number) for value in own):
            numbers = np.asarray([float(value) for value in own])
            finite = numbers[np.isfinite(numbers)]
            best = mean = float("nan")
            if finite.size:
                best = float(finite.max() if greater(name) else finite.min())
                mean = float(finite.mean())
            result[f"{prefix}_{name}"] = best if summary == "best" else mean
            result[f"{prefix}_{name}_best"], result[f"{prefix}_{name}_mean"] = best, mean
        for model_id, value in zip(model_ids, own, strict=True):
            result[f"{prefix}_{model_key(model_id)}_{name}"] = value
    return result


def of_model(
    metrics: Mapping[str, Any], model_id: int, names: set[str], prefix: str
) -> dict[str, Any]:
    """What of `summarise` (and of all else in `metrics`) a model alone would have.

    Args:
        metrics: metrics of all models.
        model_id: of the model.
        names: of the metrics that each model has.
        prefix: of all keys.
    """
    every = {f"{prefix}_{name}{tail}" for name in names for tail in ("", "_best", "_mean")}
    every.add(f"{prefix}_best_model")
    found = {
        key: value
        for key, value in metrics.items()
        if key not in every and not _KEY_OF_MODEL.match(key.removeprefix(prefix))
    }
    own = f"{prefix}_{model_key(model_id)}_"
    found.update({f"{prefix}_{k[len(own) :]}": v for k, v in metrics.items() if k.startswith(own)})
    return found
