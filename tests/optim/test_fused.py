"""What the fused optimizer adds to the arithmetic: groups, state, what it notices between steps."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import ASGD, SGD, Adagrad, Adam, NAdam, RMSprop, Rprop

from modelbatch import ModelBatch, ModelBatchError
from modelbatch.optim import FusedOptimizer, ViewOptimizer
from modelbatch.optim.rules import RULES

M = 3
CLASSES = sorted(RULES, key=lambda cls: cls.__name__)


def models(dtype=torch.float64):
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype) for _ in range(M)]


def batch(k=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (8,), generator=generator)


def step_alone(model, optimizer, x, y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def pair(cls, options=None):
    """A bundle, and the same models alone with their optimizers."""
    options = options or [{"lr": 0.01 * (i + 1)} for i in range(M)]
    mb = ModelBatch(models(), optimizer_cls=cls, optimizer_kwargs=options)
    alone = models()
    return mb, alone, [cls(m.parameters(), **o) for m, o in zip(alone, options, strict=True)]


def train(mb, alone, optimizers, steps, which=range(M)):
    for k in steps:
        x, y = batch(k)
        mb.train_step(x, y)
        for i in which:
            step_alone(alone[i], optimizers[i], x, y)


def assert_equal_alone(mb, alone):
    for i in range(M):
        torch.testing.assert_close(
            parameters(mb.models[i]), parameters(alone[i]), rtol=1e-12, atol=1e-14
        )


@pytest.mark.parametrize("cls", CLASSES)
def test_the_class_and_its_kind(cls):
    mb, _, _ = pair(cls)
    assert isinstance(mb.optimizer, FusedOptimizer)
    assert isinstance(mb.optimizer, cls)
    assert type(mb.optimizer).__name__ == cls.__name__


def test_a_subclass_keeps_its_own_step():
    class Mine(Adam):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.sub_(p.grad)

    mb = ModelBatch(models(), optimizer_cls=Mine, fallback="silent")
    assert isinstance(mb.optimizer, ViewOptimizer)
    before = parameters(mb.models[0]).clone()
    mb.train_step(*batch())
    gradient = torch.cat([g.flatten() for g in mb.gradients(0).values()])
    assert torch.equal(parameters(mb.models[0]), before - gradient)


WRITES = {
    "assign": lambda group: group.__setitem__("lr", 0.05),
    "update": lambda group: group.update(lr=0.05),
    "or": lambda group: group.__ior__({"lr": 0.05}),
    "tensor": lambda group: group.__setitem__("lr", torch.tensor(0.05, dtype=torch.float64)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_writes_take_effect_at_the_next_step(write):
    mb, alone, optimizers = pair(Adam)
    train(mb, alone, optimizers, range(2))
    write(mb.optimizer.param_groups[1])
    optimizers[1].param_groups[0]["lr"] = 0.05
    train(mb, alone, optimizers, range(2, 4))
    assert_equal_alone(mb, alone)


def test_a_tensor_that_changes_by_itself_is_read_at_every_step():
    rate = torch.tensor(0.01, dtype=torch.float64)
    options = [{"lr": 0.01}, {"lr": rate}, {"lr": 0.02}]
    mb = ModelBatch(models(), optimizer_cls=Adam, optimizer_kwargs=options)
    alone = models()
    optimizers = [Adam(m.parameters(), lr=lr) for m, lr in zip(alone, (0.01, 0.01, 0.02))]
    for k in range(4):
        train(mb, alone, optimizers, [k])
        mb.optimizer.param_groups[1]["lr"].mul_(0.5)
        optimizers[1].param_groups[0]["lr"] *= 0.5
    assert_equal_alone(mb, alone)


@pytest.mark.parametrize(
    ("cls", "option", "values"),
    [
        (Adam, "betas", [(0.5, 0.6), (0.9, 0.99)]),
        (Adam, "weight_decay", [0.3, 0.0]),
        (Adam, "maximize", [True, False]),
        (SGD, "momentum", [0.9, 0.0, 0.5]),
        (SGD, "nesterov", [True, False]),
        (RMSprop, "momentum", [0.9, 0.5]),
        (Adagrad, "lr_decay", [0.1, 0.0]),
        (ASGD, "t0", [1.0, 7.0]),
        (NAdam, "momentum_decay", [0.1, 0.0]),
        (NAdam, "decoupled_weight_decay", [True, False]),
        (Rprop, "etas", [(0.3, 1.5), (0.5, 1.2)]),
        (Rprop, "step_sizes", [(1e-3, 0.02), (1e-6, 50.0)]),
    ],
)
def test_every_option_may_be_written(cls, option, values):
    momentum = {"momentum": 0.5} if option == "nesterov" else {}
    if (cls, option) == (RMSprop, "momentum"):  # torch makes its buffer at the first step only
        momentum = {"momentum": 0.1}
    mb, alone, optimizers = pair(cls, [{"lr": 0.01 * (i + 1), **momentum} for i in range(M)])
    train(mb, alone, optimizers, range(2))
    for k, value in enumerate(values):
        mb.optimizer.param_groups[2][option] = value
        optimizers[2].param_groups[0][option] = value
        train(mb, alone, optimizers, range(2 + 2 * k, 4 + 2 * k))
    assert_equal_alone(mb, alone)


def test_learning_rates_are_read_once_until_they_change():
    mb, _, _ = pair(Adam)
    optimizer = mb.optimizer
    assert optimizer.learning_rates() == [0.01, 0.02, 0.03]
    mb.train_step(*batch())
    rates = optimizer.learning_rates()
    assert rates == [0.01, 0.02, 0.03]
    mb.train_step(*batch())
    assert optimizer.learning_rates() is rates
    optimizer.param_groups[1]["lr"] = 0.5
    assert optimizer.learning_rates() == [0.01, 0.5, 0.03]
    mb.train_step(*batch())
    assert optimizer.learning_rates() == [0.01, 0.5, 0.03]
    optimizer.param_groups[2]["lr"] = torch.tensor(0.25)
    mb.train_step(*batch())
    optimizer.param_groups[2]["lr"].mul_(2)
    assert optimizer.learning_rates() == [0.01, 0.5, 0.5]


def test_groups_may_be_replaced():
    mb, alone, optimizers = pair(SGD)
    train(mb, alone, optimizers, range(2))
    new = [{**group, "lr": 0.03, "momentum": 0.5} for group in mb.optimizer.param_groups]
    mb.optimizer.param_groups = new
    for optimizer in optimizers:
        optimizer.param_groups[0].update(lr=0.03, momentum=0.5)
    train(mb, alone, optimizers, range(2, 5))
    assert_equal_alone(mb, alone)
    assert "momentum_buffer" in mb.optimizer.state[mb.models[0][0].weight]


def test_a_value_that_is_no_number_is_refused_and_nothing_moves():
    mb, _, _ = pair(Adam)
    mb.train_step(*batch())
    before = copy.deepcopy(mb.state_dict())
    mb.optimizer.param_groups[1]["lr"] = "fast"
    with pytest.raises(ModelBatchError, match="model 1: option 'lr' must be a number, got 'fast'"):
        mb.step()
    assert all(torch.equal(v, before[k]) for k, v in mb.state_dict().items())
    mb.optimizer.param_groups[1]["lr"] = 0.1
    mb.optimizer.param_groups[2]["betas"] = (0.9,)
    with pytest.raises(ModelBatchError, match=r"model 2: option 'betas' must be 2 numbers"):
        mb.step()
    mb.optimizer.param_groups[2]["betas"] = (0.9, 0.99)
    mb.step()


def test_a_group_is_a_dict_whose_copies_are_plain():
    mb, _, _ = pair(Adam)
    group = mb.optimizer.param_groups[0]
    assert isinstance(group, dict)
    assert group.get("lr") == group["lr"] == 0.01
    assert group.get("nothing", 7) == group.pop("nothing", 7) == 7
    assert group.setdefault("mine", 3) == 3
    assert group.pop("mine") == 3
    with pytest.raises(KeyError):
        group.pop("mine")
    for copied in (copy.deepcopy(group), pickle.loads(pickle.dumps(group)), dict(group)):
        assert type(copied) is dict
        assert copied["lr"] == 0.01


def test_params_show_the_gradients():
    mb, _, _ = pair(Adam)
    x, y = batch()
    mb.compute_loss(mb(x), y).backward()
    assert mb.models[1][0].weight.grad is None
    params = mb.optimizer.param_groups[1]["params"]
    assert params[0] is mb.models[1][0].weight
    assert torch.equal(params[0].grad, mb.gradients(1)["0.weight"])
    mb.zero_grad()
    assert params[0].grad is None


def test_hooks_closure_and_profile():
    mb, _, _ = pair(Adam)
    seen = []
    mb.optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    mb.optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    x, y = batch()

    def closure():
        assert torch.is_grad_enabled()
        mb.zero_grad()
        loss = mb.compute_loss(mb(x), y)
        loss.backward()
        seen.append("closure")
        return loss

    with torch.no_grad():
        loss = mb.optimizer.step(closure)
    assert torch.is_tensor(loss)
    assert seen == ["before", "closure", "after"]


def test_autograd_notices_the_step():
    mb, _, _ = pair(SGD)
    x, y = batch()
    loss = mb.compute_loss(mb(x.requires_grad_()), y)
    loss.backward(retain_graph=True)
    mb.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- state


def test_no_state_before_the_first_step():
    for cls in CLASSES:
        mb, _, optimizers = pair(cls)
        keys = [sorted(o.state_dict()["state"]) for o in optimizers]
        ours = [sorted(mb.optimizer.model_state_dict(i)["state"]) for i in range(M)]
        assert ours == keys
        assert bool(mb.optimizer.state) is (cls is Adagrad)


def test_state_is_shown_as_views():
    mb, alone, optimizers = pair(Adam)
    train(mb, alone, optimizers, range(3))
    weight = mb.models[1][0].weight
    state = mb.optimizer.state[weight]
    theirs = optimizers[1].state[alone[1][0].weight]
    assert state.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(state[name].double(), value.double(), rtol=1e-12, atol=1e-14)
    state["exp_avg"].zero_()
    assert not mb.optimizer.state[weight]["exp_avg"].any()
    assert mb.optimizer.state[mb.models[0][0].weight]["exp_avg"].any()
    assert weight in mb.optimizer.state
    assert len(mb.optimizer.state) == M * 4
    assert all(p.shape == s["exp_avg"].shape for p, s in mb.optimizer.state.items())


def test_deleted_and_assigned_states():
    mb, alone, optimizers = pair(Adam)
    train(mb, alone, optimizers, range(3))
    for module, optimizer in ((mb.models[1], mb.optimizer), (alone[1], optimizers[1])):
        for p in module.parameters():
            optimizer.state.pop(p)
    train(mb, alone, optimizers, range(3, 5))
    assert_equal_alone(mb, alone)
    saved = {p: dict(mb.optimizer.state[p]) for p in mb.models[0].parameters()}
    copies = {p: {k: v.clone() for k, v in state.items()} for p, state in saved.items()}
    mb.optimizer.state = copies
    assert len(mb.optimizer.state) == 4
    for p, state in copies.items():
        assert all(torch.equal(mb.optimizer.state[p][k], v) for k, v in state.items())


def test_parameters_that_get_no_gradient_for_a_while():
    mb, alone, optimizers = pair(Adam)
    for k in range(6):
        x, y = batch(k)
        mb.zero_grad()
        mb.compute_loss(mb(x), y).backward()
        skip = k in (0, 2, 3)
        if skip:
            dict(mb.named_parameters())["2.weight"].grad = None
        mb.step()
        for model, optimizer in zip(alone, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if skip:
                model[2].weight.grad = None
            optimizer.step()
    assert_equal_alone(mb, alone)
    state = mb.optimizer.model_state_dict(0)["state"]
    assert [float(state[k]["step"]) for k in range(4)] == [6.0, 6.0, 3.0, 6.0]
    # A state dict whose parameters have counts of their own comes back as it was.
    other, _, _ = pair(Adam)
    other.optimizer.load_model_state_dict(0, state_dict := mb.optimizer.model_state_dict(0))
    again = other.optimizer.model_state_dict(0)
    assert all(
        torch.equal(again["state"][k][name], state_dict["state"][k][name])
        for k in range(4)
        for name in ("step", "exp_avg", "exp_avg_sq")
    )


@pytest.mark.parametrize("cls", CLASSES)
def test_whole_state_dict_goes_on_where_it_stopped(cls):
    options = [
        {"lr": 0.01 * (i + 1), **({"momentum": 0.5} if cls is SGD else {})} for i in range(M)
    ]
    mb, alone, optimizers = pair(cls, options)
    mb.freeze(2)
    train(mb, alone, optimizers, range(2), which=(0, 1))
    mb.unfreeze(2)
    train(mb, alone, optimizers, range(2, 4))
    other = ModelBatch([copy.deepcopy(m) for m in mb.models], [1.0] * M, cls)
    state = pickle.loads(pickle.dumps(mb.optimizer.state_dict()))
    other.optimizer.load_state_dict(state)
    for optimizer in optimizers:  # torch's loading casts NAdam's products
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(other, alone, optimizers, range(4, 7))
    assert_equal_alone(other, alone)


def test_load_hooks_and_wrong_states():
    mb, _, _ = pair(Adam)
    mb.train_step(*batch())
    calls = []
    mb.optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("before"))
    mb.optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("after"))
    good = copy.deepcopy(mb.optimizer.state_dict())
    mb.optimizer.load_state_dict(good)
    assert calls == ["before", "after"]
    few = {**good, "param_groups": good["param_groups"][:2]}
    with pytest.raises(ModelBatchError, match="of 2 models, the bundle has 3"):
        mb.optimizer.load_state_dict(few)
    lacking = copy.deepcopy(good)
    del lacking["state"][5]["exp_avg_sq"]
    lacking["state"][0]["exp_avg"] += 1
    before = copy.deepcopy(mb.optimizer.state_dict())
    with pytest.raises(ModelBatchError, match="model 1: the state of parameter 1 lacks exp_avg_sq"):
        mb.optimizer.load_state_dict(lacking)
    after = mb.optimizer.state_dict()
    assert torch.equal(after["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


# ---- what else a parameter may be


def test_dtypes_move_with_the_bundle():
    mb, alone, optimizers = pair(Adam)
    train(mb, alone, optimizers, range(2))
    mb.float()
    for k in range(2, 5):
        mb.train_step(*batch(k, torch.float32))
    assert mb.optimizer.state[mb.models[0][0].weight]["exp_avg"].dtype == torch.float32
    mb.double()
    train(mb, alone, optimizers, [])
    for k in range(2, 5):
        x, y = batch(k)
        for model, optimizer in zip(alone, optimizers, strict=True):
            step_alone(model, optimizer, x, y)
    for i in range(M):
        torch.testing.assert_close(
            parameters(mb.models[i]), parameters(alone[i]), rtol=1e-5, atol=1e-6
        )


def test_half_parameters_keep_their_state_in_float32():
    mb = ModelBatch(models(torch.bfloat16), [0.01] * M, Adam)
    mb.train_step(*batch(0, torch.bfloat16))
    state = mb.optimizer.state[mb.models[0][0].weight]
    assert state["exp_avg"].dtype == torch.float32
    other = ModelBatch(models(torch.bfloat16), [0.5] * M, Adam)
    other.optimizer.load_state_dict(mb.optimizer.state_dict())
    again = other.optimizer.state[other.models[0][0].weight]
    assert torch.equal(again["exp_avg"], state["exp_avg"])


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))

    def forward(self, x):
        return (x.to(torch.complex128) @ self.weight).abs()


@pytest.mark.parametrize("cls", CLASSES)
def test_complex_parameters(cls):
    torch.manual_seed(0)
    alone = [Complex() for _ in range(M)]
    rates = [0.01, 0.02, 0.03]
    mb = ModelBatch([copy.deepcopy(m) for m in alone], rates, cls)
    assert isinstance(mb.optimizer, FusedOptimizer)
    optimizers = [cls(m.parameters(), lr=lr) for m, lr in zip(alone, rates, strict=True)]
    train(mb, alone, optimizers, range(4))
    assert_equal_alone(mb, alone)
    for i in range(M):
        cls(alone[i].parameters()).load_state_dict(mb.optimizer.model_state_dict(i))
        mb.optimizer.load_model_state_dict(i, optimizers[i].state_dict())
    train(mb, alone, optimizers, range(4, 6))
    assert_equal_alone(mb, alone)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4, sparse=True, dtype=torch.float64)

    def forward(self, x):
        return self.table(x)


# torch 2.15 says so wherever it makes a sparse tensor itself.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("cls", [SGD, Adagrad])
def test_sparse_gradients(cls):
    torch.manual_seed(0)
    alone = [Words() for _ in range(M)]
    rates = [0.01, 0.02, 0.03]
    mb = ModelBatch([copy.deepcopy(m) for m in alone], rates, cls)
    optimizers = [cls(m.parameters(), lr=lr) for m, lr in zip(alone, rates, strict=True)]
    for k in range(4):
        x = torch.randint(10, (6,), generator=torch.Generator().manual_seed(k))
        y = torch.zeros(6, 4, dtype=torch.float64)
        mb.train_step(x, y, loss_fn=F.mse_loss)
        for model, optimizer in zip(alone, optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
    assert_equal_alone(mb, alone)


def test_a_gradient_whose_strides_differ():
    """torch's own fused CPU kernel updates the wrong elements then."""
    mb, alone, optimizers = pair(Adam)
    x, y = batch()
    for _ in range(3):
        mb.zero_grad()
        mb.compute_loss(mb(x), y).backward()
        weight = dict(mb.named_parameters())["0.weight"]
        weight.grad = weight.grad.transpose(1, 2).contiguous().transpose(1, 2)
        assert weight.grad.stride() != weight.stride()
        mb.step()
        for model, optimizer in zip(alone, optimizers, strict=True):
            step_alone(model, optimizer, x, y)
    assert_equal_alone(mb, alone)
