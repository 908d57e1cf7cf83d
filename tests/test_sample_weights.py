"""Training with sample weights equals training each model alone on its own samples."""

import copy

import pytest
import torch
import torch.nn.functional as F
from bundle_case import assert_relative, gradients, state
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from weights_case import (
    KINDS,
    OPTIMIZERS,
    RATES,
    B,
    M,
    make_bundle,
    make_counts,
    make_data,
    make_models,
    norm_2d,
    optimizer_state,
    own_rows,
    train_alone,
)

from modelbatch import BundleGradScaler, FallbackWarning, ModelBatch, ModelBatchError, per_model


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own_data"])
@pytest.mark.parametrize("most", [1, 3], ids=["masks", "multiplicities"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_equals_training_alone(kind: str, optimizer: str, most: int, own: bool) -> None:
    models, data, counts = make_models(kind), make_data(12, own), make_counts(12, most)
    bundle = make_bundle(models, optimizer, shared_input=not own)
    losses = [bundle.train_step(x, y, sample_weight=weight) for (x, y), weight in zip(data, counts)]
    together = torch.stack(losses)
    for i, model in enumerate(models):
        alone, own_losses = train_alone(model, i, optimizer, data, counts, own)
        assert_relative(
            together[:, i],
            torch.tensor(own_losses, dtype=torch.float64),
            1e-9,
            f"losses of model {i}",
        )
        assert_relative(state(bundle[i]), state(model), 1e-9, f"model {i}")
        assert bundle.optimizer is not None
        mine = bundle.optimizer.model_state_dict(i)["state"]  # type: ignore[attr-defined]
        assert_relative(mine, optimizer_state(alone), 1e-9, f"optimizer state of model {i}")


@pytest.mark.parametrize("kind", KINDS)
def test_what_masked_samples_hold_reaches_nothing(kind: str) -> None:
    """Garbage in inputs and targets of weight 0: the same bits as with other samples there."""
    models, counts = make_models(kind), make_counts(6)
    results = []
    for garbage in (0.0, float("nan"), float("inf"), 1e300):
        bundle = make_bundle(models, "Adam", shared_input=False)
        for (x, y), weight in zip(make_data(6, True), counts):
            unused = weight == 0
            bad_x = torch.where(unused.unsqueeze(2), garbage, x) if garbage else x
            bad_y = torch.where(unused, -77 if garbage else 0, y)
            bundle.train_step(bad_x, bad_y, sample_weight=weight)
        assert all(t.isfinite().all() for t in bundle.state_dict().values())
        results.append(state(bundle))
    for result in results[1:]:
        assert_relative(result, results[0], 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("used", ["nobody", "somebody"])
def test_nan_in_a_shared_batch_stays_with_the_models_that_see_it(kind: str, used: str) -> None:
    models, data = make_models(kind), make_data(3, False)
    counts = make_counts(3, empty=False)
    bundle = make_bundle(models, "Adam")
    for (x, y), weight in zip(data, counts):
        x[4] = float("nan")
        weight[:, 4] = 0
        if used == "somebody":
            weight[1, 4] = 1
        bundle.train_step(x, y, sample_weight=weight)
    for i, model in enumerate(models):
        train_alone(model, i, "Adam", data, counts, False)
        finite = all(t.isfinite().all() for t in state(bundle[i]).values())
        assert finite == (used == "nobody" or i != 1)
        if finite:
            assert_relative(state(bundle[i]), state(model), 1e-9, f"model {i}")


def test_a_model_without_samples_keeps_every_bit() -> None:
    bundle = make_bundle(make_models("norm_1d"), "Adam")
    (x, y), *_ = make_data(1, False)
    bundle.train_step(x, y)
    assert bundle.optimizer is not None
    before, kept = state(bundle[1]), bundle.optimizer.model_state_dict(1)  # type: ignore[attr-defined]
    weight = torch.ones(M, B)
    weight[1] = 0
    losses = bundle.train_step(x, y, sample_weight=weight)
    assert losses[1] == 0 and losses[0] > 0
    assert all(torch.equal(v, before[k]) for k, v in bundle[1].state_dict().items())
    now = bundle.optimizer.model_state_dict(1)  # type: ignore[attr-defined]
    for k, own in kept["state"].items():
        for name, value in own.items():
            assert torch.equal(now["state"][k][name], value), name
    assert all(g is None or not g.any() for g in bundle.gradients(1).values())
    assert bundle[0][1].num_batches_tracked == 2  # type: ignore[index, operator]
    assert bundle.active.all()
    assert bundle.metrics()["best_model"] != 1


def test_a_batch_of_which_nobody_has_anything() -> None:
    bundle = make_bundle(make_models("norm_1d"))
    (x, y), *_ = make_data(1, False)
    bundle.train_step(x, y)
    before = state(bundle)
    losses = bundle.train_step(x, y, sample_weight=torch.zeros(M, B))
    assert torch.equal(losses, torch.zeros(M, dtype=torch.float64))
    assert all(torch.equal(v, before[k]) for k, v in bundle.state_dict().items())
    assert all(p.grad is None for p in bundle.parameters())


@pytest.mark.parametrize("kind", ["norm_1d", "branching"])
def test_one_sample_is_refused_by_the_models_name(kind: str) -> None:
    bundle = make_bundle(make_models(kind))
    (x, y), *_ = make_data(1, False)
    weight = torch.ones(M, B)
    weight[2, 1:] = 0
    before = state(bundle)
    with pytest.raises(ModelBatchError, match="model 2: Expected more than 1 value per channel"):
        bundle.train_step(x, y, sample_weight=weight)
    assert all(torch.equal(v, before[k]) for k, v in bundle.state_dict().items())
    assert bundle.active.all()
    bundle.freeze(2)  # who does not train has no need of a variance
    bundle.train_step(x, y, sample_weight=weight)
    bundle.unfreeze(2)
    weight[2, 0] = 2  # the sample twice: torch accepts that
    bundle.train_step(x, y, sample_weight=weight)


def test_one_sample_is_enough_where_it_has_positions() -> None:
    models = make_models("norm_2d")
    bundle = make_bundle(models)
    data, counts = make_data(2, False), [torch.ones(M, B, dtype=torch.int64) for _ in range(2)]
    for weight, (x, y) in zip(counts, data):
        weight[2, 1:] = 0
        bundle.train_step(x, y, sample_weight=weight)
    train_alone(models[2], 2, "SGD", data, counts, False)
    assert_relative(state(bundle[2]), state(models[2]), 1e-9)


def test_weights_for_all_models_of_any_dtype() -> None:
    (x, y), *_ = make_data(1, False)
    keep = torch.arange(B) % 3 != 0
    results = []
    for weight in (
        keep,
        keep.double(),
        keep.int(),
        keep.expand(M, B),
        per_model(keep.expand(M, B)),
    ):
        bundle = make_bundle(make_models("norm_1d"))
        bundle.train_step(x, y, sample_weight=weight)
        results.append(state(bundle))
    for result in results[1:]:
        assert_relative(result, results[0], 1e-12)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.full((M, B), -1.0), "of model 0 must be finite and not negative"),
        (torch.full((B,), float("nan")), "sample weights must be finite"),
        (torch.ones(M + 1, B), r"must be real of shape \[B\] or \[3, B\]"),
        (torch.ones(M, B, 1), "must be real of shape"),
    ],
)
def test_bad_weights_are_refused(weight: Tensor, message: str) -> None:
    bundle = make_bundle(make_models("plain"))
    (x, y), *_ = make_data(1, False)
    before = state(bundle)
    with pytest.raises(ModelBatchError, match=message):
        bundle.train_step(x, y, sample_weight=weight)
    assert all(torch.equal(v, before[k]) for k, v in bundle.state_dict().items())


