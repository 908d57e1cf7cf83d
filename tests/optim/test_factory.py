"""`OptimizerFactory` and the functions that make configs."""

import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modelbatch import (
    BundleGradScaler,
    FallbackWarning,
    ModelBatch,
    ModelBatchError,
    OptimizerFactory,
    create_adam_configs,
    create_lr_sweep_configs,
    create_sgd_configs,
)

M = 3


def models():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double() for _ in range(M)]


def batches(count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = 3 * torch.randn(8, 4, generator=generator, dtype=torch.float64)
        yield x, torch.randint(3, (8,), generator=generator)


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_equal_alone(bundle, alone):
    for i in range(M):
        torch.testing.assert_close(
            parameters(bundle.models[i]), parameters(alone[i]), rtol=1e-12, atol=1e-14
        )


def test_base_config_and_configs_are_merged():
    mb = ModelBatch(models())
    factory = OptimizerFactory(torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1})
    optimizer = factory.create_optimizer(mb, [{}, {"lr": 0.02}, {"weight_decay": 0.0}])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.02, 0.01]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert mb.optimizer is optimizer


def test_configs_may_be_left_out():
    mb = ModelBatch(models())
    optimizer = OptimizerFactory(torch.optim.SGD, {"lr": 0.5}).create_optimizer(mb)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5] * M


@pytest.mark.parametrize("optimizer_cls", [torch.optim.Adam, torch.optim.NAdam])
@pytest.mark.parametrize("limit", [0.1, [0.05, 0.5, math.inf]])
def test_clips_the_norm_of_each_model(optimizer_cls, limit):
    mb = ModelBatch(models())
    alone = copy.deepcopy(mb.models)
    alone = [copy.deepcopy(m) for m in models()]
    factory = OptimizerFactory(optimizer_cls, clip_grad_norm=limit)
    factory.create_optimizer(mb, [{"lr": 0.01 * (i + 1)} for i in range(M)])
    optimizers = [optimizer_cls(m.parameters(), lr=0.01 * (i + 1)) for i, m in enumerate(alone)]
    limits = limit if isinstance(limit, list) else [limit] * M
    for x, y in batches(6):
        mb.train_step(x, y)
        norms = []
        for model, optimizer, own in zip(alone, optimizers, limits, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), own))
            optimizer.step()
        torch.testing.assert_close(mb.optimizer.last_grad_norms, torch.stack(norms))
        assert mb.metrics()["grad_norm_model_1"] == pytest.approx(float(norms[1]))
    mb.zero_grad()
    assert "grad_norm_model_1" not in mb.metrics()
    assert_equal_alone(mb, alone)


