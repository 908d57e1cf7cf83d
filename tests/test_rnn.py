"""LSTM, GRU and RNN in a bundle: together equals alone, over their options and sizes."""

import copy
import warnings
from typing import Any

import pytest
import torch
from rnn_case import CLASSES, Layer, compare_with_alone, pairwise
from torch import Tensor, nn

from modelbatch import ModelBatch, StructureMismatchError

GRID = pairwise(
    {
        "kind": ["lstm", "lstm projected", "gru", "rnn tanh", "rnn relu"],
        "layers": [1, 2, 3],
        "bidirectional": [False, True],
        "bias": [True, False],
        "batch_first": [False, True],
        "models": [1, 2, 3, 4, 5],
        "steps": [1, 4],
        "batch": [1, 3, 0, None],
        "hidden": [1, 7, 64],
        "states": ["none", "shared", "own"],
        "shared_input": [True, False],
        "contiguous": [True, False],
    }
)


def make_models(case: dict[str, Any], dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    kind, _, variant = case["kind"].partition(" ")
    options = {k: case[k] for k in ("bidirectional", "bias", "batch_first")}
    options |= {"num_layers": case["layers"], "dtype": dtype}
    if kind == "rnn":
        options["nonlinearity"] = variant
    hidden = case["hidden"]
    if variant == "projected":
        hidden = max(hidden, 2)  # a projection is smaller than what it projects
        options["proj_size"] = (hidden + 1) // 2
    torch.manual_seed(0)
    return [Layer(kind, 3, hidden, **options) for _ in range(case["models"])]


def make_inputs(case: dict[str, Any], rnn: nn.RNNBase) -> tuple[list[Tensor], list[bool]]:
    """The inputs, and which of them all models share."""
    batch = [] if case["batch"] is None else [case["batch"]]
    order = [*batch, case["steps"]] if case["batch_first"] else [case["steps"], *batch]
    layers = rnn.num_layers * (2 if rnn.bidirectional else 1)
    shapes = [(*order, 3)]
    shared = [case["shared_input"]]
    if case["states"] != "none":
        shapes.append((layers, *batch, rnn.proj_size or rnn.hidden_size))
        if isinstance(rnn, nn.LSTM):
            shapes.append((layers, *batch, rnn.hidden_size))
        shared += [case["states"] == "shared"] * (len(shapes) - 1)
    inputs = []
    for shape, same in zip(shapes, shared, strict=True):
        size = shape if same else (case["models"], *shape)
        if case["contiguous"]:
            inputs.append(torch.randn(size, dtype=torch.float64))
        else:
            wide = torch.randn(*size[:-1], 2 * size[-1] + 1, dtype=torch.float64)
            inputs.append(wide[..., 1::2])
    return inputs, shared


def name_of(case: dict[str, Any]) -> str:
    return "-".join(str(value) for value in case.values())


# torch alone says so once for a projection on a CPU
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("case", GRID, ids=name_of)
def test_outputs_and_gradients_equal_alone(case: dict[str, Any]) -> None:
    models = make_models(case)
    compare_with_alone(models, *make_inputs(case, models[0].rnn))


def test_no_steps_are_refused_as_torch_refuses_them() -> None:
    for kind in CLASSES:
        models = [Layer(kind, 3, 4) for _ in range(2)]
        for shape in ((0, 2, 3), (0, 3)):
            x = torch.randn(shape)
            with pytest.raises(RuntimeError) as alone:
                models[0](x)
            with pytest.raises(RuntimeError) as together:
                ModelBatch(copy.deepcopy(models), fallback="silent")(x)
            assert str(together.value) == str(alone.value)


def test_errors_are_those_of_one_model() -> None:
    models = [Layer("lstm", 3, 4) for _ in range(2)]
    x, h = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    wrong = [(torch.randn(5, 2, 7),), (x, torch.randn(1, 2, 5), h), (x.double(),), (x[0, 0],)]
    for inputs in wrong:
        with pytest.raises((RuntimeError, ValueError)) as alone:
            models[0](*inputs)
        with pytest.raises(type(alone.value)) as together:
            ModelBatch(copy.deepcopy(models), fallback="silent")(*inputs)
        assert str(together.value) == str(alone.value)


def test_nothing_is_looped() -> None:
    x = torch.randn(5, 2, 3)
    for kind in CLASSES:
        bundle = ModelBatch([Layer(kind, 3, 4, num_layers=2, dropout=0.5) for _ in range(2)])
        report = bundle.explain(x)
        assert report.fallbacks == []
        paths = {o.name: o.path for o in report.operations}
        assert paths[{"rnn": "rnn_tanh"}.get(kind, kind)] == "modelbatch rule"


# ---- cells ---------------------------------------------------------------------------------------


class Cells(nn.Module):
    """A cell that is applied step by step."""

    def __init__(self, cls: Any, **kwargs: Any):
        super().__init__()
        self.cell = cls(3, 4, dtype=torch.float64, **kwargs)

    def forward(self, x: Tensor) -> Any:
        state = None
        outputs = []
        for row in x:
            state = self.cell(row, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs), state


@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (nn.LSTMCell, {}),
        (nn.GRUCell, {}),
        (nn.RNNCell, {}),
        (nn.RNNCell, {"nonlinearity": "relu"}),
    ],
)
def test_cells_equal_alone(cls: Any, options: Any, bias: bool, unbatched: bool) -> None:
    torch.manual_seed(0)
    models = [Cells(cls, bias=bias, **options) for _ in range(3)]
    x = torch.randn(4, 3, dtype=torch.float64)
    x = x if unbatched else torch.randn(4, 2, 3, dtype=torch.float64)
    compare_with_alone(models, [x], [True])
    compare_with_alone(models, [torch.stack([x, x + 1, x * 2])], [False])
    assert ModelBatch(copy.deepcopy(models)).explain(x).fallbacks == []


