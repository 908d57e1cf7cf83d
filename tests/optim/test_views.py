"""The universal optimizer: M models trained together equal M models trained alone."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from modelbatch.errors import BatchingError, FallbackWarning, ModelBatchError
from modelbatch.optim import ViewOptimizer, build_optimizer, build_view_optimizer
from modelbatch.optim.views import announce

AT_ONCE = [
    optim.Adadelta, optim.Adafactor, optim.Adamax, optim.ASGD, optim.NAdam, optim.RAdam, optim.Rprop
]  # fmt: skip


def test_every_class_of_torch_is_tested(cases):
    named = {cls for cls, _ in cases.values()} | {optim.Optimizer}
    elsewhere = {optim.LBFGS, optim.SparseAdam}
    exported = {value for value in vars(optim).values() if isinstance(value, type)}
    assert {cls for cls in exported if issubclass(cls, optim.Optimizer)} == named | elsewhere


def test_float64_equals_alone(case, hand_made, regression):
    optimizer_cls, configs = case
    bundle, loss = hand_made(optimizer_cls), regression()
    before = copy.deepcopy(bundle.alone)
    optimizer = bundle.optimizer(optimizer_cls, configs)
    alone = bundle.alone_optimizers(optimizer_cls, configs)
    assert isinstance(optimizer, optimizer_cls)
    assert len(optimizer.param_groups) == 3
    for _ in range(10):
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
    assert bundle.worst_error() <= 1e-12
    assert bundle.worst_error(before) > 1e-4, "nothing was trained"


def test_float32_is_as_exact_as_torch(case, hand_made, regression):
    optimizer_cls, configs = case
    single, double = hand_made(optimizer_cls, dtype=torch.float32), hand_made(optimizer_cls)
    for exact, rounded in zip(double.alone, single.alone, strict=True):
        exact.load_state_dict(rounded.state_dict())
    optimizer = single.optimizer(optimizer_cls, configs)
    alone = single.alone_optimizers(optimizer_cls, configs)
    truth = double.alone_optimizers(optimizer_cls, configs)
    for _ in range(10):
        single.step(optimizer, regression(torch.float32))
        single.step_alone(alone, regression(torch.float32))
        double.step_alone(truth, regression())
    ours = single.worst_error(double.alone)
    single.models = single.alone
    assert ours <= 2 * single.worst_error(double.alone) + torch.finfo(torch.float32).eps


def test_freezing_in_the_middle(case, hand_made, regression):
    optimizer_cls, configs = case
    bundle, loss = hand_made(optimizer_cls), regression()
    optimizer = bundle.optimizer(optimizer_cls, configs)
    alone = bundle.alone_optimizers(optimizer_cls, configs)
    for step in range(9):
        bundle.active[1] = step not in (3, 4, 5)
        if not bundle.active[1]:
            parameters = [p.detach().clone() for p in bundle.models[1].parameters()]
            state = optimizer.model_state_dict(1)
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss, which=None if bundle.active[1] else {0, 2})
        if not bundle.active[1]:
            for p, kept in zip(bundle.models[1].parameters(), parameters, strict=True):
                assert torch.equal(p, kept)
                assert p.grad is None
            hand_made.assert_same_state(optimizer.model_state_dict(1), state)
    assert bundle.worst_error() <= 1e-12


def test_closure_is_called_once_with_gradients_enabled(case, hand_made, regression):
    optimizer_cls, configs = case
    bundle, loss = hand_made(optimizer_cls), regression()
    optimizer = bundle.optimizer(optimizer_cls, configs)
    alone = bundle.alone_optimizers(optimizer_cls, configs)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        losses = bundle.losses(loss)
        losses.sum().backward()
        calls.append(losses)
        return losses

    for _ in range(3):
        with torch.no_grad():
            assert optimizer.step(closure) is calls[-1]
        bundle.step_alone(alone, loss)
    assert len(calls) == 3
    assert bundle.worst_error() <= 1e-12


@pytest.mark.parametrize("optimizer_cls", [optim.Adam, optim.RMSprop])
def test_zero_grad(optimizer_cls, hand_made, regression):
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optimizer_cls, [{}] * 3)

    def gradients():
        return [p.grad for p in [*bundle.stacked.values(), *bundle.models[1].parameters()]]

    bundle.losses(loss).sum().backward()
    assert gradients()[-1] is None, "shown before anybody asked"
    first = optimizer.param_groups[1]["params"][0].grad
    assert torch.equal(first, bundle.stacked["0.weight"].grad[1])
    assert first.data_ptr() == bundle.stacked["0.weight"].grad[1].data_ptr()
    memory = weakref.ref(bundle.stacked["0.weight"].grad.untyped_storage())
    # One model's own zero_grad drops its views; the next zeroing of the bundle shows them again.
    bundle.models[1].zero_grad()
    optimizer.zero_grad(set_to_none=False)
    assert all(grad is not None and not grad.any() for grad in gradients())
    del first
    optimizer.zero_grad()
    assert all(grad is None for grad in gradients())
    assert memory() is None, "the gradients' memory is still held"


def test_gradients_accumulate_as_alone(hand_made, regression):
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optim.Adam, [{"lr": 0.01}, {"lr": 0.1}, {}])
    alone = bundle.alone_optimizers(optim.Adam, [{"lr": 0.01}, {"lr": 0.1}, {}])
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(2):
            bundle.losses(loss).sum().backward()
            assert all(p.grad is not None for p in optimizer.param_groups[0]["params"])
        optimizer.step()
        for i, stock in enumerate(alone):
            stock.zero_grad()
            loss(bundle.alone[i], i).backward()
            loss(bundle.alone[i], i).backward()
            stock.step()
    assert bundle.worst_error() <= 1e-12


def test_gradient_memory_that_is_used_again(hand_made, regression):
    """The same gradient tensors come back after zero_grad, with new contents."""
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optim.Adam, [{"lr": 0.01}] * 3)
    alone = bundle.alone_optimizers(optim.Adam, [{"lr": 0.01}] * 3)
    pool = {name: torch.empty_like(parameter) for name, parameter in bundle.stacked.items()}
    for _ in range(4):
        optimizer.zero_grad()
        assert bundle.models[0][0].weight.grad is None
        grads = torch.autograd.grad(bundle.losses(loss).sum(), list(bundle.stacked.values()))
        for (name, buffer), grad in zip(pool.items(), grads, strict=True):
            bundle.stacked[name].grad = buffer.copy_(grad)
        optimizer.step()
        bundle.step_alone(alone, loss)
    assert bundle.worst_error() <= 1e-12


def test_transposed_gradients(hand_made, regression):
    """torch's fused CPU kernels ignore that a gradient lies in memory in another order."""
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optim.Adam, [{"lr": 0.01}] * 3)
    alone = bundle.alone_optimizers(optim.Adam, [{"lr": 0.01}] * 3)
    for _ in range(3):
        optimizer.zero_grad()
        bundle.losses(loss).sum().backward()
        weight = bundle.stacked["0.weight"]
        weight.grad = weight.grad.transpose(1, 2).contiguous().transpose(1, 2)
        assert not weight.grad.is_contiguous()
        optimizer.step()
        bundle.step_alone(alone, loss)
    assert bundle.worst_error() <= 1e-12


