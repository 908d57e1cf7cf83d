"""Train 32 LSTM classifiers with different learning rates at once on handwritten digits.

An image of scikit-learn's digits is read row by row: 8 steps of 8 pixels. The same classifiers are
then trained one by one in a plain torch loop, to compare times and accuracies.

    python examples/lstm_sweep.py --models 32 --epochs 15 --hidden 32
"""

import argparse
import copy
import sys
import time

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from modelbatch import History, ModelBatch, accuracy, fit


class RowReader(nn.Module):
    """An LSTM over the rows of an image, and a linear layer on what it remembers at the end."""

    def __init__(self, hidden: int):
        super().__init__()
        self.lstm = nn.LSTM(8, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, image: Tensor) -> Tensor:
        rows, _ = self.lstm(image)  # [B, 8, 8] -> [B, 8, hidden]
        return self.head(rows[:, -1])


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Search the learning rate of an LSTM on digits.")
    parser.add_argument("--models", type=positive, default=32, help="networks (default 32)")
    parser.add_argument("--epochs", type=positive, default=15, help="epochs (default 15)")
    parser.add_argument("--hidden", type=positive, default=32, help="hidden units (default 32)")
    parser.add_argument("--batch-size", type=positive, default=32, help="samples (default 32)")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda (default cpu)")
    parser.add_argument("--seed", type=int, default=0, help="data and weights (default 0)")
    return parser.parse_args()


def load_data(seed: int, device: torch.device) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images `[N, 8, 8]` between 0 and 1, and their digits."""
    images, digits = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images / 16, digits, test_size=0.2, stratify=digits, random_state=seed
    )

    def dataset(x: object, y: object) -> TensorDataset:
        rows = torch.tensor(x, dtype=torch.float32, device=device).reshape(-1, 8, 8)
        return TensorDataset(rows, torch.tensor(y, dtype=torch.int64, device=device))

    return dataset(train_x, train_y), dataset(test_x, test_y)


def train_alone(model: nn.Module, rate: float, loader: DataLoader, epochs: int) -> None:
    """The plain loop that everybody writes."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def result_table(rates: list[float], history: History, test: list[float]) -> Table:
    table = Table("model", "learning rate", "train loss", "test accuracy")
    for column in table.columns:
        column.justify = "right"
    best = max(range(len(rates)), key=test.__getitem__)
    losses = history["loss"][-1].tolist()
    for i, rate in enumerate(rates):
        row = [str(i), f"{rate:.2e}", f"{losses[i]:.4f}", f"{test[i]:.1%}"]
        if i == best:
            table.add_row(*row[:-1], f"{row[-1]} best", style="bold green")
        else:
            table.add_row(*row)
    return table


def main() -> None:
    arguments = parse_arguments()
    console = Console()
    try:
        device = torch.device(arguments.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    train, test = load_data(arguments.seed, device)
    rates = torch.logspace(-4, -1, arguments.models, dtype=torch.float64).tolist()
    torch.manual_seed(arguments.seed)
    models = [RowReader(arguments.hidden).to(device) for _ in rates]
    alone = copy.deepcopy(models)

    def batches() -> DataLoader:
        generator = torch.Generator().manual_seed(arguments.seed)
        return DataLoader(train, arguments.batch_size, shuffle=True, generator=generator)

    bundle = ModelBatch(models, lr_list=rates, optimizer_cls=torch.optim.Adam)
    console.print(f"{len(bundle)} LSTMs with {arguments.hidden} hidden units", highlight=False)
    start = time.perf_counter()
    history = fit(bundle, batches(), epochs=arguments.epochs, progress=True)
    together = time.perf_counter() - start
    whole_test = [test.tensors]
    tested = bundle.evaluate(whole_test, metric_fns={"accuracy": accuracy})["accuracy"]
    console.print(result_table(rates, history, tested.tolist()))

    # One epoch of each alone tells what all of them would take.
    start = time.perf_counter()
    for model, rate in zip(alone, rates, strict=True):
        train_alone(model, rate, batches(), epochs=1)
    one_by_one = (time.perf_counter() - start) * arguments.epochs
    console.print(f"seconds together:   {together:.1f}", highlight=False)
    console.print(f"seconds one by one: {one_by_one:.1f} (from one epoch of each)", highlight=False)
    console.print(f"speed-up:           {one_by_one / together:.1f}x", highlight=False)


if __name__ == "__main__":
    main()
