"""Whole training steps as one compiled graph: the results of the general path, and when."""

import copy
import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bundle_case import assert_relative, state
from torch import Tensor, nn

from modelbatch import FallbackWarning, ModelBatch, OptimizerFactory, per_model
from modelbatch.optim import BundleGradScaler

# torch itself, when some versions load what generates code
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")

M, B = 3, 8


# No bias before a batch normalisation: its gradient is zero up to rounding, which Adam blows up.
def _mlp(p: float = 0.4) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(p), nn.Linear(6, 3))
    )


def _plain() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))


def _cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.SiLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16, 3)),
    )


def _bundle(
    make: Callable[[], nn.Module] = _mlp,
    optimizer_cls: Any = torch.optim.Adam,
    backend: str | None = None,
    fallback: str = "warn",
    **options: Any,
) -> ModelBatch:
    torch.manual_seed(3)
    models = [make().double() for _ in range(M)]
    clips = {name: options.pop(name) for name in list(options) if name.startswith("clip")}
    mb = ModelBatch(models, seeds=range(M), fallback=fallback)
    factory = OptimizerFactory(optimizer_cls, options, **clips)
    factory.create_optimizer(mb, [{"lr": 0.01 * (i + 1)} for i in range(M)])
    mb.enable_engine(False)
    if backend is not None:
        mb.enable_compile(backend=backend)
    return mb


