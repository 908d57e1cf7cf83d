"""What came of the models of an experiment, after `Tuner.fit`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune import Checkpoint, ResultGrid
from torch import nn

from ...errors import ModelBatchError
from ...sweep.failing import what_happened
from ...sweep.ledger import Ledger
from ...sweep.result import SweepResult
from ...sweep.trials import ENDED, TrialResult
from ...sweep.weights import Weights
from .checkpoint import read_trials, read_weights
from .entries import read_entries

__all__ = ["bundle_results"]


def bundle_results(
    results: ResultGrid, build: Callable[[dict[str, Any]], nn.Module] | None = None
) -> SweepResult:
    """The models of all bundles as the result of one sweep.

    What is known of a bundle is what its last checkpoint says; that is written at its end, and
    before as `CheckpointConfig` tells. Models of a bundle that failed are `"failed"`.

    Args:
        results: what `Tuner.fit()` returned.
        build: makes a model of a config, for `SweepResult.export`.

    Returns:
        Results by number of the model: `best`, `ranking()`, `to_dataframe()`, `export()`,
        `report(path)`, and so on.

    Raises:
        ModelBatchError: there is no checkpoint at all, or two bundles have models of the same
            number, as lists that no `BundleSearcher` made.
        CheckpointError: a checkpoint is not one of a bundle.
    """
    listed = [results[place] for place in range(len(results))]
    found: dict[int, TrialResult] = {}
    places: dict[int, Checkpoint] = {}
    metric = mode = None
    complete, seconds = True, 0.0
    for result in listed:
        error = "" if result.error is None else _what_happened(result.error)
        complete = complete and not error
        metrics = result.metrics or {}
        seconds = max(seconds, float(metrics.get("time_total_s", 0.0)))
        if result.checkpoint is None:
            own = _without_checkpoint(result.config or {}, error)
        else:
            with result.checkpoint.as_directory() as directory:
                known = read_trials(Path(directory))
            own, metric, mode = known["results"], known["metric"], known["mode"]
        for number, model in own.items():
            if number in found:
                raise ModelBatchError(
                    f"two bundles have a model {number}; give each its own 'number'"
                )
            if model.status not in ENDED:
                complete = False
                if error:
                    model.status, model.error = "failed", error
            found[number] = model
            if result.checkpoint is not None:
                places[number] = result.checkpoint
    if metric is None or mode is None:
        errors = [f": {_what_happened(result.error)}" for result in listed if result.error][:1]
        raise ModelBatchError(f"no bundle has a checkpoint{''.join(errors)}")
    ledger = Ledger([], metric, mode)
    ledger.results = dict(sorted(found.items()))
    return SweepResult(
        ledger,
        status="finished" if complete else "interrupted",
        seconds=seconds,
        build=_no_build if build is None else build,
        weights=_CheckpointWeights(places),
    )


def _without_checkpoint(config: dict[str, Any], error: str) -> dict[int, TrialResult]:
    entries, _ = read_entries(config)
    status = "failed" if error else "pending"
    return {e.number: TrialResult(e.number, e.config, 0, status, error=error) for e in entries}


def _what_happened(error: BaseException) -> str:
    """What went wrong in the actor, without the stack of Ray."""
    cause = getattr(error, "cause", None)
    if cause is not None:
        return what_happened(cause)
    # an actor that died tells a long story, with the reason at its end
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if len(lines) > 1 else what_happened(error)


def _no_build(config: dict[str, Any]) -> nn.Module:
    raise ModelBatchError("to make a model, bundle_results needs build=")


class _CheckpointWeights(Weights):
    """Weights that are read from the checkpoints of the bundles when they are asked for."""

    def __init__(self, places: dict[int, Checkpoint]) -> None:
        super().__init__(None)
        self._places = places

    def __contains__(self, trial: int) -> bool:
        return trial in self._states or self._read(trial)

    def load(self, trial: int, model: nn.Module) -> None:
        """Give a freshly built model the weights of a trial."""
        self._read(trial)
        super().load(trial, model)

    def _read(self, trial: int) -> bool:
        """Read the file that a trial's weights are in; returns whether they are there."""
        if trial not in self._states and trial in self._places:
            place = self._places.pop(trial)
            with place.as_directory() as directory:
                kept = read_weights(Path(directory))
            if trial in kept:
                self._states[trial] = kept[trial]
        return trial in self._states
