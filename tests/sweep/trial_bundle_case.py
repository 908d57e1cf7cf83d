"""What the tests of bundles of trials share: their settings, and trials that train in one."""

from typing import Any

import torch
import torch.nn.functional as F
from sweep.sweep_case import build, data
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import Dataset

from modelbatch.random import derive_seed
from modelbatch.sweep.bundle import TrialBundle
from modelbatch.sweep.data import Data
from modelbatch.sweep.gather import Settings
from modelbatch.sweep.trials import Trial, make_trial
from modelbatch.sweep.weights import seeded


class Noisy(Dataset[Any]):
    """Samples that come with a little noise from torch's generator, as augmented ones do."""

    def __init__(self) -> None:
        self.x, self.y = data()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + 0.1 * torch.randn(self.x.shape[1], dtype=torch.float64), self.y[i]


def decay(optimizer: Any, config: dict[str, Any]) -> Any:
    return ExponentialLR(optimizer, config.get("gamma", 0.9))


def make_settings(train: Any = None, **changes: Any) -> Settings:
    x, y = data()
    given: dict[str, Any] = {
        "build": build,
        "train": Data("train_data", (x, y) if train is None else train, 0, None),
        "val": Data("val_data", (x[:10], y[:10]), 0, None),
        "bundle_size": None,
        "metric_fns": None,
        "callbacks": lambda trials: [],
        "scheduler": None,
        "scheduler_interval": "epoch",
        "pruner": None,
        "keep_weights": None,
        "seed": 0,
        "device": None,
        "checkpoint_every": 1,
        "directory": None,
    }
    return Settings(**{**given, **changes})


def make(number: int, config: dict[str, Any], epochs: int = 4, **changes: Any) -> Trial:
    arguments: dict[str, Any] = {
        "seed": derive_seed(number, 0),
        "batch_size": 8,
        "optimizer_cls": torch.optim.Adam,
        "loss_fn": F.cross_entropy,
        **changes,
    }
    return make_trial(number, config, epochs=epochs, **arguments)


def bundle_of(trials: list[Trial], settings: Settings) -> TrialBundle:
    models = [seeded(settings.build, trial.config, trial.seed) for trial in trials]
    return TrialBundle(trials, models, settings)


def joining(trial: Trial, settings: Settings) -> tuple[Trial, Any]:
    return trial, seeded(settings.build, trial.config, trial.seed)


class Curves:
    """The numbers of every trial, epoch by epoch."""

    def __init__(self) -> None:
        self.values: dict[int, list[dict[str, float]]] = {}

    def add(self, bundle: TrialBundle) -> Any:
        """Train an epoch and note what came of it."""
        done = bundle.run_epoch()
        for place, trial in enumerate(done.trials):
            own = self.values.setdefault(trial, [])
            assert done.epochs[place] == len(own)
            own.append({name: row[place] for name, row in done.values.items()})
        return done

    def of(self, trial: int, name: str = "loss") -> list[float]:
        return [values[name] for values in self.values[trial]]


def solo(trial: Trial, settings: Settings, epochs: int) -> tuple[Curves, TrialBundle]:
    """A trial in a bundle of its own."""
    bundle, curves = bundle_of([trial], settings), Curves()
    for _ in range(epochs):
        curves.add(bundle)
    return curves, bundle
