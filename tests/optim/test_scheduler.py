"""Every model's schedule is, to the bit, the one that it would follow alone."""

import copy
import json
import math

import pytest
import torch
from bundle_case import assert_relative
from schedules import (
    CONFIGS,
    METRICS,
    NAMES,
    NUM_MODELS,
    OPTIMIZERS,
    STEPS,
    batch,
    class_named,
    new_bundle,
    options,
    schedule,
    step_alone,
    train_alone,
)
from torch import nn
from torch.optim import lr_scheduler as schedulers

from modelbatch import ModelBatch, ModelBatchError
from modelbatch.optim.scheduler import create_lr_scheduler


class Run:
    """A bundle with its scheduler next to the separate models with theirs."""

    def __init__(self, name, kind="sgd_momentum", as_classes=False):
        self.bundle, self.alone, self.optimizers = new_bundle(kind)
        build = schedule(name)
        self.schedulers = [build(optimizer, i) for i, optimizer in enumerate(self.optimizers)]
        self.scheduler = self.new_scheduler(name, as_classes)

    def new_scheduler(self, name, as_classes=False):
        if as_classes:
            return create_lr_scheduler(self.bundle.optimizer, class_named(name), CONFIGS[name]())
        return create_lr_scheduler(self.bundle.optimizer, schedule(name))

    def step(self, step, metrics=None, moving=range(NUM_MODELS)):
        x, y = batch(step)
        self.bundle.train_step(x, y)
        self.scheduler.step(METRICS[step] if metrics is None else metrics)
        for i in moving:
            train_alone(self.alone[i], self.optimizers[i], step)
            step_alone(self.schedulers[i], METRICS[step][i])

    def assert_same_schedule(self):
        groups = self.bundle.optimizer.param_groups
        for i, (group, optimizer) in enumerate(zip(groups, self.optimizers, strict=True)):
            own, expected = options(group), options(optimizer.param_groups[0])
            assert {option: own[option] for option in expected} == expected, f"model {i}"
            assert type(group["lr"]) is type(optimizer.param_groups[0]["lr"])
        rates = [float(own.get_last_lr()[0]) for own in self.schedulers]
        assert self.scheduler.get_last_lr() == rates


def assert_same_weights(bundle, alone):
    for own, model in zip(bundle.models, alone, strict=True):
        expected = dict(model.named_parameters())
        assert_relative(dict(own.named_parameters()), expected, 1e-9)


def test_every_scheduler_of_torch_is_here():
    assert set(NAMES) - {"SWALR", "different_classes"} == set(schedulers.__all__) - {"LRScheduler"}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", NAMES)
def test_schedules_equal_separate_ones(name, kind):
    run = Run(name, kind)
    run.assert_same_schedule()
    seen = set()
    for step in range(STEPS):
        run.step(step)
        run.assert_same_schedule()
        assert run.scheduler.last_epoch == step + 1
        seen.add(tuple(run.scheduler.get_last_lr()))
    assert len(seen) > 1, "the schedule never moved"
    assert_same_weights(run.bundle, run.alone)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_class_with_configs(name):
    run = Run(name, "adam", as_classes=True)
    for step in range(10):
        run.assert_same_schedule()
        run.step(step)
    assert all(type(group["betas"]) is tuple for group in run.bundle.optimizer.param_groups)


def test_one_config_for_all_and_a_class_for_each():
    bundle, _, optimizers = new_bundle()
    scheduler = create_lr_scheduler(bundle.optimizer, schedulers.ExponentialLR, {"gamma": 0.5})
    assert scheduler.get_last_lr() == [0.1, 0.03, 0.01]
    bundle.train_step(*batch(0))
    scheduler.step()
    assert scheduler.get_last_lr() == [0.1 * 0.5, 0.03 * 0.5, 0.01 * 0.5]

    bundle, _, optimizers = new_bundle()
    classes = [schedulers.StepLR, schedulers.ConstantLR, schedulers.CosineAnnealingLR]
    configs = [{"step_size": 1}, None, {"T_max": 5}]
    scheduler = create_lr_scheduler(bundle.optimizer, classes, configs)
    alone = [c(o, **(k or {})) for c, o, k in zip(classes, optimizers, configs, strict=True)]
    bundle.train_step(*batch(0))
    scheduler.step()
    for own, optimizer in zip(alone, optimizers, strict=True):
        optimizer.step()
        own.step()
    assert scheduler.get_last_lr() == [own.get_last_lr()[0] for own in alone]
    assert [type(own) for own in scheduler.schedulers] == classes


