"""Options of single parameters: no weight decay for biases, say."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modelbatch import ModelBatch, ModelBatchError, OptimizerFactory

RATES = [0.1, 0.01, 0.02]
X = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])


def _models() -> list[nn.Module]:
    models: list[nn.Module] = []
    for i in range(3):
        torch.manual_seed(i)
        layers = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 2))
        models.append(layers.double())
    return models


def _bundle(cls: Any = torch.optim.AdamW, **more: Any) -> ModelBatch:
    bundle = ModelBatch(_models())
    names = [name for name, p in bundle[0].named_parameters() if p.ndim == 1]
    options = {name: {"weight_decay": 0.0} for name in names}
    factory = OptimizerFactory(cls, {"weight_decay": 0.3}, parameter_options=options, **more)
    factory.create_optimizer(bundle, [{"lr": rate} for rate in RATES])
    return bundle


def _alone(cls: Any, model: nn.Module, lr: float) -> Any:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.3},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return cls(groups, lr=lr)


def _difference(bundle: ModelBatch, models: list[nn.Module]) -> float:
    pairs = zip(bundle.models, models)
    return max(
        float((p - q).detach().abs().max())
        for own, model in pairs
        for p, q in zip(own.parameters(), model.parameters())
    )


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_equals_two_groups_alone(cls) -> None:
    bundle, models = _bundle(cls, clip_grad_norm=0.1), _models()
    optimizers = [_alone(cls, model, lr) for model, lr in zip(models, RATES)]
    for step in range(6):
        if step == 2:
            bundle.freeze(1)
        if step == 3:  # copies and states keep the steps of both kinds of parameters
            state = copy.deepcopy(bundle.optimizer.state_dict())
            bundle = copy.deepcopy(bundle)
            bundle.optimizer.load_state_dict(state)
            bundle.unfreeze(1)
        bundle.train_step(X, Y)
        for i, (model, optimizer) in enumerate(zip(models, optimizers)):
            if step == 2 and i == 1:
                continue
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    assert _difference(bundle, models) < 1e-12


def test_an_overflow_skips_all_of_a_models_parameters() -> None:
    from modelbatch import BundleGradScaler

    bundle, scaler = _bundle(), BundleGradScaler(init_scale=8.0)
    before = copy.deepcopy(bundle.state_dict())
    losses = bundle.compute_loss(bundle(X), Y, reduction="none")
    scaler.scale(losses).sum().backward()
    bundle.get_parameter("2.bias").grad[1] = torch.inf
    scaler.step(bundle.optimizer)
    scaler.update()
    for name, tensor in bundle.state_dict().items():
        assert torch.equal(tensor[1], before[name][1]), name
        assert not torch.equal(tensor[0], before[name][0]), name
    assert scaler.get_scale() == [8.0, 4.0, 8.0]


def test_models_that_join_have_them_too() -> None:
    bundle, model = _bundle(), _models()[0]
    own = copy.deepcopy(model)
    bundle.train_step(X, Y)
    bundle.replace(1, own, lr=0.05)
    optimizer = _alone(torch.optim.AdamW, model, 0.05)
    for _ in range(3):
        bundle.train_step(X, Y)
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    assert all(
        torch.allclose(p, q, rtol=0, atol=1e-12)
        for p, q in zip(bundle.models[1].parameters(), model.parameters())
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"3.bias": {"weight_decay": 0.0}}, "no parameter '3.bias'"),
        ({"0.bias": {"lr": 0.1}}, "'lr' cannot differ"),
        ({"0.bias": {"amsgrad": True}}, "'amsgrad' cannot differ"),
        ({"0.bias": {"weight_decay": -1.0}}, "not negative"),
        ({"0.bias": {"weight_decay": "much"}}, "must be a number"),
    ],
)
def test_refused(options, match) -> None:
    bundle = ModelBatch(_models())
    factory = OptimizerFactory(torch.optim.AdamW, parameter_options=options)
    with pytest.raises(ModelBatchError, match=match):
        factory.create_optimizer(bundle)
    assert bundle.optimizer is None


def test_a_class_that_steps_model_by_model_is_refused() -> None:
    class Own(torch.optim.SGD):
        pass

    bundle = ModelBatch(_models(), fallback="silent")
    options = {"0.bias": {"weight_decay": 0.0}}
    factory = OptimizerFactory(Own, {"lr": 0.1}, parameter_options=options)
    with pytest.raises(ModelBatchError, match="steps model by model"):
        factory.create_optimizer(bundle)