# ---- dropout between layers ----------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", CLASSES)
def test_dropout_draws_from_each_models_own_stream(kind: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    options = {"num_layers": 3, "dropout": 0.4, "batch_first": batch_first, "bidirectional": True}
    models = [Layer(kind, 3, 4, dtype=torch.float64, **options) for _ in range(3)]
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    bundle = ModelBatch(copy.deepcopy(models), seeds=[4, 5, 6], fallback="error")
    first, second = bundle(x)[0], bundle(x)[0]
    assert not torch.equal(first, second)
    for i in range(3):
        alone = ModelBatch([copy.deepcopy(models[i])], seeds=[4 + i], fallback="error")
        assert torch.equal(alone(x)[0][0], first[i]) and torch.equal(alone(x)[0][0], second[i])
    bundle.eval()
    assert torch.equal(bundle(x)[0], bundle(x)[0])


def test_dropout_is_the_same_while_models_run_one_by_one() -> None:
    class Branches(Layer):
        def forward(self, x: Any, *states: Tensor) -> Any:
            y = super().forward(x, *states)[0]
            return y if float(y.detach().sum()) > -1e9 else -y

    torch.manual_seed(0)
    options = {"num_layers": 2, "dropout": 0.5, "dtype": torch.float64}
    models = [Branches("gru", 3, 4, **options) for _ in range(2)]
    plain = [Layer("gru", 3, 4, **options) for _ in range(2)]
    for a, b in zip(plain, models, strict=True):
        a.load_state_dict(b.state_dict())
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    looped = ModelBatch(models, seeds=[1, 2], fallback="silent")(x)
    batched = ModelBatch(plain, seeds=[1, 2], fallback="error")(x)[0]
    torch.testing.assert_close(looped, batched, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rng", ["torch", "philox"])
def test_dropout_may_differ_between_models(rng: str) -> None:
    torch.manual_seed(0)
    rates = [0.0, 0.3, 1.0]
    models = [Layer("lstm", 3, 4, num_layers=2, dropout=p, dtype=torch.float64) for p in rates]
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    bundle = ModelBatch(copy.deepcopy(models), rng=rng, seeds=[1, 2, 3], fallback="error")
    out = bundle(x)[0]
    for i, model in enumerate(models):
        alone = ModelBatch([copy.deepcopy(model)], rng=rng, seeds=[i + 1], fallback="error")
        torch.testing.assert_close(out[i], alone(x)[0][0], rtol=0, atol=1e-12)
        if rng == "torch":
            torch.manual_seed(i + 1)
            torch.testing.assert_close(out[i], model(x)[0], rtol=0, atol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about dropout after a single layer
        different = [Layer("lstm", 3, 4, num_layers=n, dropout=0.1) for n in (1, 2)]
    with pytest.raises(StructureMismatchError):
        ModelBatch(different)


# ---- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*CLASSES, "packed lstm", "projected lstm"])
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_autocast_has_the_dtypes_of_one_model(kind: str) -> None:
    class Packed(Layer):
        def forward(self, x: Any, *states: Tensor) -> Any:
            packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3])
            out, state = super().forward(packed, *states)
            return out.data, state

    variant, _, name = kind.rpartition(" ")
    cls = Packed if variant == "packed" else Layer
    options = {"proj_size": 2} if variant == "projected" else {}
    models = [cls(name, 3, 4, **options) for _ in range(2)]
    bundle = ModelBatch(copy.deepcopy(models), fallback="error")
    x = torch.randn(5, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        for given in (x, x.bfloat16()):
            expected, found = models[0](given), bundle(given)
            dtypes, own = (
                [t.dtype for t in torch.utils._pytree.tree_leaves(out)] for out in (found, expected)
            )
            assert dtypes == own
