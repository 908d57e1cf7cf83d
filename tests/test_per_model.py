"""Numbers that differ between models, attributes that forwards write, hooks and fallbacks."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bundle_case import assert_relative, gradients, row
from torch import Tensor, nn

from modelbatch import (
    BatchingError,
    FallbackWarning,
    ModelBatch,
    StructureMismatchError,
)

# ---- plain numbers

NUMBERS: dict[str, tuple[Any, list[Any], tuple[int, ...]]] = {
    "LeakyReLU": (lambda v: nn.LeakyReLU(v), [0.1, 0.3, 0.1], (4, 6)),
    "ELU": (lambda v: nn.ELU(v), [1.0, 0.5, 2], (4, 6)),
    "CELU": (lambda v: nn.CELU(v), [1.0, 0.5, 2.0], (4, 6)),
    "Softplus": (lambda v: nn.Softplus(beta=v), [1, 2, 3], (4, 6)),
    "Hardtanh": (lambda v: nn.Hardtanh(-v, v), [0.5, 1.0, 0.25], (4, 6)),
    "Threshold": (lambda v: nn.Threshold(v, 0.1), [0.5, 1.0, 0.25], (4, 6)),
    "Softshrink": (lambda v: nn.Softshrink(v), [0.5, 0.1, 0.25], (4, 6)),
    "Hardshrink": (lambda v: nn.Hardshrink(v), [0.5, 0.1, 0.25], (4, 6)),
    "LayerNorm": (lambda v: nn.LayerNorm(6, eps=v), [1e-5, 1e-1, 1.0], (4, 6)),
    "GroupNorm": (lambda v: nn.GroupNorm(2, 6, eps=v), [1e-5, 1e-1, 1.0], (4, 6, 3)),
    "RMSNorm": (lambda v: nn.RMSNorm(6, eps=v), [1e-5, 1e-1, 1.0], (4, 6)),
    "LocalResponseNorm": (lambda v: nn.LocalResponseNorm(2, alpha=v), [0.1, 0.5, 1.0], (4, 6, 3)),
    "BatchNorm eps": (lambda v: nn.BatchNorm1d(6, eps=v), [1e-5, 1e-1, 1.0], (4, 6)),
    "BatchNorm momentum": (lambda v: nn.BatchNorm2d(6, momentum=v), [0.1, 0.5, 0.9], (4, 6, 3, 3)),
    "BatchNorm cumulative": (lambda v: nn.BatchNorm1d(6, momentum=v), [None, 0.5, None], (4, 6)),
    "BatchNorm all cumulative": (lambda v: nn.BatchNorm1d(6, momentum=v), [None] * 3, (4, 6)),
    "InstanceNorm": (
        lambda v: nn.InstanceNorm1d(6, eps=v, affine=True, track_running_stats=True),
        [1e-5, 1e-1, 1.0], (4, 6, 5)),
}  # fmt: skip


class WithHead(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(x.movedim(1, -1)).movedim(-1, 1)
        return self.inner(mixed)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_differ_are_honoured(name: str) -> None:
    make, values, shape = NUMBERS[name]
    torch.manual_seed(0)
    models = [WithHead(make(v)).double() for v in values]
    bundle = ModelBatch(copy.deepcopy(models), fallback="error")
    for mode in (True, True, False):
        bundle.train(mode)
        x = torch.randn(shape, dtype=torch.float64)
        bundle.zero_grad()
        out = bundle(x)
        bundle.compute_loss(out, x, F.mse_loss).backward()
        for i, model in enumerate(models):
            model.train(mode).zero_grad()
            expected = model(x)
            F.mse_loss(expected, x).backward()
            assert_relative(out[i], expected, 1e-10, name)
            assert_relative(bundle.gradients(i), gradients(model), 1e-10, name)
            assert_relative(bundle[i].state_dict(), model.state_dict(), 1e-10, name)
    # the models still hold plain numbers of their own
    for model, original in zip(bundle.models, models):
        inner = original.get_submodule("inner").__dict__
        for key, value in model.get_submodule("inner").__dict__.items():
            if isinstance(inner[key], float):
                assert type(value) is float and value == inner[key]


def test_a_dropout_sweep_drops_each_models_own_share() -> None:
    rates = [0.0, 0.2, 0.5, 0.9, 1.0]
    bundle = ModelBatch([nn.Sequential(nn.Dropout(p)) for p in rates], seeds=range(5))
    x = torch.ones(40_000)
    out = bundle(x)
    for p, y in zip(rates, out):
        # five standard deviations of a binomial share
        bound = 5 * (p * (1 - p) / x.numel()) ** 0.5
        assert abs((y == 0).double().mean().item() - p) <= bound
        if p < 1:
            assert torch.allclose(y[y != 0], torch.tensor(1 / (1 - p)))


def test_attributes_changed_later_take_effect_at_the_next_mode_change() -> None:
    models = [nn.Sequential(nn.Linear(3, 3), nn.LeakyReLU(0.1)) for _ in range(2)]
    bundle = ModelBatch(models)
    x = torch.randn(4, 3)
    models[1][1].negative_slope = 0.5
    bundle.train()
    torch.testing.assert_close(bundle(x)[1], models[1](x))
    models[1][1].inplace = True
    with pytest.raises(StructureMismatchError, match="'1.inplace' differs"):
        bundle.train()


class Scaled(nn.Module):
    def __init__(self, scale: float = 1.0, notes: Any = None, layers: Any = None) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.scale, self.notes = scale, notes
        self.extra = layers or []

    def forward(self, x: Tensor) -> Tensor:
        for extra in self.extra:
            x = extra(x)
        return self.layer(x) * self.scale


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "number": ([{"scale": 1.0}, {"scale": 2.0}], "'scale' differs between models: 1.0 in model 0"),
    "flag": ([{"notes": True}, {"notes": False}], "'notes'"),
    "string in a dict": ([{"notes": {"a": ["x"]}}, {"notes": {"a": ["y"]}}], r"notes\['a'\]\[0\]"),
    "tensor": ([{"notes": torch.ones(2)}, {"notes": torch.zeros(2)}], "'notes'"),
    "function": ([{"notes": F.relu}, {"notes": F.gelu}], "'notes'"),
    "unregistered modules": (
        [{"layers": [nn.Linear(3, 3)]}, {"layers": [nn.Linear(3, 3)]}], r"'extra\[0\]"),
    "set": ([{"notes": {1}}, {"notes": {2}}], "'notes'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_other_differences_are_refused_by_name(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(StructureMismatchError, match=message):
        ModelBatch([Scaled(**o) for o in options])


def test_equal_and_ignored_attributes_are_accepted() -> None:
    notes = [{"f": F.relu, "t": torch.arange(3), "nan": float("nan"), "l": [1, (2, None)]}] * 2
    ModelBatch([Scaled(notes=copy.deepcopy(n)) for n in notes])
    ModelBatch([Scaled(notes="a"), Scaled(notes="b")], ignore_attributes=["notes"])
    closures = [Scaled(notes=(lambda k: lambda x: x * k)(2.0)) for _ in range(2)]
    ModelBatch(closures)
    with pytest.raises(StructureMismatchError, match="closure"):
        ModelBatch([Scaled(notes=(lambda k: lambda x: x * k)(v)) for v in (2.0, 3.0)])


def test_a_number_used_in_python_arithmetic_falls_back_to_each_models_own() -> None:
    class Custom(nn.LeakyReLU):
        def forward(self, x: Tensor) -> Tensor:
            return x * (self.negative_slope + 1)

    models = [nn.Sequential(nn.Linear(3, 3), Custom(v)) for v in (0.1, 0.4)]
    bundle = ModelBatch(copy.deepcopy(models))
    x = torch.randn(2, 3)
    with pytest.warns(FallbackWarning, match="Python arithmetic"):
        out = bundle(x)
    for i, model in enumerate(models):
        torch.testing.assert_close(out[i], model(x))


# ---- buffers and attributes that the forward writes


class Counts(nn.Module):
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("inplace", torch.zeros(3))
        self.register_buffer("late", None)
        self.calls = 0
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        if self.last is not None:
            out = out + self.last
        self.total = self.total + out.detach().sum()
        self.inplace.add_(out.detach().mean(0))
        self.late = out.detach().amax(0)
        self.calls += 1
        self.last = out.detach()
        return out


def test_what_a_forward_writes_reaches_every_model() -> None:
    torch.manual_seed(0)
    models = [Counts().double() for _ in range(3)]
    bundle = ModelBatch(copy.deepcopy(models), fallback="error")
    for step in range(3):
        x = torch.randn(2, 3, dtype=torch.float64)
        out = bundle(x)
        for i, model in enumerate(models):
            assert_relative(out[i], model(x), 1e-12)
            mine = bundle[i]
            assert mine.calls == model.calls == step + 1
            for name in ("total", "inplace", "late", "last"):
                assert_relative(getattr(mine, name), getattr(model, name), 1e-12, name)
    assert bundle.state_dict()["late"].shape == (3, 3)
    exported = bundle.export(1)
    assert_relative(exported(x), models[1](x), 1e-12)


def test_an_attribute_that_is_only_read_stays_each_models_own() -> None:
    class Remembers(nn.Module):
        last: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.last = torch.zeros(3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x) + self.last
            if self.training:
                self.last = out.detach().mean(0)
            return out

    torch.manual_seed(0)
    models = [Remembers().double() for _ in range(2)]
    bundle = ModelBatch(copy.deepcopy(models))
    x = torch.randn(4, 3, dtype=torch.float64)
    for mode in (True, False, False, True):
        bundle.train(mode)
        out = bundle(x)
        for i, model in enumerate(models):
            assert_relative(out[i], model.train(mode)(x), 1e-12)
            assert_relative(bundle[i].last, model.last, 1e-12)


def test_frozen_models_keep_written_buffers() -> None:
    bundle = ModelBatch([Counts() for _ in range(3)])
    bundle(torch.randn(2, 3))
    bundle.freeze(1)
    before = {k: v.clone() for k, v in bundle[1].state_dict().items()}
    bundle(torch.randn(2, 3))
    assert all(torch.equal(v, before[k]) for k, v in bundle[1].state_dict().items())
    assert bundle[0].total.item() != 0


# ---- what cannot be batched


class UsesVander(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 1)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        powers = torch.vander(torch.tanh(self.first(x)).flatten(), 4)
        return self.head(self.drop(powers))


@pytest.mark.parametrize("rng", ["torch", "philox"])
def test_one_operation_without_a_rule_is_looped_over(rng: str) -> None:
    torch.manual_seed(0)
    models = [UsesVander().double() for _ in range(3)]
    bundle = ModelBatch(copy.deepcopy(models), rng=rng, seeds=[1, 2, 3])
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    with pytest.warns(FallbackWarning, match="vander cannot be batched"):
        out = bundle(x)
    assert bundle.explain(x).fallbacks == ["vander"]
    if rng == "torch":
        for i, model in enumerate(models):
            torch.manual_seed(i + 1)
            assert_relative(out[i], model(x), 1e-10)
    bundle.eval()
    evaluated = bundle(x)
    for i, model in enumerate(models):
        assert_relative(evaluated[i], model.eval()(x), 1e-10)


def test_the_loop_draws_what_the_batched_forward_draws() -> None:
    """A model's philox stream does not depend on how its forward is run."""

    class Drops(nn.Module):
        def __init__(self, branch: bool) -> None:
            super().__init__()
            self.layer, self.branch = nn.Linear(6, 6), branch

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(self.layer(x), 0.5)
            if self.branch and x.sum() > 1e9:
                return x
            return x + torch.rand_like(x) + torch.randn(6, dtype=x.dtype)

    torch.manual_seed(0)
    layers = [nn.Linear(6, 6).double() for _ in range(3)]
    outputs = []
    for branch in (False, True):
        models = [Drops(branch).double() for _ in range(3)]
        for model, layer in zip(models, layers):
            model.layer.load_state_dict(layer.state_dict())
        bundle = ModelBatch(models, seeds=[7, 8, 9], fallback="silent")
        x = torch.ones(4, 6, dtype=torch.float64)
        outputs.append([bundle(x), bundle(x)])
    for a, b in zip(*outputs):
        assert_relative(a, b, 1e-12)


