"""Whichever path a step takes, the training goes on the same; and bits depend on nothing else."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_case import NETWORKS, Residual, assert_same, by_engine, make_bundle, mlp, pair, states
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, StepLR

from modelbatch import ModelBatch, ModelBatchError, OptimizerFactory, per_model


def _data(count: int, batch: int = 9, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(count, batch, 6, dtype=dtype), torch.randint(4, (count, batch))


# ---- both paths in one training


@pytest.mark.parametrize("optimizer", ["adam", "momentum", "rmsprop_centered", "adagrad"])
def test_paths_may_alternate(optimizer: str, tmp_path: Path) -> None:
    ours, theirs = pair(Residual, optimizer)
    xs, ys = _data(12)
    for k, (x, y) in enumerate(zip(xs, ys)):
        ours.enable_engine(k % 3 != 1)
        for bundle in (ours, theirs):
            if k == 4:
                bundle.freeze([0, 2])
            if k == 6:
                bundle.unfreeze(0)
            if k == 7:
                bundle.unfreeze(2)
                for group in bundle.optimizer.param_groups:
                    group["lr"] *= 0.5
            bundle.train_step(x, y)
        assert by_engine(ours) == (k % 3 != 1)
        if k == 8:
            ours.save_all(tmp_path / "kept")
            ours = make_bundle(Residual, optimizer)
            ours.load_all(tmp_path / "kept")
    assert_same(ours, theirs, 1e-9)
    assert all(p.grad is None for p in ours.parameters())


def test_gradients_of_the_general_path_are_cleared() -> None:
    bundle = make_bundle(lambda: mlp(nn.Tanh()))
    (x, *_), (y, *_) = _data(1)
    bundle.enable_engine(False)
    bundle.train_step(x, y)
    assert bundle.optimizer.param_groups[0]["params"][0].grad is not None
    versions = [p._version for p in bundle.parameters()]
    bundle.enable_engine()
    bundle.train_step(x, y)
    assert all(p.grad is None for p in bundle.parameters())
    assert all(p.grad is None for p in bundle[0].parameters())
    assert all(p._version > v for p, v in zip(bundle.parameters(), versions))


def test_what_is_replaced_is_noticed() -> None:
    bundles = pair(Residual)
    (x, *_), (y, *_) = _data(1)

    def step() -> None:
        for bundle in bundles:
            bundle.train_step(x, y)
        assert by_engine(bundles[0]), bundles[0]._engine.reason
        assert_same(*bundles, 1e-9)

    step()
    saved = [{k: v.clone() for k, v in b.state_dict().items()} for b in bundles]
    step()
    for bundle, values in zip(bundles, saved):
        bundle.load_state_dict(values)
    step()
    for bundle, values in zip(bundles, saved):
        bundle.load_state_dict({k: v.clone() for k, v in values.items()}, assign=True)
    bundles = tuple(copy.deepcopy(bundle) for bundle in bundles)
    step()
    for bundle in bundles:
        bundle.load_model(1, {k: v.clone() for k, v in bundle[0].state_dict().items()})
    step()
    for bundle in bundles:
        dict(bundle.named_parameters())["second.weight"].requires_grad_(False)
    step()
    for bundle in bundles:
        dict(bundle.named_parameters())["second.weight"].requires_grad_(True)
    for bundle in bundles:
        bundle.train_step(x, y)
    # one parameter has taken fewer steps than the others, which one call cannot take
    assert "different numbers of steps" in str(bundles[0]._engine.reason)
    assert_same(*bundles, 1e-9)
    for bundle in bundles:
        OptimizerFactory(torch.optim.SGD).create_optimizer(bundle, [{"lr": 0.1}] * 3)
    step()
    x = x.float()
    for bundle in bundles:
        bundle.float().train_step(x, y)
        assert bundle[0].out.weight.dtype == torch.float32
    assert by_engine(bundles[0])
    assert_same(*bundles, 1e-4)


def test_stock_schedulers_do_not_miss_the_step() -> None:
    bundle = make_bundle(lambda: mlp(nn.Tanh()))
    (x, *_), (y, *_) = _data(1)
    scheduler = StepLR(bundle.optimizer, 1, 0.5)
    bundle.train_step(x, y)
    assert by_engine(bundle)
    scheduler.step()  # warns if no step came before it
    own = OptimizerFactory.create_lr_scheduler(bundle.optimizer, ExponentialLR, {"gamma": 0.5})
    bundle.train_step(x, y)
    own.step()
    assert by_engine(bundle)
    assert bundle.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 / 4)


# ---- bits


@pytest.mark.parametrize("network", ["residual", "relu", "rows", "bag"])
def test_bits_depend_on_nothing_but_the_model(network: str) -> None:
    build, make_x = NETWORKS[network]
    torch.manual_seed(0)
    models = [build() for _ in range(256)]
    torch.manual_seed(1)
    batches = [(make_x(20), torch.randint(4, (20,))) for _ in range(3)]
    if network != "bag":
        batches = [(x.float(), y) for x, y in batches]

    def train(which: list[int], threads: int, together: bool) -> list[dict[str, Tensor]]:
        torch.set_num_threads(threads)
        bundle = ModelBatch(
            copy.deepcopy([models[i] for i in which]),
            [0.01] * len(which),
            torch.optim.Adam,
            seeds=which,
        )
        if together:
            bundle.train_steps(*(torch.stack(part) for part in zip(*batches)))
        else:
            for x, y in batches:
                bundle.train_step(x, y)
        assert by_engine(bundle), bundle._engine.reason
        return [dict(bundle[slot].state_dict()) for slot in range(len(which))]

    reference = train(list(range(256)), 2, False)
    some = [[7], [255, 7], list(range(33)), list(range(255, -1, -1))]
    for which in some:
        for threads, together in ((1, True), (2, False), (2, True)):
            for i, own in zip(which, train(which, threads, together)):
                assert all(torch.equal(v, reference[i][k]) for k, v in own.items()), (i, which)


def test_frozen_models_keep_every_bit_and_change_nobody_elses() -> None:
    free, part = make_bundle(Residual), make_bundle(Residual)
    xs, ys = _data(3)
    for bundle in (free, part):
        bundle.train_step(xs[0], ys[0])
    part.freeze(1)
    kept = states(part)
    for x, y in zip(xs[1:], ys[1:]):
        for bundle in (free, part):
            bundle.train_step(x, y)
    now, all_free = states(part), states(free)
    for name, value in now.items():
        if value.dim() and len(value) == 3:
            assert torch.equal(value[1], kept[name][1]), name
            assert torch.equal(value[0], all_free[name][0]), name
            assert torch.equal(value[2], all_free[name][2]), name


# ---- train_steps


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("weighted", [None, "shared", "own"])
def test_train_steps_is_k_train_steps(engine: bool, weighted: str | None) -> None:
    several = make_bundle(Residual)
    several.enable_engine(engine)
    single = copy.deepcopy(several)
    xs, ys = _data(5)
    weights = None
    if weighted is not None:
        weights = torch.rand(5, *((3,) if weighted == "own" else ()), 9, dtype=torch.float64) + 0.1
        weights[..., 2:4] = 0
        if weighted == "own":
            weights[1, 2] = 0
    for bundle in (several, single):
        bundle.freeze(1)
    losses = several.train_steps(xs, ys, sample_weight=weights)
    expected = []
    for k in range(5):
        own = None if weights is None else weights[k]
        expected.append(single.train_step(xs[k], ys[k], sample_weight=own).clone())
    assert by_engine(several) is engine
    assert torch.equal(losses, torch.stack(expected))
    assert torch.equal(several.latest_losses, losses[-1])
    assert_same(several, single, 0)


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("per_model_rates", [True, False])
def test_learning_rates_of_every_step(engine: bool, per_model_rates: bool) -> None:
    several = make_bundle(lambda: mlp(nn.Tanh()))
    several.enable_engine(engine)
    single = copy.deepcopy(several)
    xs, ys = _data(4)
    rates = torch.rand(4, 3, dtype=torch.float64)
    if not per_model_rates:
        rates = rates[:, :1].expand(4, 3)
    several.train_steps(xs, ys, lr=rates if per_model_rates else rates[:, 0].tolist())
    assert [g["lr"] for g in several.optimizer.param_groups] == [0.01, 0.02, 0.03]
    for k in range(4):
        for group, rate in zip(single.optimizer.param_groups, rates[k].tolist()):
            group["lr"] = rate
        single.train_step(xs[k], ys[k])
    for group, rate in zip(single.optimizer.param_groups, (0.01, 0.02, 0.03)):
        group["lr"] = rate
    assert_same(several, single, 0)


def test_train_steps_takes_what_train_step_takes() -> None:
    several = make_bundle(Residual)
    single = copy.deepcopy(several)
    xs, ys = torch.randn(2, 3, 9, 6, dtype=torch.float64), torch.randint(4, (2, 3, 9))
    several.train_steps({"x": per_model(xs)}, per_model(ys))
    assert by_engine(several)
    for x, y in zip(xs, ys):
        single.train_step({"x": per_model(x)}, per_model(y))
    assert_same(several, single, 0)


def test_train_steps_refuses() -> None:
    bundle = make_bundle(Residual)
    xs, ys = _data(3)
    for x, y, options, message in (
        (xs, ys[:2], {}, "leading axes of 2, 3"),
        (xs[:0], ys[:0], {}, "at least 1"),
        (torch.tensor(1.0), ys, {}, "leading axis of K steps"),
        (xs, ys, {"lr": [0.1]}, "lr must be of shape"),
        (xs, ys, {"lr": [0.1, -0.1, 0.1]}, r"lr\[1\] of model 0"),
        (xs, ys, {"lr": "fast"}, "lr must be"),
    ):
        with pytest.raises(ModelBatchError, match=message):
            bundle.train_steps(x, y, **options)
    with pytest.raises(ModelBatchError, match="no optimizer"):
        ModelBatch([nn.Linear(6, 4)]).train_steps(xs, ys)


def test_a_model_that_is_not_finite_stops_by_itself() -> None:
    several = make_bundle(Residual)
    single = copy.deepcopy(several)
    xs, ys = _data(4)
    x = per_model(xs.unsqueeze(1).repeat(1, 3, 1, 1))
    x.value[1, 2, 0] = float("inf")
    several._engine.stop_nonfinite = True
    losses = several.train_steps(x, ys)
    for k in range(4):
        own = single.train_step(per_model(x.value[k]), ys[k])
        assert torch.equal(own.isfinite(), losses[k].isfinite())
        assert torch.equal(own[:2], losses[k, :2])
        if k == 1:
            single.freeze(2)
    assert_same(several, single, 0) if not _has_nan(several) else _assert_bits(several, single)


def _has_nan(bundle: ModelBatch) -> bool:
    return any(v.isnan().any() for v in states(bundle).values() if v.is_floating_point())


def _assert_bits(a: ModelBatch, b: ModelBatch) -> None:
    for (name, value), other in zip(states(a).items(), states(b).values()):
        assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(other)), name


def test_copies_have_an_engine_of_their_own() -> None:
    bundle = make_bundle(lambda: mlp(nn.Tanh()))
    (x, *_), (y, *_) = _data(1)
    bundle.train_step(x, y)
    other = copy.deepcopy(bundle)
    assert other._engine is not bundle._engine
    for b in (bundle, other):
        b.train_step(x, y, loss_fn=F.cross_entropy)
        assert by_engine(b)
    assert_same(bundle, other, 0)


def test_explain_says_which_path(capsys: Any) -> None:
    bundle = make_bundle(Residual)
    x = torch.randn(9, 6, dtype=torch.float64)
    before = states(bundle)
    assert bundle.explain(x).step_path.startswith("engine")
    assert "train_step: engine" in str(bundle.explain(x=x))
    assert "eval mode" in bundle.eval().explain(x).step_path
    bundle.train()
    assert "switched off" in bundle.enable_engine(False).explain(x).step_path
    assert all(torch.equal(v, before[k]) for k, v in states(bundle).items())
    assert "no optimizer" in ModelBatch([mlp(nn.Tanh())]).explain(x.float()).step_path