@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.Adamax])
def test_clips_the_values_of_each_model(optimizer_cls):
    mb = ModelBatch(models())
    alone = models()
    limits = torch.tensor([0.01, 0.05, 10.0])
    factory = OptimizerFactory(optimizer_cls, {"lr": 0.1}, clip_grad_value=limits)
    factory.create_optimizer(mb)
    optimizers = [optimizer_cls(m.parameters(), lr=0.1) for m in alone]
    for x, y in batches(5):
        mb.train_step(x, y)
        for model, optimizer, own in zip(alone, optimizers, limits.tolist(), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_value_(model.parameters(), own)
            optimizer.step()
    assert_equal_alone(mb, alone)


def test_the_scaler_is_the_one_train_step_uses():
    mb = ModelBatch(models())
    scaler = BundleGradScaler(init_scale=4.0, growth_interval=1)
    OptimizerFactory(torch.optim.SGD, {"lr": 0.1}, grad_scaler=scaler).create_optimizer(mb)
    assert mb.grad_scaler is scaler
    for x, y in batches(2):
        mb.train_step(x, y)
    assert list(scaler.get_scale()) == [16.0] * M


def test_a_copy_of_the_bundle_clips_and_scales_too():
    mb = ModelBatch(models())
    scaler = BundleGradScaler(init_scale=4.0)
    factory = OptimizerFactory(torch.optim.Adam, clip_grad_norm=0.1, grad_scaler=scaler)
    factory.create_optimizer(mb, create_lr_sweep_configs(1e-3, 1e-1, M))
    pairs = list(batches(4))
    for x, y in pairs[:2]:
        mb.train_step(x, y)
    twin = copy.deepcopy(mb)
    assert twin.grad_scaler is not scaler
    for x, y in pairs[2:]:
        mb.train_step(x, y)
        twin.train_step(x, y)
    assert torch.equal(twin.optimizer.last_grad_norms, mb.optimizer.last_grad_norms)
    for a, b in zip(mb.models, twin.models, strict=True):
        assert torch.equal(parameters(a), parameters(b))


def test_a_slow_class_says_so_once():
    class Mine(torch.optim.SGD):
        pass

    factory = OptimizerFactory(Mine, {"lr": 0.1})
    with pytest.warns(FallbackWarning, match="Mine") as caught:
        factory.create_optimizer(ModelBatch(models()))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    mb = ModelBatch(models(), fallback="error")
    with pytest.raises(ModelBatchError, match="Mine"):
        factory.create_optimizer(mb)
    assert mb.optimizer is None
    factory.create_optimizer(ModelBatch(models(), fallback="silent"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer_cls": nn.Linear}, "derived from torch.optim.Optimizer"),
        ({"base_config": [1]}, "base_config must be a dict"),
        ({"clip_grad_norm": 1.0, "clip_grad_value": 1.0}, "choose one"),
        ({"grad_scaler": object()}, "grad_scaler must be"),
        ({"optimizer_cls": torch.optim.LBFGS, "clip_grad_norm": 1.0}, "LBFGS"),
    ],
)
def test_a_bad_factory_is_refused(arguments, message):
    with pytest.raises(ModelBatchError, match=message):
        OptimizerFactory(**{"optimizer_cls": torch.optim.SGD, **arguments})


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ({"lr": 0.1}, "3 dicts, one per model"),
        ([{}] * 2, "2 configs for 3 models"),
        ([{}, 0.1, {}], "model 1: a config must be a dict"),
        ([{}, {}, {"lr": -1.0}], "model 2: option 'lr'"),
        ([{}, {"speed": 1.0}, {}], "model 1: SGD has no option 'speed'"),
    ],
)
def test_bad_configs_are_refused_and_change_nothing(configs, message):
    mb = ModelBatch(models())
    before = OptimizerFactory(torch.optim.SGD).create_optimizer(mb)
    with pytest.raises(ModelBatchError, match=message):
        OptimizerFactory(torch.optim.SGD).create_optimizer(mb, configs)
    assert mb.optimizer is before


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, [1.0], "1", [1.0, True, 1.0]])
def test_bad_limits_are_refused(limit):
    factory = OptimizerFactory(torch.optim.SGD, clip_grad_norm=limit)
    with pytest.raises(ModelBatchError, match="clip_grad_norm"):
        factory.create_optimizer(ModelBatch(models()))


def test_configs_of_sgd_and_adam():
    assert create_sgd_configs([0.1, 1], momentum=0.5) == [
        {"lr": 0.1, "momentum": 0.5, "weight_decay": 1e-4},
        {"lr": 1.0, "momentum": 0.5, "weight_decay": 1e-4},
    ]
    (config,) = create_adam_configs([0.1])
    assert config == {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def test_sweeps():
    rates = [config["lr"] for config in create_lr_sweep_configs(1e-4, 1e-2, 5)]
    assert (rates[0], rates[-1]) == (1e-4, 1e-2)
    ratios = [b / a for a, b in pairwise(rates)]
    assert ratios == pytest.approx([math.sqrt(10)] * 4)
    linear = [config["lr"] for config in create_lr_sweep_configs(0.0, 1.0, 3, scale="linear")]
    assert linear == [0.0, 0.5, 1.0]
    assert create_lr_sweep_configs(0.1, 0.2, 1) == [{"lr": 0.1}]


@pytest.mark.parametrize(
    "arguments",
    [
        (0.0, 1.0, 3),
        (0.1, math.inf, 3),
        (0.1, 0.2, 0),
        (-0.1, 0.2, 3, "linear"),
        (0.1, 0.2, 3, "x"),
    ],
)
def test_bad_sweeps_are_refused(arguments):
    with pytest.raises(ModelBatchError):
        create_lr_sweep_configs(*arguments)
