"""Checkpoints in bundles of other size, precision, device or kind of optimizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_case import M, Net, assert_same, build, everything, train
from torch import nn
from torch.optim import lr_scheduler

from modelbatch import BundleGradScaler, ModelBatch, OptimizerFactory
from modelbatch.checkpoint import checkpoint_info
from modelbatch.optim import FusedOptimizer, build_view_optimizer


def saved(directory: Path, cls: type = torch.optim.Adam, **more: Any) -> ModelBatch:
    mb = build(cls, fallback="silent", **more)
    mb.freeze(1)
    train(mb, range(3))
    mb.save_all(directory)
    return mb


def smooth(p: float) -> nn.Module:
    """Without BatchNorm: it makes gradients of zero, of which Adam sees the rounding only."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3))


@pytest.mark.parametrize("rng", ["philox", "torch"])
@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.Adafactor, torch.optim.LBFGS])
@pytest.mark.parametrize("indices", [[2], [2, 0], [1, 1, 0, 2, -1], torch.tensor([0, 2, 1])])
def test_indices(indices: Any, cls: type, rng: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"net": smooth, "rng": rng, "dtype": torch.float64}
    mb = saved(tmp_path, cls, **options)
    other = build(cls, num_models=len(indices), seed=1, fallback="silent", **options)
    train(other, range(1))
    other.load_all(tmp_path, indices=indices)
    picked = [int(i) % M for i in indices]
    # a line search among dropout's draws makes 1e-9 of a rounding in three steps
    further = 1 if cls is torch.optim.LBFGS else 3
    for later in (False, True):
        if later:  # the models go on as they would have
            for own in (mb, other):
                train(own, range(3, 3 + further))
        theirs, mine = everything(mb), everything(other)
        for name, tensor in theirs["tensors"].items():
            expected = tensor[picked]
            if not later:
                assert_same(mine["tensors"][name], expected, name)
            torch.testing.assert_close(mine["tensors"][name], expected, rtol=1e-9, atol=1e-12)
        for key in ("seeds", "states", *(() if later else ("optimizer",))):
            if theirs[key]:
                assert_same(mine[key], [theirs[key][i] for i in picked], key)
        assert_same(mine["active"], theirs["active"][picked])
        assert_same(mine["steps"], theirs["steps"][picked])


def test_indices_of_schedulers_and_scalers(tmp_path: Path) -> None:
    def new(num_models: int) -> tuple[ModelBatch, Any]:
        mb = build(torch.optim.SGD, num_models=num_models)
        mb.grad_scaler = BundleGradScaler(2.0**10, growth_interval=1)
        return mb, OptimizerFactory.create_lr_scheduler(
            mb.optimizer, lr_scheduler.ExponentialLR, {"gamma": 0.5}
        )

    mb, scheduler = new(3)
    mb.freeze(1)
    train(mb, range(3), scheduler)
    mb.save_all(tmp_path, states={"scheduler": scheduler})
    other, own = new(2)
    other.load_all(tmp_path, indices=[2, 1], states={"scheduler": own})
    assert own.get_last_lr() == [scheduler.get_last_lr()[i] for i in (2, 1)]
    scales = mb.grad_scaler.get_scale()
    assert other.grad_scaler.get_scale() == [scales[2], scales[1]]
    assert scales[1] != scales[2]
    train(other, range(1), own)


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.NAdam, torch.optim.Adafactor])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_other_precision(cls: type, dtypes: tuple[Any, Any], tmp_path: Path) -> None:
    """The values are rounded once; the optimizer is what torch's own would be after loading."""
    mb = saved(tmp_path, cls, dtype=dtypes[0])
    other = build(cls, dtype=dtypes[1], seed=1, fallback="silent")
    other.load_all(tmp_path)
    theirs, mine = everything(mb), everything(other)
    for name, tensor in theirs["tensors"].items():
        dtype = dtypes[1] if tensor.is_floating_point() else tensor.dtype
        assert_same(mine["tensors"][name], tensor.to(dtype), name)
    for i in range(M):
        alone = other.export(i)
        stock = cls(alone.parameters(), lr=1.0)
        stock.load_state_dict(mb.optimizer.model_state_dict(i))
        for k, parameter in enumerate(alone.parameters()):
            for key, value in stock.state.get(parameter, {}).items():
                own = mine["optimizer"][i]["state"][k][key]
                assert torch.equal(own.to(value.dtype), value), (i, k, key)
    train(other, range(3, 5))


def test_between_computed_at_once_and_model_by_model(tmp_path: Path) -> None:
    """A checkpoint does not depend on how the bundle computes its optimizer's steps."""

    def new(fused: bool, seed: int) -> ModelBatch:
        mb = build(torch.optim.Adam, seed=seed, net=smooth, dtype=torch.float64)
        assert isinstance(mb.optimizer, FusedOptimizer)
        if not fused:
            configs = [{"lr": 0.02 * (i + 1)} for i in range(M)]
            parameters = dict(mb.named_parameters())
            mb.optimizer = build_view_optimizer(
                parameters, mb.models, torch.optim.Adam, configs, active=mb._is_active
            )
        return mb

    for fused in (False, True):
        mb, other = new(fused, 0), new(not fused, 1)
        train(mb, range(3))
        mb.save_all(tmp_path)
        other.load_all(tmp_path)
        assert_same(everything(other), everything(mb))
        for own in (mb, other):
            train(own, range(3, 6))
        for a, b in zip(mb.parameters(), other.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=0)


