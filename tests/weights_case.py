"""Models, data and weights for the tests of sample weights, and each model trained alone."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelbatch import ModelBatch

M, B = 3, 9


class PerStep(nn.Module):
    """Normalises over batch and time together, after the two have become one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.reshape(-1, 2)).reshape(x.shape[0], -1)
        return self.out(torch.tanh(y))


class Branching(nn.Module):
    """Depends on a value, so that models run one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if x.mean() > 1e6:
            y = -y
        return self.out(y)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


# No biases before a batch norm: their gradient is 0, and Adam would magnify its rounding.


def norm_1d() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def norm_2d() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 4, 2, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 2, 2, bias=False),
        nn.BatchNorm2d(2, momentum=None),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def instance_norm() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 2)),
        nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
        nn.Flatten(),
        nn.LayerNorm(4),
        nn.Linear(4, 3),
    )


KINDS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "norm_1d": norm_1d,
    "norm_2d": norm_2d,
    "instance_norm": instance_norm,
    "per_step": PerStep,
    "branching": Branching,
}
LOOPED = ("per_step", "branching")
OPTIMIZERS: dict[str, Any] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "Adam": (torch.optim.Adam, {}),
    "Rprop": (torch.optim.Rprop, {}),
}
RATES = [0.05, 0.02, 0.1]


def make_models(kind: str) -> list[nn.Module]:
    torch.manual_seed(0)
    return [KINDS[kind]().double() for _ in range(M)]


def make_bundle(models: list[nn.Module], optimizer: str = "SGD", **kwargs: Any) -> ModelBatch:
    cls, options = OPTIMIZERS[optimizer]
    return ModelBatch(
        copy.deepcopy(models),
        lr_list=RATES,
        optimizer_cls=cls,
        optimizer_kwargs=options,
        fallback="silent",
        **kwargs,
    )


def make_data(steps: int, own: bool) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    lead = (M,) if own else ()
    return [
        (torch.randn(*lead, B, 4, dtype=torch.float64), torch.randint(3, (*lead, B)))
        for _ in range(steps)
    ]


def make_counts(steps: int, most: int = 1, empty: bool = True) -> list[Tensor]:
    """Whole weights [M, B]; every model has 0 or at least 2 samples."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for step in range(steps):
        counts = torch.randint(most + 1, (M, B), generator=generator)
        counts[:, :2] = counts[:, :2].clamp(min=1)
        if empty and step % 4 == 1:
            counts[step // 4 % M] = 0
        found.append(counts)
    return found


def own_rows(counts: Tensor) -> Tensor:
    return torch.arange(len(counts)).repeat_interleave(counts)


def optimizer_state(optimizer: torch.optim.Optimizer) -> Any:
    return optimizer.state_dict()["state"]


def train_alone(
    model: nn.Module, i: int, optimizer: str, data: list[Any], counts: list[Tensor], own: bool
) -> tuple[torch.optim.Optimizer, list[float]]:
    """A usual loop over the model's own samples; nothing is done where it has none."""
    cls, options = OPTIMIZERS[optimizer]
    alone = cls(model.parameters(), lr=RATES[i], **options)
    losses = []
    for (x, y), weight in zip(data, counts):
        rows = own_rows(weight[i])
        if len(rows) == 0:
            losses.append(0.0)
            continue
        alone.zero_grad()
        loss = F.cross_entropy(model((x[i] if own else x)[rows]), (y[i] if own else y)[rows])
        loss.backward()
        alone.step()
        losses.append(loss.item())
    return alone, losses
