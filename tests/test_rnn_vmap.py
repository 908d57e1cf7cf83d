"""Plain `torch.vmap` over torch's LSTM, GRU, RNN and their cells, after `import modelbatch`."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._C._functorch as functorch
from rnn_case import CLASSES, assert_close
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, stack_module_state, vmap
from torch.utils._pytree import tree_leaves

from modelbatch.ops import rnn_batching

CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("lstm", {}),
    ("lstm", {"num_layers": 2, "bidirectional": True, "proj_size": 2}),
    ("lstm", {"bias": False, "batch_first": True}),
    ("gru", {"num_layers": 2, "batch_first": True}),
    ("gru", {"bidirectional": True, "bias": False}),
    ("rnn", {"bidirectional": True}),
    ("rnn", {"nonlinearity": "relu", "num_layers": 3}),
]

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.fixture(autouse=True)
def _no_slow_fallback() -> Iterator[None]:
    """An operation that vmap would loop over warns, and warnings are errors."""
    functorch._set_vmap_fallback_warning_enabled(True)
    yield
    functorch._set_vmap_fallback_warning_enabled(False)


def make(kind: str, count: int = 3, cell: bool = False, **options: Any) -> Any:
    """The modules, their stacked parameters, and a function of parameters and arguments."""
    torch.manual_seed(0)
    classes: dict[str, Any] = CELLS if cell else CLASSES
    modules = [classes[kind](3, 4, dtype=torch.float64, **options) for _ in range(count)]
    stacked, _ = stack_module_state(modules)
    parameters = {name: value.detach() for name, value in stacked.items()}
    base = copy.deepcopy(modules[0])
    return modules, parameters, lambda p, *args: functional_call(base, p, args)


def stacked(outputs: list[Any]) -> list[Tensor]:
    return [torch.stack(column) for column in zip(*map(tree_leaves, outputs), strict=True)]


def squared(outputs: Any) -> Any:
    return sum(t.pow(2).sum() for t in tree_leaves(outputs))


def own_gradients(module: nn.Module, *args: Any) -> dict[str, Tensor]:
    module.zero_grad()
    squared(module(*args)).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_layers(kind: str, options: dict[str, Any]) -> None:
    modules, parameters, call = make(kind, **options)
    x, xs = torch.randn(5, 5, 3).double(), torch.randn(3, 5, 5, 3).double()
    one = {name: value[0] for name, value in parameters.items()}
    ensemble = vmap(call, (0, None))(parameters, x)
    assert_close(tree_leaves(ensemble), stacked([m(x) for m in modules]))
    both = vmap(call)(parameters, xs)
    assert_close(tree_leaves(both), stacked([m(t) for m, t in zip(modules, xs, strict=True)]))
    inputs = vmap(call, (None, 0))(one, xs)
    assert_close(tree_leaves(inputs), stacked([modules[0](t) for t in xs]))
    nested = vmap(vmap(call, (None, 0)), (0, None))(parameters, xs)
    for i, t in enumerate(xs):
        expected = stacked([m(t) for m in modules])
        assert_close([leaf[:, i] for leaf in tree_leaves(nested)], expected)
    loss: Callable[..., Any] = lambda p, x: squared(call(p, x))  # noqa: E731
    inside = vmap(grad(loss), (0, None))(parameters, x)
    outside = grad(lambda p: vmap(loss, (0, None))(p, x).sum())(parameters)
    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    vmap(loss, (0, None))(leaves, x).sum().backward()
    for i, module in enumerate(modules):
        for name, expected_grad in own_gradients(module, x).items():
            for found in (inside[name], outside[name], leaves[name].grad):
                assert found is not None
                assert_close(found[i], expected_grad)
    per_sample = vmap(grad(loss, 1), (None, 0))(one, xs)
    assert_close(per_sample, torch.stack([grad(loss, 1)(one, t) for t in xs]))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("kind", CLASSES)
def test_initial_states(kind: str, batched: bool) -> None:
    modules, parameters, call = make(kind)
    x, h = torch.randn(5, 2, 3).double(), torch.randn(3, 1, 2, 4).double()
    states = h if batched else h[0]
    hx = (states, states * 0.5) if kind == "lstm" else states
    found = vmap(call, (0, None, 0 if batched else None))(parameters, x, hx)

    def own(i: int) -> Any:
        one = states[i] if batched else states
        return (one, one * 0.5) if kind == "lstm" else one

    assert_close(tree_leaves(found), stacked([m(x, own(i)) for i, m in enumerate(modules)]))


@pytest.mark.parametrize("kind", CLASSES)
def test_unbatched_sequences_and_sizes(kind: str) -> None:
    modules, parameters, call = make(kind)
    for shape in ((5, 3), (1, 2, 3), (4, 1, 3), (4, 0, 3)):
        x = torch.randn(shape).double()
        found = vmap(call, (0, None))(parameters, x)
        assert_close(tree_leaves(found), stacked([m(x) for m in modules]))
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        vmap(call, (0, None))(parameters, torch.randn(0, 2, 3).double())


@pytest.mark.parametrize("kind", CLASSES)
def test_second_derivatives(kind: str) -> None:
    _, parameters, call = make(kind, count=2)
    x = torch.randn(2, 2, 3).double()
    name = "weight_hh_l0"

    def loss(weight: Tensor, i: int) -> Any:
        own = {n: p[i] for n, p in parameters.items()}
        return squared(call({**own, name: weight}, x))

    def batched(weights: Tensor) -> Tensor:
        return vmap(lambda p, w: squared(call({**p, name: w}, x)))(parameters, weights)

    weights = parameters[name]
    of_all = hessian(lambda w: batched(w).sum())(weights)
    assert_close(jacrev(batched)(weights).sum(0), grad(lambda w: batched(w).sum())(weights))
    inside = vmap(lambda p, w: hessian(lambda w: squared(call({**p, name: w}, x)))(w))
    each = inside(parameters, weights)
    for i in range(2):
        row = weights[i].clone().requires_grad_()
        # without transforms, in torch's own double backward; oneDNN's layer has none
        torch._C._set_mkldnn_enabled(False)
        try:
            expected = torch.autograd.functional.hessian(lambda w, i=i: loss(w, i), row)
        finally:
            torch._C._set_mkldnn_enabled(True)
        assert_close(each[i], expected)
        assert_close(of_all[i, :, :, i], expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind: str, bias: bool) -> None:
    modules, parameters, call = make(kind, cell=True, bias=bias)
    x = torch.randn(2, 3).double()
    found = vmap(call, (0, None))(parameters, x)
    assert_close(tree_leaves(found), stacked([m(x) for m in modules]))
    one = {name: value[0] for name, value in parameters.items()}
    xs = torch.randn(4, 2, 3).double()
    found = vmap(call, (None, 0))(one, xs)
    assert_close(tree_leaves(found), stacked([modules[0](t) for t in xs]))
    gradients = vmap(grad(lambda p: squared(call(p, x))))(parameters)
    for i, module in enumerate(modules):
        for name, expected in own_gradients(module, x).items():
            assert_close(gradients[name][i], expected)


def test_dropout_between_layers_follows_the_randomness_of_vmap() -> None:
    module = nn.LSTM(3, 4, num_layers=2, dropout=0.5)
    x = torch.randn(5, 2, 3).expand(2, 5, 2, 3)
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(lambda x: module(x)[0])(x)
    different = vmap(lambda x: module(x)[0], randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    same = vmap(lambda x: module(x)[0], randomness="same")(x)
    assert torch.equal(same[0], same[1])
    module.eval()
    assert_close(vmap(lambda x: module(x)[0])(x)[1], module(x[1])[0], 1e-5)


@pytest.mark.parametrize("kind", CLASSES)
def test_autocast(kind: str) -> None:
    torch.manual_seed(0)
    module = CLASSES[kind](3, 4)
    xs = torch.randn(2, 5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = tree_leaves(vmap(module)(xs)), tree_leaves(module(xs[0]))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a[0] - b).abs().max() < 0.05  # some roundings of bfloat16


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", CLASSES)
def test_compile(kind: str, dynamic: bool) -> None:
    """The function of torch compiles into one graph; modules are what dynamo itself refuses."""
    _, parameters, _ = make(kind)
    function = {"lstm": torch.lstm, "gru": torch.gru, "rnn": torch.rnn_tanh}[kind]
    weights = list(parameters.values())

    def loss(weights: list[Tensor], x: Tensor) -> Tensor:
        h = torch.zeros(1, 2, 4, dtype=x.dtype)
        hx = (h, h) if kind == "lstm" else h
        return function(x, hx, weights, True, 1, 0.0, True, False, False)[0].pow(2).sum()

    torch._dynamo.reset()
    x = torch.randn(5, 2, 3).double()
    for f in (vmap(loss, (0, None)), vmap(grad(loss), (0, None))):
        compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for given in (x, x[:3]) if dynamic else (x,):
            assert_close(tree_leaves(compiled(weights, given)), tree_leaves(f(weights, given)))


def test_without_vmap_nothing_changes() -> None:
    """`torch.func.grad` alone goes through torch's own kernels."""
    module = nn.GRU(3, 4)
    x = torch.randn(5, 2, 3)
    with torch.profiler.profile(acc_events=True) as profile:
        grad(lambda x: module(x)[0].sum())(x)
        module(x)[0].sum().backward()
    assert not [e.name for e in profile.events() if e.name.startswith("modelbatch::")]


# ---- which rules are added -----------------------------------------------------------------------


def test_every_rule_is_there() -> None:
    for name in (*rnn_batching.RECURRENT, *rnn_batching.PACKING):
        assert rnn_batching.has_rule(name), name


def test_rules_of_torch_are_left_alone() -> None:
    """With a torch that has a rule, ours is not added and nothing warns of overriding."""
    code = """
import warnings
warnings.simplefilter("error")
import torch
theirs = torch.library.Library("aten", "IMPL")
def rule(input, hx, *rest):
    return input * 3, hx
theirs.impl("gru.input", rule, "FuncTorchBatchedDecomposition")
import modelbatch
from modelbatch.ops.rnn_batching import ADDED
assert "gru.input" not in ADDED and "gru.data" in ADDED and "lstm.input" in ADDED
x, h = torch.ones(2, 5, 2, 3), torch.zeros(1, 2, 4)
out = torch.vmap(lambda x: torch.gru(x, h, [], False, 1, 0.0, False, False, False)[0])(x)
assert torch.equal(out, x * 3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
