"""Recurrent classifiers in a bundle train as they would alone."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from bundle_case import BundleCase, assert_relative, state
from rnn_case import CLASSES
from torch import Tensor, nn

from modelbatch import ModelBatch


class Classifier(nn.Module):
    """Reads a sequence and decides by its last output."""

    def __init__(self, kind: str, **options: Any):
        super().__init__()
        self.rnn = CLASSES[kind](3, 5, batch_first=True, **options)
        self.head = nn.Linear(5 * (2 if self.rnn.bidirectional else 1), 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class RecurrentCase(BundleCase):
    kind = "lstm"
    options: ClassVar[dict[str, Any]] = {}

    def make_model(self) -> nn.Module:
        return Classifier(self.kind, **self.options)

    def make_batch(self) -> tuple[Tensor, Tensor]:
        return torch.randn(6, 7, 3), torch.randint(4, (6,))


class TestLSTMs(RecurrentCase):
    pass


class TestDroppingLSTMs(RecurrentCase):
    has_dropout = True
    steps = 10
    options: ClassVar[dict[str, Any]] = {"num_layers": 2, "dropout": 0.3, "bidirectional": True}


class TestGRUs(RecurrentCase):
    kind = "gru"
    steps = 10
    options: ClassVar[dict[str, Any]] = {"num_layers": 2}


class TestRNNs(RecurrentCase):
    kind = "rnn"
    steps = 10


def test_five_lstm_classifiers_train_thirty_steps_as_alone() -> None:
    torch.manual_seed(0)
    rates = [0.001, 0.003, 0.01, 0.03, 0.0003]
    options = {"num_layers": 2, "dropout": 0.25}
    models = [Classifier("lstm", **options).double() for _ in rates]
    alone = [Classifier("lstm", **options).double() for _ in rates]
    for a, b in zip(alone, models, strict=True):
        a.load_state_dict(b.state_dict())
    bundle = ModelBatch(
        models,
        lr_list=rates,
        optimizer_cls=torch.optim.Adam,
        rng="torch",
        seeds=[7, 8, 9, 10, 11],
        fallback="error",
    )
    data = [(torch.randn(6, 7, 3).double(), torch.randint(4, (6,))) for _ in range(30)]
    for x, y in data:
        bundle.train_step(x, y, loss_fn=F.cross_entropy)
    for i, model in enumerate(alone):
        optimizer = torch.optim.Adam(model.parameters(), lr=rates[i])
        torch.manual_seed(7 + i)
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert_relative(state(bundle[i]), state(model), 1e-9, f"model {i}")
