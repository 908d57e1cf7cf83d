"""The protocol of gradient scalers: order of calls, what is refused, state."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from scaling_case import (
    INF,
    KINDS,
    OVERFLOWS,
    RATES,
    M,
    OwnAdam,
    make_batches,
    make_bundle,
    make_models,
    train,
)
from torch import nn, optim
from torch.utils._python_dispatch import TorchDispatchMode

from modelbatch import ModelBatch, ModelBatchError
from modelbatch.optim.scaler import BundleGradScaler


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request):
    return request.param


class SyncWatch(TorchDispatchMode):
    """Fails where a host value would be read from a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.equal.default,
        ), func
        return func(*args, **(kwargs or {}))


class TestProtocol:
    def ready(self, kind=KINDS["adam"], dtype=torch.float64, **options):
        bundle, scaler = make_bundle(kind, dtype), BundleGradScaler(**options)
        x, y = make_batches(1, dtype)[0]
        scaler.scale(bundle.compute_loss(bundle(x), y, F.mse_loss)).backward()
        return bundle, scaler

    def test_no_call_waits_for_the_device(self):
        bundle, (x, y) = make_bundle(), make_batches(1)[0]
        scaler = BundleGradScaler()
        loss = bundle.compute_loss(bundle(x), y, F.mse_loss)
        seen = []
        bundle.optimizer.step = lambda: seen.append(
            (bundle.optimizer.grad_scale, bundle.optimizer.found_inf)
        )
        with SyncWatch():
            scaled = scaler.scale(loss / 2)
        scaled.backward()
        with SyncWatch():
            scaler.step(bundle.optimizer)
            scaler.update()
            scaler.scale(torch.ones(M))
            scaler.unscale_(bundle.optimizer)
            scaler.step(bundle.optimizer)
            scaler.update()
        (scale, found), (none, unscaled_found) = seen
        assert torch.equal(scale, torch.full((M,), 65536.0)) and none is None
        for flags in (found, unscaled_found):
            assert flags.dtype == torch.float32 and flags.tolist() == [0.0] * M
        assert not hasattr(bundle.optimizer, "found_inf")
        assert not hasattr(bundle.optimizer, "grad_scale")

    def test_unscaled_gradients(self, kind):
        bundle, scaler = self.ready(kind)
        clean, (x, y) = make_bundle(kind), make_batches(1)[0]
        clean.compute_loss(clean(x), y, F.mse_loss).backward()
        bundle.get_parameter("0.bias").grad[1, 2] = INF
        scaler.unscale_(bundle.optimizer)
        for i in (0, 2, 3):
            for name, grad in clean.gradients(i).items():
                torch.testing.assert_close(bundle.gradients(i)[name], grad, rtol=1e-12, atol=0)
        before = [p.clone() for p in bundle[1].parameters()]
        scaler.step(bundle.optimizer)
        assert all(torch.equal(p, q) for p, q in zip(bundle[1].parameters(), before))
        assert not torch.equal(bundle[0][0].weight, make_models()[0][0].weight)

    def test_a_frozen_model_keeps_gradients_and_scale(self, kind):
        bundle, scaler = self.ready(kind, growth_interval=1)
        bundle.freeze(1)
        gradients = {name: grad.clone() for name, grad in bundle.gradients(1).items()}
        bundle.get_parameter("0.bias").grad[2] = INF
        unscaled = bundle.gradients(3)["0.bias"] / 65536
        scaler.unscale_(bundle.optimizer)
        assert torch.equal(bundle.gradients(3)["0.bias"], unscaled)
        scaler.step(bundle.optimizer)
        scaler.update()
        for name, grad in gradients.items():
            assert torch.equal(grad, bundle.gradients(1)[name])
        assert scaler.get_scale() == [131072.0, 65536.0, 32768.0, 131072.0]

    def test_everything_frozen(self):
        bundle, scaler = self.ready()
        bundle.freeze(range(M))
        bundle.zero_grad()
        scaler.step(bundle.optimizer)
        scaler.update()
        assert scaler.get_scale() == [65536.0] * M

    def test_order_of_calls(self):
        bundle, scaler = self.ready()
        fresh = BundleGradScaler()
        for call in (
            lambda: fresh.unscale_(bundle.optimizer),
            lambda: fresh.step(bundle.optimizer),
        ):
            with pytest.raises(AssertionError, match="_scale is None"):
                call()
        with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
            scaler.update()
        scaler.unscale_(bundle.optimizer)
        with pytest.raises(RuntimeError, match="already been called on this optimizer"):
            scaler.unscale_(bundle.optimizer)
        scaler.step(bundle.optimizer)
        with pytest.raises(RuntimeError, match="step\\(\\) has already been called"):
            scaler.step(bundle.optimizer)
        with pytest.raises(RuntimeError, match="being called after step"):
            scaler.unscale_(bundle.optimizer)
        scaler.update()
        bundle.zero_grad()
        scaler.step(bundle.optimizer)
        with pytest.raises(AssertionError, match="No inf checks were recorded prior to update"):
            scaler.update()

    def test_wrong_optimizers(self):
        bundle, scaler = self.ready()
        stock = optim.SGD(nn.Linear(2, 2).parameters())
        for call in (scaler.unscale_, scaler.step):
            with pytest.raises(ModelBatchError, match="got SGD; torch.amp.GradScaler is for"):
                call(stock)
        small = ModelBatch(make_models()[:3], RATES[:3], optim.SGD)
        for call in (scaler.unscale_, scaler.step):
            with pytest.raises(ModelBatchError, match="of 4 models, but the optimizer has 3"):
                call(small.optimizer)
        with pytest.raises(ModelBatchError, match="of 4 models, but got losses of shape \\(3,\\)"):
            scaler.scale(torch.ones(3))
        with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
            scaler.step(bundle.optimizer, lambda: None)
        scaler.step(bundle.optimizer, closure=None)  # as training frameworks write it
        searching = make_bundle((optim.LBFGS, {}))
        with pytest.raises(RuntimeError, match="LBFGS needs one"):
            scaler.step(searching.optimizer)

    def test_half_parameters(self):
        bundle, scaler = self.ready((OwnAdam, {}), torch.float16, init_scale=2.0)
        before = [param.grad.clone() for param in bundle.parameters()]
        with pytest.raises(ValueError, match=r"Attempting to unscale FP16 gradients\."):
            scaler.unscale_(bundle.optimizer)
        for param, grad in zip(bundle.parameters(), before):
            assert torch.equal(param.grad, grad)

    def test_sparse_gradients(self):
        bundle = ModelBatch([nn.Embedding(4, 2) for _ in range(M)], RATES, optim.SGD)
        weight = bundle.get_parameter("weight")
        indices = torch.tensor([[3, 0, 0, 1, 0], [1, 2, 2, 3, 0]])  # uncoalesced, none of model 2
        values = torch.arange(10.0).reshape(5, 2)
        values[0, 1] = INF
        weight.grad = torch.sparse_coo_tensor(indices, values, weight.shape, check_invariants=True)
        expected = weight.grad.to_dense() * torch.tensor([0.5, 1.0, 1.0, 1.0]).reshape(M, 1, 1)
        before = weight.detach().clone()
        scaler = BundleGradScaler(growth_interval=1)
        scaler.scale(torch.ones(M))
        scaler.update([2.0, 1.0, 1.0, 1.0])
        scaler.unscale_(bundle.optimizer)
        assert torch.equal(weight.grad.to_dense(), expected)
        scaler.step(bundle.optimizer)
        scaler.update()
        assert scaler.get_scale() == [4.0, 2.0, 2.0, 0.5]
        rates = torch.tensor(RATES).reshape(M, 1, 1)
        torch.testing.assert_close(weight[:3], (before - rates * expected)[:3])
        assert torch.equal(weight[3], before[3])

    def test_an_error_in_step_leaves_nothing_behind(self):
        bundle, scaler = self.ready()

        def fail():
            raise ZeroDivisionError

        bundle.optimizer.step = fail
        with pytest.raises(ZeroDivisionError):
            scaler.step(bundle.optimizer)
        assert not {"grad_scale", "found_inf"} & set(vars(bundle.optimizer))

    def test_several_optimizers(self):
        """An overflow under either of them lowers a model's scale once."""
        bundle, scaler = self.ready()
        other, (x, y) = make_bundle(), make_batches(1)[0]
        scaler.scale(other.compute_loss(other(x), y, F.mse_loss)).backward()
        bundle.get_parameter("0.bias").grad[1] = INF
        other.get_parameter("0.bias").grad[[0, 1, 3]] = INF
        other.freeze(3)  # so that what became of its gradients there is no matter
        scaler.step(bundle.optimizer)
        scaler.step(other.optimizer)
        scaler.update()
        assert scaler.get_scale() == [32768.0, 32768.0, 65536.0, 65536.0]
        assert scaler._get_growth_tracker() == [0, 0, 1, 1]

    def test_disabled(self):
        bundle, scaler = self.ready(enabled=False)
        plain, (x, y) = make_bundle(), make_batches(1)[0]
        loss = plain.compute_loss(plain(x), y, F.mse_loss)
        assert scaler.scale(loss) is loss
        loss.backward()
        scaler.unscale_(bundle.optimizer)
        scaler.step(bundle.optimizer)
        scaler.update()
        plain.step()
        assert torch.equal(bundle[1][0].weight, plain[1][0].weight)
        assert (scaler.get_scale(), scaler.state_dict(), scaler.is_enabled()) == (1.0, {}, False)
        scaler.load_state_dict({})


