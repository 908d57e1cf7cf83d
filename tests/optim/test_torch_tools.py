"""What torch builds around an optimizer: schedulers, hooks, GradScaler, autograd's checks."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn, optim
from torch.optim.optimizer import register_optimizer_step_post_hook


def test_schedulers(hand_made, regression):
    bundle, loss = hand_made(), regression()
    shared = torch.tensor(0.1)
    configs = [{"lr": 0.01}, {"lr": shared}, {"lr": shared}]
    optimizer = bundle.optimizer(optim.SGD, configs)
    alone = bundle.alone_optimizers(optim.SGD, configs)

    def build(opt):
        warmup = optim.lr_scheduler.LinearLR(opt, 0.1, total_iters=3)
        cosine = optim.lr_scheduler.CosineAnnealingLR(opt, 5)
        return optim.lr_scheduler.SequentialLR(opt, [warmup, cosine], [3])

    scheduler, schedulers = build(optimizer), [build(stock) for stock in alone]
    for _ in range(8):
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
        scheduler.step()
        for own in schedulers:
            own.step()
        rates = [float(own.get_last_lr()[0]) for own in schedulers]
        assert [float(rate) for rate in scheduler.get_last_lr()] == rates
    assert float(shared) == pytest.approx(0.1), "the caller's tensor was written"
    assert bundle.worst_error() <= 1e-12


def test_one_cycle_momentum(hand_made, regression):
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optim.Adam, [{}] * 3)
    scheduler = optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2, 0.3], total_steps=5)
    for _ in range(4):
        bundle.step(optimizer, loss)
        scheduler.step()
    rates = scheduler.get_last_lr()
    assert rates[1] == pytest.approx(2 * rates[0])
    assert optimizer.param_groups[0]["betas"][0] != 0.9


def test_hooks_run_once(hand_made, regression):
    bundle, loss = hand_made(), regression()
    # torch wraps the step of a class when the first of its kind is built.
    optim.Adam([nn.Parameter(torch.zeros(1))])
    optimizer = bundle.optimizer(optim.Adam, [{}] * 3)
    seen = []

    def before(opt, args, kwargs):
        assert opt is optimizer
        seen.append(("before", opt.param_groups[2]["params"][0].grad is not None))

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append("after"))
    handle = register_optimizer_step_post_hook(lambda opt, args, kwargs: seen.append("global"))
    try:
        bundle.step(optimizer, loss)
    finally:
        handle.remove()
    assert seen == [("before", True), "after", "global"]


def overflowing(bundle, loss, step):
    """The loss with an overflow in model 1 at step 2."""

    def with_overflow(model, i):
        value = loss(model, i)
        return value * float("inf") if (step, i) == (2, 1) else value

    return with_overflow


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize(
    ("optimizer_cls", "options"),
    [(optim.Adam, {}), (optim.Adam, {"fused": True}), (optim.SGD, {"lr": 0.1}), (optim.Rprop, {})],
)
def test_grad_scaler_skips_the_overflowing_model_alone(
    optimizer_cls, options, unscale_first, hand_made, regression
):
    dtype = torch.float32
    bundle = hand_made(dtype=dtype)
    optimizer = bundle.optimizer(optimizer_cls, [options] * 3)
    alone = bundle.alone_optimizers(optimizer_cls, [options] * 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        loss = overflowing(bundle, regression(dtype), step)
        optimizer.zero_grad()
        scaler.scale(bundle.losses(loss).sum()).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
            weight = bundle.alone[0][0].weight
            (unscaled,) = torch.autograd.grad(loss(bundle.alone[0], 0), [weight])
            torch.testing.assert_close(bundle.stacked["0.weight"].grad[0], unscaled)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (512.0 if step >= 2 else 1024.0)
        bundle.step_alone(alone, loss, which={0, 2} if step == 2 else None)
    # The scale is a power of two, and exact; fused Adam differs from the default by roundings.
    assert bundle.worst_error() <= 100 * torch.finfo(dtype).eps
    assert not hasattr(optimizer, "found_inf")


def test_autograd_sees_that_parameters_changed(hand_made, regression):
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optim.Adam, [{}] * 3)
    total = bundle.stacked["0.weight"].square().sum()
    bundle.step(optimizer, loss)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_the_class_looks_like_torchs(hand_made):
    first = hand_made().optimizer(optim.AdamW, [{}] * 3)
    second = hand_made().optimizer(optim.AdamW, [{}] * 3)
    assert type(first) is type(second)
    assert isinstance(first, optim.AdamW)
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(first), attribute) == getattr(optim.AdamW, attribute)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(first)
    with pytest.raises(TypeError, match="cannot be copied"):
        pickle.dumps(first)


def test_nothing_warns(hand_made, regression):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bundle = hand_made()
        bundle.step(bundle.optimizer(optim.Adam, [{}] * 3), regression())
