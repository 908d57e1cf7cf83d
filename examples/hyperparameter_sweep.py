"""Which learning rate and weight decay? Train 64 small networks with as many settings at once.

Every network has a learning rate, a weight decay and a seed of its own; all learn scikit-learn's
handwritten digits by SGD. The learning rates reach far beyond what is reasonable, so some networks
diverge: they are frozen, as are those whose test loss no longer improves, while the others go on.

    python examples/hyperparameter_sweep.py
    python examples/hyperparameter_sweep.py --epochs 60 --resume   # goes on with the same directory

The directory of the results gets the curves of all networks (curves.csv), a plot of them
(sweep.png), one line per network (results.csv) and the checkpoint. Ctrl-C ends the training after
the current step, and --resume goes on from there as if it had never stopped.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from modelbatch import ModelBatch
from modelbatch.callbacks import EarlyStopping, MetricsLogger, NaNCallback
from modelbatch.data import PerModelLoader
from modelbatch.training import History, accuracy, fit

Batch = tuple[Tensor, Tensor]


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Search learning rate and weight decay of an MLP on handwritten digits."
    )
    parser.add_argument("--models", type=positive, default=64, help="networks (default 64)")
    parser.add_argument("--epochs", type=positive, default=40, help="epochs (default 40)")
    parser.add_argument("--batch-size", type=positive, default=64, help="samples (default 64)")
    parser.add_argument("--patience", type=positive, default=6, help="epochs (default 6)")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda (default cpu)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="data and weights (default 0)")
    parser.add_argument("--out", type=Path, default=Path("sweep"), help="results (default sweep)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    return parser.parse_args()


def make_configurations(num_models: int, seed: int) -> list[dict[str, Any]]:
    """Learning rates from 1e-3 to 1e2, evenly spaced, and random weight decays up to 0.3."""
    generator = torch.Generator().manual_seed(seed)
    rates = torch.logspace(-3, 2, num_models, dtype=torch.float64).tolist()
    decays = torch.rand(num_models, generator=generator, dtype=torch.float64).tolist()
    return [{"lr": lr, "weight_decay": 10 ** (6 * share - 6.5)} for lr, share in zip(rates, decays)]


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Dropout(0.1), nn.Linear(48, 10))


def load_data(seed: int, device: torch.device) -> tuple[Batch, Batch]:
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, digits, test_size=0.25, random_state=seed)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32, device=device) for x in parts[:2])
    train_y, test_y = (torch.tensor(y, dtype=torch.int64, device=device) for y in parts[2:])
    return (train_x, train_y), (test_x, test_y)


def write_results(
    path: Path, configurations: list[dict[str, Any]], seeds: list[int], history: History
) -> list[float]:
    """One line per network; returns their best test accuracies."""
    accuracies = history["val_accuracy"].nan_to_num(0.0)
    best, epochs = accuracies.max(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "lr", "weight_decay", "seed", "accuracy", "epoch", "active"])
        for i, (configuration, seed) in enumerate(zip(configurations, seeds)):
            active = bool(history["active"][-1, i])
            row = [configuration["lr"], configuration["weight_decay"], seed, best[i].item()]
            writer.writerow([i, *row, epochs[i].item() + 1, active])
    return best.tolist()


def main() -> int:
    arguments = parse_arguments()
    try:
        device = torch.device(arguments.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    torch.set_num_threads(arguments.threads)  # such small networks gain nothing from more
    arguments.out.mkdir(parents=True, exist_ok=True)
    train, test = load_data(arguments.seed, device)

    configurations = make_configurations(arguments.models, arguments.seed)
    seeds = [arguments.seed + i for i in range(arguments.models)]
    bundle = ModelBatch.from_factory(
        lambda: make_model().to(device),
        arguments.models,
        seeds=seeds,
        optimizer_cls=torch.optim.SGD,
        optimizer_kwargs=configurations,
    )
    diverged = NaNCallback("freeze")
    stopping = EarlyStopping("val_loss", patience=arguments.patience)
    history = fit(
        bundle,
        # every network has an order of its own
        PerModelLoader(train, arguments.batch_size, seeds),
        [test],
        epochs=arguments.epochs,
        metric_fns={"accuracy": accuracy},
        callbacks=[
            diverged,
            stopping,
            MetricsLogger(arguments.out / "curves.csv", interval=0, overwrite=True),
        ],
        progress=True,
        checkpoint_dir=arguments.out / "checkpoint",
        resume=arguments.resume,
    )
    if not history.epochs:
        print(f"{history.status} before the end of the first epoch; --resume goes on")
        return 0

    accuracies = write_results(arguments.out / "results.csv", configurations, seeds, history)
    history.plot(arguments.out / "sweep.png")
    lost = int((~torch.isfinite(history["loss"][-1])).sum())
    stopped = int((~history["active"][-1]).sum()) - lost
    print(
        f"{history.status} after {history.epochs} epochs and {history.seconds:.1f} s: {lost} "
        f"networks diverged, {stopped} were stopped early, "
        f"{int(history['active'][-1].sum())} trained on"
    )
    ranking = sorted(range(arguments.models), key=lambda i: -accuracies[i])
    for place, i in enumerate(ranking[:5], 1):
        lr, decay = configurations[i]["lr"], configurations[i]["weight_decay"]
        print(f"{place}. model {i}: lr {lr:.3g}, weight decay {decay:.1e}: {accuracies[i]:.1%}")
    print(f"results in {arguments.out}: results.csv, curves.csv, sweep.png, checkpoint")
    return 0


if __name__ == "__main__":
    sys.exit(main())
