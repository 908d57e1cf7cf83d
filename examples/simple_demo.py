"""Train many networks with different learning rates at once, and check them against separate ones.

The data are scikit-learn's handwritten digits: 1797 images of 8 x 8 pixels. Every network is a
64-32-32-10 MLP with an initialisation and an Adam learning rate of its own; all see the same
mini-batches. The same networks are then trained one by one in a plain torch loop, and once more in
float64, which says how much rounding matters here.

    python examples/simple_demo.py --models 32 --epochs 10
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from modelbatch import ModelBatch

Batch = tuple[Tensor, Tensor]


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train many MLPs with different learning rates on handwritten digits at once, "
        "and compare with training them one by one.",
        epilog="The exit status is 1 if the two trainings are not equal.",
    )
    parser.add_argument("--models", type=positive, default=32, help="networks (default 32)")
    parser.add_argument("--epochs", type=positive, default=10, help="epochs (default 10)")
    parser.add_argument("--batch-size", type=positive, default=32, help="samples (default 32)")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda (default cpu)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="data and weights (default 0)")
    return parser.parse_args()


# ---- data and models


def load_data(seed: int, device: torch.device) -> tuple[Batch, Batch]:
    """Training and test set, standardised with the training set's statistics."""
    images, digits = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images, digits, test_size=0.2, stratify=digits, random_state=seed
    )
    scaler = StandardScaler().fit(train_x)

    def to_tensors(x: object, y: object) -> Batch:
        return (
            torch.tensor(scaler.transform(x), dtype=torch.float32, device=device),
            torch.tensor(y, dtype=torch.int64, device=device),
        )

    return to_tensors(train_x, train_y), to_tensors(test_x, test_y)


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10)
    )


def learning_rates(num_models: int) -> list[float]:
    """From 1e-4 to 1e-2, evenly spaced on a logarithmic scale."""
    return torch.logspace(-4, -2, num_models, dtype=torch.float64).tolist()


# ---- the two ways to train


def train_together(bundle: ModelBatch, batches: list[Batch]) -> None:
    for x, y in batches:
        bundle.train_step(x, y)


def train_one_by_one(
    models: list[nn.Module], optimizers: list[torch.optim.Optimizer], batches: list[Batch]
) -> None:
    for model, optimizer in zip(models, optimizers):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def adams(models: list[nn.Module], rates: list[float]) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam(model.parameters(), lr=lr) for model, lr in zip(models, rates)]


def warm_up(models: list[nn.Module], rates: list[float], batch: Batch) -> None:
    """Two steps of both ways on copies, so that neither pays for what torch sets up once."""
    alone = copy.deepcopy(models[:1])
    train_one_by_one(alone, adams(alone, rates[:1]), [batch] * 2)
    bundle = ModelBatch(copy.deepcopy(models), lr_list=rates, optimizer_cls=torch.optim.Adam)
    train_together(bundle, [batch] * 2)


def seconds(work: Callable[[], None], device: torch.device) -> float:
    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    finish()
    start = time.perf_counter()
    work()
    finish()
    return time.perf_counter() - start


@contextmanager
def progress_of(console: Console, epochs: int) -> Iterator[Callable[[int, str], None]]:
    """A progress bar, or a few plain lines where the output is no terminal."""
    if not console.is_terminal:
        every = max(epochs // 5, 1)

        def say(epoch: int, text: str) -> None:
            if epoch % every == 0 or epoch == epochs:
                console.print(f"epoch {epoch}/{epochs}: {text}", highlight=False)

        yield say
        return
    columns = (
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=epochs)
        yield lambda epoch, text: bar.update(task, completed=epoch, description=text)


# ---- comparison


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


@torch.no_grad()
def loss_of(model: nn.Module, data: Batch) -> Tensor:
    x, y = data
    dtype = next(model.parameters()).dtype
    return F.cross_entropy(model(x.to(dtype)), y).double()


def compare(name: str, together: Tensor, alone: Tensor, exact: Tensor) -> tuple[bool, list[str]]:
    """Whether two float32 results are equal up to rounding, and the lines that say so.

    Both results are off by rounding. How much is known for the separate training, whose float64
    twin is exact by comparison; two results that are each off by so much may differ by twice that.
    One rounding of the largest value is added because no float32 result is nearer than that.
    """
    difference = (together - alone).abs()
    own_error = (alone - exact).abs().max().item()
    largest = exact.abs().max().item()
    tolerance = 2 * own_error + torch.finfo(torch.float32).eps * largest
    worst = difference.max().item()
    relative = worst / largest if largest else worst
    # not "worst > tolerance": NaN is never equal
    equal = worst <= tolerance
    verdict = f"tolerance {tolerance:.1e}"
    return equal, [name, f"{worst:.1e}", f"{relative:.1e}", verdict]


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(-1) == labels).float().mean()