class TestState:
    def test_round_trip(self):
        batches = make_batches(12, overflows=OVERFLOWS)
        bundle, scaler = make_bundle(), BundleGradScaler(1024.0, 1.5, 0.25, 2)
        train(bundle, scaler, batches[:6])
        saved = pickle.loads(pickle.dumps(scaler.state_dict()))
        assert {type(v) for v in saved.values()} == {list, float, int}
        copies = [BundleGradScaler(), pickle.loads(pickle.dumps(scaler)), copy.deepcopy(scaler)]
        copies[0].load_state_dict(saved)
        expected = train(bundle, scaler, batches[6:])
        for other in copies:
            assert other.state_dict() == saved
            assert train(make_bundle(), other, batches[6:]) == expected
        scaler.load_state_dict(saved)  # where scales are in use already
        assert scaler.state_dict() == saved

    def test_from_a_stock_scaler(self):
        stock = torch.amp.GradScaler("cpu", 512.0, 3.0, 0.1, 7)
        loaded = BundleGradScaler()
        loaded.load_state_dict(stock.state_dict())
        assert loaded.get_scale() == 512.0
        used = BundleGradScaler()
        used.scale(torch.ones(M))
        used.load_state_dict({**stock.state_dict(), "_growth_tracker": 3})
        loaded.scale(torch.ones(2))
        assert (loaded.get_scale(), used.get_scale()) == ([512.0] * 2, [512.0] * M)
        assert used._get_growth_tracker() == [3] * M
        getters = (used.get_growth_factor(), used.get_backoff_factor(), used.get_growth_interval())
        assert getters == (3.0, 0.1, 7)

    def test_bad_states(self):
        scaler = BundleGradScaler()
        scaler.scale(torch.ones(M))
        before = scaler.state_dict()
        for change, message in (
            ({"scale": [1.0] * 3}, "of 3 models, expected 4"),
            ({"_growth_tracker": [0] * 5}, "of 5 models, expected 4"),
            ({"scale": "1"}, "'scale' .* must be numbers"),
        ):
            with pytest.raises(ModelBatchError, match=message):
                scaler.load_state_dict({**before, "growth_factor": 9.0, **change})
        with pytest.raises(ModelBatchError, match="lacks growth_factor, backoff_factor"):
            scaler.load_state_dict({"scale": 1.0, "growth_interval": 1, "_growth_tracker": 0})
        with pytest.raises(RuntimeError, match="source state dict is empty"):
            scaler.load_state_dict({})
        assert scaler.state_dict() == before
        other = BundleGradScaler()
        other.load_state_dict(before)
        with pytest.raises(ModelBatchError, match="state of this scaler is that of 4 models"):
            other.scale(torch.ones(3))

    def test_pickling_within_an_iteration_is_refused(self):
        bundle, scaler = TestProtocol().ready()
        scaler.unscale_(bundle.optimizer)
        with pytest.raises(AssertionError, match="may only be pickled"):
            pickle.dumps(scaler)

    def test_new_scales(self):
        scaler = BundleGradScaler()
        with pytest.raises(AssertionError, match="_scale is None"):
            scaler.update(2.0)
        scaler.scale(torch.ones(M))
        for new, expected in (
            (2.0, [2.0] * M),
            (8, [8.0] * M),
            (torch.tensor(3.0), [3.0] * M),
            (torch.tensor([5.0]), [5.0] * M),
            (torch.arange(1.0, 5.0), [1.0, 2.0, 3.0, 4.0]),
            ([4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]),
        ):
            scaler.update(new)
            assert scaler.get_scale() == expected
        for wrong in ([1.0] * 3, torch.ones(M, requires_grad=True), "high", torch.ones(M, 1)):
            with pytest.raises(ModelBatchError, match="new_scale"):
                scaler.update(wrong)
        assert scaler.get_scale() == [4.0, 3.0, 2.0, 1.0]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"init_scale": 0.0}, "init_scale must be a positive finite number, got 0.0"),
            ({"init_scale": "cuda"}, "init_scale must be a positive finite number, got 'cuda'"),
            ({"growth_factor": 1.0}, "growth_factor must be greater than 1"),
            ({"growth_factor": math.nan}, "growth_factor must be a positive finite"),
            ({"backoff_factor": 1.0}, "backoff_factor must be less than 1"),
            ({"backoff_factor": -0.5}, "backoff_factor must be a positive"),
            ({"growth_interval": 0}, "growth_interval must be at least 1"),
            ({"growth_interval": 2.5}, "growth_interval must be an int"),
        ],
    )
    def test_bad_arguments(self, options, message):
        with pytest.raises(ModelBatchError, match=message):
            BundleGradScaler(**options)

    def test_it_is_a_grad_scaler(self):
        assert isinstance(BundleGradScaler(), torch.amp.GradScaler)
        if not torch.cuda.is_available():
            with pytest.warns(UserWarning, match="CUDA is not available"):
                assert not BundleGradScaler(device="cuda").is_enabled()
