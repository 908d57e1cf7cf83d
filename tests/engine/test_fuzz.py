"""Random legal networks: the engine, the general path and the interpreter of programs agree."""

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from bundle_case import assert_relative, difference, largest
from engine_case import OPTIMIZERS, by_engine, states
from engine_interpreter import interpret
from torch import Tensor, nn

from modelbatch import ModelBatch, OptimizerFactory
from modelbatch.engine import run
from modelbatch.ops.engine import train_steps_

ACTIVATIONS = ("tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "elu", "softplus", "leaky")
LAYERS = (*ACTIVATIONS, "linear", "linear", "layer_norm", "batch_norm", "dropout", "residual")


class Network(nn.Module):
    """Layers by name, after an optional embedding, and one more linear layer."""

    def __init__(self, layers: list[Any], width: int, rows: int, tokens: bool, outputs: int):
        super().__init__()
        self.embed = nn.Embedding(7, width, padding_idx=1) if tokens else nn.Identity()
        self.layers = nn.ModuleList([_layer(kind, width, n) for kind, n in layers])
        self.residual = tuple(kind == "residual" for kind, _ in layers)
        self.flat = rows == 0
        self.out = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        if not self.flat:
            h = h.mean(1)
        for layer, adds in zip(self.layers, self.residual):
            h = h + layer(h) if adds else layer(h)
        return self.out(h)


def _layer(kind: str, width: int, n: int) -> nn.Module:
    plain: dict[str, Any] = {
        "tanh": nn.Tanh,
        "sigmoid": nn.Sigmoid,
        "silu": nn.SiLU,
        "gelu": nn.GELU,
        "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
        "elu": lambda: nn.ELU(0.1 + 0.3 * n),
        "softplus": lambda: nn.Softplus(0.5 + n, 4.0 * n + 1),
        "leaky": lambda: nn.LeakyReLU(0.1 * n),
        "linear": lambda: nn.Linear(width, width, bias=n > 1),
        "layer_norm": lambda: nn.LayerNorm(width, eps=1e-3, elementwise_affine=n > 0),
        "batch_norm": lambda: nn.BatchNorm1d(
            width, 1e-2, None if n == 2 else 0.2, n > 0, track_running_stats=n != 3
        ),
        "dropout": lambda: nn.Dropout(0.3 * n),
        "residual": lambda: nn.Sequential(nn.Linear(width, width), nn.Tanh()),
    }
    return plain[kind]()


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    tokens = draw(st.booleans())
    layer = st.tuples(st.sampled_from(LAYERS), st.integers(0, 3))
    return {
        "layers": draw(st.lists(layer, max_size=6)),
        "width": draw(st.integers(1, 20)),
        "rows": draw(st.integers(1, 4)) if tokens else draw(st.sampled_from([0, 0, 2, 3])),
        "tokens": tokens,
        "outputs": draw(st.integers(2, 9)),
        "batch": draw(st.integers(2, 40)),
        "num_models": draw(st.integers(1, 4)),
        "loss": draw(st.sampled_from(["classes", "shares", "mse", "huber", "bce"])),
        "optimizer": draw(st.sampled_from(sorted(OPTIMIZERS))),
        "own": draw(st.booleans()),
        "weights": draw(st.sampled_from([None, "shared", "own"])),
        "clip": draw(st.booleans()),
        "seed": draw(st.integers(0, 10**6)),
    }


def _check(case: dict[str, Any]) -> None:
    torch.manual_seed(case["seed"])
    models, batch = case["num_models"], case["batch"]
    shape = [models] if case["own"] else []
    network = [case[k] for k in ("layers", "width", "rows", "tokens", "outputs")]
    bundles = [_bundle(case, network) for _ in range(3)]
    bundles[1].enable_engine(False)
    if case["tokens"]:
        x = torch.randint(7, (*shape, batch, case["rows"]))
    else:
        rows = [case["rows"]] if case["rows"] else []
        x = torch.randn(*shape, batch, *rows, case["width"], dtype=torch.float64)
    loss_fn, y = _loss(case, [*shape, batch])
    weight = None
    if case["weights"] is not None:
        size = (models, batch) if case["weights"] == "own" else (batch,)
        weight = torch.randint(0, 3, size).double() + torch.rand(size, dtype=torch.float64).round()
        weight[..., :2] = 1.5
    stream = bundles[0]._streams.step.clone()
    a = bundles[0].train_step(x, y, loss_fn=loss_fn, sample_weight=weight)
    assert by_engine(bundles[0]), bundles[0]._engine.reason
    b = bundles[1].train_step(x, y, loss_fn=loss_fn, sample_weight=weight)
    assert not by_engine(bundles[1])
    original, run.train_steps_ = run.train_steps_, _interpreted  # type: ignore[assignment]
    try:
        c = bundles[2].train_step(x, y, loss_fn=loss_fn, sample_weight=weight)
    finally:
        run.train_steps_ = original
    assert by_engine(bundles[2])
    assert original is train_steps_ and bool((bundles[0]._streams.step >= stream).all())
    assert_relative(a, b, 1e-12, "losses")
    assert_relative(c, b, 1e-12, "losses of the interpreter")
    _compare(bundles[0], bundles[1], case)
    _compare(bundles[2], bundles[1], case)


def _interpreted(params: Any, *args: Any) -> Any:
    with torch.enable_grad():
        return interpret([p.detach() for p in params], *args)


def _bundle(case: dict[str, Any], network: list[Any]) -> ModelBatch:
    cls, options = OPTIMIZERS[case["optimizer"]]
    torch.manual_seed(case["seed"] + 1)
    models = [Network(*network).double() for _ in range(case["num_models"])]
    bundle = ModelBatch(models, seeds=range(len(models)), shared_input=not case["own"])
    # Adam divides a gradient by its own size, so that rounding decides about one that is zero
    configs = [{"lr": 0.01, **options, **({"eps": 1e-2} if "eps" in _names(cls) else {})}]
    clip = 0.5 if case["clip"] else None
    factory = OptimizerFactory(cls, clip_grad_norm=clip)
    factory.create_optimizer(bundle, configs * len(models))
    return bundle


def _names(cls: Any) -> Any:
    import inspect

    return inspect.signature(cls).parameters


def _loss(case: dict[str, Any], size: list[int]) -> tuple[Any, Tensor]:
    outputs = case["outputs"]
    if case["loss"] == "classes":
        return nn.CrossEntropyLoss(label_smoothing=0.1), torch.randint(outputs, size)
    values = torch.randn(*size, outputs, dtype=torch.float64)
    if case["loss"] == "shares":
        return F.cross_entropy, values.softmax(-1)
    if case["loss"] == "bce":
        return F.binary_cross_entropy_with_logits, values.sigmoid()
    return {"mse": F.mse_loss, "huber": F.huber_loss}[case["loss"]], values


def _compare(ours: ModelBatch, theirs: ModelBatch, case: dict[str, Any]) -> None:
    a, b = states(ours), states(theirs)
    assert a.keys() == b.keys()
    scale = largest([t for t in b.values() if t.is_floating_point()])
    for name, value in a.items():
        assert difference(value, b[name]) <= 1e-11 * scale, (name, case)


@hypothesis.settings(max_examples=20)
@hypothesis.given(cases())
def test_random_networks(case: dict[str, Any]) -> None:
    _check(case)


@pytest.mark.slow
@hypothesis.settings(max_examples=200)
@hypothesis.given(cases())
def test_many_random_networks(case: dict[str, Any]) -> None:
    _check(case)
