"""A search of 200 trials with Optuna: bundled, one by one, two at a time, under Ray, and by 0.1.0.

Every variant has the same network (an MLP with hidden layers of 64 and 32 on scikit-learn's
digits), budget (20 epochs of batches of 32), space, and sampler (TPE of the same seed). Each round
takes another seed; the variants take turns in it, so that slow spells of the machine hit all of
them. What is reported are medians over the rounds, of the wall time, of the time relative to one
trial after the other, and of the best validation accuracy found.

    python benchmarks/bench_sweep.py --rounds 3
    python benchmarks/bench_sweep.py --rounds 20 --only OptunaSweep --to sweep_best
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import optuna
import torch
import torch.nn.functional as F
from harness import save
from rivals import modelbatch_010
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from modelbatch.integrations.optuna import OptunaSweep
from modelbatch.sweep.data import epoch_order
from modelbatch.training import accuracy

BATCH = 32


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and validation data."""
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=0.2, random_state=0)
    x_train, x_val, y_train, y_val = parts
    as_float = (torch.tensor(own, dtype=torch.float32) for own in (x_train, x_val))
    return (*as_float, torch.tensor(y_train), torch.tensor(y_val))


def build(config: dict[str, Any]) -> nn.Module:
    """The network of a trial."""
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def space(trial: Any) -> dict[str, Any]:
    """What is searched."""
    return {
        "lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-7, 1e-2, log=True),
    }


def train_alone(config: dict[str, Any], seed: int, epochs: int, data: Any) -> float:
    """One trial in plain PyTorch; the best validation accuracy of its epochs."""
    x, x_val, y, y_val = data
    torch.manual_seed(seed)
    model = build(config)
    optimizer = torch.optim.Adam(model.parameters(), **config)
    best = 0.0
    for epoch in range(epochs):
        for rows in epoch_order(len(x), 0, epoch).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            best = max(best, accuracy(model(x_val), y_val).item())
    return best


def sampler(seed: int) -> Any:
    """The sampler that all variants share."""
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)


def study(seed: int) -> Any:
    """A new study in memory."""
    pruner = optuna.pruners.NopPruner()  # all variants do all the work
    return optuna.create_study(direction="maximize", sampler=sampler(seed), pruner=pruner)


def bundled(trials: int, epochs: int, seed: int, data: Any) -> float:
    """`OptunaSweep`."""
    x, x_val, y, y_val = data
    own = study(seed)
    sweep = OptunaSweep(
        own,
        space,
        build,
        (x, y),
        (x_val, y_val),
        epochs=epochs,
        batch_size=BATCH,
        metric="val_accuracy",
        metric_fns={"accuracy": accuracy},
        keep_weights=None,
    )
    sweep.run(trials, progress=False)
    return own.best_value


def one_by_one(trials: int, epochs: int, seed: int, data: Any, n_jobs: int = 1) -> float:
    """`study.optimize`."""
    own = study(seed)
    own.optimize(
        lambda trial: train_alone(space(trial), trial.number, epochs, data),
        n_trials=trials,
        n_jobs=n_jobs,
    )
    return own.best_value


def two_jobs(trials: int, epochs: int, seed: int, data: Any) -> float:
    """`study.optimize` with two threads."""
    return one_by_one(trials, epochs, seed, data, n_jobs=2)


def under_ray(trials: int, epochs: int, seed: int, data: Any, share: float = 1.0) -> float:
    """Ray Tune with `OptunaSearch`; a trial has this share of a CPU, and processes are reused."""
    with tempfile.TemporaryDirectory() as folder:
        return _tuned(trials, epochs, seed, data, share, folder)


