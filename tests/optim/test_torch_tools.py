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


class OwnAdam(optim.Adam):
    """Somebody's own class, stepped model by model."""


@pytest.mark.parametrize("optimizer_cls", [optim.Adam, optim.NAdam, OwnAdam])
def test_hooks_run_once(optimizer_cls, hand_made, regression):
    bundle, loss = hand_made(), regression()
    # torch wraps the step of a class when the first of its kind is built.
    optimizer_cls([nn.Parameter(torch.zeros(1))])
    optimizer = bundle.optimizer(optimizer_cls, [{}] * 3)
    seen = []

    def before(opt, args, kwargs):
        assert opt is optimizer
        seen.append(("before", opt.param_groups[2]["params"][0].grad is not None))

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append("after"))
    handle = register_optimizer_step_post_hook(lambda opt, args, kwargs: seen.append("global"))
    try:
        for _ in range(2):
            bundle.step(optimizer, loss)
    finally:
        handle.remove()
    assert seen == [("before", True), "after", "global"] * 2


def overflowing(bundle, loss, step):
    """The loss with an overflow in model 1 at step 2."""

    def with_overflow(model, i):
        value = loss(model, i)
        return value * float("inf") if (step, i) == (2, 1) else value

    return with_overflow


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize(
    ("optimizer_cls", "options"),
    [
        (optim.Adam, {}),
        (optim.Adam, {"fused": True}),
        (optim.SGD, {"lr": 0.1}),
        (optim.NAdam, {}),
        (optim.Rprop, {}),
        (OwnAdam, {}),
    ],
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


CLASSES = [optim.Adam, optim.Adamax, optim.SparseAdam, optim.Rprop]


def set_gradients(bundle, grads, factors=(1.0, 1.0, 1.0), sparse=False):
    """Gives all models, and the lone copies unscaled, the same gradients."""
    for name, parameter in bundle.stacked.items():
        grad = torch.stack([grads[i][name] * factors[i] for i in range(3)])
        parameter.grad = grad.to_sparse(2) if sparse else grad
        for i, model in enumerate(bundle.alone):
            own = grads[i][name].clone()
            model.get_parameter(name).grad = own.to_sparse(1) if sparse else own


def some_gradients(bundle, seed, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            for name, p in model.named_parameters()
        }
        for model in bundle.alone
    ]


def matrices():
    return nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 2, bias=False))


# torch 2.15 says so wherever it makes a sparse tensor itself.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("optimizer_cls", CLASSES)
def test_a_scale_and_a_flag_for_each_model(optimizer_cls, hand_made):
    """Each model's gradients are divided by its own scale; the flagged model keeps every bit."""
    bundle = hand_made(matrices, dtype=torch.float32)
    sparse = optimizer_cls is optim.SparseAdam
    optimizer = bundle.optimizer(optimizer_cls, [{"lr": 0.01}] * 3)
    alone = bundle.alone_optimizers(optimizer_cls, [{"lr": 0.01}] * 3)
    scales = torch.tensor([8.0, 1024.0, 2.0])
    for step in range(5):
        flagged = 1 if step in (0, 2, 3) else None
        set_gradients(bundle, some_gradients(bundle, step), scales.tolist(), sparse)
        if flagged is not None:
            before = copy.deepcopy(bundle.models[1]), optimizer.model_state_dict(1)
        optimizer.grad_scale = scales
        optimizer.found_inf = torch.tensor([0.0, float(flagged is not None), 0.0])
        optimizer.step()
        assert optimizer.grad_scale is scales
        del optimizer.grad_scale, optimizer.found_inf
        for i, stock in enumerate(alone):
            if i != flagged:
                stock.step()
        if flagged is not None:
            hand_made.assert_same_state(bundle.models[1].state_dict(), before[0].state_dict())
            hand_made.assert_same_state(optimizer.model_state_dict(1), before[1])
    # Powers of two are exact.
    assert bundle.worst_error() <= 100 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("optimizer_cls", [optim.Adam, optim.Adamax, optim.Rprop])
def test_gradients_that_are_unscaled_already(optimizer_cls, hand_made):
    bundle = hand_made()
    optimizer = bundle.optimizer(optimizer_cls, [{"lr": 0.01}] * 3)
    alone = bundle.alone_optimizers(optimizer_cls, [{"lr": 0.01}] * 3)
    for step in range(3):
        set_gradients(bundle, some_gradients(bundle, step))
        optimizer.grad_scale, optimizer.found_inf = None, torch.zeros(3)
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        for stock in alone:
            stock.step()
    assert bundle.worst_error() <= 1e-12


@pytest.mark.parametrize("optimizer_cls", [optim.Adam, optim.Adamax, optim.Rprop])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_a_lost_model_does_not_shrink_the_one_scale(unscale_first, optimizer_cls, hand_made):
    """Its parameters are NaN, so no scale helps it; restored, it takes part again."""
    bundle = hand_made(dtype=torch.float32)
    optimizer = bundle.optimizer(optimizer_cls, [{"lr": 0.01}] * 3)
    alone = bundle.alone_optimizers(optimizer_cls, [{"lr": 0.01}] * 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(1))  # so that there is a scale
    weight = bundle.models[1][0].weight
    took_part = []
    for step in range(9):
        if step == 2:
            kept = weight.detach().clone()
            weight.data[0, 0] = float("nan")
        if step == 6:
            weight.data.copy_(kept)
        grads = some_gradients(bundle, step)
        if not torch.isfinite(weight).all():
            grads[1]["2.bias"][0] = float("nan")
        optimizer.zero_grad()
        set_gradients(bundle, grads, [scaler.get_scale()] * 3)
        before = weight.detach().clone()
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        took_part.append(not torch.equal(weight.nan_to_num(), before.nan_to_num()))
        assert scaler.get_scale() == (512.0 if step >= 2 else 1024.0)
        for i, stock in enumerate(alone):
            if i != 1 or took_part[-1]:
                stock.step()
    # Once unscaled without it, a step cannot take the model in any more.
    first = 7 if unscale_first else 6
    assert took_part == [step < 2 or step >= first for step in range(9)]
    assert bundle.worst_error() <= 100 * torch.finfo(torch.float32).eps