# torch 2.15 says so wherever it makes a sparse tensor itself.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients(hand_made):
    """SparseAdam, and the classes whose fused kernel takes no sparse gradients."""
    words = torch.tensor([[0, 3], [3, 1], [2, 2], [4, 0]])

    def build():
        return nn.Sequential(nn.Embedding(6, 4, sparse=True))

    for optimizer_cls in (optim.SparseAdam, optim.SGD, optim.Adagrad):
        options = {"momentum": 0.9} if optimizer_cls is optim.SGD else {}
        configs = [{"lr": 0.1}, {"lr": 0.01, **options}, {**options}]
        bundle = hand_made(build)
        optimizer = bundle.optimizer(optimizer_cls, configs)
        alone = bundle.alone_optimizers(optimizer_cls, configs)
        for step in range(4):

            def loss(model, i, step=step):
                return (model(words[(i + step) % 4]) ** 2).sum()

            bundle.step(optimizer, loss)
            assert bundle.stacked["0.weight"].grad.is_sparse
            bundle.step_alone(alone, loss)
        assert bundle.worst_error() <= 1e-12


def test_sparse_adam_refuses_dense_gradients(hand_made, regression):
    bundle = hand_made()
    optimizer = bundle.optimizer(optim.SparseAdam, [{}] * 3)
    with pytest.raises(RuntimeError, match="dense gradients"):
        bundle.step(optimizer, regression())


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.first = nn.Linear(4, 2)
        self.second = nn.Linear(4, 2)
        self.fixed = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x, use_second):
        x = self.body(x).tanh()
        return self.fixed * (self.second(x) if use_second else self.first(x))


