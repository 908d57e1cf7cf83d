"""Packed sequences, in a bundle and under plain `torch.vmap`."""

import copy
from typing import Any

import pytest
import torch
from rnn_case import CLASSES, Layer, assert_close, compare_with_alone
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

from modelbatch import FallbackWarning, ModelBatch, per_model, shared

SORTED, UNSORTED = [5, 3, 3, 1], [3, 5, 1, 3]


class Padded(Layer):
    """Packs its input, and pads what comes out of the recurrent module."""

    def __init__(self, kind: str, lengths: Any, total: int | None = None, **options: Any):
        super().__init__(kind, 3, 4, dtype=torch.float64, **options)
        self.lengths, self.total = lengths, total

    def forward(self, x: Any, *states: Tensor) -> Any:
        first = self.rnn.batch_first
        is_sorted = self.lengths == SORTED
        packed = pack_padded_sequence(x, self.lengths, first, enforce_sorted=is_sorted)
        out, state = super().forward(packed, *states)
        padded, lengths = pad_packed_sequence(out, first, -2.0, self.total)
        assert lengths.tolist() == list(self.lengths)
        return padded, state


@pytest.mark.parametrize("shared_input", [True, False])
@pytest.mark.parametrize("lengths", [SORTED, UNSORTED, [4, 4, 4, 4]], ids=str)
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lstm", {"bidirectional": True, "num_layers": 2}),
        ("lstm", {"proj_size": 2, "batch_first": True, "bidirectional": True}),
        ("gru", {"bidirectional": True, "batch_first": True, "total": 7}),
        ("rnn", {"num_layers": 3, "bias": False}),
    ],
)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_bundle_equals_alone(
    kind: str, options: dict[str, Any], lengths: list[int], shared_input: bool
) -> None:
    torch.manual_seed(0)
    models: list[nn.Module] = [Padded(kind, lengths, **options) for _ in range(3)]
    x = torch.randn(4, 5, 3) if options.get("batch_first") else torch.randn(5, 4, 3)
    x = x.double() if shared_input else torch.stack([x, x + 1, x * 2]).double()
    rnn = models[0].rnn
    layers = rnn.num_layers * (2 if rnn.bidirectional else 1)
    states = [torch.randn(3, layers, 4, rnn.proj_size or 4).double()]
    if kind == "lstm":
        states.append(torch.randn(3, layers, 4, 4).double())
    compare_with_alone(models, [x], [shared_input])
    compare_with_alone(models, [x, *states], [shared_input, *[False] * len(states)])


def test_packed_sequences_as_input_and_output() -> None:
    torch.manual_seed(0)
    models = [Layer("lstm", 3, 4, dtype=torch.float64, bidirectional=True) for _ in range(3)]
    bundle = ModelBatch(copy.deepcopy(models), fallback="error")
    x = torch.randn(5, 4, 3).double()
    packed = pack_padded_sequence(x, torch.tensor(UNSORTED), enforce_sorted=False)
    out, (h, _) = bundle(packed)
    assert isinstance(out, PackedSequence) and out.data.shape == (3, 12, 8)
    for i, model in enumerate(models):
        expected, (own_h, _) = model(packed)
        assert_close(out.data[i], expected.data)
        assert_close(h[i], own_h)
        row = PackedSequence(*(None if t is None else t[i] for t in out))
        for a, b in zip(pad_packed_sequence(row), pad_packed_sequence(expected), strict=True):
            assert_close(a, b)


def test_packed_sequences_with_data_of_each_models_own() -> None:
    torch.manual_seed(0)
    models = [Layer("gru", 3, 4, dtype=torch.float64) for _ in range(3)]
    xs = torch.randn(3, 5, 4, 3).double()
    rows = [pack_padded_sequence(x, SORTED) for x in xs]

    class Takes(nn.Module):
        def __init__(self, layer: nn.Module):
            super().__init__()
            self.layer = layer

        def forward(self, data: Tensor, batch_sizes: Tensor) -> Tensor:
            return self.layer(PackedSequence(data, batch_sizes))[0].data

    bundle = ModelBatch([Takes(copy.deepcopy(m)) for m in models], fallback="error")
    data = per_model(torch.stack([r.data for r in rows]))
    out = bundle(data, shared(rows[0].batch_sizes))
    for i, model in enumerate(models):
        assert_close(out[i], model(rows[i])[0].data)


