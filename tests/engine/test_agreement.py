"""The engine and the general path compute the same."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bundle_case import assert_relative, difference, largest, row, state
from engine_case import LOSSES, NETWORKS, OPTIMIZERS, by_engine, make_bundle, mlp, pair, states
from torch import nn

from modelbatch import ModelBatch

SMOOTH = [name for name in NETWORKS if name not in ("relu", "kinks", "cumulative")]


def _train(
    bundles: tuple[ModelBatch, ModelBatch], batches: list[Any], loss_fn: Any, **options: Any
) -> None:
    ours, theirs = bundles
    for x, y in batches:
        a = ours.train_step(x, y, loss_fn=loss_fn, **options)
        b = theirs.train_step(x, y, loss_fn=loss_fn, **options)
        assert by_engine(ours) and not by_engine(theirs), ours._engine.reason
        assert a.dtype == b.dtype and a is ours.latest_losses
        assert_relative(a, b, 1e-9, "losses")


def _batches(network: str, loss: str, count: int, batch: int = 9) -> list[Any]:
    torch.manual_seed(1)
    return [(NETWORKS[network][1](batch), LOSSES[loss][1](batch)) for _ in range(count)]


def _compare(ours: ModelBatch, theirs: ModelBatch, tolerance: float) -> None:
    a, b = states(ours), states(theirs)
    assert a.keys() == b.keys()
    scale = largest([t for t in b.values() if t.is_floating_point()])
    for name in a:
        error = difference(a[name], b[name])
        assert error <= tolerance * scale, f"{name}: {error:.2e} of {scale:.2e}"


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_after_one_step_and_after_a_hundred(network: str) -> None:
    bundles = pair(NETWORKS[network][0])
    _train(bundles, _batches(network, "cross_entropy", 1), F.cross_entropy)
    _compare(*bundles, 1e-12)
    if network in SMOOTH:
        _train(bundles, _batches(network, "cross_entropy", 99), F.cross_entropy)
        _compare(*bundles, 1e-9)
    for a, b in zip(bundles[0].metrics().items(), bundles[1].metrics().items()):
        assert a[0] == b[0] and a[1] == pytest.approx(b[1], rel=1e-8)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_every_loss(loss: str, weighted: bool) -> None:
    if weighted and loss.endswith("_sum"):
        pytest.skip("a sum has no weighted mean")
    loss_fn, _ = LOSSES[loss]
    bundles = pair(lambda: mlp(nn.Tanh()), "sgd", shared_input=True)
    options = {}
    if weighted:
        weight = torch.rand(3, 9, dtype=torch.float64) + 0.1
        weight[0, :4] = 0
        weight[1] = 0
        options["sample_weight"] = weight
    _train(bundles, _batches("tanh", loss, 1), loss_fn, **options)
    _compare(*bundles, 1e-12)
    assert bundles[0]._without_samples == bundles[1]._without_samples


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, "norm", "value"])
def test_every_optimizer(optimizer: str, clip: str | None) -> None:
    bundles = pair(lambda: mlp(nn.Tanh()), optimizer)
    for bundle in bundles:
        bundle.freeze(1)
        if clip is not None:
            setattr(bundle.optimizer, f"clip_grad_{clip}", [0.01, 0.1, 5.0])
    _train(bundles, _batches("tanh", "mse", 1), F.mse_loss)
    _compare(*bundles, 1e-12)
    if clip == "norm":
        a, b = (bundle.optimizer.last_grad_norms for bundle in bundles)
        assert_relative(a, b, 1e-12, "norms")
    _train(bundles, _batches("tanh", "mse", 20), F.mse_loss)
    for bundle in bundles:
        bundle.unfreeze(1)
    _train(bundles, _batches("tanh", "mse", 20), F.mse_loss)
    _compare(*bundles, 1e-9)


def test_options_that_differ_between_models() -> None:
    bundles = pair(lambda: mlp(nn.Tanh()), "amsgrad")
    for bundle in bundles:
        groups = bundle.optimizer.param_groups
        groups[0]["amsgrad"], groups[1]["maximize"], groups[2]["betas"] = False, False, (0.5, 0.9)
    _train(bundles, _batches("tanh", "mse", 30), F.mse_loss)
    _compare(*bundles, 1e-9)


def test_numbers_that_differ_between_models() -> None:
    def models() -> list[nn.Module]:
        torch.manual_seed(0)
        rates = iter((0.1, 0.5, 0.0, 1.0))
        return [
            nn.Sequential(
                nn.Linear(6, 5, bias=False),
                nn.BatchNorm1d(5, eps=0.1 * p, momentum=p or None),
                nn.LeakyReLU(p),
                nn.Dropout(p / 2),
                nn.Linear(5, 4),
            ).double()
            for p in rates
        ]

    bundles = [
        ModelBatch(models(), [0.1] * 4, torch.optim.SGD, seeds=[1, 2, 3, 4]) for _ in range(2)
    ]
    bundles[1].enable_engine(False)
    _train((bundles[0], bundles[1]), _batches("tanh", "mse", 5), F.mse_loss)
    _compare(bundles[0], bundles[1], 1e-11)


@pytest.mark.parametrize("own", ["x", "y", "both"])
def test_data_of_each_model(own: str) -> None:
    from modelbatch import per_model

    bundles = pair(lambda: mlp(nn.Tanh()))
    x, y = torch.randn(3, 9, 6, dtype=torch.float64), torch.randint(4, (3, 9))
    x, y = (per_model(x) if own != "y" else x[0]), (per_model(y) if own != "x" else y[0])
    _train(bundles, [(x, y)] * 3, F.cross_entropy)
    _compare(*bundles, 1e-11)


def test_inputs_as_tuple_and_dict_and_strided() -> None:
    bundles = pair(NETWORKS["residual"][0])
    x, y = torch.randn(6, 9, dtype=torch.float64).t(), torch.randint(4, (18,))[::2]
    _train(bundles, [((x,), y), ({"x": x}, y)], F.cross_entropy)
    _compare(*bundles, 1e-11)


def test_parameters_that_do_not_learn() -> None:
    def build() -> nn.Module:
        model = mlp(nn.Tanh(), nn.Tanh())
        model[0].weight.requires_grad_(False)
        model[2].bias.requires_grad_(False)
        model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
        return model

    bundles = pair(build)
    _train(bundles, _batches("tanh", "mse", 3), F.mse_loss)
    _compare(*bundles, 1e-11)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("network", ["tanh", "smooth", "rows"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_float32_is_as_exact_as_torch(network: str, loss: str, optimizer: str) -> None:
    build, _ = NETWORKS[network]
    loss_fn, _ = LOSSES[loss]
    cls, options = OPTIMIZERS[optimizer]
    bundle = make_bundle(build, optimizer, dtype=torch.float32)
    alone = [bundle.export(i) for i in range(3)]
    exact = [bundle.export(i).double() for i in range(3)]
    batches = _batches(network, loss, 10)
    for x, y in batches:
        short = [t.float() if t.is_floating_point() else t for t in (x, y)]
        bundle.train_step(*short, loss_fn=loss_fn)
        assert by_engine(bundle)
    errors, own_errors = [], []
    for i in range(3):
        for model in (alone[i], exact[i]):
            dtype = next(model.parameters()).dtype
            own = cls(model.parameters(), lr=0.01 * (1 + i), **options)
            for x, y in batches:
                data = [t.to(dtype) if t.is_floating_point() else t for t in (x, y)]
                own.zero_grad()
                loss_fn(model(data[0]), data[1]).backward()
                own.step()
        errors.append(difference(state(bundle[i]), state(exact[i])))
        own_errors.append(difference(state(alone[i]), state(exact[i])))
    floor = torch.finfo(torch.float32).eps * largest([state(m) for m in exact])
    assert max(errors) <= 2 * max(own_errors) + floor


def test_nan_stays_in_its_model() -> None:
    results = []
    for spoil in (False, True):
        bundle = make_bundle(NETWORKS["residual"][0], dtype=torch.float32)
        if spoil:
            bundle[1].out.weight.data.fill_(float("nan"))
        for x, y in _batches("residual", "cross_entropy", 3):
            bundle.train_step(x.float(), y)
        assert by_engine(bundle)
        assert bool(bundle.metrics()["loss_model_1"] != bundle.metrics()["loss_model_1"]) is spoil
        results.append(row(dict(bundle.state_dict()), 0) | row(dict(bundle.state_dict()), 2))
    assert all(torch.equal(a, b) for a, b in zip(results[0].values(), results[1].values()))


def test_what_unused_samples_hold_reaches_nothing() -> None:
    bundles = pair(NETWORKS["residual"][0])
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randint(4, (9,))
    weight = torch.ones(3, 9)
    weight[:, 0] = 0
    weight[1, 3:] = 0
    x[0] = float("nan")
    x[5] = float("inf")
    weight[0, 5] = weight[2, 5] = 0
    y[0] = 77
    for k in range(3):
        ours, theirs = (b.train_step(x, y, sample_weight=weight) for b in bundles)
        assert by_engine(bundles[0]), (k, bundles[0]._engine.reason)
        assert ours.isfinite().all()
        assert_relative(ours, theirs, 1e-11)
    _compare(*bundles, 1e-11)
