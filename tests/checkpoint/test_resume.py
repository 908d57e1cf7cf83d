"""Training that was saved and resumed equals training that was never stopped, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_case import M, assert_same, batch, build, everything, train
from torch import Tensor, nn
from torch.optim import lr_scheduler

from modelbatch import BundleGradScaler, ModelBatch, OptimizerFactory


class OwnAdam(torch.optim.Adam):
    """A class of the user's, which steps model by model."""


class Plain(nn.Module):
    """Parameters with two axes only, as Muon wants them."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.relu(self.a(x))))


CASES: list[tuple[type, Any]] = [
    (torch.optim.SGD, None),
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}),
    (torch.optim.SGD, [{"momentum": 0.9, "nesterov": True}, {}, {"momentum": 0.5}]),
    (torch.optim.Adam, [{"amsgrad": True}, {}, {"weight_decay": 0.1}]),
    (torch.optim.AdamW, None),
    (torch.optim.RMSprop, [{"centered": True}, {"momentum": 0.9}, {}]),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    (torch.optim.Adadelta, None),
    (torch.optim.Adamax, None),
    (torch.optim.NAdam, None),
    (torch.optim.RAdam, None),
    (torch.optim.ASGD, None),
    (torch.optim.Rprop, None),
    (torch.optim.Adafactor, None),
    (torch.optim.LBFGS, {"history_size": 3, "max_iter": 4}),
    (OwnAdam, {"amsgrad": True}),
]


def build_case(cls: type, options: Any, dtype: torch.dtype, seed: int = 0) -> ModelBatch:
    return build(cls, options, dtype=dtype, seed=seed, fallback="silent")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("cls", "options"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_every_optimizer(cls: type, options: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    reference = build_case(cls, options, dtype)
    train(reference, range(6))

    first = build_case(cls, options, dtype)
    train(first, range(3))
    before = everything(first)
    first.save_all(tmp_path)
    assert_same(everything(first), before)

    second = build_case(cls, options, dtype, seed=1)
    train(second, range(10, 12))  # a past of its own, of which nothing may remain
    second.load_all(tmp_path)
    assert_same(everything(second), before)
    train(second, range(3, 6))
    assert_same(everything(second), everything(reference))
    train(first, range(3, 6))
    assert_same(everything(first), everything(reference))


def test_before_the_first_step(tmp_path: Path) -> None:
    for cls, options in CASES:
        reference = build_case(cls, options, torch.float32)
        reference.save_all(tmp_path)
        second = build_case(cls, options, torch.float32, seed=1)
        train(second, range(2))
        second.load_all(tmp_path)
        train(second, range(3))
        train(reference, range(3))
        assert_same(everything(second), everything(reference), cls.__name__)


def test_muon(tmp_path: Path) -> None:
    def new(seed: int) -> ModelBatch:
        return build(torch.optim.Muon, seed=seed, net=Plain, fallback="silent")

    reference, second = new(0), new(1)
    train(reference, range(3))
    reference.save_all(tmp_path)
    second.load_all(tmp_path)
    for mb in (reference, second):
        train(mb, range(3, 6))
    assert_same(everything(second), everything(reference))


def test_a_stock_optimizer_over_the_stacked_parameters(tmp_path: Path) -> None:
    def new(seed: int) -> ModelBatch:
        mb = build(None, seed=seed)
        mb.optimizer = torch.optim.Adam(mb.parameters(), lr=0.01)
        return mb

    reference, second = new(0), new(1)
    train(reference, range(3))
    reference.save_all(tmp_path)
    second.load_all(tmp_path)
    assert_same(everything(second), everything(reference))
    for mb in (reference, second):
        train(mb, range(3, 5))
    assert_same(everything(second), everything(reference))


@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_random_streams(rng: str, tmp_path: Path) -> None:
    def new(seed: int) -> ModelBatch:
        return build(torch.optim.Adam, seed=seed, rng=rng, seeds=[seed + i for i in range(M)])

    reference = new(0)
    train(reference, range(6))
    first, second = new(0), new(7)
    train(first, range(3))
    first.save_all(tmp_path)
    second.load_all(tmp_path)
    assert second.seeds == first.seeds
    train(second, range(3, 6))
    assert_same(everything(second), everything(reference))


def test_frozen_models_modes_and_limits(tmp_path: Path) -> None:
    def new(seed: int) -> ModelBatch:
        mb = build(None, seed=seed)
        factory = OptimizerFactory(
            torch.optim.Adam, {"lr": 0.1}, clip_grad_norm=[0.1 + seed, 1.0, 2.0]
        )
        factory.create_optimizer(mb, [{}] * M)
        return mb

    reference = new(0)
    train(reference, range(2))
    reference.freeze(1)
    train(reference, range(2, 4))
    for model in reference.models:
        model.norm.eval()
    reference.refresh()
    reference.save_all(tmp_path)
    second = new(5)
    second.load_all(tmp_path)
    assert_same(everything(second), everything(reference))
    assert second.active.tolist() == [True, False, True]
    assert second.training and not second[2].norm.training
    assert second.optimizer.clip_grad_norm[0] == 0.1
    for mb in (reference, second):
        train(mb, range(4, 6))
        mb.unfreeze(1)
        train(mb, range(6, 8))
    assert_same(everything(second), everything(reference))


def _cosine_after_warm_up(optimizer: torch.optim.Optimizer, i: int) -> Any:
    if i == 0:
        return lr_scheduler.MultiStepLR(optimizer, milestones=[1, 4], gamma=0.3)
    if i == 1:
        return lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=20)
    warm_up = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=4)
    rest = lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    return lr_scheduler.SequentialLR(optimizer, [warm_up, rest], milestones=[4])


@pytest.mark.parametrize("kind", ["one class", "per model", "stock"])
def test_schedulers(kind: str, tmp_path: Path) -> None:
    def new(seed: int) -> tuple[ModelBatch, Any]:
        mb = build(torch.optim.Adam, seed=seed)
        if kind == "stock":
            return mb, lr_scheduler.MultiStepLR(mb.optimizer, [2, 4])
        if kind == "per model":
            build_one = _cosine_after_warm_up
            return mb, OptimizerFactory.create_lr_scheduler(mb.optimizer, build_one)
        configs = [{"gamma": 0.9 - 0.1 * i} for i in range(M)]
        return mb, OptimizerFactory.create_lr_scheduler(
            mb.optimizer, lr_scheduler.ExponentialLR, configs
        )

    reference, its = new(0)
    train(reference, range(6), its)
    first, own = new(0)
    train(first, range(3), own)
    first.save_all(tmp_path, states={"scheduler": own})
    second, other = new(1)
    second.load_all(tmp_path, states={"scheduler": other})
    assert other.get_last_lr() == own.get_last_lr()
    train(second, range(3, 6), other)
    assert_same(everything(second), everything(reference))
    assert_same(other.state_dict(), its.state_dict())


def test_plateau(tmp_path: Path) -> None:
    def new() -> tuple[ModelBatch, Any]:
        mb = build(torch.optim.SGD)
        scheduler = OptimizerFactory.create_lr_scheduler(
            mb.optimizer, lr_scheduler.ReduceLROnPlateau, {"patience": 1}
        )
        return mb, scheduler

    metrics = torch.tensor([[1.0, 2.0, float("nan")], [1.0, 1.0, 1.0], [3.0, 0.5, 1.0]])
    (first, own), (second, other) = new(), new()
    first.train_step(*batch(0))
    for row in metrics:
        own.step(row)
    first.save_all(tmp_path, states={"scheduler": own})
    second.load_all(tmp_path, states={"scheduler": other})
    for mb, scheduler in ((first, own), (second, other)):
        mb.train_step(*batch(1))
        scheduler.step(metrics[2])
    assert other.get_last_lr() == own.get_last_lr()
    assert own.get_last_lr()[0] < 0.02
    assert_same(everything(second), everything(first))


@pytest.mark.parametrize("attached", [False, True])
def test_gradient_scaling(attached: bool, tmp_path: Path) -> None:
    def new(seed: int) -> ModelBatch:
        return build(torch.optim.Adam, seed=seed, lr=0.01)

    def scaled() -> BundleGradScaler:
        return BundleGradScaler(2.0**40, growth_interval=2)

    reference = new(0)
    reference.grad_scaler = scaled()
    train(reference, range(8), amp_dtype=torch.float16)
    first = new(0)
    first.grad_scaler = scaled()
    train(first, range(4), amp_dtype=torch.float16)
    assert first.grad_scaler.get_scale() != [2.0**40] * M
    first.save_all(tmp_path)
    second = new(1)
    if attached:
        second.grad_scaler = BundleGradScaler()
    second.load_all(tmp_path)
    train(second, range(4, 8), amp_dtype=torch.float16)
    assert_same(everything(second), everything(reference))


def test_stock_scaler(tmp_path: Path) -> None:
    def new(seed: int) -> ModelBatch:
        mb = build(torch.optim.Adam, seed=seed)
        mb.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=2)
        return mb

    first, second = new(0), new(1)
    train(first, range(3))
    first.save_all(tmp_path)
    second.load_all(tmp_path)
    for mb in (first, second):
        train(mb, range(3, 6))
    assert_same(everything(second), everything(first))


class Lazy(nn.Module):
    """A buffer that the first forward makes, one that changes its shape, and extra state."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("seen", None)
        self.register_buffer("cache", torch.zeros(1), persistent=False)
        self.version = p

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        if self.seen is None:
            self.seen = out.detach().mean(0)
        self.cache = out.detach().sum(0)
        return out + self.seen

    def get_extra_state(self) -> dict[str, Any]:
        return {"version": self.version, "table": torch.arange(2)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.version = state["version"]


def test_buffers_made_by_the_forward_and_extra_state(tmp_path: Path) -> None:
    def new(seed: int) -> ModelBatch:
        return build(seed=seed, net=Lazy, ignore_attributes=["version"])

    first, second = new(0), new(1)
    for i, model in enumerate(first.models):
        model.version = 10 + i
    train(first, range(2))
    first.save_all(tmp_path)
    second.load_all(tmp_path)
    assert [model.version for model in second.models] == [10, 11, 12]
    assert_same(everything(second), everything(first))
    for mb in (first, second):
        train(mb, range(2, 4))
    assert_same(everything(second), everything(first))
