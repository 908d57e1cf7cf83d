"""Clipping: every model as torch clips it alone."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.nn.utils import (
    clip_grad_norm_ as torch_clip_norm_,
    clip_grad_value_ as torch_clip_value_,
)

from modelbatch import ModelBatch, ModelBatchError
from modelbatch.optim.clip import clip_factor, clip_grad_norm_, clip_grad_value_, grad_stats

INF = math.inf
M = 4


def make_models(dtype=torch.float64):
    torch.manual_seed(3)
    # of very different sizes, so that some models are clipped and some are not
    models = [nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)) for _ in range(M)]
    with torch.no_grad():
        for i, model in enumerate(models):
            model[2].weight.mul_(10.0 ** (i - 1))
    return [model.to(dtype) for model in models]


def with_gradients(dtype=torch.float64, **options):
    """A bundle and separate models, with the same gradients to the bit."""
    models = make_models(dtype)
    alone = copy.deepcopy(models)
    bundle = ModelBatch(models, [0.1] * M, optim.SGD, **options)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(6, 2, generator=generator, dtype=torch.float64).to(dtype)
    bundle.compute_loss(bundle(x), y, nn.functional.mse_loss).backward()
    for i, model in enumerate(alone):
        for name, param in model.named_parameters():
            param.grad = bundle.gradients(i)[name].clone()
    return bundle, alone


def error(bundle, alone, which=range(M)):
    """The largest relative difference of gradients."""
    worst = 0.0
    for i in which:
        for name, param in alone[i].named_parameters():
            got, expected = bundle.gradients(i)[name].double(), param.grad.double()
            scale = expected.abs().max().clamp_min(1e-300)
            worst = max(worst, float((got - expected).abs().max() / scale))
    return worst


NORM_TYPES = [2.0, 1.0, 3.5, INF, -INF, 0.0, -1.0]


class TestNorm:
    @pytest.mark.parametrize("norm_type", NORM_TYPES)
    @pytest.mark.parametrize("max_norm", [0.3, 0.0, INF, [0.1, 5.0, 0.02, 1e6]])
    def test_equals_torch(self, norm_type, max_norm):
        bundle, alone = with_gradients()
        limits = max_norm if isinstance(max_norm, list) else [max_norm] * M
        norms = clip_grad_norm_(bundle, max_norm, norm_type)
        expected = [
            torch_clip_norm_(model.parameters(), limit, norm_type)
            for model, limit in zip(alone, limits)
        ]
        assert norms.shape == (M,) and norms.dtype == torch.float64
        torch.testing.assert_close(norms, torch.stack(expected), rtol=1e-12, atol=0)
        assert error(bundle, alone) <= 1e-12

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("norm_type", [2.0, 1.0, INF])
    def test_is_as_exact_as_torch(self, dtype, norm_type):
        bundle, alone = with_gradients(dtype)
        exact = [copy.deepcopy(model).double() for model in alone]
        for model, own in zip(exact, alone):
            for wide, param in zip(model.parameters(), own.parameters()):
                wide.grad = param.grad.double()
        limits = [0.05, 1.0, 0.5, 3.0]
        norms = clip_grad_norm_(bundle, limits, norm_type)
        assert norms.dtype == torch.float32
        for i in range(M):
            own = torch_clip_norm_(alone[i].parameters(), limits[i], norm_type)
            true = torch_clip_norm_(exact[i].parameters(), limits[i], norm_type)
            floor = torch.finfo(torch.float32).eps
            bound = 2 * abs(own.double() / true - 1) + floor
            assert abs(norms[i].double() / true - 1) <= bound
            bound = 2 * error_of(alone[i], exact[i]) + torch.finfo(dtype).eps
            assert error(bundle, exact, [i]) <= bound

    def test_the_optimizer_will_do_instead_of_the_bundle(self):
        bundle, alone = with_gradients()
        norms = clip_grad_norm_(bundle.optimizer, torch.tensor([0.1, 0.2, 0.3, 0.4]))
        for i, model in enumerate(alone):
            expected = torch_clip_norm_(model.parameters(), 0.1 * (i + 1))
            torch.testing.assert_close(norms[i], expected, rtol=1e-7, atol=0)
        assert error(bundle, alone) <= 1e-6  # 0.1 as a float32
        before = bundle[1][0].weight.detach().clone()
        bundle.step()
        stepped = before - 0.1 * bundle.gradients(1)["0.weight"]
        torch.testing.assert_close(bundle[1][0].weight.detach(), stepped, rtol=1e-12, atol=1e-15)

    def test_torch_on_one_group_is_one_model(self):
        bundle, alone = with_gradients()
        torch_clip_norm_(bundle.optimizer.param_groups[2]["params"], 0.01)
        torch_clip_norm_(alone[2].parameters(), 0.01)
        assert error(bundle, alone) == 0.0

    @pytest.mark.parametrize("bad", [math.nan, INF])
    @pytest.mark.parametrize("norm_type", [2.0, INF])
    def test_a_bad_model_stays_alone(self, bad, norm_type):
        bundle, alone = with_gradients(torch.float32)
        clean, _ = with_gradients(torch.float32)
        bundle.get_parameter("0.bias").grad[1, 3] = bad
        alone[1][0].bias.grad[3] = bad
        norms = clip_grad_norm_(bundle, 0.1, norm_type)
        clean_norms = clip_grad_norm_(clean, 0.1, norm_type)
        assert not torch.isfinite(norms[1])
        torch_clip_norm_(alone[1].parameters(), 0.1, norm_type)
        for name, param in alone[1].named_parameters():
            got = bundle.gradients(1)[name]
            torch.testing.assert_close(got, param.grad, equal_nan=True, rtol=0, atol=0)
        for i in (0, 2, 3):
            assert torch.equal(norms[i], clean_norms[i])
            for name, grad in bundle.gradients(i).items():
                assert torch.equal(grad, clean.gradients(i)[name])

    def test_nonfinite_as_an_error(self):
        bundle, alone = with_gradients()
        bundle.get_parameter("0.bias").grad[1, 3] = INF
        bundle.get_parameter("2.bias").grad[3, 0] = math.nan
        alone[1][0].bias.grad[3] = INF
        with pytest.raises(ModelBatchError, match="models 1, 3 is not finite"):
            clip_grad_norm_(bundle, 0.1, error_if_nonfinite=True)
        assert error(bundle, alone, [0, 2]) == 0.0, "changed before the error"
        bundle.freeze([1, 3])
        norms = clip_grad_norm_(bundle, 0.1, error_if_nonfinite=True)
        assert torch.isfinite(norms).tolist() == [True, False, True, False]

    def test_a_frozen_model_keeps_its_gradients(self):
        bundle, alone = with_gradients()
        bundle.freeze([0, 3])
        norms = clip_grad_norm_(bundle, 1e-3)
        for i in range(M):
            limit = INF if i in (0, 3) else 1e-3
            expected = torch_clip_norm_(alone[i].parameters(), limit)
            torch.testing.assert_close(norms[i], expected, rtol=1e-12, atol=0)
        assert error(bundle, alone, [0, 3]) == 0.0
        assert error(bundle, alone, [1, 2]) <= 1e-12

    def test_any_strides(self):
        bundle, alone = with_gradients()
        weight = bundle.get_parameter("0.weight")
        weight.grad = weight.grad.transpose(0, 2).contiguous().transpose(0, 2)
        assert not weight.grad.is_contiguous()
        norms = clip_grad_norm_(bundle, 0.1)
        for i, model in enumerate(alone):
            expected = torch_clip_norm_(model.parameters(), 0.1)
            torch.testing.assert_close(norms[i], expected, rtol=1e-12, atol=0)
        assert error(bundle, alone) <= 1e-12

    def test_no_gradients(self):
        bundle = ModelBatch(make_models(), [0.1] * M, optim.SGD)
        assert clip_grad_norm_(bundle, 1.0).tolist() == [0.0] * M
        bundle.get_parameter("0.bias").grad = torch.ones(M, 7, dtype=torch.float64)
        norms = clip_grad_norm_(bundle, 1.0)
        torch.testing.assert_close(norms, torch.full((M,), 7.0**0.5, dtype=torch.float64))

    def test_mixed_dtypes(self):
        models = make_models()
        for model in models:
            model[0].to(torch.float32)
        bundle = ModelBatch(models, [0.1] * M, optim.SGD)
        for param in bundle.parameters():
            param.grad = torch.randn_like(param)
        alone = make_models()
        for i, model in enumerate(alone):
            model[0].to(torch.float32)
            for name, param in model.named_parameters():
                param.grad = bundle.gradients(i)[name].clone()
        norms = clip_grad_norm_(bundle, 0.1)
        expected = torch.stack([torch_clip_norm_(m.parameters(), 0.1) for m in alone])
        assert norms.dtype == torch.float64
        torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0)
        assert error(bundle, alone) <= 1e-6

    @pytest.mark.parametrize("norm_type", [2.0, 1.0, INF])
    def test_sparse_gradients(self, norm_type):
        bundle, alone = sparse_bundle()
        norms = clip_grad_norm_(bundle, 0.7, norm_type)
        for i, param in enumerate(alone):
            # torch has only some norms of sparse tensors
            dense = nn.Parameter(torch.zeros(4, 2, dtype=torch.float64))
            dense.grad = param.grad.to_dense()
            expected = torch_clip_norm_([dense], 0.7, norm_type)
            torch.testing.assert_close(norms[i], expected, rtol=1e-12, atol=0)
            got = bundle.get_parameter("weight").grad.to_dense()[i]
            torch.testing.assert_close(got, dense.grad, rtol=1e-12, atol=0)
        assert norms[2] == 0


class TestValue:
    @pytest.mark.parametrize("clip_value", [0.01, 0.0, [0.1, 0.001, INF, 0.5]])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_equals_torch_to_the_bit(self, clip_value, dtype):
        bundle, alone = with_gradients(dtype)
        bundle.get_parameter("0.bias").grad[1, 3] = math.nan
        alone[1][0].bias.grad[3] = math.nan
        bundle.get_parameter("0.bias").grad[2, 3] = -INF
        alone[2][0].bias.grad[3] = -INF
        assert clip_grad_value_(bundle, clip_value) is None
        limits = clip_value if isinstance(clip_value, list) else [clip_value] * M
        for i, model in enumerate(alone):
            torch_clip_value_(model.parameters(), limits[i])
            for name, param in model.named_parameters():
                got = bundle.gradients(i)[name]
                torch.testing.assert_close(got, param.grad, equal_nan=True, rtol=0, atol=0)

    @pytest.mark.parametrize("clip_value", [0.01, [0.01] * M])
    def test_a_frozen_model_keeps_its_gradients(self, clip_value):
        bundle, alone = with_gradients()
        bundle.freeze(2)
        clip_grad_value_(bundle.optimizer, clip_value)
        for i in (0, 1, 3):
            torch_clip_value_(alone[i].parameters(), 0.01)
        assert error(bundle, alone) == 0.0

    def test_sparse_gradients_are_refused(self):
        bundle, _ = sparse_bundle()
        with pytest.raises(ModelBatchError, match="sparse gradients cannot be clipped by value"):
            clip_grad_value_(bundle, 0.1)


def test_limits_of_numpy():
    bundle, alone = with_gradients()
    clip_grad_norm_(bundle, np.logspace(-3, 0, M))
    clip_grad_norm_(bundle, np.float32(0.5))
    for model, limit in zip(alone, np.logspace(-3, 0, M)):
        torch_clip_norm_(model.parameters(), limit)
        torch_clip_norm_(model.parameters(), 0.5)
    assert error(bundle, alone) <= 1e-12


class TestErrors:
    @pytest.mark.parametrize(
        ("limit", "message"),
        [
            (-1.0, "must not be negative or NaN, got -1.0"),
            (math.nan, "must not be negative or NaN, got nan"),
            ([1.0, 1.0, -2.0, 1.0], "of model 2 must not be negative or NaN, got -2.0"),
            ([1.0, 2.0], "expected a number or 4 numbers, got 2"),
            (torch.ones(3), r"expected a number or 4 numbers, got \(3,\)"),
            (torch.ones(M, 1), r"expected a number or 4 numbers, got \(4, 1\)"),
            (None, "must be a number or M numbers, got None"),
            ("1", "must be a number or M numbers, got '1'"),
            ([1.0, None, 1.0, 1.0], "must be a number or M numbers"),
        ],
    )
    def test_bad_limits(self, limit, message):
        bundle, alone = with_gradients()
        for clip in (clip_grad_norm_, clip_grad_value_):
            with pytest.raises(ModelBatchError, match=message):
                clip(bundle, limit)
        assert error(bundle, alone) == 0.0

    def test_what_is_no_bundle(self):
        bundle, _ = with_gradients()
        for wrong in (bundle.parameters(), list(bundle.parameters()), nn.Linear(2, 2)):
            with pytest.raises(ModelBatchError, match="expected a ModelBatch or its optimizer"):
                clip_grad_norm_(wrong, 1.0)
        with pytest.raises(ModelBatchError, match="norm_type"):
            clip_grad_norm_(bundle, 1.0, math.nan)


class TestHelpers:
    def test_stats(self):
        grads = [torch.randn(M, 3, 2), torch.randn(M, dtype=torch.float64), torch.ones(M, 0)]
        grads.append(torch.full((M, 2), 2.0**100))  # the square overflows in float32
        grads[0][2, 1, 1] = math.nan
        grads[1][3] = -INF
        sq_norm, nonfinite = grad_stats(grads, M)
        assert (sq_norm.dtype, nonfinite.dtype) == (torch.float64, torch.bool)
        assert nonfinite.tolist() == [False, False, True, True]
        expected = sum(g.double().reshape(M, -1).square().sum(1) for g in grads)
        torch.testing.assert_close(sq_norm, expected, equal_nan=True, rtol=1e-14, atol=0)

    def test_stats_of_sparse_gradients(self):
        bundle, _ = sparse_bundle()
        grad = bundle.get_parameter("weight").grad
        sq_norm, nonfinite = grad_stats([grad], M)
        expected = grad.to_dense().reshape(M, -1).square().sum(1)
        torch.testing.assert_close(sq_norm, expected, rtol=1e-14, atol=0)
        assert not nonfinite.any()
        grad._values()[3, 1] = math.nan
        assert grad_stats([grad], M)[1].nonzero().tolist() == [[int(grad._indices()[0, 3])]]

    def test_factor(self):
        sq_norm = torch.tensor([4.0, 0.0, INF, math.nan, 100.0], dtype=torch.float64)
        inv_scale = torch.tensor([0.5, 1.0, 1.0, 1.0, 0.25])
        limits = torch.tensor([0.5, 0.0, 1.0, 1.0, 1e3], dtype=torch.float64)
        norms, factor = clip_factor(sq_norm, limits, inv_scale)
        assert (norms.dtype, factor.dtype) == (torch.float64, torch.float32)
        assert norms.tolist()[:3] + norms.tolist()[4:] == [1.0, 0.0, INF, 2.5]
        expected = torch.tensor([0.5 / (1 + 1e-6), 0.0, 0.0, math.nan, 1.0])
        torch.testing.assert_close(factor, expected, equal_nan=True, rtol=0, atol=0)
        norms, factor = clip_factor(sq_norm, 1.0, dtype=torch.float64)
        assert norms[0] == 2.0 and factor[0] == 1.0 / (2.0 + 1e-6)


def error_of(model, exact):
    pairs = zip(model.parameters(), exact.parameters())
    return max(float((a.grad - b.grad).abs().max() / b.grad.abs().max()) for a, b in pairs)


def sparse_bundle():
    """A bundle of embeddings with an uncoalesced sparse gradient; model 2 has no entry."""
    models = [nn.Embedding(4, 2).double() for _ in range(M)]
    bundle = ModelBatch(models, [0.1] * M, optim.SGD)
    indices = torch.tensor([[3, 0, 0, 1, 0], [1, 2, 2, 3, 0]])
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    weight = bundle.get_parameter("weight")
    weight.grad = torch.sparse_coo_tensor(indices, values, weight.shape, check_invariants=True)
    alone = []
    for i in range(M):
        param = nn.Parameter(torch.zeros(4, 2, dtype=torch.float64))
        mine = indices[0] == i
        param.grad = torch.sparse_coo_tensor(
            indices[1:, mine], values[mine], (4, 2), check_invariants=True
        )
        alone.append(param)
    return bundle, alone
