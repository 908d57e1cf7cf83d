"""Cross-validation in one training: a network per fold, and all of them together as an ensemble.

The data are scikit-learn's handwritten digits. Network i is trained on all folds but fold i, on
which it is validated; the router says which image is in which fold. All networks are trained at the
same time. Then their averaged predictions are compared with those of the network whose validation
was best, on test images that none of them has seen.

    python examples/kfold_ensemble.py
    python examples/kfold_ensemble.py --models 20 --folds 5   # four networks per fold
"""

import argparse
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from modelbatch import ModelBatch
from modelbatch.callbacks import BestModel
from modelbatch.data import PerModelLoader, StratifiedDataRouter
from modelbatch.training import accuracy, fit

Batch = tuple[Tensor, Tensor]


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a network per fold of handwritten digits, and compare their ensemble "
        "with the best of them."
    )
    parser.add_argument("--models", type=positive, default=10, help="networks (default 10)")
    parser.add_argument("--folds", type=positive, help="folds (default: one per network)")
    parser.add_argument("--epochs", type=positive, default=40, help="epochs (default 40)")
    parser.add_argument("--batch-size", type=positive, default=32, help="samples (default 32)")
    parser.add_argument("--lr", type=float, default=0.003, help="learning rate (default 0.003)")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda (default cpu)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="data and weights (default 0)")
    parser.add_argument("--plot", type=Path, help="draw the validation losses into this file")
    arguments = parser.parse_args()
    arguments.folds = arguments.folds or arguments.models
    if arguments.folds < 2:
        parser.error("cross-validation needs at least 2 folds")
    return arguments


def load_data(seed: int, device: torch.device) -> tuple[Batch, Batch]:
    images, digits = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, digits, test_size=0.6, random_state=seed)
    train_x, test_x = (torch.tensor(x, dtype=torch.float32, device=device) for x in parts[:2])
    train_y, test_y = (torch.tensor(y, dtype=torch.int64, device=device) for y in parts[2:])
    return (train_x, train_y), (test_x, test_y)


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10)
    )


@torch.no_grad()
def probabilities_of(bundle: ModelBatch, x: Tensor) -> Tensor:
    """What every network thinks of every image, `[M, B, 10]`."""
    bundle.eval()
    return bundle(x).softmax(-1)


def main() -> int:
    arguments = parse_arguments()
    try:
        device = torch.device(arguments.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    torch.set_num_threads(arguments.threads)  # such small networks gain nothing from more
    train, (test_x, test_y) = load_data(arguments.seed, device)

    seeds = [arguments.seed + i for i in range(arguments.models)]
    bundle = ModelBatch.from_factory(
        lambda: make_model().to(device),
        arguments.models,
        seeds=seeds,
        lr_list=[arguments.lr] * arguments.models,
        optimizer_cls=torch.optim.Adam,
    )
    router = StratifiedDataRouter(
        arguments.models,
        "kfold",
        num_folds=arguments.folds,
        dataset_size=len(train[1]),
        shuffle_seed=arguments.seed,
    )
    best = BestModel("val_loss")
    history = fit(
        bundle,
        PerModelLoader(train, arguments.batch_size, seeds, subsets=router.subsets()),
        PerModelLoader(train, 512, shuffle=False, subsets=router.validation().subsets()),
        epochs=arguments.epochs,
        metric_fns={"accuracy": accuracy},
        callbacks=[best],
        progress=True,
    )
    best.restore()
    if arguments.plot is not None:
        history.plot(arguments.plot)

    each = probabilities_of(bundle, test_x)
    together = each.mean(0)
    validated = history["val_accuracy"][best.best_epochs.cpu(), torch.arange(arguments.models)]
    for i in range(arguments.models):
        print(
            f"model {i}: fold {i % arguments.folds} held out, best in epoch "
            f"{best.best_epochs[i] + 1} with loss {best.best_values[i]:.3f}, accuracy "
            f"{validated[i]:.1%}; test {accuracy(each[i], test_y):.1%}"
        )
    chosen = int(best.best_values.argmin())
    single, ensemble = accuracy(each[chosen], test_y), accuracy(together, test_y)
    mean = torch.stack([accuracy(own, test_y) for own in each]).mean()
    print(f"cross-validated accuracy: {validated.mean():.1%}")
    print(f"test accuracy: best single network (model {chosen}) {single:.1%}, mean {mean:.1%}")
    print(f"test accuracy: ensemble {ensemble:.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
