"""Optuna searches for the network that reads handwritten digits best, many trials at a time.

TPE suggests learning rate, weight decay, dropout, width and activation of a network with one hidden
layer; MedianPruner or Hyperband ends what falls behind, and the place of a trial that has ended is
given to a new one at once. --compare runs the same search the way Optuna is mostly used: one trial
after the other, each trained by a plain torch loop, with the same sampler, pruner and budget.

    python examples/optuna_sweep.py
    python examples/optuna_sweep.py --compare --pruner hyperband
    python examples/optuna_sweep.py --storage digits.log  # may be killed, and goes on
    python examples/optuna_sweep.py --out plots
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import torch
import torch.nn.functional as F
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from modelbatch import accuracy
from modelbatch.integrations.optuna import OptunaSweep

BATCH_SIZE = 64
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Search a network for digits with Optuna.")
    parser.add_argument("--trials", type=positive, default=200, help="in all (default 200)")
    parser.add_argument("--epochs", type=positive, default=20, help="at most (default 20)")
    parser.add_argument(
        "--alive", type=positive, default=None, help="trials at a time (default: a quarter of all)"
    )
    parser.add_argument("--pruner", choices=("median", "hyperband"), default="median")
    parser.add_argument("--storage", help="a journal file, or a URL such as sqlite:///digits.db")
    parser.add_argument("--compare", action="store_true", help="search one trial at a time, too")
    parser.add_argument("--out", type=Path, help="directory for a report and Optuna's plots")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda (default cpu)")
    parser.add_argument("--seed", type=int, default=0, help="sampler, weights, data (default 0)")
    return parser.parse_args()


def load_data(device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images `[N, 64]` between 0 and 1 and their digits, for training and for validation."""
    images, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(digits)
    train, val = train_test_split(range(len(x)), test_size=0.25, stratify=digits, random_state=0)
    x, y = x.to(device), y.to(device)
    return (x[train], y[train]), (x[val], y[val])


def space(trial: optuna.Trial) -> dict[str, Any]:
    return {
        "lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-6, 1e-2, log=True),
        "dropout": trial.suggest_float("dropout", 0.0, 0.5),
        "width": trial.suggest_categorical("width", [32, 64]),
        "activation": trial.suggest_categorical("activation", list(ACTIVATIONS)),
    }


def build(config: dict[str, Any]) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, config["width"]),
        ACTIVATIONS[config["activation"]](),
        nn.Dropout(config["dropout"]),
        nn.Linear(config["width"], 10),
    )


def make_pruner(arguments: argparse.Namespace) -> BasePruner:
    if arguments.pruner == "hyperband":
        return HyperbandPruner(min_resource=2, max_resource=arguments.epochs)
    return MedianPruner(n_startup_trials=10, n_warmup_steps=3)


def open_storage(given: str | None) -> BaseStorage | str | None:
    if given is None or "://" in given:
        return given
    return JournalStorage(JournalFileBackend(given))


def one_at_a_time(
    arguments: argparse.Namespace,
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    console: Console,
) -> optuna.Study:
    """What one writes without ModelBatch."""
    (x, y), (val_x, val_y) = train, val

    def objective(trial: optuna.Trial) -> float:
        config = space(trial)
        torch.manual_seed(arguments.seed + trial.number)
        model = build(config).to(x.device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config["lr"], weight_decay=config["weight_decay"]
        )
        best = 0.0
        for epoch in range(1, arguments.epochs + 1):
            model.train()
            for rows in torch.randperm(len(x)).split(BATCH_SIZE):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
            model.eval()
            with torch.no_grad():
                value = (model(val_x).argmax(1) == val_y).float().mean().item()
            best = max(best, value)
            trial.report(value, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
        return best

    study = optuna.create_study(
        direction="maximize",
        sampler=TPESampler(seed=arguments.seed, constant_liar=True),
        pruner=make_pruner(arguments),
    )
    for _ in track(range(arguments.trials), "one at a time", console=console):
        study.optimize(objective, n_trials=1)
    return study


def table_of_best(study: optuna.Study) -> Table:
    done = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    names = list(done[0].params)
    table = Table("trial", "accuracy", *names)
    for trial in sorted(done, key=lambda own: -own.value)[:5]:
        values = [trial.params[name] for name in names]
        words = [f"{v:.2e}" if isinstance(v, float) else str(v) for v in values]
        table.add_row(str(trial.number), f"{trial.value:.1%}", *words)
    return table


def save_plots(study: optuna.Study, directory: Path) -> str:
    if not optuna.visualization.is_available():
        return "Optuna's plots need plotly"
    for name in ("optimization_history", "parallel_coordinate", "intermediate_values", "slice"):
        figure = getattr(optuna.visualization, f"plot_{name}")(study)
        figure.write_html(directory / f"{name}.html")
    return f"{directory} has Optuna's plots"


def summary(name: str, study: optuna.Study, seconds: float) -> str:
    epochs = sum(len(trial.intermediate_values) for trial in study.trials)
    pruned = len(study.get_trials(states=(optuna.trial.TrialState.PRUNED,)))
    return (
        f"{name + ':':<15} {seconds:6.1f} s, best {study.best_value:.1%}, "
        f"{len(study.trials)} trials, {pruned} pruned, {epochs} epochs"
    )


def main() -> int:
    arguments = parse_arguments()
    try:
        device = torch.device(arguments.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    console = Console()
    train, val = load_data(device)
    torch.optim.AdamW([torch.zeros(1)])  # torch loads much at the first optimizer; not timed

    sweep = OptunaSweep(
        open_storage(arguments.storage),
        space,
        build,
        train,
        val,
        study_name="digits",
        direction="maximize",
        sampler=TPESampler(seed=arguments.seed, constant_liar=True),
        pruner=make_pruner(arguments),
        epochs=arguments.epochs,
        batch_size=BATCH_SIZE,
        bundle_size=arguments.alive or "auto",
        metric="val_accuracy",
        metric_fns={"accuracy": accuracy},
        optimizer_cls=torch.optim.AdamW,
        seed=arguments.seed,
        device=device,
    )
    start = time.perf_counter()
    result = sweep.run(total=arguments.trials, console=console)
    together = time.perf_counter() - start
    if result.status == "interrupted":
        return 1
    console.print(table_of_best(sweep.study))
    print(summary("side by side", sweep.study, together))
    if arguments.compare:
        start = time.perf_counter()
        study = one_at_a_time(arguments, train, val, console)
        alone = time.perf_counter() - start
        print(summary("one at a time", study, alone))
        print(f"speed-up:       {alone / together:.1f}x")
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        result.report(arguments.out / "report.html")
        print(save_plots(sweep.study, arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
