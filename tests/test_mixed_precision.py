"""`train_step(amp_dtype=...)`: autocast and scaled gradients in one call."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modelbatch import BundleGradScaler, ModelBatch, ModelBatchError, OptimizerFactory

M = 3


def models():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)) for _ in range(M)]


def batches(count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)


def vector(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def train_alone(nets, dtype, rates, steps):
    """Each model under autocast with its own scaler, and in float64 without either."""
    for model, rate in zip(nets, rates, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        wide = next(model.parameters()).dtype == torch.float64
        scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16 and not wide)
        for x, y in batches(steps):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=not wide):
                loss = F.cross_entropy(model(x.double() if wide else x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_alone_to_the_precision_of_the_dtype(dtype):
    rates = [0.05, 0.1, 0.2]
    alone, exact = models(), [m.double() for m in models()]
    mb = ModelBatch(models(), rates, torch.optim.SGD)
    for x, y in batches(8):
        losses = mb.train_step(x, y, amp_dtype=dtype)
        assert losses.dtype == torch.float32
    train_alone(alone, dtype, rates, 8)
    train_alone(exact, dtype, rates, 8)
    assert (mb.grad_scaler is not None) == (dtype == torch.float16)
    for ours, theirs, truth in zip(mb.models, alone, exact, strict=True):
        torchs = (vector(theirs) - vector(truth)).abs().max()
        rounding = torch.finfo(torch.float32).eps * vector(truth).abs().max()
        assert (vector(ours) - vector(truth)).abs().max() <= 2 * torchs + rounding


def test_float16_makes_a_scaler_and_keeps_it():
    mb = ModelBatch(models(), [0.1] * M, torch.optim.Adam)
    for x, y in batches(2):
        mb.train_step(x, y, amp_dtype=torch.float16)
        scaler = mb.grad_scaler
        assert isinstance(scaler, BundleGradScaler)
    assert mb.grad_scaler is scaler
    assert len(scaler.get_scale()) == M


@pytest.mark.parametrize("kind", [BundleGradScaler, lambda: torch.amp.GradScaler("cpu")])
def test_a_given_scaler_is_used(kind):
    scaler = kind()
    mb = ModelBatch(models())
    OptimizerFactory(torch.optim.SGD, {"lr": 0.1}, grad_scaler=scaler).create_optimizer(mb)
    twin = ModelBatch(models(), [0.1] * M, torch.optim.SGD)
    twin.enable_engine(False)  # it takes no scaler, and rounds differently
    for x, y in batches(3):
        mb.train_step(x, y)
        twin.train_step(x, y)
    assert mb.grad_scaler is scaler
    # Scales are powers of two: nothing is rounded differently.
    for a, b in zip(mb.models, twin.models, strict=True):
        assert torch.equal(vector(a), vector(b))


@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.Adafactor])
def test_gradient_norms_are_without_the_scale(optimizer_cls):
    norms = []
    for scaler in (None, BundleGradScaler(init_scale=1024.0)):
        mb = ModelBatch(models())
        OptimizerFactory(optimizer_cls, {"lr": 0.1}, grad_scaler=scaler).create_optimizer(mb)
        mb.enable_engine(False)  # it takes no scaler, and rounds differently
        mb.train_step(*next(batches(1)))
        norms.append([mb.metrics()[f"grad_norm_model_{i}"] for i in range(M)])
    assert norms[0] == norms[1]


def test_one_overflow_skips_one_model():
    class Spoils(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)
            self.spoil = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.linear(x) + self.spoil * 1e38 * 1e3

    torch.manual_seed(0)
    nets = [Spoils() for _ in range(M)]
    clean = copy.deepcopy(nets)
    with torch.no_grad():
        nets[1].spoil.fill_(1.0)
    runs = []
    for group in (nets, clean):
        mb = ModelBatch(group)
        factory = OptimizerFactory(
            torch.optim.Adam, {"lr": 0.1}, grad_scaler=BundleGradScaler(init_scale=8.0)
        )
        factory.create_optimizer(mb)
        before = vector(mb.models[1].linear).clone()
        for x, y in batches(3):
            mb.train_step(x, y)
        runs.append((mb, before))
    (spoilt, before), (good, _) = runs
    assert torch.equal(vector(spoilt.models[1].linear), before)
    for i in (0, 2):
        assert torch.equal(vector(spoilt.models[i].linear), vector(good.models[i].linear))
    assert spoilt.grad_scaler.get_scale() == [8.0, 1.0, 8.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, "bfloat16"])
def test_other_dtypes_are_refused(dtype):
    mb = ModelBatch(models(), [0.1] * M, torch.optim.SGD)
    before = vector(mb.models[0]).clone()
    with pytest.raises(ModelBatchError, match="amp_dtype"):
        mb.train_step(*next(batches(1)), amp_dtype=dtype)
    assert torch.equal(vector(mb.models[0]), before)


def test_lbfgs_cannot_scale():
    mb = ModelBatch(models(), [0.1] * M, torch.optim.LBFGS)
    with pytest.raises(ModelBatchError, match="LBFGS"):
        mb.train_step(*next(batches(1)), amp_dtype=torch.float16)