def test_a_lost_model_steps_again_without_a_scaler(hand_made):
    bundle = hand_made()
    optimizer = bundle.optimizer(optim.NAdam, [{"lr": 0.01}] * 3)
    bundle.stacked["2.bias"].data[1] = float("inf")
    grads = some_gradients(bundle, 0)
    grads[1]["2.bias"][0] = float("nan")
    set_gradients(bundle, grads)
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    assert optimizer._views.lost == {1}
    assert optimizer.param_groups[1]["params"][0].grad is None
    optimizer.step()
    assert torch.isnan(bundle.stacked["2.bias"][1, 0])
    assert not optimizer._views.lost


def test_a_scale_of_one_is_not_to_blame(hand_made):
    """A gradient that overflows without scaling will overflow for ever."""
    bundle = hand_made(dtype=torch.float32)
    optimizer = bundle.optimizer(optim.NAdam, [{"lr": 0.01}] * 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.zeros(1))
    scales = []
    for step in range(4):
        grads = some_gradients(bundle, step)
        grads[1]["2.bias"][0] = float("inf")
        optimizer.zero_grad()
        set_gradients(bundle, grads, [scaler.get_scale()] * 3)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales == [1.0, 0.5, 0.5, 0.5]


def test_all_models_lost_is_a_scalers_usual_business(hand_made):
    bundle = hand_made(dtype=torch.float32)
    optimizer = bundle.optimizer(optim.NAdam, [{"lr": 0.01}] * 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(1))
    for parameter in bundle.stacked.values():
        parameter.data.fill_(float("nan"))
    for step in range(2):
        optimizer.zero_grad()
        set_gradients(bundle, some_gradients(bundle, step, float("nan")))
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("optimizer_cls", CLASSES)
@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_by_norm_in_the_step(scaled, optimizer_cls, hand_made):
    bundle = hand_made(matrices)
    sparse = optimizer_cls is optim.SparseAdam
    optimizer = bundle.optimizer(optimizer_cls, [{"lr": 0.01}] * 3)
    alone = bundle.alone_optimizers(optimizer_cls, [{"lr": 0.01}] * 3)
    limits = [0.5, 100.0, 2.0]
    optimizer.clip_grad_norm = limits
    for step in range(4):
        bundle.active[2] = step < 2
        set_gradients(bundle, some_gradients(bundle, step), [4.0 if scaled else 1.0] * 3, sparse)
        if scaled:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        optimizer.step()
        if scaled:
            del optimizer.grad_scale, optimizer.found_inf
        norms = []
        for i, stock in enumerate(alone):
            own = list(bundle.alone[i].parameters())
            # torch has no norm of sparse gradients.
            dense = [p.grad.to_dense() if sparse else p.grad for p in own]
            norms.append(torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in dense])))
            for parameter in own:
                parameter.grad = parameter.grad * min(1.0, limits[i] / (float(norms[i]) + 1e-6))
            if bundle.active[i]:
                stock.step()
        torch.testing.assert_close(
            optimizer.last_grad_norms, torch.stack(norms), rtol=1e-12, atol=0
        )
    assert bundle.worst_error() <= 1e-12
    optimizer.clip_grad_norm = None
    optimizer.step()
    assert optimizer.last_grad_norms is None


@pytest.mark.parametrize("optimizer_cls", [optim.Adam, optim.Adamax, optim.Adadelta])
def test_clipping_by_value_in_the_step(optimizer_cls, hand_made):
    bundle = hand_made()
    optimizer = bundle.optimizer(optimizer_cls, [{"lr": 0.01}] * 3)
    alone = bundle.alone_optimizers(optimizer_cls, [{"lr": 0.01}] * 3)
    limits = [0.5, 100.0, 0.1]
    optimizer.clip_grad_value = limits
    for step in range(4):
        bundle.active[2] = step != 2
        set_gradients(bundle, some_gradients(bundle, step))
        optimizer.step()
        assert optimizer.last_grad_norms is None
        for i, stock in enumerate(alone):
            nn.utils.clip_grad_value_(bundle.alone[i].parameters(), limits[i])
            if bundle.active[i]:
                stock.step()
    assert bundle.worst_error() <= 1e-12


@pytest.mark.parametrize("optimizer_cls", [optim.Adam, optim.Adamax, optim.Rprop])
def test_clipping_what_a_closure_computes(optimizer_cls, hand_made):
    bundle = hand_made()
    optimizer = bundle.optimizer(optimizer_cls, [{"lr": 0.01}] * 3)
    alone = bundle.alone_optimizers(optimizer_cls, [{"lr": 0.01}] * 3)
    optimizer.clip_grad_norm = [0.5, 1.0, 1.5]
    for step in range(3):
        optimizer.step(lambda step=step: set_gradients(bundle, some_gradients(bundle, step)))
        for i, stock in enumerate(alone):
            nn.utils.clip_grad_norm_(bundle.alone[i].parameters(), [0.5, 1.0, 1.5][i])
            stock.step()
    assert bundle.worst_error() <= 1e-12


@pytest.mark.parametrize("optimizer_cls", [optim.Adam, optim.NAdam, OwnAdam])
def test_autograd_sees_that_parameters_changed(optimizer_cls, hand_made, regression):
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optimizer_cls, [{}] * 3)
    for _ in range(2):
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
