"""The cross entropy of stacked models against torch's for each model alone."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from modelbatch import ModelBatch, ModelBatchError
from modelbatch._extension import built_isas, isa
from modelbatch.ops.loss import cross_entropy

NUM_MODELS = 3
# Rows around the 64 that a kernel takes at once; classes around the lengths of vectors.
SIZES = [(1, 1), (5, 4), (32, 2), (63, 10), (64, 17), (65, 33), (200, 3), (7, 1000)]


def make(batch, classes, dtype, per_model, ignore_index=None, scale=3.0):
    generator = torch.Generator().manual_seed(0)
    sizes = (NUM_MODELS, batch, classes)
    logits = (scale * torch.randn(sizes, generator=generator, dtype=torch.float64)).to(dtype)
    shape = (NUM_MODELS, batch) if per_model else (batch,)
    target = torch.randint(classes, shape, generator=generator)
    if ignore_index is not None:
        target[..., ::3] = ignore_index
        target[..., -1] = 0
    return logits.requires_grad_(), target


def alone(logits, target, ignore_index=-100):
    targets = target.expand(logits.shape[:2])
    return torch.stack(
        [F.cross_entropy(z, t, ignore_index=ignore_index) for z, t in zip(logits, targets)]
    )


def error(values, exact):
    return float((values.double() - exact).detach().abs().max())


@pytest.mark.parametrize("ignore_index", [None, -100, 1])
@pytest.mark.parametrize("per_model", [False, True])
@pytest.mark.parametrize(("batch", "classes"), SIZES)
def test_equals_torch(batch, classes, per_model, ignore_index):
    if classes == 1 and ignore_index == 1:
        pytest.skip("the class to ignore does not exist")
    index = -100 if ignore_index is None else ignore_index
    for dtype in (torch.float64, torch.float32):
        logits, target = make(batch, classes, dtype, per_model, ignore_index)
        exact_logits = logits.detach().double().requires_grad_()
        exact = alone(exact_logits, target, index)
        weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
        (exact_grad,) = torch.autograd.grad((exact * weights).sum(), exact_logits)
        reference = alone(logits, target, index)
        (reference_grad,) = torch.autograd.grad((reference * weights).sum(), logits)
        losses = cross_entropy(logits, target, index)
        (grad,) = torch.autograd.grad((losses * weights).sum(), logits)
        assert losses.shape == (NUM_MODELS,)
        for ours, theirs, truth in (
            (losses, reference, exact),
            (grad, reference_grad, exact_grad),
        ):
            # Twice torch's own error and a few roundings; in float64, where torch is the truth,
            # a rounding for every sample that is added up.
            roundings = 4 if dtype == torch.float32 else 4 + batch
            bound = roundings * torch.finfo(dtype).eps * float(truth.detach().abs().max())
            assert error(ours, truth) <= 2 * error(theirs, truth) + bound
        with torch.no_grad():
            assert torch.equal(cross_entropy(logits, target, index), losses)


def test_strided_logits():
    logits, target = make(8, 5, torch.float64, False)
    transposed = logits.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert not transposed.is_contiguous()
    assert torch.equal(cross_entropy(transposed, target), cross_entropy(logits, target))


@pytest.mark.parametrize("scale", [1e-6, 30.0, 1000.0])
def test_extreme_logits(scale):
    logits, target = make(40, 6, torch.float32, False, scale=scale)
    exact = alone(logits.double(), target)
    theirs = alone(logits, target)
    losses = cross_entropy(logits, target)
    rounding = torch.finfo(torch.float32).eps * float(exact.detach().max())
    bound = 2 * error(theirs, exact) + 4 * rounding
    assert error(losses, exact) <= bound


def test_models_do_not_touch_each_other():
    logits, target = make(70, 9, torch.float32, False)
    losses = cross_entropy(logits, target)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    bad = logits.detach().clone()
    bad[1, 3, 2] = float("nan")
    bad[2, 0, 0] = float("inf")
    bad.requires_grad_()
    spoilt = cross_entropy(bad, target)
    (spoilt_grad,) = torch.autograd.grad(spoilt.sum(), bad)
    assert torch.equal(spoilt[0], losses[0])
    assert torch.equal(spoilt_grad[0], grad[0])
    assert spoilt[1:].isnan().all()
    for i in range(NUM_MODELS):
        assert torch.equal(cross_entropy(logits[i : i + 1], target)[0], losses[i])


def test_nothing_counts():
    logits, _ = make(4, 3, torch.float32, False)
    target = torch.tensor([[0, 1, 2, 0], [-100] * 4, [1, 1, 1, -100]])
    losses = cross_entropy(logits, target)
    assert losses.isnan().tolist() == [False, True, False]
    assert cross_entropy(torch.zeros(2, 0, 3), torch.zeros(0, dtype=torch.int64)).isnan().all()
    assert cross_entropy(torch.zeros(0, 4, 3), target[0]).shape == (0,)


def test_derivatives():
    logits, target = make(5, 4, torch.float64, True, ignore_index=-100)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, target), logits)
    assert torch.autograd.gradgradcheck(lambda z: cross_entropy(z, target), logits)


def test_opcheck():
    op = torch.ops.modelbatch.cross_entropy.default
    for need_slope in (False, True):
        logits, target = make(5, 4, torch.float32, True)
        torch.library.opcheck(op, (logits.detach(), target, -100, need_slope))


def test_threads_do_not_matter():
    logits = torch.randn(16, 100, 40)
    target = torch.randint(40, (100,))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cross_entropy(logits, target)
        torch.set_num_threads(3)
        assert torch.equal(cross_entropy(logits, target), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), r"shape \[M, B, C\]"),
        (torch.zeros(2, 3, 0), torch.zeros(3, dtype=torch.int64), "at least one class"),
        (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64), r"got \[2\]"),
        (torch.zeros(2, 3, 4), torch.zeros(3), "int64"),
        (torch.zeros(2, 3, 4).half(), torch.zeros(3, dtype=torch.int64), "float32 or float64"),
        (torch.zeros(2, 3, 4), torch.tensor([0, 4, 1]), "target 4 of sample 1 is not one of the 4"),
        (torch.zeros(2, 3, 4), torch.tensor([[0, 1, 1], [0, 1, -1]]), "sample 2 of model 1"),
    ],
)
def test_refusals(logits, target, message):
    with pytest.raises(RuntimeError, match=message):
        cross_entropy(logits, target)


def losses_of_some_models():
    logits, target = make(70, 10, torch.float32, True)
    return cross_entropy(logits, target).tolist()


@pytest.mark.parametrize("name", built_isas())
def test_every_instruction_set(name):
    order = built_isas()
    if order.index(name) > order.index(isa()):
        pytest.skip(f"this machine has no {name}")
    code = "import test_loss; print(test_loss.isa(), *test_loss.losses_of_some_models())"
    line = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MODELBATCH_ISA": name, "PYTHONPATH": os.path.dirname(__file__)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    logits, target = make(70, 10, torch.float64, True)
    exact = alone(logits, target)
    values = torch.tensor([float(word) for word in line[1:]], dtype=torch.float64)
    assert line[0] == name
    assert error(values, exact) <= 1e-6 * float(exact.detach().max())


# ---- in a bundle


def test_a_bundle_uses_it_and_names_a_bad_target():
    torch.manual_seed(0)
    mb = ModelBatch([torch.nn.Linear(4, 3) for _ in range(NUM_MODELS)])
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, -100])
    for loss_fn in (F.cross_entropy, torch.nn.CrossEntropyLoss()):
        losses = mb.compute_loss(mb(x), y, loss_fn, reduction="none")
        assert type(losses.grad_fn).__name__ == "_CrossEntropyBackward"
        expected = torch.stack([F.cross_entropy(model(x), y) for model in mb.models])
        torch.testing.assert_close(losses, expected)
    with pytest.raises((ModelBatchError, IndexError)):
        mb.compute_loss(mb(x), y + 7)


def test_a_loss_with_options_goes_the_general_way():
    torch.manual_seed(0)
    mb = ModelBatch([torch.nn.Linear(4, 3) for _ in range(NUM_MODELS)])
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    loss_fn = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    losses = mb.compute_loss(mb(x), y, loss_fn, reduction="none")
    expected = torch.stack([loss_fn(model(x), y) for model in mb.models])
    torch.testing.assert_close(losses, expected)