def result_table(rates: list[float], losses: list[float], accuracies: list[float]) -> Table:
    table = Table("model", "learning rate", "train loss", "test accuracy")
    for column in table.columns:
        column.justify = "right"
    best = max(range(len(rates)), key=lambda i: (accuracies[i], -losses[i]))
    for i, lr in enumerate(rates):
        mark = " best" if i == best else ""
        table.add_row(
            f"{i}",
            f"{lr:.2e}",
            f"{losses[i]:.4f}",
            f"{accuracies[i]:.1%}{mark}",
            style="bold green" if i == best else None,
        )
    return table


def main() -> int:
    arguments = parse_arguments()
    console = Console()
    try:
        device = torch.device(arguments.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    # Networks of this size gain nothing from more threads, alone or together; on a busy machine the
    # threads would wait for each other and the times would say nothing.
    torch.set_num_threads(arguments.threads)
    train, test = load_data(arguments.seed, device)

    torch.manual_seed(arguments.seed)
    models = [make_model().to(device) for _ in range(arguments.models)]
    rates = learning_rates(arguments.models)
    alone = copy.deepcopy(models)
    exact = [copy.deepcopy(model).double() for model in models]
    alone_optimizers, exact_optimizers = adams(alone, rates), adams(exact, rates)
    warm_up(models, rates, (train[0][:32], train[1][:32]))
    bundle = ModelBatch(models, lr_list=rates, optimizer_cls=torch.optim.Adam)

    console.print(
        f"{len(bundle)} MLPs 64-32-32-10, {len(train[1])} training images, Adam, "
        f"CPU threads: {torch.get_num_threads()}, device: {device}",
        highlight=False,
    )
    together_s: list[float] = []
    alone_s: list[float] = []
    generator = torch.Generator().manual_seed(arguments.seed)
    # Both ways take turns, epoch by epoch, so that whatever else the machine does disturbs both.
    with progress_of(console, arguments.epochs) as show:
        for epoch in range(1, arguments.epochs + 1):
            order = torch.randperm(len(train[1]), generator=generator).to(device)
            batches = [
                (train[0][part], train[1][part]) for part in order.split(arguments.batch_size)
            ]
            together_s.append(seconds(lambda b=batches: train_together(bundle, b), device))
            alone_s.append(
                seconds(lambda b=batches: train_one_by_one(alone, alone_optimizers, b), device)
            )
            train_one_by_one(exact, exact_optimizers, [(x.double(), y) for x, y in batches])
            show(epoch, f"together {sum(together_s):.1f} s, one by one {sum(alone_s):.1f} s")

    losses = bundle.evaluate([train])["loss"]
    accuracies = bundle.evaluate([test], metric_fns={"accuracy": accuracy})["accuracy"]
    console.print(result_table(rates, losses.tolist(), accuracies.tolist()))

    equal_weights, weight_row = compare(
        "final weights",
        *(torch.stack([weights(m) for m in group]) for group in (bundle.models, alone, exact)),
    )
    equal_losses, loss_row = compare(
        "final losses",
        losses.double(),
        *(torch.stack([loss_of(m, train) for m in group]) for group in (alone, exact)),
    )
    speed_up = statistics.median(b / a for a, b in zip(together_s, alone_s))
    lines = [
        f"seconds together:      {sum(together_s):.2f}",
        f"seconds one by one:    {sum(alone_s):.2f}",
        f"speed-up:              {speed_up:.1f}x (median over the epochs)",
    ]
    lines += [
        f"largest difference, {name + ':':<15} {worst} absolute, {relative} of the largest value "
        f"({verdict})"
        for name, worst, relative, verdict in (weight_row, loss_row)
    ]
    equal = equal_weights and equal_losses
    rule = "within twice the error of separate float32 training against float64"
    lines.append(f"{'equal' if equal else 'NOT equal'} {rule}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
