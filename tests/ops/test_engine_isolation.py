"""What a model's numbers depend on in `train_steps_`: on nothing but its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_networks import Drop, Loss, Network, Residual, Training
from torch import nn

from modelbatch._extension import built_isas, isa


def everything(i, dtype):
    """A model with a layer of nearly every kind."""
    torch.manual_seed(i)
    return nn.Sequential(
        nn.Linear(5, 19), nn.BatchNorm1d(19, momentum=0.1 * (1 + i % 3)), nn.ReLU(),
        Residual(nn.LayerNorm(19), nn.Linear(19, 19), nn.GELU(), Drop(0.1 * (i % 4), 0)),
        nn.Linear(19, 3),
    ).to(dtype)  # fmt: skip


def bundle(numbers, dtype=torch.float32, steps=3, batch=21, **kwargs):
    """A training of the models with these numbers, whatever else is in the bundle."""
    network = Network([everything(i, dtype) for i in numbers], Loss("cross_entropy"), (1, 5))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(steps, batch, 5, generator=generator).to(dtype)
    y = torch.randint(3, (steps, batch), generator=generator)
    kwargs.setdefault("optimizer", torch.optim.Adam)
    kwargs.setdefault("options", [{"lr": 0.01 * (1 + i % 5)} for i in numbers])
    return Training(network, x, y, seeds=[7 + i for i in numbers], **kwargs)


def same(a, b):
    """Equal bits."""
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def slices(training, m):
    return [tensor[m].clone() for tensor in training.everything()]


def assert_same(training, m, other, n):
    for a, b in zip(slices(training, m), slices(other, n), strict=True):
        assert same(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [2, 33, 256])
def test_number_of_models_and_slots(count, dtype):
    numbers = list(range(count))
    training = bundle(numbers, dtype)
    losses, _, norms = training.run(grad_norm=True)
    backwards = bundle(numbers[::-1], dtype)
    backwards.run(grad_norm=True)
    for m in {0, 1, count // 2, count - 1}:
        alone = bundle([m], dtype)
        loss, _, norm = alone.run(grad_norm=True)
        assert same(loss[:, 0], losses[:, m]) and same(norm[:, 0], norms[:, m])
        assert_same(training, m, alone, 0)
        assert_same(training, m, backwards, count - 1 - m)


def test_threads():
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            training = bundle(range(40))
            results.append((training, training.run()[0]))
    finally:
        torch.set_num_threads(before)
    for training, losses in results[1:]:
        assert same(losses, results[0][1])
        for m in range(40):
            assert_same(training, m, results[0][0], m)


@pytest.mark.parametrize("kwargs", [{}, {"clip_norm": [0.1] * 4}, {"active": [True, False] * 2}])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_steps_in_a_row_are_single_steps(kwargs, optimizer):
    once = bundle(range(4), steps=6, optimizer=optimizer, **kwargs)
    single = bundle(range(4), steps=6, optimizer=optimizer, **kwargs)
    losses, status, norms = once.run(grad_norm=True)
    parts = [single.run(k, k + 1, grad_norm=True) for k in range(6)]
    for whole, part in zip((losses, status, norms), zip(*parts, strict=True), strict=True):
        assert same(whole, torch.cat(part))
    for m in range(4):
        assert_same(once, m, single, m)


def test_kept_gradients_give_the_same_update():
    plain, kept = bundle(range(3)), bundle(range(3))
    plain.run()
    kept.run(grad_norm=True)
    for m in range(3):
        assert_same(plain, m, kept, m)


# ---- models that rest


@pytest.mark.parametrize("grad_norm", [False, True])
def test_frozen_models_keep_every_bit(grad_norm):
    active = [True, False, True, False]
    training = bundle(range(4), active=active)
    before = [slices(training, m) for m in range(4)]
    losses, status, norms = training.run(grad_norm=grad_norm)
    for m in (1, 3):
        assert all(same(a, b) for a, b in zip(before[m], slices(training, m), strict=True))
    assert status[:, 1::2].eq(8).all() and status[:, ::2].eq(0).all()
    assert losses.isfinite().all()
    if grad_norm:
        assert norms[:, 1::2].eq(0).all() and norms[:, ::2].gt(0).all()
    others = bundle(range(4))
    others.run()
    for m in (0, 2):
        assert_same(training, m, others, m)
    want, _ = training.reference()
    torch.testing.assert_close(losses[0].double(), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses[:, 1::2].double(), want[:, 1::2], rtol=1e-5, atol=1e-5)


def test_a_model_without_samples_rests():
    training = bundle(range(3), steps=4)
    training.weight = torch.ones(4, 3, 21)
    training.weight[1, 1] = 0.0
    losses, status, _ = training.run()
    assert status[1].tolist() == [0, 8, 0] and losses[1, 1] == 0.0
    shorter = bundle(range(3), steps=4)
    shorter.x, shorter.y = training.x[[0, 2, 3]], training.y[[0, 2, 3]]
    shorter.K = 3
    shorter.weight = torch.ones(3, 3, 21)
    shorter.run()
    assert_same(training, 1, shorter, 1)


@pytest.mark.parametrize("own", [False, True])
def test_samples_of_weight_zero_reach_nothing(own):
    trained = []
    for poison in (0.5, float("nan"), float("inf")):
        training = bundle(range(3), own_x=own, own_y=own)
        if own:
            training.x = training.x.unsqueeze(1).repeat(1, 3, 1, 1)
            training.y = training.y.unsqueeze(1).repeat(1, 3, 1)
        training.weight = torch.ones(3, 3, 21)
        training.weight[:, :, 4] = 0.0
        training.x[..., 4, :] = poison
        if poison != 0.5:
            training.y[..., 4] = 1000
        losses, status, _ = training.run()
        assert losses.isfinite().all() and status.eq(0).all()
        trained.append(training)
    for other in trained[1:]:
        for a, b in zip(trained[0].everything(), other.everything(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ---- numbers that are not finite


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", range(3))
@pytest.mark.parametrize("grad_norm", [False, True])
def test_a_bad_model_stays_alone(bad, where, grad_norm):
    clean, training = bundle(range(3)), bundle(range(3))
    training.params[0][where, 0, 0] = bad
    clean_losses, _, _ = clean.run(grad_norm=grad_norm)
    losses, status, _ = training.run(grad_norm=grad_norm)
    for m in range(3):
        if m != where:
            assert_same(clean, m, training, m)
            assert same(clean_losses[:, m], losses[:, m])
            assert status[:, m].eq(0).all()
    assert status[:, where].bitwise_and(4).ne(0).all()


def test_a_stopped_model_is_as_if_frozen():
    training = bundle(range(3), steps=5, stop=True)
    training.x[2, 3, 1] = float("inf")
    _, status, norms = training.run(grad_norm=True)
    assert status[:2].eq(0).all() and status[2].bitwise_and(1 | 2 | 4).eq(7).all()
    assert status[3:].bitwise_and(8).eq(8).all() and norms[3:].eq(0).all()
    until = bundle(range(3), steps=5)
    until.x = training.x
    until.run(0, 3)
    for m in range(3):
        assert_same(training, m, until, m)


def test_status_names_what_is_not_finite():
    network = Network(
        [nn.Sequential(nn.Linear(1, 1, bias=False)) for _ in range(3)], Loss("l1"), (1, 1)
    )
    training = Training(network, torch.ones(1, 2, 1), torch.zeros(1, 2, 1))
    training.params[0][:, 0, 0] = torch.tensor([1.0, float("inf"), 1.0])
    training.hyper[0, 2] = float("inf")
    _, status, _ = training.run()
    assert status.tolist() == [[0, 1 | 4, 4]]
    for grad_norm in (False, True):
        training = Training(network, torch.ones(1, 2, 1), torch.zeros(1, 2, 1))
        training.x[0, 0, 0] = float("nan")
        _, status, _ = training.run(grad_norm=grad_norm)
        assert status.eq(1 | 2 | 4).all()


def test_a_lane_beyond_the_batch_reaches_no_sum():
    """An infinite weight makes NaN of the zeros there, and plain numbers of the samples."""
    for build in (lambda: [nn.Linear(1, 2)], lambda: [nn.Linear(1, 2), nn.LayerNorm(2)]):
        torch.manual_seed(0)
        model = nn.Sequential(*build(), nn.Linear(2, 1)).double()
        with torch.no_grad():
            model[0].weight[0] = float("inf")
        network = Network([model], Loss("mse"), (1, 1))
        training = Training(network, torch.ones(1, 3, 1).double(), torch.zeros(1, 3, 1).double())
        training.run()
        training.reference()
        for name, stacked in zip(network.names, training.params, strict=True):
            assert torch.equal(stacked[0].isnan(), training.trained[0].state_dict()[name].isnan())


# ---- instruction sets

_RUN = """
import sys
sys.path.insert(0, {folder!r})
from engine_networks import *
sys.path.insert(0, {here!r})
from test_engine_isolation import bundle
import torch
for dtype in (torch.float32, torch.float64):
    for batch in (1 + 1, 3, 8, 33):
        options = {{"optimizer": torch.optim.SGD, "batch": batch}}
        training = bundle(range(3), dtype, **options)
        training.run()
        wide = bundle(range(3), torch.float64, **options)
        wide.reference()
        tolerance = 1e-11 if dtype == torch.float64 else 2e-4
        for name, stacked in zip(wide.network.names, training.params, strict=True):
            for model, values in zip(wide.trained, stacked, strict=True):
                torch.testing.assert_close(
                    values.double(), model.state_dict()[name], rtol=0, atol=tolerance
                )
print("equal")
"""


@pytest.mark.parametrize("name", [n for n in built_isas() if n != isa()])
def test_other_instruction_sets(name):
    here = Path(__file__).parent
    root = here.parent.parent
    code = _RUN.format(folder=str(here.parent), here=str(here))
    environment = {**os.environ, "MODELBATCH_ISA": name, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    if "this machine" in done.stderr or "the best it supports" in done.stderr:
        pytest.skip(f"this machine has no {name}")
    assert done.stdout.strip() == "equal", done.stderr
