"""Where the general path has to take a step, it does."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from engine_case import Residual, assert_same, by_engine, make_bundle, mlp, pair
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

from modelbatch import BundleGradScaler, ModelBatch, ModelBatchError

X, Y = torch.randn(9, 6, dtype=torch.float64), torch.randint(4, (9,))


def _bundle(build: Callable[[], nn.Module] = lambda: mlp(nn.Tanh()), **kwargs: Any) -> ModelBatch:
    bundle = make_bundle(build, **kwargs)
    bundle.train_step(X, Y)
    return bundle


def _assert_general(bundle: ModelBatch, reason: str, **options: Any) -> None:
    bundle.train_step(X, Y, **options)
    assert not by_engine(bundle)
    assert reason in str(bundle._engine.reason)


def _assert_engine(bundle: ModelBatch) -> None:
    bundle.train_step(X, Y)
    assert by_engine(bundle), bundle._engine.reason


# ---- hooks


def _module_hook(bundle: ModelBatch) -> Any:
    return bundle[1][0].register_forward_hook(lambda *_: None)


HOOKS: dict[str, tuple[Callable[[ModelBatch], Any], str]] = {
    "bundle": (lambda b: b.register_forward_hook(lambda *_: None), "forward hooks"),
    "bundle_pre": (lambda b: b.register_forward_pre_hook(lambda *_: None), "forward hooks"),
    "bundle_backward": (
        lambda b: b.register_full_backward_pre_hook(lambda *_: None),
        "backward hooks",
    ),
    "all_modules": (
        lambda b: nn.modules.module.register_module_forward_hook(lambda *_: None),
        "hooks on all modules",
    ),
    "all_modules_pre": (
        lambda b: nn.modules.module.register_module_forward_pre_hook(lambda *_: None),
        "hooks on all modules",
    ),
    "optimizer": (
        lambda b: b.optimizer.register_step_post_hook(lambda *_: None),
        "hooks on the optimizer",
    ),
    "all_optimizers": (
        lambda b: register_optimizer_step_pre_hook(lambda *_: None),
        "hooks on all optimizers",
    ),
    "gradient": (
        lambda b: next(b.parameters()).register_hook(lambda grad: None),
        "hooks on the parameters",
    ),
    "accumulated": (
        lambda b: next(b.parameters()).register_post_accumulate_grad_hook(lambda p: None),
        "hooks on the parameters",
    ),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks(kind: str) -> None:
    register, reason = HOOKS[kind]
    bundle = _bundle()
    handle = register(bundle)
    try:
        _assert_general(bundle, reason)
    finally:
        handle.remove()
    _assert_engine(bundle)


def test_a_hook_of_a_model_is_called_for_that_model() -> None:
    seen: list[Tensor] = []
    bundle = make_bundle(lambda: mlp(nn.Tanh()))
    bundle._forward.fallback = "silent"
    handle = bundle[1][0].register_forward_hook(lambda m, a, out: seen.append(out))
    _assert_general(bundle, "forward hooks")
    assert len(seen) == 1 and seen[0].shape == (9, 6)
    handle.remove()
    _assert_engine(bundle)


# ---- modes and settings


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_modes() -> None:
    bundle = _bundle()
    with _Mode():
        _assert_general(bundle, "a mode that sees every operation")
    with torch.profiler.profile(acc_events=True):
        _assert_general(bundle, "a profiler")
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        _assert_general(bundle, "anomalies")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        _assert_general(bundle, "hooks on saved tensors")
    with torch.autocast("cpu", torch.bfloat16):
        _assert_general(bundle, "autocast")
    with bundle.sample_weights(torch.ones(9)):
        _assert_general(bundle, "within sample_weights")
    _assert_engine(bundle)
    bundle.train_step(X, Y, amp_dtype=torch.bfloat16)
    assert not by_engine(bundle)
    bundle.grad_scaler = BundleGradScaler()
    _assert_general(bundle, "a gradient scaler")
    bundle.grad_scaler = None
    with torch.no_grad(), pytest.raises(RuntimeError, match="does not require grad"):
        bundle.train_step(X, Y)
    _assert_engine(bundle)
    bundle.enable_engine(False)
    _assert_general(bundle, "switched off")
    bundle.enable_engine()
    _assert_engine(bundle)
    bundle.enable_compile(backend="eager")
    _assert_engine(bundle)  # which is faster still


def test_arguments() -> None:
    bundle = _bundle()
    _assert_general(bundle, "not in the engine's vocabulary", loss_fn=lambda o, y: o.square().sum())
    partial = functools.partial(F.cross_entropy, label_smoothing=0.1)
    bundle.train_step(X, Y, loss_fn=partial)
    assert by_engine(bundle)
    _assert_general(bundle, "functools.partial", loss_fn=partial, sample_weight=torch.rand(9))
    loss = nn.CrossEntropyLoss()
    handle = loss.register_forward_hook(lambda *_: None)
    _assert_general(bundle, "the loss has hooks", loss_fn=loss)
    handle.remove()
    x = X.clone().requires_grad_()
    bundle.train_step(x, Y)
    assert not by_engine(bundle) and x.grad is not None
    _assert_engine(bundle)


def test_a_loss_may_change_its_options() -> None:
    ours, theirs = pair(lambda: mlp(nn.Tanh()))
    loss = nn.CrossEntropyLoss(weight=torch.ones(4, dtype=torch.float64))

    def step() -> None:
        for bundle in (ours, theirs):
            bundle.train_step(X, Y, loss_fn=loss)
        assert by_engine(ours)
        assert_same(ours, theirs, 1e-11)

    step()
    loss.label_smoothing = 0.3
    step()
    assert loss.weight is not None
    loss.weight[2] = 5.0
    step()
    loss.weight = None
    step()


# ---- what a forward may be


def _with_forward(forward: Any, **attributes: Any) -> Callable[[], nn.Module]:
    """A class whose forward is `forward`, and whose models have these attributes."""

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)
            self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
            for name, value in attributes.items():
                setattr(self, name, value)

    Custom.forward = forward
    return Custom


def _counts(self: Any, x: Tensor) -> Tensor:
    self.calls = 1
    return self.b(self.a(x))


def _counts_in_a_list(self: Any, x: Tensor) -> Tensor:
    self.log.append(1)
    return self.b(self.a(x))


def _reads_a_buffer(self: Any, x: Tensor) -> Tensor:
    self.seen.add_(1)
    return self.b(self.a(x))


def _prints(self: Any, x: Tensor) -> Tensor:
    print(end="")
    return self.b(self.a(x))


def _draws(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x)) + torch.rand(4, dtype=x.dtype)


def _ties(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(self.a(x)))


def _writes_in_place(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    g = h
    g += x
    return self.b(torch.tanh(g) + h)


def _imports(self: Any, x: Tensor) -> Tensor:
    import math

    return self.b(self.a(x)) * math.pi


def _without_gradient(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = self.a(x)
    return self.b(h)


class _Convolves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.conv = nn.Linear(6, 6), nn.Linear(6, 4), nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.conv(self.a(x).unsqueeze(1)).squeeze(1))


def _weight_norm(layer: nn.Linear) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "counts": (_with_forward(_counts), "writes an attribute"),
    "list": (_with_forward(_counts_in_a_list, log=[]), "which may change"),
    "buffer": (_with_forward(_reads_a_buffer), "buffer"),
    "print": (_with_forward(_prints), "'print'"),
    "random": (_with_forward(_draws), "'.rand'"),
    "tied": (_with_forward(_ties), "more than once"),
    "in place": (_with_forward(_writes_in_place), "something else reads"),
    "import": (_with_forward(_imports), "imports"),
    "with": (_with_forward(_without_gradient), "'.no_grad'"),
    "normed by a hook": (
        lambda: nn.Sequential(_weight_norm(nn.Linear(6, 4))),
        "computed by a hook",
    ),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))),
        "not in the engine's vocabulary",
    ),
    "layer": (_Convolves, "nn.Conv1d 'conv' is not in the engine's vocabulary"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_forwards_that_are_not_taken(kind: str) -> None:
    build, reason = REFUSED[kind]
    ours, theirs = pair(build)
    report = ours.explain(X)
    assert f"not the engine: {ours._engine.reason}" != report.step_path
    _assert_general(ours, reason)
    _assert_general(ours, reason)
    assert reason in report.step_path
    for _ in range(2):
        theirs.train_step(X, Y)
    assert_same(ours, theirs, 0)


SCALE = 2


def _halves(x: Tensor) -> Tensor:
    return torch.tanh(x)


def _switches(self: Any, x: Tensor) -> Tensor:
    h = self.a(x)
    for _ in range(self.times):
        h = torch.tanh(h)
    if self.training and self.skip:
        h = h + x
    return self.b(_halves(h) if SCALE == 2 else h)


def test_attributes_and_names_that_change_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    bundles = pair(_with_forward(_switches, times=1, skip=False))

    def step(engine: bool = True) -> None:
        for bundle in bundles:
            bundle.train_step(X, Y)
        assert by_engine(bundles[0]) is engine, bundles[0]._engine.reason
        assert_same(*bundles, 1e-10)

    step()
    for bundle in bundles:
        for model in bundle.models:
            model.times, model.skip = 2, True
    step()
    for bundle in bundles:
        bundle.eval()
    step()
    for bundle in bundles:
        bundle.train()
    monkeypatch.setitem(globals(), "SCALE", 3)
    step()
    monkeypatch.setitem(globals(), "_halves", torch.sigmoid)
    monkeypatch.setitem(globals(), "SCALE", 2)
    step()
    for bundle in bundles:
        for model in bundle.models:
            model.a = nn.Sequential(model.a)
        monkeypatch.setattr(type(bundle[0]), "forward", lambda self, x: self.b(x))
    for bundle in bundles:
        bundle.train_step(X, Y)
    assert_same(*bundles, 1e-10)


def test_dropout_and_modes_that_change_are_noticed() -> None:
    bundles = pair(Residual)

    def step() -> None:
        for bundle in bundles:
            bundle.train_step(X, Y)
        assert_same(*bundles, 1e-9)

    step()
    for p in (0.7, 0.0, 0.2):
        for bundle in bundles:
            for model in bundle.models:
                model.drop.p = p
        step()
        assert by_engine(bundles[0])
    for bundle in bundles:
        bundle[0].drop.p = 0.9
        bundle.refresh()
    step()
    for bundle in bundles:
        bundle.eval()
    step()
    assert "eval mode" in str(bundles[0]._engine.reason)
    for bundle in bundles:
        bundle.train()
    step()
    assert by_engine(bundles[0])


# ---- what is refused is refused as ever


@pytest.mark.parametrize("engine", [True, False])
def test_errors_are_those_of_the_general_path(engine: bool) -> None:
    bundle = make_bundle(Residual)
    bundle.enable_engine(engine)
    bundle.train_step(X, Y)
    before = {k: v.clone() for k, v in bundle.state_dict().items()}
    stream = bundle._streams.step.clone()
    for _ in range(4):
        with pytest.raises(ModelBatchError, match="Target . is out of bounds"):
            bundle.train_step(X, torch.full((9,), 7))
        with pytest.raises((ModelBatchError, RuntimeError, ValueError)):
            bundle.train_step(X, Y[:4])
        with pytest.raises((ModelBatchError, RuntimeError, ValueError)):
            bundle.train_step(X[:, :5], Y)
        with pytest.raises(ModelBatchError, match="must be finite"):
            bundle.train_step(X, Y, sample_weight=-torch.ones(9))
    bundle.optimizer.param_groups[1]["lr"] = "fast"
    with pytest.raises(ModelBatchError, match="model 1: option 'lr'"):
        bundle.train_step(X, Y)
    bundle.optimizer.param_groups[1]["lr"] = 0.1
    if engine:
        assert torch.equal(stream + 1, bundle._streams.step)  # the forward of that last step
        assert all(
            torch.equal(v, before[k]) for k, v in bundle.state_dict().items() if "norm" not in k
        )
        _assert_engine(bundle)


def test_rng_torch_is_the_general_path() -> None:
    bundle = make_bundle(Residual, rng="torch")
    _assert_general(bundle, 'rng="torch"')
    assert by_engine(_bundle(rng="torch"))