class WritesIntoZeros(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.zeros(x.shape[0], 4, dtype=x.dtype)
        out = torch.zeros(x.shape[0], x.shape[1], 4, dtype=x.dtype)
        for t in range(x.shape[1]):
            hidden = torch.tanh(self.cell(torch.cat([x[:, t], hidden], 1)))
            out[:, t] = hidden
        return out


def test_a_hand_written_recurrence_that_fills_zeros_is_batched() -> None:
    torch.manual_seed(0)
    models = [WritesIntoZeros().double() for _ in range(3)]
    bundle = ModelBatch(copy.deepcopy(models), fallback="error")
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    out = bundle(x)
    out.square().sum().backward()
    for i, model in enumerate(models):
        expected = model(x)
        assert_relative(out[i], expected, 1e-12)
        expected.square().sum().backward()
        assert_relative(bundle.gradients(i)["cell.weight"], model.cell.weight.grad, 1e-10)


def test_a_parameter_reached_around_its_attribute_is_not_shared_in_silence() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.cache = [self.layer.weight]

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.cache[0])

    models = [Cached() for _ in range(2)]
    bundle = ModelBatch(copy.deepcopy(models))
    x = torch.randn(4, 3)
    with pytest.raises(BatchingError, match="'layer.weight'.*outside of its attribute"):
        bundle(x)