@pytest.mark.parametrize("optimizer_cls", [optim.SGD, optim.Adam, optim.Adagrad, *AT_ONCE])
def test_parameters_that_get_gradients_late(optimizer_cls, hand_made):
    """A head without gradient is skipped, and its state begins when the first one comes."""
    options = {"momentum": 0.9, "weight_decay": 0.1} if optimizer_cls is optim.SGD else {}
    configs = [{"lr": 0.1, **options}, {"lr": 0.01, **options}, {"lr": 0.1}]
    bundle = hand_made(TwoHeads)
    optimizer = bundle.optimizer(optimizer_cls, configs)
    alone = bundle.alone_optimizers(optimizer_cls, configs)
    x = torch.randn(5, 3, dtype=torch.float64)
    for step in range(6):

        def loss(model, i, step=step):
            return model(x * (i + 1), step % 3 == 2).square().sum()

        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
    assert bundle.worst_error() <= 1e-12
    assert torch.equal(bundle.models[2].fixed, torch.ones(2, dtype=torch.float64))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = nn.Linear(3, 3, bias=False)
        self.decode = nn.Linear(3, 3)
        self.decode.weight = self.encode.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0))

    def forward(self, x):
        return self.decode(self.encode(x)) * self.scale + self.empty.sum()


# Adafactor divides by the number of elements, which is 0 for one of these.
@pytest.mark.parametrize("optimizer_cls", [optim.Adam, optim.SGD, *AT_ONCE[:1], *AT_ONCE[2:]])
def test_tied_scalar_and_empty_parameters(optimizer_cls, hand_made):
    configs = [{"lr": 0.1}, {"lr": 0.01}, {"lr": 0.02}]
    bundle = hand_made(Tied)
    optimizer = bundle.optimizer(optimizer_cls, configs)
    alone = bundle.alone_optimizers(optimizer_cls, configs)
    x = torch.randn(5, 3, dtype=torch.float64)
    for _ in range(5):
        bundle.step(optimizer, lambda model, i: F.mse_loss(model(x), x * i))
        bundle.step_alone(alone, lambda model, i: F.mse_loss(model(x), x * i))
    assert len(optimizer.param_groups[0]["params"]) == 4
    assert bundle.worst_error() <= 1e-12