@pytest.mark.parametrize("through_json", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_in_the_middle(name, kind, through_json):
    run = Run(name, kind)
    for step in range(13):
        run.step(step)
    saved = run.scheduler.state_dict()
    if through_json and kind != "adam_tensor_lr":
        saved = json.loads(json.dumps(saved))
    weights = copy.deepcopy(run.bundle.state_dict())
    optimizer_state = copy.deepcopy(run.bundle.optimizer.state_dict())
    run.step(13)  # what was saved must not follow
    run.bundle = new_bundle(kind)[0]
    run.scheduler = run.new_scheduler(name)
    run.bundle.load_state_dict(weights)
    run.bundle.optimizer.load_state_dict(optimizer_state)
    run.scheduler.load_state_dict(saved)
    untouched = copy.deepcopy(saved)
    run.bundle.train_step(*batch(13))
    run.scheduler.step(METRICS[13])
    for step in range(14, STEPS):
        run.assert_same_schedule()
        run.step(step)
    run.assert_same_schedule()
    assert_same_weights(run.bundle, run.alone)
    assert run.scheduler.last_epoch == STEPS
    assert json.dumps(saved, default=float) == json.dumps(untouched, default=float)


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_models_schedule_stands_still(name):
    run = Run(name)
    run.step(0)
    run.bundle.freeze(1)
    for step in range(1, 9):
        run.step(step, [METRICS[step][0], None, METRICS[step][2]], moving=(0, 2))
        run.assert_same_schedule()
    run.bundle.unfreeze(1)
    for step in range(9, 14):
        run.step(step)
        run.assert_same_schedule()
    assert_same_weights(run.bundle, run.alone)
    assert run.scheduler.last_epoch == 14


@pytest.mark.parametrize("name", NAMES)
def test_a_stock_scheduler_on_the_bundles_optimizer(name):
    """One schedule of torch for all models; ReduceLROnPlateau has one metric for all then."""
    bundle, models, optimizers = new_bundle("adam")
    stock = schedule(name)(bundle.optimizer, 0)
    alone = [schedule(name)(optimizer, 0) for optimizer in optimizers]
    for step in range(STEPS):
        bundle.train_step(*batch(step))
        step_alone(stock, METRICS[step][1])
        for model, optimizer, own in zip(models, optimizers, alone, strict=True):
            train_alone(model, optimizer, step)
            step_alone(own, METRICS[step][1])
        groups = [optimizer.param_groups[0] for optimizer in optimizers]
        for own, expected in zip(bundle.optimizer.param_groups, groups, strict=True):
            assert {option: own[option] for option in options(expected)} == options(expected)
        assert stock.get_last_lr() == [group["lr"] for group in groups]
    assert_same_weights(bundle, models)


def test_a_stock_scheduler_with_a_list_for_the_models():
    bundle, _, optimizers = new_bundle()
    stock = schedulers.OneCycleLR(bundle.optimizer, [0.1, 0.2, 0.3], total_steps=20)
    alone = [
        schedulers.OneCycleLR(optimizer, max_lr, total_steps=20)
        for optimizer, max_lr in zip(optimizers, (0.1, 0.2, 0.3), strict=True)
    ]
    for step in range(19):
        bundle.train_step(*batch(step))
        stock.step()
        for optimizer, own in zip(optimizers, alone, strict=True):
            optimizer.step()
            own.step()
        assert stock.get_last_lr() == [own.get_last_lr()[0] for own in alone]


def test_two_schedulers_on_one_optimizer_work_together():
    bundle, _, optimizers = new_bundle()
    warm_up = create_lr_scheduler(bundle.optimizer, schedulers.LinearLR, {"total_iters": 4})
    decay = create_lr_scheduler(bundle.optimizer, schedulers.ExponentialLR, {"gamma": 0.9})
    stock = schedulers.StepLR(bundle.optimizer, 2)
    alone = [
        [schedulers.LinearLR(o, total_iters=4), schedulers.ExponentialLR(o, 0.9)]
        for o in optimizers
    ]
    for own, optimizer in zip(alone, optimizers, strict=True):
        own.append(schedulers.StepLR(optimizer, 2))
    for step in range(8):
        bundle.train_step(*batch(step))
        for scheduler in (warm_up, decay, stock):
            scheduler.step()
        for optimizer, own in zip(optimizers, alone, strict=True):
            optimizer.step()
            for scheduler in own:
                scheduler.step()
        rates = [group["lr"] for group in bundle.optimizer.param_groups]
        assert rates == [optimizer.param_groups[0]["lr"] for optimizer in optimizers]


def test_a_rate_written_by_hand_counts():
    run = Run("ExponentialLR")
    run.step(0)
    run.bundle.optimizer.param_groups[2]["lr"] = 7.0
    run.optimizers[2].param_groups[0]["lr"] = 7.0
    run.step(1)
    run.assert_same_schedule()
    assert run.scheduler.get_last_lr()[2] == 7.0 * 1.01


def test_the_optimizer_that_build_is_given():
    bundle, alone, optimizers = new_bundle("adam")
    seen = []

    def build(optimizer, i):
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert optimizer.param_groups[0] is bundle.optimizer.param_groups[i]
        assert len(optimizer.param_groups) == 1
        assert optimizer.defaults["betas"] == optimizers[i].defaults["betas"]
        assert optimizer.defaults.keys() == optimizers[i].defaults.keys()
        seen.append(optimizer)
        return schedulers.StepLR(optimizer, 5)

    create_lr_scheduler(bundle.optimizer, build)
    bundle.train_step(*batch(0))
    assert set(seen[1].state) == set(bundle[1].parameters())
    stock = torch.optim.Adam(alone[1].parameters())
    stock.load_state_dict(seen[1].state_dict())
    assert stock.param_groups[0]["lr"] == 0.03
    seen[0].load_state_dict(seen[1].state_dict())
    assert bundle.optimizer.param_groups[0]["lr"] == 0.03
    assert "lr: 0.03" in repr(seen[0])


def test_lbfgs():
    torch.manual_seed(0)
    models = [nn.Linear(3, 1).double() for _ in range(2)]
    bundle = ModelBatch(models, lr_list=[0.5, 0.1], optimizer_cls=torch.optim.LBFGS)
    scheduler = create_lr_scheduler(
        bundle.optimizer, schedulers.ExponentialLR, [{"gamma": 0.5}, {"gamma": 0.1}]
    )
    x, y = torch.randn(8, 3).double(), torch.randn(8, 1).double()

    def closure():
        bundle.zero_grad()
        bundle.compute_loss(bundle(x), y, nn.functional.mse_loss).backward()
        return bundle.latest_losses

    bundle.step(closure)
    scheduler.step()
    assert [group["lr"] for group in bundle.optimizer.param_groups] == [0.25, 0.1 * 0.1]


@pytest.mark.parametrize(
    "metrics",
    [
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16, requires_grad=True),
        [1.0, torch.tensor(2.0), 3],
        (1, 2, 3),
        torch.tensor([1.0, 2.0, 3.0]).numpy(),
        iter([1.0, 2.0, 3.0]),
    ],
    ids=["tensor", "bfloat16", "list", "tuple", "array", "iterator"],
)
def test_metrics_for_each_model(metrics):
    bundle, _, _ = new_bundle()
    scheduler = create_lr_scheduler(bundle.optimizer, schedulers.ReduceLROnPlateau)
    scheduler.step(metrics)
    assert [own.best for own in scheduler.schedulers] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "metrics",
    [2.0, 2, torch.tensor(2.0), torch.tensor(2.0).numpy(), torch.tensor([2.0]).numpy()[0]],
    ids=["float", "int", "tensor", "array", "scalar"],
)
def test_one_metric_for_all_models(metrics):
    bundle, _, _ = new_bundle()
    scheduler = create_lr_scheduler(bundle.optimizer, schedulers.ReduceLROnPlateau)
    scheduler.step(metrics)
    assert [own.best for own in scheduler.schedulers] == [2.0] * 3