def _data(count: int, shape: tuple[int, ...] = (5,)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    return [
        (
            torch.randn(B, *shape, generator=generator, dtype=torch.float64),
            torch.randint(3, (B,), generator=generator),
        )
        for _ in range(count)
    ]


def _taken(mb: ModelBatch) -> bool:
    """Whether the last step was one graph."""
    step = mb._compiler.whole_step  # type: ignore[union-attr]
    return step.graphs > 0 and step.reason is None


def _assert_same(a: ModelBatch, b: ModelBatch, tolerance: float) -> None:
    assert_relative(state(a), state(b), tolerance)
    assert a.latest_losses is not None and b.latest_losses is not None
    assert_relative(a.latest_losses, b.latest_losses, tolerance)
    assert torch.equal(a._streams.step, b._streams.step)
    numbers = [torch.tensor(list(mb.metrics().values()), dtype=torch.float64) for mb in (a, b)]
    assert a.metrics().keys() == b.metrics().keys()
    assert_relative(*numbers, tolerance)


@pytest.mark.parametrize(
    ("make", "shape", "optimizer_cls", "options"),
    [
        (_mlp, (5,), torch.optim.Adam, {"amsgrad": True}),
        (_cnn, (1, 6, 6), torch.optim.SGD, {"momentum": 0.9}),
    ],
    ids=["mlp-adam", "cnn-sgd"],
)
def test_inductor_equals_the_general_path(
    make: Any, shape: Any, optimizer_cls: Any, options: Any
) -> None:
    """With models frozen, thawed and given other rates on the way, and one compilation in all."""
    general = _bundle(make, optimizer_cls, **options)
    compiled = _bundle(make, optimizer_cls, "inductor", **options)
    kept: dict[Any, list[Tensor]] = {}
    for number, (x, y) in enumerate(_data(20, shape)):
        for mb in (general, compiled):
            if number == 4:
                mb.freeze(1)
                kept[mb] = [t[1].clone() for t in mb.state_dict().values()]
            if number == 8:
                for old, now in zip(kept[mb], mb.state_dict().values(), strict=True):
                    assert torch.equal(old, now[1])
                mb.unfreeze(1)
            mb.optimizer.param_groups[0]["lr"] = 0.01 / (1 + number)  # type: ignore[union-attr]
            mb.train_step(x, y)
        assert _taken(compiled)
        _assert_same(compiled, general, 1e-12 if number == 0 else 1e-9)
        assert_relative(_gradients(compiled), _gradients(general), 1e-9)
    assert compiled._compiler.whole_step.graphs == 1  # type: ignore[union-attr]


def _gradients(mb: ModelBatch) -> list[Tensor]:
    found = [p.grad for p in mb.parameters()]
    assert all(grad is not None for grad in found)
    return [grad for grad in found if grad is not None]


@pytest.mark.parametrize("optimizer_cls", [torch.optim.NAdam, torch.optim.RMSprop])
def test_other_optimizers(optimizer_cls: Any) -> None:
    general, compiled = (_bundle(_mlp, optimizer_cls, b) for b in (None, "aot_eager"))
    for x, y in _data(4):
        for mb in (general, compiled):
            mb.train_step(x, y)
        _assert_same(compiled, general, 1e-9)
    assert _taken(compiled)


@pytest.mark.parametrize("kind", ["shared", "own"])
def test_sample_weights(kind: str) -> None:
    """A model without samples rests; the general path first finds out whether the forward asks."""
    general, compiled = (_bundle(_plain, backend=b) for b in (None, "aot_eager"))
    generator = torch.Generator().manual_seed(2)
    for number, (x, y) in enumerate(_data(6)):
        weight = torch.randint(3, (B,) if kind == "shared" else (M, B), generator=generator)
        if kind == "own" and number == 3:
            weight[1] = 0
        for mb in (general, compiled):
            mb.train_step(x, y, sample_weight=weight)
            assert mb._without_samples == ({1} if kind == "own" and number == 3 else set())
        _assert_same(compiled, general, 1e-9)
    assert _taken(compiled)


def test_weights_that_reach_a_normalisation_take_the_general_path() -> None:
    general, compiled = (_bundle(backend=b) for b in (None, "aot_eager"))
    for x, y in _data(3):
        for mb in (general, compiled):
            mb.train_step(x, y, sample_weight=torch.arange(B) % 3)
        assert not _taken(compiled)
        assert "sample weights" in compiled.explain(x).step_path
        _assert_same(compiled, general, 1e-9)


@pytest.mark.parametrize("clip", ["clip_grad_norm", "clip_grad_value"])
def test_clipping(clip: str) -> None:
    limits = {clip: [0.01, 0.1, 10.0]}
    general, compiled = (_bundle(backend=b, **limits) for b in (None, "aot_eager"))
    for x, y in _data(4):
        for mb in (general, compiled):
            mb.train_step(x, y)
        _assert_same(compiled, general, 1e-9)
    assert _taken(compiled)


def test_nan_stays_in_its_model() -> None:
    general, compiled = (_bundle(_plain, backend=b) for b in (None, "aot_eager"))
    for number, (x, y) in enumerate(_data(4)):
        own = x.expand(M, B, 5).clone()
        if number == 1:
            own[1] = float("nan")
        for mb in (general, compiled):
            mb.train_step(per_model(own), y)
    assert _taken(compiled)
    for a, b in zip(compiled.state_dict().values(), general.state_dict().values(), strict=True):
        assert a[1].isnan().all() == b[1].isnan().all()
        for i in (0, 2):
            torch.testing.assert_close(a[i], b[i], rtol=1e-9, atol=1e-12)


def test_paths_may_change_in_mid_training() -> None:
    """Engine, one graph, two graphs and the general path in turns, against the general path."""
    general, mixed = _bundle(), _bundle(backend="aot_eager")
    for number, (x, y) in enumerate(_data(12)):
        general.train_step(x, y)
        mixed.enable_engine(number % 4 == 0)
        if number % 4 == 2:
            handle = mixed.register_forward_hook(lambda *_: None)
        mixed.train_step(x, y)
        if number % 4 == 2:
            handle.remove()
        assert _taken(mixed) or number % 4 in (0, 2)
        _assert_same(mixed, general, 1e-9)
    assert mixed._compiler.whole_step.graphs == 1  # type: ignore[union-attr]


def test_the_engine_comes_first() -> None:
    mb = _bundle(backend="aot_eager")
    mb.enable_engine()
    x, y = _data(1)[0]
    mb.train_step(x, y)
    assert mb._engine.reason is None and not _taken(mb)
    assert mb.explain(x).step_path.startswith("engine")


def test_message_and_explain(caplog: pytest.LogCaptureFixture) -> None:
    mb = _bundle(backend="aot_eager")
    (x, y), (small, few) = _data(2)
    assert mb.explain(x).step_path.startswith("compiled step (to be compiled")
    with caplog.at_level(logging.INFO, "modelbatch"):
        for _ in range(2):
            mb.train_step(x, y)
            # written anew at every step, but always the same loss
            mb.train_step(small[:4], few[:4], loss_fn=lambda o, t: F.cross_entropy(o, t))
    assert len(caplog.records) == 2
    assert caplog.records[0].message.startswith("compiled the training step of 3 models: graph 1,")
    path = mb.explain(x).step_path
    assert path.startswith("compiled step (") and "s to compile, 2 graphs)" in path
    assert path.endswith("not the engine: it is switched off")


@pytest.mark.parametrize("reason", ["hooks on the parameters", "a gradient scaler", "not one op"])
def test_what_is_not_taken_as_a_whole(reason: str) -> None:
    kind: Any = torch.optim.LBFGS if reason == "not one op" else torch.optim.SGD
    mb = _bundle(_plain, torch.optim.Adafactor if kind is torch.optim.LBFGS else kind, "aot_eager")
    x, y = _data(1)[0]
    if reason.startswith("hooks"):
        seen: list[Tensor] = []
        next(iter(mb.parameters())).register_hook(seen.append)
    elif reason.endswith("scaler"):
        mb.grad_scaler = BundleGradScaler()
    mb.train_step(x, y)
    assert not _taken(mb)
    assert reason in mb.explain(x).step_path
    assert not reason.startswith("hooks") or len(seen) == 1


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(5, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.linear(x)


def test_a_step_that_cannot_be_traced_is_reported_once() -> None:
    mb, general = _bundle(_Counting, backend="aot_eager"), _bundle(_Counting)
    data = _data(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in data:
            mb.train_step(x, y)
            general.train_step(x, y)
    texts = [str(w.message) for w in caught if issubclass(w.category, FallbackWarning)]
    assert sum("cannot be compiled as a whole" in text for text in texts) == 1
    assert "'calls'" in mb.explain(data[0][0]).step_path
    _assert_same(mb, general, 1e-9)


def test_a_backend_that_fails_is_reported_once() -> None:
    calls = []

    def backend(graph: Any, _: Any) -> Any:
        calls.append(graph)
        if len(calls) == 1:
            raise RuntimeError("no code for this")
        return graph.forward

    general, mb = _bundle(), _bundle()
    mb.enable_compile(backend=backend)
    data = _data(3)
    with pytest.warns(FallbackWarning, match="cannot be compiled as a whole.*no code for this"):
        mb.train_step(*data[0])
    general.train_step(*data[0])
    for x, y in data[1:]:
        for bundle in (general, mb):
            bundle.train_step(x, y)
    assert len(calls) >= 3 and not _taken(mb)
    _assert_same(mb, general, 1e-9)


def test_losses_that_are_modules() -> None:
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    general, compiled = (_bundle(backend=b) for b in (None, "aot_eager"))
    for x, y in _data(2):
        for mb in (general, compiled):
            mb.train_step(x, y, loss_fn=loss_fn)
        _assert_same(compiled, general, 1e-9)
    assert _taken(compiled)


def test_wrong_arguments_leave_no_trace() -> None:
    mb = _bundle(backend="aot_eager", fallback="silent")
    (x, y), *_ = _data(1)
    before = copy.deepcopy(state(mb))
    with pytest.raises(RuntimeError):
        mb.train_step(x[:, :4], y)
    assert_relative(state(mb), before, 0.0)
    mb.train_step(x, y)
    assert _taken(mb)


def test_a_changed_module_makes_another_graph() -> None:
    general, compiled = (_bundle(_plain, backend=b) for b in (None, "aot_eager"))
    for number, (x, y) in enumerate(_data(3)):
        for mb in (general, compiled):
            if number == 1:
                for model in mb.models:
                    model[2].p = 0.6  # type: ignore[index,union-attr]
            if number == 2:
                mb.eval()
            mb.train_step(x, y)
        _assert_same(compiled, general, 1e-9)
        assert compiled._compiler.whole_step.graphs == number + 1  # type: ignore[union-attr]


def _present(gradients: dict[str, Any]) -> dict[str, Tensor]:
    return {name: grad for name, grad in gradients.items() if grad is not None}


class _Sum(nn.Module):
    """Two parameters with the same gradient, and one without any."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = (nn.Parameter(torch.randn(3)) for _ in range(3))
        self.linear = nn.Linear(5, 3)
        self.linear.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (self.a + self.b)


def test_gradients_are_those_of_the_general_path() -> None:
    general, compiled = (_bundle(_Sum, backend=b) for b in (None, "aot_eager"))
    for x, y in _data(3):
        for mb in (general, compiled):
            mb.train_step(x, y)
        _assert_same(compiled, general, 1e-9)
    assert _taken(compiled)
    for (name, a), b in zip(compiled.named_parameters(), general.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == (name in ("unused", "linear.bias"))
    for i in range(M):
        found = [_present(mb.gradients(i)) for mb in (compiled, general)]
        assert found[0].keys() == found[1].keys() == {"a", "b", "linear.weight"}
        assert_relative(*found, 1e-9)
    grads = dict(compiled.named_parameters())
    assert grads["a"].grad is not None and grads["b"].grad is not None
    assert grads["a"].grad.data_ptr() != grads["b"].grad.data_ptr()


def test_versions_parameters_and_copies() -> None:
    mb = _bundle(backend="aot_eager")
    x, y = _data(1)[0]
    mb.train_step(x, y)
    versions = [t._version for t in (*mb.parameters(), *mb.buffers())]
    pointers = [t.data_ptr() for t in (*mb.parameters(), *mb.buffers())]
    twin = copy.deepcopy(mb)
    mb.train_step(x, y)
    tensors = (*mb.parameters(), *mb.buffers())
    assert all(t._version > version for t, version in zip(tensors, versions, strict=True))
    assert [t.data_ptr() for t in tensors] == pointers
    twin.train_step(x, y)
    assert _taken(twin)
    _assert_same(twin, mb, 1e-12)
    mb.prune([0])
    mb.train_step(x, y)
    assert _taken(mb)