def weighted_norm(model: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """norm_1d with weighted statistics, written out."""
    h = model[0](x)  # type: ignore[index]
    total = weight.sum()
    mean = (h * weight[:, None]).sum(0) / total
    var = ((h - mean).square() * weight[:, None]).sum(0) / total
    norm = model[1]  # type: ignore[index]
    h = (h - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias
    return model[3](model[2](h))  # type: ignore[index]


@pytest.mark.parametrize("looped", [False, True])
def test_fractional_weights(looped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    models, (data, *_) = make_models("norm_1d"), make_data(1, False)
    x, y = data
    weight = torch.rand(M, B, dtype=torch.float64) + 0.1
    weight[1, :3] = 0
    bundle = make_bundle(models)
    if looped:
        for model in bundle.models:
            model.register_forward_hook(lambda *_: None)
    with bundle.sample_weights(weight):
        bundle.compute_loss(bundle(x), y, sample_weight=weight).backward()
    for i, model in enumerate(models):
        own = weight[i]
        losses = F.cross_entropy(weighted_norm(model, x, own), y, reduction="none")
        ((losses * own).sum() / own.sum()).backward()
        assert_relative(bundle.gradients(i), gradients(model), 1e-9, f"model {i}")
        h = model[0](x).detach()  # type: ignore[index]
        mean = (h * own[:, None]).sum(0) / own.sum()
        assert_relative(bundle[i][1].running_mean, 0.1 * mean, 1e-9)  # type: ignore[index]
        var = ((h - mean).square() * own[:, None]).sum(0) / (own.sum() - 1)
        assert_relative(bundle[i][1].running_var, 0.9 + 0.1 * var, 1e-9)  # type: ignore[index]


def test_tiny_fractional_weights_do_not_blow_up_the_variance() -> None:
    bundle = make_bundle(make_models("norm_1d"))
    (x, y), *_ = make_data(1, False)
    bundle.train_step(x, y, sample_weight=torch.full((M, B), 1.0000001 / B))
    for model in bundle.models:
        biased = model[1].running_var  # type: ignore[index]
        assert biased.max() < 10


def test_the_context_holds_for_a_forward_and_a_step_of_ones_own() -> None:
    (x, y), *_ = make_data(1, False)
    weight = make_counts(2)[1]
    stepped, own = make_bundle(make_models("norm_1d")), make_bundle(make_models("norm_1d"))
    stepped.train_step(x, y, sample_weight=weight)
    with own.sample_weights(weight):
        assert own.active.tolist() == (weight.sum(1) > 0).tolist()
        own.compute_loss(own(x), y, sample_weight=weight).backward()
        own.step()
        own.freeze(1)
    assert own.active.tolist() == [True, False, True]
    assert_relative(state(own), state(stepped), 1e-12)
    with own.sample_weights(weight), own.sample_weights(None):
        assert own(x).shape == (M, B, 3)


def test_an_operation_over_another_batch_runs_model_by_model_and_says_so() -> None:
    models = make_models("per_step")
    bundle = ModelBatch(models)
    (x, _), *_ = make_data(1, False)
    with bundle.sample_weights(make_counts(1)[0]), pytest.warns(FallbackWarning, match="18"):
        bundle(x)
    bundle(x)  # without weights it is batched as before
    assert bundle.explain(x).whole_forward is None
    strict = ModelBatch(make_models("per_step"), fallback="error")
    with (
        strict.sample_weights(make_counts(1)[0]),
        pytest.raises(ModelBatchError, match="18"),
    ):
        strict(x)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own_data"])
@pytest.mark.parametrize("kind", ["plain", "norm_1d"])
def test_compiled_equals_eager(kind: str, own: bool) -> None:
    bundles = [make_bundle(make_models(kind), shared_input=not own) for _ in range(2)]
    bundles[1].enable_compile(backend="aot_eager")
    for (x, y), weight in zip(make_data(4, own), make_counts(4)):
        if own:
            x = torch.where((weight == 0).unsqueeze(2), float("nan"), x)
        for bundle in bundles:
            bundle.train_step(x, y, sample_weight=weight)
    assert_relative(state(bundles[1]), state(bundles[0]), 1e-10)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).double().mean()


@pytest.mark.parametrize("kind", ["norm_1d", "branching"])
def test_evaluation_is_over_each_models_own_samples(kind: str) -> None:
    models, data, counts = make_models(kind), make_data(3, False), make_counts(3)
    bundle = make_bundle(models)
    loader = [(x, y, weight) for (x, y), weight in zip(data, counts)]
    result = bundle.evaluate(loader, metric_fns={"accuracy": accuracy})
    for i, model in enumerate(models):
        model.eval()
        x = torch.cat([x[own_rows(w[i])] for (x, _), w in zip(data, counts)])
        y = torch.cat([y[own_rows(w[i])] for (_, y), w in zip(data, counts)])
        with torch.no_grad():
            outputs = model(x)
        assert_relative(result["loss"][i], F.cross_entropy(outputs, y), 1e-9)
        assert_relative(result["accuracy"][i], accuracy(outputs, y), 1e-9)
    assert all(module.training for module in bundle.modules())


def test_evaluation_of_a_model_without_samples_is_nan() -> None:
    bundle = make_bundle(make_models("plain"))
    (x, y), *_ = make_data(1, False)
    weight = torch.ones(M, B)
    weight[0] = 0
    loss = bundle.evaluate([(x, y, weight)])["loss"]
    assert loss.isnan().tolist() == [True, False, False]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=2, max_size=2))
