"""What the tests of bundles in Ray Tune share."""

import os
import random
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import tune
from sweep.sweep_case import build, data
from torch import nn

from modelbatch.callbacks import Callback, Event
from modelbatch.integrations.ray import BundleTrainable
from modelbatch.integrations.ray.entries import Many

EPOCHS = 5
OPTIONS: dict[str, Any] = {"epochs": EPOCHS, "batch_size": 8}


def configs(count: int, seed: int = 3) -> list[dict[str, Any]]:
    """Configurations of two structures, whose learning rates differ a lot."""
    generator = random.Random(seed)
    return [
        {"lr": 10 ** generator.uniform(-3.5, -0.5), "width": generator.choice([4, 6])}
        for _ in range(count)
    ]


def entries(given: Sequence[dict[str, Any]], first: int = 0) -> Many:
    """As a `BundleSearcher` gives them, numbered from `first` on."""
    numbered = enumerate(given, first)
    return Many({"id": f"{n:05d}", "number": n, "config": own} for n, own in numbered)


def trainable(cls: Any = BundleTrainable, **arguments: Any) -> Any:
    """The class with the arguments that the tests share."""
    x, y = data()
    shared = {
        "build": build,
        "train_data": (x, y),
        "val_data": (x[:10], y[:10]),
        **OPTIONS,
        **arguments,
    }
    with warnings.catch_warnings():
        # Ray's own: it opens a file and leaves it to the garbage collector
        warnings.simplefilter("ignore", ResourceWarning)
        return tune.with_parameters(cls, **shared)


def run(bundle: Any) -> list[dict[str, Any]]:
    """Train until it is done; the results of all steps."""
    results = [bundle.train()]
    while not results[-1]["done"]:
        results.append(bundle.train())
    return results


def curves(results: Sequence[dict[str, Any]], metric: str = "val_loss") -> dict[str, list[float]]:
    """By id of the model, what each step said."""
    found: dict[str, list[float]] = {}
    for result in results:
        for row in result["models"]:
            if metric in row:
                found.setdefault(row["id"], []).append(row[metric])
    return found


def picky(config: dict[str, Any]) -> nn.Module:
    """Like `build`, but some configurations raise."""
    if config.get("raises"):
        raise RuntimeError("such a network cannot be built")
    return build(config)


class Deadly:
    """Makes callbacks that kill the process once, at an epoch of the bundle with a model.

    Args:
        marker: a file that says that it has happened.
        epoch: the one at whose end it happens, from 0.
        model: number of a model of the bundle.
    """

    def __init__(self, marker: str, epoch: int, model: int) -> None:
        self.marker, self.epoch, self.model = marker, epoch, model

    def __call__(self, trials: list[int]) -> list[Callback]:
        return [_Kill(self.marker, self.epoch)] if self.model in trials else []


class _Kill(Callback):
    reads_models = False

    def __init__(self, marker: str, epoch: int) -> None:
        self.marker, self.epoch = marker, epoch

    def on_epoch_end(self, event: Event) -> None:
        if event.epoch == self.epoch and not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
