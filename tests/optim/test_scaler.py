"""Gradient scaling: every model as with a `torch.amp.GradScaler` of its own."""

import gc
import math
import random
import weakref

import pytest
import torch
import torch.nn.functional as F
from scaling_case import (
    INF,
    KINDS,
    OVERFLOWS,
    RATES,
    M,
    error,
    make_batches,
    make_bundle,
    make_models,
    train,
    train_alone,
)
from torch import nn, optim

from modelbatch import ModelBatchError
from modelbatch.loss import combine
from modelbatch.optim.scaler import BundleGradScaler


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request):
    return request.param


class TestTogetherEqualsAlone:
    @pytest.mark.parametrize("clip", [None, 0.5], ids=["", "unscaled_and_clipped"])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_overflows_at_chosen_steps(self, kind, clip, reduction):
        batches = make_batches(14, overflows=OVERFLOWS)
        bundle = make_bundle(kind)
        scaler = BundleGradScaler(1000.0, 1.7, 0.3, 3)
        scales = train(bundle, scaler, batches, clip, reduction)
        for i, model in enumerate(make_models()):
            optimizer = kind[0](model.parameters(), lr=RATES[i], **kind[1])
            own = torch.amp.GradScaler("cpu", 1000.0, 1.7, 0.3, 3)
            alone = train_alone(model, optimizer, own, batches, i, clip)
            assert [step[i] for step in scales] == alone
            # a scale that is no power of two rounds: to float32 in the reciprocal, both here and
            # there, and to float64 elsewhere
            assert error(bundle[i], model) <= 1e-12
            state = bundle.optimizer.model_state_dict(i)["state"]
            expected = optimizer.state_dict()["state"]
            assert state.keys() == expected.keys()
            for name in state:
                if "step" in state[name]:
                    assert float(state[name]["step"]) == float(expected[name]["step"])

    @pytest.mark.parametrize("limit", ["clip_grad_norm", "clip_grad_value"])
    def test_the_optimizer_clips_what_was_unscaled(self, kind, limit):
        batches = make_batches(8, torch.float32, [(2, 1), (5, 3)])
        limits = [0.3, 0.01, 0.1, 1e3]
        bundle = make_bundle(kind, torch.float32)
        setattr(bundle.optimizer, limit, limits)
        scales = train(bundle, BundleGradScaler(1024.0, growth_interval=3), batches)
        clip = getattr(nn.utils, f"{limit}_")
        for i, (model, exact) in enumerate(zip(make_models(torch.float32), make_models())):
            own = torch.amp.GradScaler("cpu", 1024.0, growth_interval=3)
            optimizer = kind[0](model.parameters(), lr=RATES[i], **kind[1])
            args = (own, batches, i, limits[i], clip)
            assert train_alone(model, optimizer, *args) == [step[i] for step in scales]
            exact.load_state_dict(make_models(torch.float32)[i].state_dict())
            optimizer = kind[0](exact.parameters(), lr=RATES[i], **kind[1])
            own = torch.amp.GradScaler("cpu", 1024.0, growth_interval=3)
            wide = [(x.double(), y.double()) for x, y in batches]
            train_alone(exact, optimizer, own, wide, i, limits[i], clip)
            # one rounding of the largest value is the least that any float32 result may be off by
            bound = 2 * error(model.double(), exact) + torch.finfo(torch.float32).eps
            assert error(bundle.export(i).double(), exact) <= bound
        assert (bundle.optimizer.last_grad_norms is not None) == (limit == "clip_grad_norm")

    def test_the_others_keep_their_bits(self, kind):
        runs = []
        for overflows in ((), [(2, 1), (5, 1), (6, 1)]):
            bundle = make_bundle(kind, torch.float32)
            scaler = BundleGradScaler(1024.0, growth_interval=3)
            scales = train(bundle, scaler, make_batches(9, torch.float32, overflows))
            runs.append((bundle, scales))
        (clean, clean_scales), (bundle, scales) = runs
        assert [row[1] for row in scales] != [row[1] for row in clean_scales]
        assert not torch.equal(bundle[1][0].weight, clean[1][0].weight)
        for i in (0, 2, 3):
            assert [row[i] for row in scales] == [row[i] for row in clean_scales]
            for p, q in zip(bundle[i].parameters(), clean[i].parameters(), strict=True):
                assert torch.equal(p, q)

    @pytest.mark.parametrize("seed", range(6))
    def test_scales_equal_separate_scalers_step_by_step(self, seed):
        """60 steps of random overflows and freezing, through the overflow of the scale itself."""
        rng = random.Random(seed)
        options = {
            "init_scale": rng.choice([65536.0, 1e38, 3.3e-44, 0.1]),
            "growth_factor": rng.choice([2.0, 1.1, 7.3]),
            "backoff_factor": rng.choice([0.5, 0.77, 0.1]),
            "growth_interval": rng.choice([1, 2, 3]),
        }
        rate = rng.choice([0.1, 0.5])
        bundle = make_bundle((optim.SGD, {}), torch.float32)
        scaler = BundleGradScaler(**options)
        params = [nn.Parameter(torch.zeros(2)) for _ in range(M)]
        alone = [optim.SGD([param], lr=0.1) for param in params]
        own = [torch.amp.GradScaler("cpu", **options) for _ in range(M)]
        for stock in own:
            stock.scale(torch.ones(()))
        for _ in range(60):
            frozen = [i for i in range(M) if rng.random() < 0.2]
            overflow = [i for i in range(M) if rng.random() < rate]
            bundle.freeze(frozen)
            scaler.scale(torch.ones(M))
            for param in bundle.parameters():
                param.grad = torch.ones_like(param)
                param.grad[overflow] = rng.choice([INF, -INF, math.nan])
            if rng.random() < 0.5:
                scaler.unscale_(bundle.optimizer)
            scaler.step(bundle.optimizer)
            scaler.update()
            bundle.unfreeze(frozen)
            for i in set(range(M)).difference(frozen):
                params[i].grad = torch.full((2,), INF if i in overflow else 1.0)
                own[i].step(alone[i])
                own[i].update()
            assert scaler.get_scale() == [stock.get_scale() for stock in own]
            trackers = [stock._get_growth_tracker() for stock in own]
            assert scaler._get_growth_tracker() == trackers

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_autocast(self, dtype):
        """Losses of very different sizes: in float16, each model finds a scale of its own."""
        sizes = [1.0, 1e-3, 30.0, 1e3]
        batches = [
            (x, y * torch.tensor(sizes).reshape(M, 1, 1))
            for x, y in make_batches(20, torch.float32)
        ]
        kind = (optim.SGD, {})
        rates = [0.01 / max(size, 1.0) for size in sizes]
        bundle = make_bundle(kind, torch.float32, lr_list=rates)
        scaler = BundleGradScaler(2.0**20, growth_interval=4)
        scales = []
        for x, y in batches:
            bundle.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = bundle.compute_loss(bundle(x), y, F.mse_loss)
            scaler.scale(loss).backward()
            scaler.step(bundle.optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        models, exact = make_models(torch.float32), make_models(torch.float32)
        for i in range(M):
            own = torch.amp.GradScaler("cpu", 2.0**20, growth_interval=4)
            optimizer = optim.SGD(models[i].parameters(), lr=rates[i])
            reference = optim.SGD(exact[i].double().parameters(), lr=rates[i])
            for step, (x, y) in enumerate(batches):
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype):
                    loss = F.mse_loss(models[i](x[i]), y[i])
                own.scale(loss).backward()
                own.step(optimizer)
                before = own.get_scale()
                own.update()
                assert own.get_scale() == scales[step][i], f"model {i}, step {step}"
                if own.get_scale() >= before:  # it was no overflow
                    reference.zero_grad()
                    F.mse_loss(exact[i](x[i].double()), y[i].double()).backward()
                    reference.step()
            bound = 2 * error(models[i].double(), exact[i]) + torch.finfo(dtype).eps
            assert error(bundle.export(i).double(), exact[i]) <= bound
        if dtype == torch.float16:
            assert len(set(scales[-1])) > 1, "no model overflowed, so nothing was tested"
        else:
            assert len(set(scales[-1])) == 1


