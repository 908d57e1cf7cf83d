"""A small hand-written training loop that drives callbacks, and bundles that really diverge."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelbatch import ModelBatch
from modelbatch.callbacks import Callback, CallbackPack, Event

HUGE = 1e30  # as a learning rate, a few steps suffice


class Square(nn.Module):
    """A mean squared error, which a huge learning rate blows up (cross entropy may stay finite)."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return ((output - target) ** 2).mean()


def build(i: int = 0) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))


class Loop:
    """Epochs over the same few batches."""

    def __init__(
        self,
        rates: Iterable[float],
        callbacks: Iterable[Callback] | CallbackPack,
        optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
        batches: int = 3,
    ):
        rates = list(rates)
        torch.manual_seed(5)
        self.mb = ModelBatch(
            [build() for _ in rates],
            lr_list=rates,
            optimizer_cls=optimizer,
            fallback="silent",
        )
        self.pack = callbacks if isinstance(callbacks, CallbackPack) else CallbackPack(callbacks)
        self.batches = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(batches)]
        self.event = Event(self.mb, self.mb.optimizer, num_batches=batches, batch_size=8)
        self.losses: list[list[float]] = []
        self.poison: Callable[[Event], None] | None = None

    def run(
        self, epochs: int, first: int = 0, metrics: Callable[[int], dict[str, Any]] | None = None
    ) -> Event:
        event, pack = self.event, self.pack
        event.epochs = epochs
        pack.on_train_start(event)
        try:
            for event.epoch in range(first, epochs):
                event.losses, event.metrics = None, {}
                pack.on_epoch_start(event)
                total = torch.zeros(len(self.mb))
                for event.batch, (x, y) in enumerate(self.batches):
                    event.losses = self.mb.train_step(x, y, loss_fn=Square())
                    event.step += 1
                    if len(total) != len(self.mb):  # a callback has removed models
                        total = torch.zeros(len(self.mb))
                    total += event.losses
                    self.losses.append(event.losses.tolist())
                    if self.poison is not None:
                        self.poison(event)
                    pack.on_train_step(event)
                    if event.stop:
                        break
                event.losses = None
                event.metrics = {"loss": total / len(self.batches)}
                if metrics is not None:
                    found = {k: torch.as_tensor(v) for k, v in metrics(event.epoch).items()}
                    event.metrics.update(found)
                pack.on_epoch_end(event)
                if event.stop:
                    break
        finally:
            pack.on_train_end(event)
        return event


@pytest.fixture
def loop() -> type[Loop]:
    return Loop


class Recorder(Callback):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def on_model_frozen(self, event: Event) -> None:
        self.seen.append((event.step, event.models, event.reason))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def rows_of(bundle: ModelBatch, i: int) -> list[Tensor]:
    return [t.detach().clone() for t in bundle[i].state_dict().values()]


@pytest.fixture
def rows() -> Callable[[ModelBatch, int], list[Tensor]]:
    return rows_of


@pytest.fixture
def huge() -> float:
    return HUGE


@pytest.fixture
def fresh() -> Callable[..., nn.Module]:
    return build