def _tuned(trials: int, epochs: int, seed: int, data: Any, share: float, folder: str) -> float:
    from ray import tune
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    class Trainable(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            torch.set_num_threads(1)
            self.own = config

        def step(self) -> dict[str, Any]:
            config = {name: self.own[name] for name in ("lr", "weight_decay")}
            return {"accuracy": train_alone(config, 0, epochs, data), "done": True}

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.own = new_config
            return True

        def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
            return {}

        def load_checkpoint(self, checkpoint: Any) -> None:
            pass

    search = OptunaSearch(space, metric="accuracy", mode="max", sampler=sampler(seed))
    cpus = os.cpu_count() or 1
    tuner = tune.Tuner(
        tune.with_resources(Trainable, {"cpu": share}),
        tune_config=tune.TuneConfig(
            search_alg=ConcurrencyLimiter(search, max_concurrent=round(cpus / share)),
            num_samples=trials,
            metric="accuracy",
            mode="max",
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            verbose=0,
            storage_path=folder,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    return tuner.fit().get_best_result().metrics["accuracy"]


def under_ray_by_halves(trials: int, epochs: int, seed: int, data: Any) -> float:
    """The same with two trials on each CPU."""
    return under_ray(trials, epochs, seed, data, share=0.5)


def earlier_release(trials: int, epochs: int, seed: int, data: Any) -> float:
    """`ModelBatchStudy` of modelbatch 0.1.0, with bundles of a quarter of the trials.

    It does not hand the objective the parameters of the trials, so the models carry them.
    """
    old = modelbatch_010()
    from modelbatch_010.optuna_integration import ModelBatchStudy  # type: ignore[import-not-found]

    x, x_val, y, y_val = data

    def factory(config: dict[str, Any]) -> nn.Module:
        model = build(config)
        model.config = config
        return model

    def objective(bundle: Any, _: Any) -> list[float]:
        configs = [model.config for model in bundle.models]
        optimizer = old.OptimizerFactory(torch.optim.Adam).create_optimizer(bundle, configs)
        best = torch.zeros(len(configs))
        for epoch in range(epochs):
            for rows in epoch_order(len(x), 0, epoch).split(BATCH):
                optimizer.zero_grad()
                bundle.compute_loss(bundle(x[rows]), y[rows], F.cross_entropy).backward()
                optimizer.step()
            with torch.no_grad():
                right = bundle(x_val).argmax(-1) == y_val
                best = torch.maximum(best, right.float().mean(-1))
        return best.tolist()

    class Study(ModelBatchStudy):
        def suggest_parameters(self, trial: Any) -> dict[str, Any]:
            return space(trial)

    own = study(seed)
    size = max(1, trials // 4)
    Study(own, factory, min_models_per_batch=size, max_models_per_batch=size).optimize(
        objective, n_trials=trials, show_progress_bar=False
    )
    return own.best_value


# One trial alone is slower with two threads than with one.
THREADS = {"Optuna alone": 1, "Optuna, n_jobs=2": 1}
REFERENCE = "Optuna alone"
VARIANTS: dict[str, Callable[[int, int, int, Any], float]] = {
    REFERENCE: one_by_one,
    "OptunaSweep": bundled,
    "Optuna, n_jobs=2": two_jobs,
    "Ray Tune, a CPU for each trial": under_ray,
    "Ray Tune, half a CPU for each trial": under_ray_by_halves,
    "ModelBatchStudy of 0.1.0": earlier_release,
}


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--to", default="sweep", help="the name of the file in results/")
    args = parser.parse_args()
    wanted = {REFERENCE, *args.only}
    variants = {name: run for name, run in VARIANTS.items() if name in wanted}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    data, threads = digits(), torch.get_num_threads()
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    for run in variants.values():  # imports, compilation and caches
        run(4, 1, 0, data)
    taken: dict[str, list[float]] = {name: [] for name in variants}
    found: dict[str, list[float]] = {name: [] for name in variants}
    for seed in range(args.rounds):
        for name, run in variants.items():
            torch.set_num_threads(THREADS.get(name, threads))
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                found[name].append(run(args.trials, args.epochs, seed, data))
            taken[name].append(time.perf_counter() - start)
            print(
                f"{seed} {name:36} {taken[name][-1]:8.2f} s  best {found[name][-1]:.4f}", flush=True
            )
    ray.shutdown()
    reference = taken[REFERENCE]
    results = [
        {
            "variant": name,
            "seconds": round(statistics.median(taken[name]), 3),
            "faster_than_optuna_alone": round(
                statistics.median(r / t for t, r in zip(taken[name], reference)), 2
            ),
            "best_accuracy": round(statistics.median(found[name]), 4),
            "mean_best_accuracy": round(statistics.mean(found[name]), 5),
            "best_accuracies": [round(value, 4) for value in found[name]],
        }
        for name in variants
    ]
    setting = {"trials": args.trials, "epochs": args.epochs, "batch_size": BATCH}
    setting |= {"optuna": optuna.__version__, "ray": ray.__version__}
    print(save(args.to, [{**setting, "rounds": args.rounds}, *results]))


if __name__ == "__main__":
    main()