class TestScale:
    def losses(self, scaler, **options):
        bundle = make_bundle()
        ((x, y),) = make_batches(1)
        return bundle, bundle.compute_loss(bundle(x), y, F.mse_loss, **options)

    def expected_gradients(self, factors):
        bundle = make_bundle()
        ((x, y),) = make_batches(1)
        (bundle.compute_loss(bundle(x), y, F.mse_loss, reduction="none") * factors).sum().backward()
        return [param.grad for param in bundle.parameters()]

    def check(self, bundle, factors, tolerance=1e-12):
        for param, grad in zip(bundle.parameters(), self.expected_gradients(factors), strict=True):
            error = (param.grad - grad).abs().reshape(M, -1).amax(1)
            assert (error <= tolerance * grad.abs().reshape(M, -1).amax(1)).all()

    def scaler(self):
        scaler = BundleGradScaler()
        scaler.scale(torch.ones(M))
        scaler.update([1.0, 3.0, 1e6, 0.01])
        return scaler, torch.tensor([1.0, 3.0, 1e6, 0.01]).double()

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_every_reduction(self, reduction):
        scaler, scales = self.scaler()
        bundle, loss = self.losses(scaler, reduction=reduction)
        scaled = scaler.scale(loss)
        expected = bundle.latest_losses * scales
        if reduction != "none":
            expected = expected.mean() if reduction == "mean" else expected.sum()
        torch.testing.assert_close(scaled, expected, rtol=1e-12, atol=0)
        scaled.sum().backward()
        self.check(bundle, scales)

    def test_what_was_computed_from_the_scalar(self):
        """Accumulation and training frameworks divide the loss before they scale it."""
        scaler, scales = self.scaler()
        bundle, loss = self.losses(scaler)
        scaler.scale((loss / 4).float() * torch.tensor(2.0) + 3.0).backward()
        # the weight of the loss was rounded to float32
        self.check(bundle, scales / 2, 4 * torch.finfo(torch.float32).eps)
        bundle, loss = self.losses(scaler)
        ((x, y),) = make_batches(1)
        other = bundle.compute_loss(bundle(x), y, F.mse_loss)
        scaler.scale(loss / 2 + 3 * other).backward()
        self.check(bundle, 3.5 * scales)
        bundle, loss = self.losses(scaler)
        loss /= 2
        (scaler.scale(loss) * 4).backward()
        self.check(bundle, 2 * scales)

    def test_structures(self):
        scaler, scales = self.scaler()
        bundle, loss = self.losses(scaler)
        each = torch.ones(M, dtype=torch.float64)
        first, (second, third) = scaler.scale([loss, (each, torch.ones(M, 2, 3).double())])
        assert torch.equal(second, scales)
        assert torch.equal(third, scales[:, None, None].expand(M, 2, 3))
        first.backward()
        self.check(bundle, scales)
        assert torch.equal(*scaler.scale(iter([each])), second)
        with pytest.raises(ModelBatchError, match="iterable of tensors, got float"):
            scaler.scale(1.0)

    def test_overflow_in_one_loss_leaves_the_others(self):
        scaler, scales = self.scaler()
        bundle = make_bundle()
        clean, (x, y) = make_bundle(), make_batches(1)[0]
        scaler.scale(clean.compute_loss(clean(x), y, F.mse_loss)).backward()
        x[2] = math.nan
        scaled = scaler.scale(bundle.compute_loss(bundle(x), y, F.mse_loss))
        keep = [0, 1, 3]
        expected = (bundle.latest_losses * scales)[keep].mean()
        torch.testing.assert_close(scaled.detach(), expected)
        scaled.backward()
        for p, q in zip(bundle.parameters(), clean.parameters()):
            assert torch.equal(p.grad[keep], q.grad[keep])
            assert p.grad[2].isnan().all()

    def test_a_frozen_model_gets_no_gradient(self):
        scaler, scales = self.scaler()
        bundle, (x, y) = make_bundle(), make_batches(1)[0]
        bundle.freeze(2)
        scaler.scale(bundle.compute_loss(bundle(x), y, F.mse_loss) / 1).backward()
        scales[2] = 0
        self.check(bundle, scales)

    def test_scalars_that_mix_models(self):
        scaler = BundleGradScaler()
        bundle, loss = self.losses(scaler)
        penalty = bundle.get_parameter("0.weight").square().sum()
        with torch.no_grad():
            _, unneeded = self.losses(scaler)
        for wrong in (
            loss + penalty,
            bundle.latest_losses.mean(),
            penalty,
            unneeded,
            torch.ones(()),
        ):
            with pytest.raises(ModelBatchError, match='reduction="none"'):
                scaler.scale(wrong)
        assert scaler.get_scale() == 65536.0, "the number of models was taken from what was refused"

    def test_nothing_is_kept_alive(self):
        gc.collect()
        gc.disable()
        try:
            scaler = BundleGradScaler()
            weight = torch.ones(M, requires_grad=True)
            losses = weight * 2
            total = combine(losses, None, "mean")
            scaled = scaler.scale(total / 2)
            scaled.backward()
            refs = [weakref.ref(t) for t in (losses, total, scaled)]
            del losses, total, scaled
            assert [ref() for ref in refs] == [None] * 3
        finally:
            gc.enable()
