"""Do models trained in one bundle reach the accuracies that they reach one after another?

A program of its own for one question: the same initial weights, data, learning rates and Adam, once
in a plain torch loop and once in a `ModelBatch`.

    python examples/quick_consistency_test.py
    python examples/quick_consistency_test.py --models 8 --epochs 20
"""

import argparse
import copy
import itertools
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelbatch import ModelBatch


@dataclass(frozen=True)
class Configuration:
    """What is trained, on how much data, for how long."""

    name: str
    learning_rates: tuple[float, ...]
    sizes: tuple[int, ...]
    samples: int
    epochs: int
    batch_size: int = 32

    def override(self, models: int | None, epochs: int | None) -> "Configuration":
        rates = self.learning_rates
        if models is not None:
            low, high = np.log10(rates[0]), np.log10(rates[-1])
            rates = tuple(np.logspace(low, high, models).tolist())
        return replace(self, learning_rates=rates, epochs=epochs or self.epochs)


CONFIGURATIONS = (
    Configuration("quick", (0.001, 0.01, 0.1), (8, 4, 2), samples=100, epochs=3),
    Configuration("faster", (0.001, 0.01, 0.1), (20, 16, 16, 4), samples=500, epochs=5),
    Configuration("full", (0.001, 0.003, 0.01, 0.03), (20, 16, 16, 4), samples=500, epochs=10),
)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare models trained one after another with the same models in a bundle.",
        epilog="The exit status is 1 if a configuration is DIVERGENT.",
    )
    names = [c.name for c in CONFIGURATIONS]
    parser.add_argument("--config", choices=names, help="run only this one (default: all)")
    parser.add_argument("--models", type=positive, help="models, in place of each one's own number")
    parser.add_argument("--epochs", type=positive, help="epochs, in place of each one's own number")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda (default cpu)")
    parser.add_argument("--seed", type=int, default=42, help="data and weights (default 42)")
    return parser.parse_args()


def make_model(sizes: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def make_models(configuration: Configuration, seed: int, device: torch.device) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [make_model(configuration.sizes).to(device) for _ in configuration.learning_rates]


def make_data(
    configuration: Configuration, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Points around one centre for each class, near enough to each other to be confused."""
    rng = np.random.default_rng(seed)
    features, classes = configuration.sizes[0], configuration.sizes[-1]
    centres = rng.normal(size=(classes, features))
    labels = rng.integers(classes, size=configuration.samples)
    points = centres[labels] + 1.5 * rng.normal(size=(configuration.samples, features))
    return torch.tensor(points, dtype=torch.float32, device=device), torch.tensor(
        labels, device=device
    )


def make_batches(
    configuration: Configuration, data: tuple[Tensor, Tensor], seed: int
) -> list[tuple[Tensor, Tensor]]:
    """The mini-batches of all epochs; both trainings use these."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(configuration.epochs):
        order = torch.randperm(len(y), generator=generator).to(y.device)
        batches += [(x[part], y[part]) for part in order.split(configuration.batch_size)]
    return batches


@torch.no_grad()
def logits_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return model(data[0].to(next(model.parameters()).dtype)).double()


def accuracy_of(logits: Tensor, data: tuple[Tensor, Tensor]) -> float:
    return (logits.argmax(-1) == data[1]).double().mean().item()


def train_sequentially(
    models: list[nn.Module], rates: tuple[float, ...], batches: list[tuple[Tensor, Tensor]]
) -> None:
    for model, lr in zip(models, rates):
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def train_in_a_bundle(
    models: list[nn.Module], rates: tuple[float, ...], batches: list[tuple[Tensor, Tensor]]
) -> ModelBatch:
    bundle = ModelBatch(models, lr_list=rates, optimizer_cls=torch.optim.Adam)
    for x, y in batches:
        bundle.train_step(x, y)
    return bundle


def tolerance_of(logits: Tensor, exact: Tensor) -> float:
    """The share of samples whose predicted class rounding alone may change.

    The logits of two float32 trainings may differ by twice what float32 differs from float64, plus
    one rounding of the largest. A prediction may change where the best class leads by less than
    twice that difference, since both of its logits may move.
    """
    error = (logits - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    best = exact.topk(2).values
    return (best[:, 0] - best[:, 1] <= 4 * error).double().mean().item()


def run(configuration: Configuration, seed: int, device: torch.device) -> bool:
    """Train both ways, print both, and say whether they agree."""
    data = make_data(configuration, seed, device)
    batches = make_batches(configuration, data, seed)
    rates = configuration.learning_rates
    sequential = make_models(configuration, seed, device)
    exact = [copy.deepcopy(model).double() for model in sequential]
    train_sequentially(sequential, rates, batches)
    train_sequentially(exact, rates, [(x.double(), y) for x, y in batches])
    bundle = train_in_a_bundle(make_models(configuration, seed, device), rates, batches)

    shape = "-".join(map(str, configuration.sizes))
    print(
        f"{configuration.name}: {len(rates)} models {shape}, {configuration.samples} samples, "
        f"{configuration.epochs} epochs"
    )
    differences, agree = [], True
    for i, lr in enumerate(rates):
        alone = logits_of(sequential[i], data)
        accuracy, own = accuracy_of(alone, data), accuracy_of(logits_of(bundle[i], data), data)
        difference = abs(own - accuracy)
        tolerance = tolerance_of(alone, logits_of(exact[i], data))
        print(
            f"  model {i}  lr {lr:<8.3g} sequential {accuracy:6.1%}  ModelBatch {own:6.1%}  "
            f"difference {difference:.1%}  tolerance {tolerance:.1%}"
        )
        differences.append(difference)
        agree = agree and difference <= tolerance
    print(f"  max difference {max(differences):.1%}: {'CONSISTENT' if agree else 'DIVERGENT'}")
    return agree


def main() -> int:
    arguments = parse_arguments()
    try:
        device = torch.device(arguments.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    torch.set_num_threads(1)  # more would only wait for each other over such small networks
    chosen = [c for c in CONFIGURATIONS if arguments.config in (None, c.name)]
    results = [
        run(c.override(arguments.models, arguments.epochs), arguments.seed, device) for c in chosen
    ]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