def test_a_nan_metric_disturbs_nobody_else():
    runs = [new_bundle()[0] for _ in range(2)]
    both = [
        create_lr_scheduler(bundle.optimizer, schedulers.ReduceLROnPlateau, {"patience": 1})
        for bundle in runs
    ]
    for step in range(8):
        values = METRICS[step][:2]
        both[0].step([*values, 0.5])
        both[1].step([*values, math.nan])
        rates = [scheduler.get_last_lr() for scheduler in both]
        assert rates[0][:2] == rates[1][:2]
    assert rates[1][2] < 0.01, "NaN is never an improvement"


def test_a_diverged_models_schedule_goes_on():
    bundle, _, _ = new_bundle()
    scheduler = create_lr_scheduler(bundle.optimizer, schedulers.ExponentialLR, {"gamma": 0.5})
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    with torch.no_grad():
        bundle.models[1].weight.fill_(math.nan)
    for step in range(4):
        x, y = batch(step)
        bundle.zero_grad()
        scaler.scale(bundle.compute_loss(bundle(x), y)).backward()
        scaler.step(bundle.optimizer)
        scaler.update()
        scheduler.step()
    assert scheduler.get_last_lr() == [lr * 0.5**4 for lr in (0.1, 0.03, 0.01)]


def test_a_step_of_some_models():
    bundle, _, _ = new_bundle("sgd_momentum")
    scheduler = create_lr_scheduler(bundle.optimizer, schedulers.ExponentialLR, {"gamma": 0.5})
    before = scheduler.get_last_lr()
    bundle.train_step(*batch(0))
    scheduler.step(models=[0, -1])
    factors = [new / old for new, old in zip(scheduler.get_last_lr(), before)]
    assert factors == [0.5, *[1.0] * (NUM_MODELS - 2), 0.5]
    with pytest.raises(ModelBatchError, match=str(NUM_MODELS)):
        scheduler.step(models=[NUM_MODELS])
    assert [own.last_epoch for own in scheduler.schedulers] == [1, *[0] * (NUM_MODELS - 2), 1]
