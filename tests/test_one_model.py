"""A bundle of one model calls that model, and does for it what bundles do."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelbatch import ModelBatch, ModelBatchError
from modelbatch.substitute.mode import Refused

TOLERANCE = 1e-9  # of the largest value, in float64


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layers = kind(4, 6, batch_first=True, **options)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x.view(-1, 3, 4))[0][:, -1])


class Branches(nn.Module):
    """Control flow that no batching could follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if self.a(x).sum().item() > 0 else self.b(x)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)),
        nn.Conv2d(1, 4, 2),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (3, 4)), layer, nn.Flatten(), nn.Linear(12, 3))


def smooth(dropout: float = 0.0) -> nn.Module:
    parts = [nn.Linear(12, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)]
    return nn.Sequential(*parts)


TORCHS_OWN = {
    "mlp": smooth,
    "convolutions": convolutional,
    "attention": attention,
    "branches": Branches,
}
BUILDS = {
    **TORCHS_OWN,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN, nonlinearity="tanh"),
}


def data(steps: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(steps, size, 12, generator=generator, dtype=torch.float64)
    return list(zip(x, torch.randint(3, (steps, size), generator=generator)))


def built(build: Any, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double()


def bundle_of(*models: nn.Module, **options: Any) -> ModelBatch:
    optimizer: dict[str, Any] = {"lr_list": [0.05] * len(models), "optimizer_cls": torch.optim.SGD}
    mb = ModelBatch(models, **optimizer, **options)
    mb.enable_engine(False)
    return mb


def train_alone(model: nn.Module, batches: Any) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("name", TORCHS_OWN)
def test_forward_and_gradients_have_the_bits_of_the_model_alone(name: str) -> None:
    own = built(TORCHS_OWN[name])
    mb = bundle_of(copy.deepcopy(own))
    for x, y in data(2):
        mb.zero_grad()
        own.zero_grad()
        outputs, expected = mb(x), own(x)
        assert torch.equal(outputs, expected.unsqueeze(0))
        F.cross_entropy(outputs.squeeze(0), y).backward()
        F.cross_entropy(expected, y).backward()
        for (key, parameter), alone in zip(mb.named_parameters(), own.parameters()):
            if alone.grad is None:
                assert parameter.grad is None, key
            else:
                assert torch.equal(parameter.grad[0], alone.grad), key
    for (key, buffer), alone in zip(mb.named_buffers(), own.buffers()):
        assert torch.equal(buffer[0], alone), key


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BUILDS)
def test_training_equals_the_model_alone(name: str, training: bool) -> None:
    own = built(BUILDS[name]).train(training)
    mb = bundle_of(copy.deepcopy(own))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = torch.cat([mb.train_step(x, y) for x, y in data(6)])
    expected = torch.stack(train_alone(own, data(6)))
    assert (losses - expected).abs().max() <= TOLERANCE * expected.abs().max()
    for (key, stacked), alone in zip(mb.state_dict().items(), own.state_dict().values()):
        assert (stacked[0] - alone).abs().max() <= TOLERANCE * alone.abs().max().clamp(min=1), key


@pytest.mark.parametrize(
    ("kind", "hidden", "dtype", "path"),
    [
        (nn.GRU, 128, torch.float32, "modelbatch rule"),
        (nn.RNN, 128, torch.float32, "modelbatch rule"),
        (nn.LSTM, 64, torch.float32, "modelbatch rule"),
        (nn.LSTM, 65, torch.float32, "torch rule"),
        (nn.LSTM, 65, torch.float64, "modelbatch rule"),
        (nn.LSTM, 16, torch.bfloat16, "torch rule"),
    ],
)
def test_recurrent_layers_take_the_faster_way(
    kind: Any, hidden: int, dtype: torch.dtype, path: str
) -> None:
    mb = ModelBatch([kind(3, hidden).to(dtype)])
    report = mb.explain(torch.randn(4, 2, 3, dtype=dtype))
    names = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn_tanh"}
    (found,) = (op.path for op in report.operations if op.name == names[kind.__name__])
    assert found == path


@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_the_random_stream_is_that_of_the_seed(rng: str) -> None:
    """A model draws the same numbers in a bundle of one and among others, and nobody else's."""
    models = [built(lambda: smooth(0.5), seed) for seed in range(3)]
    several = bundle_of(*copy.deepcopy(models), seeds=[5, 6, 7], rng=rng)
    one = bundle_of(copy.deepcopy(models[1]), seeds=[6], rng=rng)
    before = torch.get_rng_state()
    for x, y in data(4):
        expected = several.train_step(x, y)[1]
        assert (one.train_step(x, y)[0] - expected).abs() <= TOLERANCE * expected.abs()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_resumed_training_has_the_same_bits(rng: str, tmp_path: Any) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 3))

    mb, later = (bundle_of(built(net, seed), rng=rng) for seed in (0, 1))
    batches = data(6)
    for x, y in batches[:3]:
        mb.train_step(x, y)
    mb.save_all(tmp_path)
    later.load_all(tmp_path)
    for x, y in batches[3:]:
        assert torch.equal(later.train_step(x, y), mb.train_step(x, y))
    for key, tensor in mb.state_dict().items():
        assert torch.equal(later.state_dict()[key], tensor), key


