"""torch's own GradScaler, with one scale for all models: who overflows skips alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from scaling_case import (
    INF,
    KINDS,
    OVERFLOWS,
    RATES,
    M,
    error,
    make_batches,
    make_bundle,
    make_models,
    train,
)

OTHERS = [0, 2, 3]


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request):
    return request.param


@pytest.fixture(params=[None, 1e9], ids=["", "unscaled_and_clipped"])
def clip(request):
    """No norm reaches it: unscaling before the step is what it brings."""
    return request.param


def stock(scale=1024.0):
    return torch.amp.GradScaler("cpu", scale)


def test_only_the_overflowing_models_skip(kind, clip):
    batches = make_batches(14, overflows=OVERFLOWS)
    bundle = make_bundle(kind)
    scales = train(bundle, stock(), batches, clip)
    halvings = [step for step in range(14) if any(at == step for at, _ in OVERFLOWS)]
    assert scales == [1024.0 / 2 ** sum(at <= step for at in halvings) for step in range(14)]
    for i, model in enumerate(make_models()):
        optimizer = kind[0](model.parameters(), lr=RATES[i], **kind[1])
        for step, (x, y) in enumerate(batches):
            if (step, i) not in OVERFLOWS:
                optimizer.zero_grad()
                F.mse_loss(model(x[i]), y[i]).backward()
                optimizer.step()
        assert error(bundle[i], model) <= 1e-12


def test_the_others_keep_their_bits(kind, clip):
    """A scale is a power of two here, so that dividing by another one rounds nothing."""
    clean, bundle = make_bundle(kind), make_bundle(kind)
    train(clean, stock(), make_batches(9), clip)
    train(bundle, stock(), make_batches(9, overflows=[(2, 1), (5, 1)]), clip)
    assert not torch.equal(bundle[1][0].weight, clean[1][0].weight)
    for i in OTHERS:
        for p, q in zip(bundle[i].parameters(), clean[i].parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_a_diverged_model_lowers_the_scale_once(kind, clip, bad):
    clean, bundle, scaler = make_bundle(kind), make_bundle(kind), stock()
    train(clean, stock(), make_batches(8), clip)
    healthy = bundle[1][2].weight.detach().clone()
    with torch.no_grad():
        bundle[1][2].weight.fill_(bad)
    assert train(bundle, scaler, make_batches(8), clip) == [512.0] * 8
    for i in OTHERS:
        for p, q in zip(bundle[i].parameters(), clean[i].parameters(), strict=True):
            assert torch.equal(p, q)
    # and it trains on when somebody has put it right
    with torch.no_grad():
        bundle[1][2].weight.copy_(healthy)
    assert train(bundle, scaler, make_batches(3), clip) == [512.0] * 3
    assert not torch.equal(bundle[1][2].weight, healthy)
    assert torch.isfinite(bundle[1][2].weight).all()


def test_a_diverged_model_in_the_middle_of_training_is_as_it_was_alone(kind):
    """Found again, it makes its very next step, with the step count it had."""
    batches = make_batches(10)
    bundle, scaler = make_bundle(kind), stock()
    train(bundle, scaler, batches[:3])
    kept = bundle[1][0].bias.detach().clone()
    with torch.no_grad():
        bundle[1][0].bias.fill_(math.nan)
    train(bundle, scaler, batches[3:6])
    with torch.no_grad():
        bundle[1][0].bias.copy_(kept)
    train(bundle, scaler, batches[6:])
    model = make_models()[1]
    optimizer = kind[0](model.parameters(), lr=RATES[1], **kind[1])
    for x, y in batches[:3] + batches[6:]:
        optimizer.zero_grad()
        F.mse_loss(model(x[1]), y[1]).backward()
        optimizer.step()
    assert error(bundle[1], model) <= 1e-12


def test_data_that_overflow_whatever_the_scale(kind):
    """Below 1 a scale is not what makes a model overflow."""
    batches = make_batches(16, overflows=[(step, 1) for step in range(12)])
    bundle, scaler = make_bundle(kind), stock(8.0)
    scales = train(bundle, scaler, batches[:12])
    assert scales[-1] == scales[5] >= 0.25
    clean = make_bundle(kind)
    train(clean, stock(8.0), batches)
    before = bundle[1][0].weight.detach().clone()
    train(bundle, scaler, batches[12:])
    assert not torch.equal(bundle[1][0].weight, before)
    assert torch.equal(bundle[2][0].weight, clean[2][0].weight)


def test_a_frozen_model_does_not_count(kind, clip):
    bundle = make_bundle(kind)
    bundle.freeze(1)
    before = [param.detach().clone() for param in bundle[1].parameters()]
    batches = make_batches(5, overflows=[(step, 1) for step in range(5)])
    assert train(bundle, stock(), batches, clip) == [1024.0] * 5
    for param, old in zip(bundle[1].parameters(), before):
        assert torch.equal(param, old)


def test_all_overflow(kind):
    bundle = make_bundle(kind)
    before = [param.detach().clone() for param in bundle.parameters()]
    train(bundle, stock(), make_batches(1, overflows=[(0, i) for i in range(M)]))
    for param, old in zip(bundle.parameters(), before):
        assert torch.equal(param, old)