def test_dropout_between_layers_of_packed_sequences() -> None:
    torch.manual_seed(0)
    models = [Padded("lstm", UNSORTED, num_layers=2, dropout=0.5) for _ in range(2)]
    x = torch.randn(5, 4, 3).double()
    bundle = ModelBatch(copy.deepcopy(models), rng="torch", seeds=[3, 4], fallback="error")
    out = bundle(x)[0]
    for i, model in enumerate(models):
        torch.manual_seed(3 + i)
        assert_close(out[i], model(x)[0])


class TakesLengths(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, dtype=torch.float64)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return self.rnn(packed)[1]


def test_lengths_as_an_argument() -> None:
    torch.manual_seed(0)
    models = [TakesLengths() for _ in range(2)]
    x, lengths = torch.randn(5, 4, 3).double(), torch.tensor(UNSORTED)
    out = ModelBatch(copy.deepcopy(models), fallback="error")(x, lengths)
    for i, model in enumerate(models):
        assert_close(out[i], model(x, lengths))


def test_lengths_that_differ_between_models_are_looped_over() -> None:
    torch.manual_seed(0)
    models = [TakesLengths() for _ in range(2)]
    x, lengths = torch.randn(2, 5, 4, 3).double(), torch.tensor([UNSORTED, [1, 2, 3, 4]])
    bundle = ModelBatch(copy.deepcopy(models), shared_input=False)
    with pytest.warns(FallbackWarning):
        out = bundle(x, lengths)
    for i, model in enumerate(models):
        assert_close(out[i], model(x[i], lengths[i]))


# ---- torch.vmap ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [SORTED, UNSORTED], ids=str)
@pytest.mark.parametrize("kind", CLASSES)
def test_vmap(kind: str, lengths: list[int]) -> None:
    torch.manual_seed(0)
    module = Padded(kind, lengths, total=6, bidirectional=True, num_layers=2)
    xs = torch.randn(3, 5, 4, 3).double()

    def loss(x: Tensor) -> Any:
        return sum(t.pow(2).sum() for t in tree_leaves(module(x)))

    expected = [torch.stack(c) for c in zip(*(tree_leaves(module(x)) for x in xs), strict=True)]
    assert_close(tree_leaves(vmap(module)(xs)), expected)
    leaves = xs.clone().requires_grad_()
    sum(loss(x) for x in leaves).backward()
    assert_close(vmap(grad(loss))(xs), leaves.grad)
    assert_close(torch.stack([grad(loss)(x) for x in xs]), leaves.grad)
    batched = xs.clone().requires_grad_()
    vmap(loss)(batched).sum().backward()
    assert_close(batched.grad, leaves.grad)


def test_vmap_over_lengths_is_refused() -> None:
    module = nn.GRU(3, 4)
    x, lengths = torch.randn(2, 5, 2, 3), torch.tensor([[5, 3], [5, 2]])
    with pytest.raises(RuntimeError, match="lengths of packed sequences must be the same for all"):
        vmap(lambda x, n: module(pack_padded_sequence(x, n))[1])(x, lengths)


@pytest.mark.parametrize(
    "lengths", [[5, 3], [5, 3, 3, 0], [3, 5, 3, 1]], ids=["few", "zero", "rising"]
)
def test_wrong_lengths_are_refused_as_torch_refuses_them(lengths: list[int]) -> None:
    x = torch.randn(5, 4, 3)
    with pytest.raises(RuntimeError) as alone:
        pack_padded_sequence(x, lengths)
    with pytest.raises(RuntimeError) as batched:
        vmap(lambda x: pack_padded_sequence(x, lengths).data)(torch.stack([x, x]))
    assert str(batched.value)[:40] == str(alone.value)[:40]


def test_lengths_beyond_the_input_are_refused() -> None:
    xs = torch.randn(2, 5, 4, 3)
    with pytest.raises(RuntimeError, match="Expected lengths of at most 5, got 6"):
        vmap(lambda x: pack_padded_sequence(x, [6, 3, 3, 1]).data)(xs)