def test_any_counts_give_the_statistics_of_repeated_samples(counts: list[list[int]]) -> None:
    weight = torch.tensor(counts)
    torch.manual_seed(0)
    models = [nn.Sequential(nn.BatchNorm1d(3)).double() for _ in range(2)]
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    bundle = ModelBatch(copy.deepcopy(models), shared_input=False, fallback="error")
    refused = any(sum(row) == 1 for row in counts)
    with bundle.sample_weights(weight):
        if refused:
            with pytest.raises(ModelBatchError, match="model [01]: Expected more than 1 value"):
                bundle(x)
            return
        outputs = bundle(x)
    for i, model in enumerate(models):
        rows = own_rows(weight[i])
        if len(rows):
            expected = model(x[i][rows])
            # a sample that is there twice alone has variance 0, and its output is a rounding error
            torch.testing.assert_close(outputs[i][rows], expected, rtol=1e-9, atol=1e-9)
        assert_relative(state(bundle[i]), state(model), 1e-9)


def test_a_model_without_samples_keeps_its_random_stream_and_its_scale() -> None:
    torch.manual_seed(0)
    models: list[nn.Module] = [
        nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)) for _ in range(M)
    ]
    x, y = torch.randn(B, 4), torch.randint(3, (B,))
    weight = torch.ones(M, B)
    weight[1] = 0
    results = []
    for extra in (False, True):
        bundle = ModelBatch(
            copy.deepcopy(models), RATES, torch.optim.Adam, seeds=[1, 2, 3], fallback="error"
        )
        bundle.grad_scaler = BundleGradScaler(growth_interval=2)
        bundle.train_step(x, y)
        if extra:
            bundle.train_step(x, y, sample_weight=weight)
        bundle.train_step(x, y)
        results.append((state(bundle[1]), bundle.grad_scaler.get_scale()))
    assert all(torch.equal(v, results[1][0][k]) for k, v in results[0][0].items())
    assert results[0][1][1] == results[1][1][1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    models = [norm_2d() for _ in range(M)]
    bundle = ModelBatch(
        copy.deepcopy(models), RATES, torch.optim.SGD, shared_input=False, fallback="error"
    )
    if dtype == torch.float16:  # small enough that nobody's gradient overflows
        bundle.grad_scaler = BundleGradScaler(init_scale=128.0)
    x, y = torch.randn(M, B, 4), torch.randint(3, (M, B))
    weight = make_counts(2)[1]
    bad = torch.where((weight == 0).unsqueeze(2), float("nan"), x)
    bundle.train_step(bad, y, sample_weight=weight, amp_dtype=dtype)
    for i, model in enumerate(models):
        rows = own_rows(weight[i])
        if len(rows):
            with torch.autocast("cpu", dtype):
                F.cross_entropy(model(x[i][rows]), y[i][rows]).backward()
            torch.optim.SGD(model.parameters(), lr=RATES[i]).step()
        # a step moves by some roundings of the gradient, whose size is at most about 1
        tolerance = 8 * torch.finfo(dtype).eps * RATES[i]
        for name, value in state(model).items():
            torch.testing.assert_close(
                bundle[i].state_dict()[name], value, rtol=torch.finfo(dtype).eps, atol=tolerance
            )
