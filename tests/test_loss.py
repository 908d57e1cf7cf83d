"""The loss: own gradient for each model, readable mean, weights, any callable."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bundle_case import assert_relative, gradients
from torch import Tensor, nn

import modelbatch
from modelbatch import FallbackWarning, ModelBatch, ModelBatchError


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


@pytest.fixture
def models() -> list[nn.Module]:
    torch.manual_seed(0)
    return [net() for _ in range(3)]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))


def custom(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.softmax(1) - F.one_hot(targets, 3)).square().sum(1).mean()


ignoring = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
LOSSES: dict[str, Any] = {
    "function": F.cross_entropy,
    "module": nn.CrossEntropyLoss(),
    "class weights": nn.CrossEntropyLoss(weight=ignoring, label_smoothing=0.1),
    "ignored class": nn.CrossEntropyLoss(ignore_index=1),
    "margin": nn.MultiMarginLoss(),
    "custom": custom,
    "lambda": lambda o, t: F.nll_loss(o.log_softmax(1), t),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own_targets"])
def test_any_loss_equals_alone(name: str, own: bool, models: Any, batch: Any) -> None:
    x, y = batch
    bundle = ModelBatch(copy.deepcopy(models))
    targets = torch.stack([y.roll(i) for i in range(3)]) if own else y
    given = modelbatch.per_model(targets) if own else targets
    loss = bundle.compute_loss(bundle(x), given, LOSSES[name])
    loss.backward()
    losses = []
    for i, model in enumerate(models):
        losses.append(LOSSES[name](model(x), targets[i] if own else y))
        losses[-1].backward()
        assert_relative(bundle.gradients(i), gradients(model), 1e-10, name)
    assert_relative(bundle.latest_losses, torch.stack(losses), 1e-12)
    assert_relative(loss, torch.stack(losses).mean(), 1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own_masks"])
def test_a_mask_equals_training_on_the_models_own_samples(
    name: str, own: bool, models: Any, batch: Any
) -> None:
    if name == "class weights":
        LOSSES[name].label_smoothing = 0.0  # smoothing spreads a sample over all class weights
    x, y = batch
    mask = torch.rand(3, 8) > 0.4
    bundle = ModelBatch(copy.deepcopy(models))
    weight = mask if own else mask[0]
    bundle.compute_loss(bundle(x), y, LOSSES[name], sample_weight=weight).backward()
    for i, model in enumerate(models):
        keep = mask[i] if own else mask[0]
        loss = LOSSES[name](model(x)[keep], y[keep])
        loss.backward()
        assert_relative(bundle.latest_losses[i], loss, 1e-12)
        assert_relative(bundle.gradients(i), gradients(model), 1e-10, name)


def test_fractional_weights_and_models_without_samples(models: Any, batch: Any) -> None:
    x, y = batch
    weight = torch.rand(3, 8, dtype=torch.float64)
    weight[1] = 0
    bundle = ModelBatch(copy.deepcopy(models))
    bundle.compute_loss(bundle(x), y, sample_weight=weight).backward()
    each = F.cross_entropy(models[0](x), y, reduction="none")
    expected = (each * weight[0]).sum() / weight[0].sum()
    assert_relative(bundle.latest_losses[0], expected, 1e-12)
    assert bundle.latest_losses[1] == 0
    assert not any(g.any() for g in bundle.gradients(1).values())


def test_a_masked_sample_may_be_nan(models: Any, batch: Any) -> None:
    x, y = batch
    bundle = ModelBatch(copy.deepcopy(models), shared_input=False)
    own = x.expand(3, 8, 4).clone()
    own[1, 3] = float("nan")
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[1, 3] = False
    bundle.compute_loss(bundle(own), modelbatch.shared(y), sample_weight=mask)
    keep = mask[1]
    assert_relative(bundle.latest_losses[1], F.cross_entropy(models[1](x[keep]), y[keep]), 1e-12)


def test_reductions(models: Any, batch: Any) -> None:
    x, y = batch
    bundle = ModelBatch(models)
    out = bundle(x)
    losses = bundle.compute_loss(out, y, reduction="none")
    assert losses.shape == (3,) and losses.requires_grad
    assert_relative(bundle.compute_loss(out, y, reduction="sum"), losses.sum(), 1e-12)
    assert_relative(bundle.compute_loss(out, y), losses.mean(), 1e-12)
    grads = []
    for reduction in ("mean", "sum"):
        bundle.zero_grad()
        bundle.compute_loss(bundle(x), y, reduction=reduction).backward()
        grads.append({k: v.clone() for k, v in gradients(bundle).items()})
    assert_relative(grads[0], grads[1], 0.0)


def test_the_mean_is_over_active_finite_models(models: Any, batch: Any) -> None:
    x, y = batch
    bundle = ModelBatch(models)
    healthy = bundle.compute_loss(bundle(x), y, reduction="none").detach()
    with torch.no_grad():
        bundle[1][0].weight.fill_(float("inf"))
    loss = bundle.compute_loss(bundle(x), y)
    assert not torch.isfinite(bundle.latest_losses[1])
    assert_relative(loss, healthy[[0, 2]].mean(), 1e-12)
    bundle.freeze(0)
    assert_relative(bundle.compute_loss(bundle(x), y), healthy[2], 1e-12)
    bundle.freeze(2)
    assert torch.isnan(bundle.compute_loss(bundle(x), y))
    assert bundle.metrics()["best_model"] == -1.0


def test_gradient_accumulation_and_scaling(models: Any, batch: Any) -> None:
    """A scaled loss scales every model's own gradient, as GradScaler relies on."""
    x, y = batch
    bundle = ModelBatch(copy.deepcopy(models))
    (8 * bundle.compute_loss(bundle(x), y)).backward()
    (bundle.compute_loss(bundle(x), y) / 2).backward()
    for i, model in enumerate(models):
        (8.5 * F.cross_entropy(model(x), y)).backward()
        assert_relative(bundle.gradients(i), gradients(model), 1e-12)


