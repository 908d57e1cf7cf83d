"""A search over networks for handwritten digits on a Ray cluster, a bundle of models per actor.

To Ray Tune a bundle is one trial: each of the actors trains a share of the networks, all at once.
On one machine Ray is started for this program alone; on a cluster the same program runs with
--address. With --compare the same configurations are trained once more as Ray trials of their own,
by plain PyTorch, several at a time.

    python examples/ray_sweep.py
    python examples/ray_sweep.py --trials 400 --halving
    python examples/ray_sweep.py --compare
    python examples/ray_sweep.py --address auto --actors 8 --trials 4000
"""

import argparse
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import torch
import torch.nn.functional as F
from ray import tune
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from modelbatch import accuracy
from modelbatch.integrations.ray import BundleSearcher, BundleTrainable, RungBoard, bundle_results
from modelbatch.sweep import SuccessiveHalving

Samples = tuple[Tensor, Tensor]

SPACE = {
    "width": tune.choice([32, 64]),
    "dropout": tune.choice([0.0, 0.1, 0.3]),
    "lr": tune.loguniform(1e-4, 1e-1),
    "weight_decay": tune.loguniform(1e-6, 1e-2),
}
BATCH_SIZE = 64


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Search for a network with Ray Tune.")
    parser.add_argument("--trials", type=int, default=64, help="networks (default 64)")
    parser.add_argument("--epochs", type=int, default=10, help="epochs (default 10)")
    parser.add_argument("--actors", type=int, default=2, help="bundles at a time (default 2)")
    parser.add_argument("--address", help="of a cluster; by default Ray is started here")
    parser.add_argument("--halving", action="store_true", help="end the worse half at rungs")
    parser.add_argument("--compare", action="store_true", help="train one network at a time, too")
    parser.add_argument("--seed", type=int, default=0, help="configurations, weights, data")
    parser.add_argument("--out", type=Path, default=Path("ray_sweep"), help="results")
    arguments = parser.parse_args()
    for name in ("trials", "epochs", "actors"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be positive")
    if arguments.compare and arguments.halving:
        parser.error("--compare is about trials of equal length, so not with --halving")
    return arguments


def load_samples() -> tuple[Samples, Samples, Samples]:
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits)
    rows, test = train_test_split(range(len(x)), test_size=0.2, random_state=0)
    train, val = train_test_split(rows, test_size=0.25, random_state=0)
    return (x[train], y[train]), (x[val], y[val]), (x[test], y[test])


def build(config: dict[str, Any]) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, config["width"]),
        nn.ReLU(),
        nn.Dropout(config["dropout"]),
        nn.Linear(config["width"], 10),
    )


def run(trainable: Any, arguments: argparse.Namespace, bundle_size: int, name: str) -> Any:
    """Let Ray Tune train all networks; returns its results and the seconds that it took."""
    searcher = BundleSearcher(
        SPACE, bundle_size=bundle_size, num_trials=arguments.trials, seed=arguments.seed
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            metric="val_accuracy",
            mode="max",
            search_alg=searcher,
            num_samples=math.ceil(arguments.trials / bundle_size),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name=name, storage_path=str(arguments.out.resolve()), verbose=0),
    )
    start = time.perf_counter()
    results = tuner.fit()
    return results, time.perf_counter() - start


def train_alone(config: dict[str, Any], train: Samples, val: Samples, epochs: int) -> None:
    """One network, by plain PyTorch, as a trial of its own."""
    torch.set_num_threads(1)
    (own,) = config["trials"]
    config = own["config"]
    torch.manual_seed(own["number"])
    model = build(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config["lr"], weight_decay=config["weight_decay"]
    )
    x, y = train
    best = 0.0
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(len(x)).split(BATCH_SIZE):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            best = max(best, accuracy(model(val[0]), val[1]).item())
        tune.report({"val_accuracy": best, "epoch": epoch})


def main() -> int:
    arguments = parse_arguments()
    train, val, test = load_samples()
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    if arguments.address is None:
        ray.init(num_cpus=arguments.actors, include_dashboard=False, log_to_driver=False)
    else:
        ray.init(address=arguments.address)

    bundles = tune.with_parameters(
        BundleTrainable,
        build=build,
        train_data=train,
        val_data=val,
        epochs=arguments.epochs,
        batch_size=BATCH_SIZE,
        metric="val_accuracy",
        mode="max",
        metric_fns={"accuracy": accuracy},
        optimizer_cls=torch.optim.AdamW,
        pruner=RungBoard(SuccessiveHalving(2, 2)) if arguments.halving else None,
        seed=arguments.seed,
        keep_weights="best",
    )
    bundle_size = math.ceil(arguments.trials / arguments.actors)
    grid, seconds = run(bundles, arguments, bundle_size, f"bundles_{time.time_ns()}")
    if grid.num_errors:
        sys.exit(f"{grid.num_errors} of {len(grid)} bundles failed: {grid.errors[0]}")
    result = bundle_results(grid, build)
    print(f"{len(result)} networks in {len(grid)} bundles: {seconds:.1f} s, {result.counts}")
    for place, trial in enumerate(result.ranking()[:5], 1):
        value = "-" if trial.value is None else f"{trial.value:.1%}"
        print(f"{place}. trial {trial.id}: {value} with {trial.config}")
    best = result.export().eval()
    with torch.no_grad():
        print(f"test accuracy of the best: {accuracy(best(test[0]), test[1]).item():.1%}")
    print(f"{result.report(arguments.out / 'report.html')} has the rest")

    if arguments.compare:
        alone = tune.with_resources(
            tune.with_parameters(train_alone, train=train, val=val, epochs=arguments.epochs),
            {"cpu": 0.5},
        )
        grid, one_by_one = run(alone, arguments, 1, f"alone_{time.time_ns()}")
        accuracies = [grid[place].metrics["val_accuracy"] for place in range(len(grid))]
        print(
            f"\nthe same {len(accuracies)} as Ray trials of their own: {one_by_one:.1f} s, "
            f"{one_by_one / seconds:.1f} times as long; best {max(accuracies):.1%}, in bundles "
            f"{result.best.value:.1%}"
        )
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