def test_without_strict_what_does_not_fit_stays(tmp_path: Path) -> None:
    class More(Net):
        def __init__(self, p: float) -> None:
            super().__init__(p)
            self.register_buffer("extra", torch.ones(2))

    mb = saved(tmp_path)
    other = build(torch.optim.SGD, net=More, rng="torch", seed=1)
    streams = other._streams.states
    other.load_all(tmp_path, strict=False)
    assert torch.equal(other[0].first.weight, mb[0].first.weight)
    assert torch.equal(other[0].extra, torch.ones(2))
    assert other.optimizer.param_groups[2]["lr"] == pytest.approx(0.06)
    assert other._streams.states is streams
    assert other.active.tolist() == [True, False, True]
    for models in ([More(0.1)] * 1, [Net(0.1)] * 1):
        small = ModelBatch(models)
        small.load_all(tmp_path, indices=[2], strict=False)
        assert torch.equal(small[0].first.weight, mb[2].first.weight)


def test_a_bundle_without_an_optimizer(tmp_path: Path) -> None:
    mb = saved(tmp_path)
    other = ModelBatch([Net(0.1) for _ in range(M)])
    other.load_all(tmp_path)
    assert_same(everything(other)["tensors"], everything(mb)["tensors"])
    assert other.optimizer is None


def test_info(tmp_path: Path) -> None:
    mb = saved(tmp_path, options=[{"betas": (0.8, 0.9)}, {}, {}])
    info = checkpoint_info(tmp_path)
    assert info["num_models"] == M
    assert info["optimizer"] == "torch.optim.Adam"
    assert info["rng"] == "philox"
    assert info["tensors"]["first.weight"] == (M, 6, 4)
    assert info["models"][0]["hyper_parameters"]["betas"] == (0.8, 0.9)
    assert [model["active"] for model in info["models"]] == [True, False, True]
    assert [model["seed"] for model in info["models"]] == mb.seeds
    assert [model["attributes"] for model in info["models"]] == [
        {"drop.p": 0.1 * (i + 1)} for i in range(M)
    ]


def test_tensor_learning_rates(tmp_path: Path) -> None:
    def new(seed: int) -> ModelBatch:
        mb = build(torch.optim.Adam, seed=seed)
        for group in mb.optimizer.param_groups:
            group["lr"] = torch.tensor(0.1 + seed)
        return mb

    mb, other = new(0), new(1)
    train(mb, range(2))
    mb.save_all(tmp_path)
    other.load_all(tmp_path)
    assert_same(everything(other), everything(mb))


def test_a_copy_of_a_loaded_bundle_goes_on_alike(tmp_path: Path) -> None:
    import copy

    def net(p: float) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))

    mb = build(None, net=net)
    factory = OptimizerFactory(torch.optim.Adam, {"lr": 0.1}, clip_grad_norm=0.1)
    factory.create_optimizer(mb, [{}] * M)
    train(mb, range(2))
    mb.save_all(tmp_path)
    other = build(torch.optim.Adam, seed=1, net=net)
    other.load_all(tmp_path)
    twin = copy.deepcopy(other)
    for own in (mb, other, twin):
        train(own, range(2, 4))
    assert_same(everything(other), everything(mb))
    assert_same(everything(twin)["tensors"], everything(mb)["tensors"])


def test_autograd_sees_the_change(tmp_path: Path) -> None:
    mb = build(None, net=lambda p: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)))
    mb.save_all(tmp_path)
    total = mb(torch.randn(2, 4)).sum()
    mb.load_all(tmp_path)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.needs_cuda
@pytest.mark.parametrize("rng", ["philox", "torch"])
@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.NAdam, torch.optim.Adafactor])
def test_between_devices(cls: type, rng: str, tmp_path: Path) -> None:
    def new(device: str, seed: int) -> ModelBatch:
        torch.manual_seed(seed)
        models = [Net(0.1).to(device) for _ in range(M)]
        return ModelBatch(models, [0.01] * M, cls, rng=rng, fallback="silent")

    def forward(mb: ModelBatch, device: str) -> None:
        generator = torch.Generator().manual_seed(9)
        for _ in range(2):
            x = torch.randn(8, 4, generator=generator).to(device)
            mb.train_step(x, torch.arange(8, device=device) % 3)

    for source in ("cpu", "cuda"):
        mb = new(source, 0)
        forward(mb, source)
        mb.save_all(tmp_path)
        for target in ("cpu", "cuda"):
            other = new(target, 1)
            other.load_all(tmp_path)
            for a, b in zip(mb.state_dict().values(), other.state_dict().values()):
                assert b.device.type == target
                assert torch.equal(a.cpu(), b.cpu())
            forward(other, target)
            if source == target:
                same = new(source, 0)
                forward(same, source)
                forward(same, source)
                assert_same(everything(other)["tensors"], everything(same)["tensors"])