def test_a_loss_that_cannot_be_batched_is_looped_over(models: Any, batch: Any) -> None:
    def branching(outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, targets)
        return loss if loss.item() > 1e-3 else loss * 0

    x, y = batch
    bundle = ModelBatch(copy.deepcopy(models))
    with pytest.warns(FallbackWarning, match="loss branching"):
        bundle.compute_loss(bundle(x), y, branching).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bundle.compute_loss(bundle(x), y, branching)
    for i, model in enumerate(models):
        branching(model(x), y).backward()
        assert_relative(bundle.gradients(i), gradients(model), 1e-10)


def test_bad_losses_are_refused(models: Any, batch: Any) -> None:
    x, y = batch
    bundle = ModelBatch(models)
    out = bundle(x)
    with pytest.raises(ModelBatchError, match=r"one number for each model, got shape \(8,\)"):
        bundle.compute_loss(out, y, lambda o, t: F.cross_entropy(o, t, reduction="none"))
    with pytest.raises(ModelBatchError, match="must return a tensor, got float"):
        bundle.compute_loss(out, y, lambda o, t: 1.0)
    with pytest.raises(ModelBatchError, match="callable"):
        bundle.compute_loss(out, y, "cross_entropy")
    with pytest.raises(ModelBatchError, match="loss of model 0 failed: Target . is out of bounds"):
        bundle.compute_loss(out, torch.full((8,), 3))
    with pytest.raises(ModelBatchError, match="sample_weight"):
        bundle.compute_loss(out, y, sample_weight=torch.ones(2, 8))
    with pytest.raises(ModelBatchError, match=r"sample_weight has shape \(5,\)"):
        bundle.compute_loss(out, y, sample_weight=torch.ones(5))
