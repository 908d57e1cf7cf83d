"""Every torch optimizer through the bundle itself: together equals alone, LBFGS included."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bundle_case import assert_relative, state
from torch import Tensor, nn

from modelbatch import ModelBatch

RATES = [0.01, 0.003, 0.02]
NAMES = [
    "Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam",
    "RMSprop", "Rprop", "SGD",
]  # fmt: skip


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


@pytest.fixture
def models() -> list[nn.Module]:
    torch.manual_seed(0)
    return [net().double() for _ in RATES]


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(9, 4, dtype=torch.float64), torch.randint(3, (9,))) for _ in range(12)]


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_equals_alone(name: str, models: Any, batches: Any) -> None:
    optimizer_cls = getattr(torch.optim, name)
    bundle = ModelBatch(copy.deepcopy(models), lr_list=RATES, optimizer_cls=optimizer_cls)
    assert isinstance(bundle.optimizer, optimizer_cls)
    assert [g["lr"] for g in bundle.optimizer.param_groups] == RATES
    for x, y in batches:
        bundle.train_step(x, y)
    for i, model in enumerate(models):
        optimizer = optimizer_cls(model.parameters(), lr=RATES[i])
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert_relative(state(bundle[i]), state(model), 1e-9, name)


def test_a_scheduler_and_writes_to_lr_take_effect(models: Any, batches: Any) -> None:
    bundle = ModelBatch(
        copy.deepcopy(models), lr_list=RATES, optimizer_cls=torch.optim.SGD,
        optimizer_kwargs=[{"momentum": m} for m in (0.0, 0.5, 0.9)],
    )  # fmt: skip
    optimizer = bundle.optimizer
    assert optimizer is not None
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for x, y in batches:
        bundle.train_step(x, y)
        scheduler.step()
    optimizer.param_groups[1]["lr"] = 0.5
    bundle.train_step(*batches[0])
    for i, model in enumerate(models):
        own = torch.optim.SGD(model.parameters(), lr=RATES[i], momentum=(0.0, 0.5, 0.9)[i])
        schedule = torch.optim.lr_scheduler.StepLR(own, 2, 0.5)
        for step, (x, y) in enumerate([*batches, batches[0]]):
            if step == len(batches) and i == 1:
                own.param_groups[0]["lr"] = 0.5
            own.zero_grad()
            F.cross_entropy(model(x), y).backward()
            own.step()
            if step < len(batches):
                schedule.step()
        assert_relative(state(bundle[i]), state(model), 1e-9)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_line_searches_are_each_models_own(search: Any, models: Any, batches: Any) -> None:
    """The number of evaluations differs between models, and so BatchNorm's count of batches."""
    bundle = ModelBatch(
        copy.deepcopy(models), lr_list=[1.0, 0.5, 0.1], optimizer_cls=torch.optim.LBFGS,
        optimizer_kwargs={"line_search_fn": search, "max_iter": 5},
    )  # fmt: skip

    for x, y in batches[:3]:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            bundle.zero_grad()
            losses = bundle.compute_loss(bundle(x), y, reduction="none")
            losses.sum().backward()
            return losses

        bundle.step(closure)
    assert bool(bundle.active.all())
    for i, model in enumerate(models):
        own = torch.optim.LBFGS(
            model.parameters(), lr=[1.0, 0.5, 0.1][i], line_search_fn=search, max_iter=5
        )
        for x, y in batches[:3]:

            def alone(x: Tensor = x, y: Tensor = y, m: Any = model, o: Any = own) -> Tensor:
                o.zero_grad()
                loss = F.cross_entropy(m(x), y)
                loss.backward()
                return loss

            own.step(alone)
        assert_relative(state(bundle[i]), state(model), 1e-6, f"model {i}")


def test_gradient_accumulation_equals_alone(models: Any, batches: Any) -> None:
    bundle = ModelBatch(copy.deepcopy(models), lr_list=RATES, optimizer_cls=torch.optim.Adam)
    for k in range(0, 12, 3):
        bundle.zero_grad()
        for x, y in batches[k : k + 3]:
            (bundle.compute_loss(bundle(x), y) / 3).backward()
        bundle.step()
    for i, model in enumerate(models):
        own = torch.optim.Adam(model.parameters(), lr=RATES[i])
        for k in range(0, 12, 3):
            own.zero_grad()
            for x, y in batches[k : k + 3]:
                (F.cross_entropy(model(x), y) / 3).backward()
            own.step()
        assert_relative(state(bundle[i]), state(model), 1e-9)


def test_stock_grad_scaler(models: Any, batches: Any) -> None:
    bundle = ModelBatch(copy.deepcopy(models), lr_list=RATES, optimizer_cls=torch.optim.SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert bundle.optimizer is not None
    for x, y in batches[:4]:
        bundle.zero_grad()
        scaler.scale(bundle.compute_loss(bundle(x), y)).backward()
        scaler.step(bundle.optimizer)
        scaler.update()
    for i, model in enumerate(models):
        own = torch.optim.SGD(model.parameters(), lr=RATES[i])
        for x, y in batches[:4]:
            own.zero_grad()
            F.cross_entropy(model(x), y).backward()
            own.step()
        assert_relative(state(bundle[i]), state(model), 1e-9)