# ---- hooks


def test_hooks_see_their_own_model() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 3), nn.ReLU()).double() for _ in range(3)]
    bundle = ModelBatch(models)
    x = torch.randn(2, 3, dtype=torch.float64)
    batched = bundle(x)
    seen: dict[int, Tensor] = {}
    handles = [
        model[0].register_forward_hook(lambda m, a, o, i=i: seen.__setitem__(i, o.detach().clone()))
        for i, model in enumerate(models)
    ]
    with pytest.warns(FallbackWarning, match="forward hooks"):
        looped = bundle(x)
    assert_relative(looped, batched, 1e-12)
    for i in range(3):
        assert_relative(seen[i].relu(), batched[i], 1e-12)
    for handle in handles:
        handle.remove()
    seen.clear()
    bundle(x)
    assert not seen and not bundle.explain(x).fallbacks


def test_hooks_present_at_construction_run() -> None:
    models = [nn.Sequential(nn.Linear(3, 3)) for _ in range(2)]
    calls: list[nn.Module] = []
    models[1][0].register_forward_pre_hook(lambda m, a: calls.append(m))
    bundle = ModelBatch(models, fallback="silent")
    bundle(torch.randn(2, 3))
    assert calls == [models[1][0]]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("kind", ["old", "parametrized"])
def test_weight_norm_is_batched(kind: str) -> None:
    norm = {
        "old": nn.utils.weight_norm,
        "parametrized": nn.utils.parametrizations.weight_norm,
    }[kind]
    torch.manual_seed(0)
    models = [nn.Sequential(norm(nn.Linear(3, 4)), nn.ReLU()).double() for _ in range(3)]
    x = torch.randn(2, 3, dtype=torch.float64)
    expected = [model(x) for model in models]
    bundle = ModelBatch(models, fallback="error")
    out = bundle(x)
    for i in range(3):
        assert_relative(row(out, i), expected[i], 1e-12)
