"""Which network reads handwritten digits best? A list of configurations, trained in bundles.

Width, activation, dropout, batch size, learning rate and weight decay are drawn at random. Networks
of the same structure are trained together, whatever else differs; MedianPruner ends those that fall
behind. Killed or interrupted, the program goes on where it stood when it is started again.

    python examples/config_sweep.py
    python examples/config_sweep.py --trials 500 --out more

The directory of the results gets report.html, a page with the table of all trials and their curves.
"""

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from modelbatch.sweep import MedianPruner, run_sweep
from modelbatch.training import accuracy

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sweep over networks for handwritten digits.")
    parser.add_argument("--trials", type=int, default=200, help="configurations (default 200)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs (default 20)")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda (default cpu)")
    parser.add_argument("--seed", type=int, default=0, help="configurations, weights, data")
    parser.add_argument("--out", type=Path, default=Path("config_sweep"), help="results")
    return parser.parse_args()


def draw_config(generator: random.Random) -> dict[str, Any]:
    return {
        "width": generator.choice([16, 32, 64]),
        "activation": generator.choice(list(ACTIVATIONS)),
        "dropout": generator.choice([0.0, 0.1, 0.3]),
        "batch_size": generator.choice([32, 64]),
        "lr": 10 ** generator.uniform(-4, -1),
        "weight_decay": 10 ** generator.uniform(-6, -2),
    }


def build(config: dict[str, Any]) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, config["width"]),
        ACTIVATIONS[config["activation"]](),
        nn.Dropout(config["dropout"]),
        nn.Linear(config["width"], 10),
    )


def main() -> int:
    arguments = parse_arguments()
    try:
        device = torch.device(arguments.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits)
    rows, test_rows = train_test_split(range(len(x)), test_size=0.2, random_state=0)
    train_rows, val_rows = train_test_split(rows, test_size=0.25, random_state=0)

    generator = random.Random(arguments.seed)
    result = run_sweep(
        build,
        [draw_config(generator) for _ in range(arguments.trials)],
        (x[train_rows], y[train_rows]),
        (x[val_rows], y[val_rows]),
        epochs=arguments.epochs,
        metric_fns={"accuracy": accuracy},
        metric="val_accuracy",
        mode="max",
        optimizer_cls=torch.optim.AdamW,
        pruner=MedianPruner(warmup_epochs=2),
        keep_weights="best",
        seed=arguments.seed,
        directory=arguments.out,
        device=device,
    )
    for place, trial in enumerate(result.ranking()[:5], 1):
        value = "-" if trial.value is None else f"{trial.value:.1%}"
        print(f"{place}. trial {trial.id}: {value} with {trial.config}")
    best = result.export().eval()
    with torch.no_grad():
        right = accuracy(best.to(device)(x[test_rows].to(device)), y[test_rows].to(device))
    print(f"test accuracy of the best: {right.item():.1%}")
    print(f"{result.report(arguments.out / 'report.html')} has the rest")
    return 0


if __name__ == "__main__":
    sys.exit(main())