class Remembers(nn.Module):
    """Keeps its last hidden state, a count and a buffer that it makes in the first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(12, 4), nn.Linear(4, 3)
        self.register_buffer("first", None)
        self.last = torch.zeros(8, 4, dtype=torch.float64)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.first is None:
            self.first = x.mean(0)
        h = torch.tanh(self.linear(x - self.first)) + 0.5 * self.last
        self.last = h.detach()
        self.calls += 1
        return self.head(h)


def test_what_a_forward_keeps_follows_when_models_come_and_go() -> None:
    batches = data(8)
    own = [built(Remembers, seed) for seed in range(3)]
    for model in own[1:]:  # as the first one is when they join it
        model.first = batches[0][0].mean(0)
        model.calls = 2
    fresh = [copy.deepcopy(model) for model in own]
    mb = bundle_of(fresh[0])
    for x, y in batches[:2]:
        mb.train_step(x, y)
    mb.append(fresh[1:], lr=0.05)
    for x, y in batches[2:5]:
        mb.train_step(x, y)
    mb.prune([0, 2])
    for x, y in batches[5:]:
        mb.train_step(x, y)
    train_alone(own[0], batches[:5])
    train_alone(own[1], batches[2:])
    train_alone(own[2], batches[2:5])
    assert [model.calls for model in fresh] == [model.calls for model in own] == [5, 8, 5]
    for model, alone in zip(fresh, own):
        states = model.state_dict(), alone.state_dict()
        assert states[0].keys() == states[1].keys() and "first" in states[0]
        for key in states[0]:
            difference = (states[0][key] - states[1][key]).abs().max()
            assert difference <= TOLERANCE * states[1][key].abs().max(), key
        assert (model.last - alone.last).abs().max() <= TOLERANCE * alone.last.abs().max()


def test_a_buffer_that_the_forward_makes_belongs_to_the_bundle() -> None:
    mb = bundle_of(built(Remembers))
    x, y = data(1)[0]
    with pytest.raises(ModelBatchError, match="the loss of model 0 failed"):
        mb.train_step(x, y[:3])
    assert mb.models[0].first is None  # as if it had not been tried
    assert "first" not in mb.state_dict()
    mb.train_step(x, y)
    assert torch.equal(mb.state_dict()["first"], x.mean(0).unsqueeze(0))
    assert mb.models[0].first.data_ptr() == mb.state_dict()["first"].data_ptr()


@pytest.mark.parametrize("count", [1, 3])
def test_explain_changes_nothing(count: int) -> None:
    models = [built(Remembers, seed) for seed in range(count)]
    mb = bundle_of(*models)
    report = mb.explain(data(1)[0][0])
    assert report.fallbacks == []
    assert {operation.name for operation in report.operations} >= {"linear", "tanh"}
    assert [model.calls for model in models] == [0] * count
    assert all(model.first is None and not model.last.any() for model in models)
    assert "first" not in mb.state_dict()


class ReachesAround(nn.Module):
    """Uses its weight by a reference outside of the module's attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3)
        self.references = (self.linear.weight,)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(x, self.references[0])


def test_a_reference_around_the_attribute_is_refused() -> None:
    mb = bundle_of(built(ReachesAround))
    x, y = data(1)[0]
    with pytest.raises(Refused, match=r"'linear.weight' of model 0 .* gradient would be lost"):
        mb.train_step(x, y)


class ReachesAroundAndBranches(ReachesAround):
    def forward(self, x: Tensor) -> Tensor:
        if self.linear(x).sum().item() > 0:
            return self.linear(x)
        return super().forward(x)


def test_a_reference_around_the_attribute_is_refused_where_models_run_one_by_one() -> None:
    models = [built(ReachesAroundAndBranches, seed) for seed in range(6)]
    with pytest.raises(Refused, match="gradient would be lost"):
        bundle_of(*models, fallback="silent")(data(1)[0][0])


def test_loss_that_is_not_finite() -> None:
    mb = bundle_of(built(smooth))
    outputs = mb(data(1)[0][0])

    def infinite(outputs: Tensor, target: Tensor) -> Tensor:
        return outputs.sum() * torch.inf

    for reduction, shown in (("mean", torch.nan), ("sum", 0.0)):
        total = mb.compute_loss(outputs, torch.zeros(8), infinite, reduction=reduction)
        torch.testing.assert_close(total, torch.tensor(shown).double(), equal_nan=True)
    assert mb.latest_losses is not None and mb.latest_losses.isinf().all()


def test_a_frozen_model_rests() -> None:
    mb = bundle_of(built(lambda: nn.Sequential(nn.Linear(12, 3), nn.BatchNorm1d(3))))
    x, y = data(1)[0]
    before = {key: tensor.clone() for key, tensor in mb.state_dict().items()}
    mb.freeze(0)
    mb.train_step(x, y)
    assert all(torch.equal(before[key], tensor) for key, tensor in mb.state_dict().items())
    mb.unfreeze(0)
    mb.train_step(x, y)
    assert not torch.equal(before["0.weight"], mb.state_dict()["0.weight"])
