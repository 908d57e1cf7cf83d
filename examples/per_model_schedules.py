"""Which learning rate schedule suits a small network? Train one network with each, all at once.

The networks start from the same weights and see the same mini-batches of handwritten digits; only
the schedules differ: another class of torch's schedulers for each, and one that waits for a plateau
of its own network's test loss.

    python examples/per_model_schedules.py --epochs 10
"""

import argparse
import copy
import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import lr_scheduler

from modelbatch import ModelBatch, OptimizerFactory

SCHEDULES = ("constant", "step", "exponential", "warm-up and cosine", "plateau")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare learning rate schedules on digits.")
    parser.add_argument("--models", type=positive, default=5, help="networks (default 5)")
    parser.add_argument("--epochs", type=positive, default=10, help="epochs (default 10)")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda (default cpu)")
    parser.add_argument("--seed", type=int, default=0, help="data and weights (default 0)")
    return parser.parse_args()


def build(optimizer: torch.optim.Optimizer, i: int, epochs: int) -> lr_scheduler.LRScheduler:
    """The schedule of network i; further networks begin again with the first."""
    name = SCHEDULES[i % len(SCHEDULES)]
    if name == "constant":
        return lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if name == "step":
        return lr_scheduler.StepLR(optimizer, step_size=max(epochs // 3, 1), gamma=0.3)
    if name == "exponential":
        return lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
    if name == "plateau":
        return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    warm_up = lr_scheduler.LinearLR(optimizer, start_factor=0.2, total_iters=2)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
    return lr_scheduler.SequentialLR(optimizer, [warm_up, cosine], milestones=[2])


def load_data(seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    images, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(images, dtype=torch.float32)[order] / 16
    return x.to(device), torch.tensor(digits, dtype=torch.int64)[order].to(device)


def main() -> int:
    arguments = parse_arguments()
    try:
        device = torch.device(arguments.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    x, y = load_data(arguments.seed, device)
    train, test = (x[:1437], y[:1437]), (x[1437:], y[1437:])

    torch.manual_seed(arguments.seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).to(device)
    bundle = ModelBatch(
        [copy.deepcopy(model) for _ in range(arguments.models)],
        lr_list=[0.02] * arguments.models,
        optimizer_cls=torch.optim.Adam,
    )
    scheduler = OptimizerFactory.create_lr_scheduler(
        bundle.optimizer, lambda optimizer, i: build(optimizer, i, arguments.epochs)
    )

    generator = torch.Generator().manual_seed(arguments.seed)
    for epoch in range(1, arguments.epochs + 1):
        order = torch.randperm(len(train[1]), generator=generator).to(device)
        for part in order.split(64):
            bundle.train_step(train[0][part], train[1][part])
        losses = bundle.evaluate([test])["loss"]
        rates = " ".join(f"{lr:.5f}" for lr in scheduler.get_last_lr())
        print(f"epoch {epoch}/{arguments.epochs}: learning rates {rates}")
        scheduler.step(losses)  # the plateau is each network's own

    for i, loss in enumerate(losses.tolist()):
        best = " (best)" if i == losses.argmin() else ""
        print(f"model {i}: {SCHEDULES[i % len(SCHEDULES)]:<18}  test loss {loss:.4f}{best}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
