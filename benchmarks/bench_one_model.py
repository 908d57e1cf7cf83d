"""A bundle of one model against that model by itself: whole steps, not by the engine.

python benchmarks/bench_one_model.py --rounds 15
"""

import argparse
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bundle import mlp
from harness import compare, save, show
from torch import Tensor, nn

from modelbatch import ModelBatch


class Recurrent(nn.Module):
    """One recurrent layer and a head."""

    def __init__(self, kind: type[nn.RNNBase], inputs: int, hidden: int) -> None:
        super().__init__()
        self.layer, self.head = kind(inputs, hidden, batch_first=True), nn.Linear(hidden, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Classes from the last step."""
        return self.head(self.layer(x)[0][:, -1])


def convolutional() -> nn.Module:
    """Two convolutions with batch normalisation."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 25, 10)),
    )


def transformer() -> nn.Module:
    """Two encoder layers of width 32."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(16 * 32, 5))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 20-16-16-4": (lambda: mlp(20, 16, 16, 4), (32, 20)),
    "MLP 784-128-10": (lambda: mlp(784, 128, 10), (32, 784)),
    "MLP 256-512-512-10": (lambda: mlp(256, 512, 512, 10), (128, 256)),
    "two convolutions, 28x28": (convolutional, (32, 1, 28, 28)),
    "two transformer layers": (transformer, (16, 16, 32)),
}
for _kind in (nn.LSTM, nn.GRU, nn.RNN):
    for _batch, _steps, _inputs, _hidden in ((16, 12, 10, 16), (32, 64, 16, 64), (64, 50, 32, 128)):
        CASES[f"{_kind.__name__}, {_hidden} hidden units, {_steps} steps"] = (
            lambda kind=_kind, inputs=_inputs, hidden=_hidden: Recurrent(kind, inputs, hidden),
            (_batch, _steps, _inputs),
        )


def steps(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """Training steps with Adam, in the loop that one writes oneself."""
    bundle = ModelBatch([copy.deepcopy(model)], lr_list=[1e-3], optimizer_cls=torch.optim.Adam)

    def together() -> None:
        bundle.zero_grad()
        bundle.compute_loss(bundle(x), y).backward()
        bundle.step()

    def alone(**options: bool) -> Callable[[], object]:
        own = copy.deepcopy(model)
        optimizer = torch.optim.Adam(own.parameters(), lr=1e-3, **options)

        def run() -> None:
            optimizer.zero_grad()
            F.cross_entropy(own(x), y).backward()
            optimizer.step()

        return run

    return {"a bundle of one": together, "the model": alone(), "fused Adam": alone(fused=True)}


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    results = []
    for dtype in (torch.float32, torch.float64):
        for name, (build, shape) in CASES.items():
            torch.manual_seed(0)
            x, y = torch.randn(shape, dtype=dtype), torch.randint(4, (shape[0],))
            result = compare(steps(build().to(dtype), x, y), args.rounds, repeat=10)
            show(f"{name}, {dtype}, B={shape[0]} (ratios to the bundle)", result)
            results.append({"workload": name, "dtype": str(dtype), "batch": shape[0], **result})
    print(save("one_model", results))


if __name__ == "__main__":
    main()