@pytest.mark.parametrize("optimizer_cls", [optim.Adam, optim.SGD, *AT_ONCE])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nonfinite_numbers_stay_in_their_model(number, optimizer_cls, hand_made, regression):
    results = []
    for poison in (False, True):
        bundle, loss = hand_made(), regression()
        # An option that only one of the models has.
        configs = [{"lr": 0.01}, {"lr": 0.01}, {"lr": 0.01}]
        if optimizer_cls is not optim.Rprop:
            configs[2]["weight_decay"] = 0.1
        optimizer = bundle.optimizer(optimizer_cls, configs)
        alone = bundle.alone_optimizers(optimizer_cls, configs)
        for step in range(4):
            optimizer.zero_grad()
            bundle.losses(loss).sum().backward()
            for i, model in enumerate(bundle.alone):
                for name, parameter in model.named_parameters():
                    parameter.grad = bundle.stacked[name].grad[i].clone()
            if poison and step > 0:
                weight, bias = bundle.stacked["0.weight"], bundle.stacked["0.bias"]
                own = bundle.alone[1][0]
                for of_weight, of_bias, values in (
                    (weight.grad[1], bias.grad[1], bias.data[1]),
                    (own.weight.grad, own.bias.grad, own.bias.data),
                ):
                    of_weight[0, 0] = values[1] = number
                    of_bias[1] = 0.5  # a finite gradient of a parameter that is not
            optimizer.step()
            for stock in alone:
                stock.step()
        for own, parameter in zip(bundle.alone[1].parameters(), bundle.models[1].parameters()):
            torch.testing.assert_close(parameter, own, rtol=1e-9, atol=1e-12, equal_nan=True)
        results.append(bundle)
    clean, poisoned = results
    assert not torch.isfinite(poisoned.stacked["0.bias"][1, 1])
    for name, parameter in clean.stacked.items():
        assert torch.equal(parameter[[0, 2]], poisoned.stacked[name][[0, 2]])


class TestAnnounce:
    def test_classes_that_step_model_by_model(self):
        for optimizer_cls in (optim.Muon, optim.SparseAdam, SharpnessAware):
            name = optimizer_cls.__name__
            with pytest.warns(FallbackWarning, match=f"^{name} .*model by model") as warned:
                announce(optimizer_cls, "warn")
            assert warned[0].filename == __file__
            with pytest.raises(BatchingError, match=name):
                announce(optimizer_cls, "error")
            announce(optimizer_cls, "silent")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_classes_that_do_not(self, dtype, hand_made, cases):
        model_by_model = {optim.Muon}
        if dtype == torch.bfloat16:
            model_by_model.add(optim.Adafactor)
        for optimizer_cls in {cls for cls, _ in cases.values()} | {optim.LBFGS}:
            bundle = hand_made(optimizer_cls, dtype=dtype)
            arguments = (bundle.stacked, bundle.models, optimizer_cls, [{}] * 3)

            def build(arguments=arguments):
                return build_optimizer(*arguments, active=lambda: [True] * 3, fallback="error")

            if optimizer_cls in model_by_model:
                with pytest.raises(BatchingError, match=optimizer_cls.__name__):
                    build()
            else:
                build()


class SharpnessAware(optim.Optimizer):
    """Two evaluations per step, per group; written only against the public optimizer interface."""

    def __init__(self, params, lr, radius=0.05):
        super().__init__(params, {"lr": lr, "radius": radius})

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            norm = sum((p.grad.square().sum() for p in params), torch.tensor(0.0)).sqrt()
            for p in params:
                self.state[p]["ascent"] = p.grad * (group["radius"] / norm)
                p.add_(self.state[p]["ascent"])
        groups = self.param_groups
        closure()
        for group in groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(self.state[p]["ascent"]).sub_(p.grad, alpha=group["lr"])
        return loss


def test_a_class_of_somebody_elses(hand_made, regression):
    configs = [{"lr": 0.1}, {"lr": 0.2, "radius": 0.1}, {"lr": 0.3}]
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(SharpnessAware, configs)
    alone = bundle.alone_optimizers(SharpnessAware, configs)

    def closure():
        optimizer.zero_grad()
        losses = bundle.losses(loss)
        losses.sum().backward()
        return losses

    for _ in range(4):
        optimizer.step(closure)
        for i, stock in enumerate(alone):

            def closure_alone(stock=stock, i=i):
                stock.zero_grad()
                value = loss(bundle.alone[i], i)
                value.backward()
                return value

            stock.step(closure_alone)
    assert bundle.worst_error() <= 1e-12


class OwnAdam(optim.Adam):
    """As somebody writes it who logs something at each step; nobody knows what it does."""


class OwnSGD(optim.SGD):
    """Likewise."""


