"""The files that a Ray trial goes on from, and that results are read from."""

from pathlib import Path
from typing import Any

import ray.cloudpickle as cloudpickle
import torch

from ...errors import CheckpointError
from .bundles import ActorBundles

__all__ = ["load_bundles", "read_trials", "read_weights", "save_bundles"]

_TRIALS = "trials.pkl"
_WEIGHTS = "weights.pt"
_VERSION = 1


def save_bundles(bundles: ActorBundles, directory: Path) -> None:
    """Write everything that training goes on from, bit for bit."""
    arguments, table = bundles.arguments, bundles.table
    known = {
        "version": _VERSION,
        "metric": table.metric,
        "mode": table.mode,
        "ids": table.ids,
        "results": table.results,
        "lineage": table.lineage,
        "epochs": bundles.epochs,
        "news": bundles.news,
        "pruner": bundles.pruner,
        "board": None if arguments.board is None else arguments.board.state_dict(),
        "bundles": [[trial.id for trial in bundle.trials] for bundle in bundles.bundles],
    }
    (directory / _TRIALS).write_bytes(cloudpickle.dumps(known))
    kept = dict(bundles.weights)
    if arguments.keep_weights is not None:  # of those that go on too, should this be the last one
        for bundle in bundles.bundles:
            for trial in bundle.trials:
                if trial.id not in kept:
                    kept[trial.id] = bundle.state_dict_of(trial.id)
    torch.save(kept, directory / _WEIGHTS)
    for place, bundle in enumerate(bundles.bundles):
        bundle.save(directory / f"bundle_{place:03d}")


def load_bundles(bundles: ActorBundles, directory: Path) -> None:
    """Go on from what `save_bundles` wrote for the same models.

    Raises:
        CheckpointError: the files are damaged, or of other models.
    """
    arguments, table, known = bundles.arguments, bundles.table, read_trials(directory)
    if list(known["results"]) != list(table.results):
        raise CheckpointError(f"{directory} is of other models than these")
    kept = read_weights(directory)
    bundles.close()
    bundles.bundles = []
    table.ids, table.results, table.lineage = known["ids"], known["results"], known["lineage"]
    bundles.epochs, bundles.news, bundles.pruner = known["epochs"], known["news"], known["pruner"]
    if arguments.board is not None and known["board"] is not None:
        arguments.board.load_state_dict(known["board"])
    running = {number for own in known["bundles"] for number in own}
    bundles.weights = {
        number: state
        for number, state in kept.items()
        if arguments.keep_weights == "best" or number not in running
    }
    for place, numbers in enumerate(known["bundles"]):
        results = [table.results[number] for number in numbers]
        bundle = bundles.former.make([arguments.trial(r.id, r.config, r.seed) for r in results])
        bundle.load(directory / f"bundle_{place:03d}")
        bundles.bundles.append(bundle)


def read_trials(directory: Path) -> dict[str, Any]:
    """What a checkpoint says of the models.

    Raises:
        CheckpointError: it is none.
    """
    try:
        known: dict[str, Any] = cloudpickle.loads((directory / _TRIALS).read_bytes())
        version = known["version"]
    except Exception as error:
        raise CheckpointError(f"{directory} is no checkpoint of a bundle: {error}") from error
    if version != _VERSION:
        raise CheckpointError(f"{directory} has version {version}, not {_VERSION}")
    return known


def read_weights(directory: Path) -> dict[int, dict[str, Any]]:
    """The weights in a checkpoint, by number of the model.

    Raises:
        CheckpointError: there are none.
    """
    path = directory / _WEIGHTS
    try:
        kept: dict[int, dict[str, Any]] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return kept