@pytest.mark.parametrize("optimizer_cls", [OwnAdam, OwnSGD])
def test_a_subclass_of_torchs(optimizer_cls, hand_made):
    """Its step may differ, so it is the class's own, model by model."""
    options = {"momentum": 0.9} if optimizer_cls is OwnSGD else {"amsgrad": True}
    configs = [{"lr": 0.01}, {"lr": 0.03, **options}, {"lr": 0.02, "maximize": True}]
    bundle = hand_made(TwoHeads)
    x = torch.randn(5, 3, dtype=torch.float64)
    optimizer = bundle.optimizer(optimizer_cls, configs)
    alone = bundle.alone_optimizers(optimizer_cls, configs)
    assert isinstance(optimizer, ViewOptimizer)
    for step in range(8):

        def loss(model, i, step=step):
            return model(x * (i + 1), step % 3 == 2).square().sum()

        bundle.active[0] = step not in (4, 5)
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss, which=None if bundle.active[0] else {1, 2})
    assert bundle.worst_error() <= 1e-12


def test_one_model_and_a_thousand(hand_made, regression):
    loss = regression()
    for num_models in (1, 1000):
        bundle = hand_made(num_models=num_models)
        configs = [{"lr": 0.01 * (i + 1)} for i in range(num_models)]
        optimizer = bundle.optimizer(optim.SGD, configs)
        alone = bundle.alone_optimizers(optim.SGD, configs)
        bundle.step(optimizer, lambda model, i: loss(model, i % 8))
        bundle.step_alone(alone, lambda model, i: loss(model, i % 8))
        assert bundle.worst_error() <= 1e-12


class TestErrors:
    def test_no_more_groups(self, hand_made):
        optimizer = hand_made().optimizer(optim.SGD, [{}] * 3)
        with pytest.raises(ModelBatchError, match="one parameter group per model"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
        assert len(optimizer.param_groups) == 3

    def test_parameters_that_the_class_refuses(self, hand_made):
        bundle = hand_made()
        with pytest.raises(ModelBatchError, match=r"model 0: Muon: .*2D"):
            bundle.optimizer(optim.Muon, [{}] * 3)

    def test_options_that_the_class_refuses(self, hand_made):
        bundle = hand_made()
        with pytest.raises(ModelBatchError, match="model 2: Adam: Invalid learning rate: -1"):
            bundle.optimizer(optim.Adam, [{}, {}, {"lr": -1.0}])
        with pytest.raises(ModelBatchError, match=r"model 1: .*differentiable"):
            bundle.optimizer(optim.SGD, [{}, {"differentiable": True}, {}])

    def test_counts(self, hand_made):
        bundle = hand_made()
        with pytest.raises(ModelBatchError, match="2 configs for 3 models"):
            bundle.optimizer(optim.SGD, [{}] * 2)
        with pytest.raises(ModelBatchError, match="at least one model"):
            build_view_optimizer({}, [], optim.SGD, [], active=list)
        for optimizer_cls in (optim.SGD, optim.NAdam, optim.SparseAdam):
            optimizer = bundle.optimizer(optimizer_cls, [{}] * 3)
            bundle.stacked["0.bias"].grad = torch.ones_like(bundle.stacked["0.bias"])
            bundle.active = [True] * 4
            with pytest.raises(ModelBatchError, match="4 flags for 3 models"):
                optimizer.step()

    def test_models_that_are_not_the_stack(self, hand_made):
        bundle = hand_made()
        bundle.models[1] = copy.deepcopy(bundle.models[1])
        with pytest.raises(ModelBatchError, match=r"model 1: parameter '0.weight' is not a view"):
            bundle.optimizer(optim.SGD, [{}] * 3)
        bundle.models[1] = nn.Linear(3, 5)
        with pytest.raises(ModelBatchError, match="model 1: its parameters are not those"):
            bundle.optimizer(optim.SGD, [{}] * 3)
        bundle.models[1] = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
        with pytest.raises(ModelBatchError, match=r"model 1: .*\(6, 3\).*\(3, 5, 3\)"):
            bundle.optimizer(optim.SGD, [{}] * 3)
