"""What `states` may hold survives a save exactly; what it may not hold is refused before it."""

import json
import math
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_case import assert_same, build, everything
from hypothesis import given, strategies as st
from torch import nn

from modelbatch import CheckpointError
from modelbatch.checkpoint import GlobalRandomState
from modelbatch.checkpoint.encoding import Decoder, Encoder

CPU = torch.device("cpu")


class Holder:
    """An object with any state."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def through(value: Any) -> Any:
    encoder = Encoder()
    text = json.dumps(encoder.encode(value, "x", "x"), allow_nan=False)
    return Decoder(
        {name: _stored(tensor) for name, tensor in encoder.tensors.items()}, "file", CPU
    ).decode(json.loads(text))


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


VALUES: list[Any] = [
    None,
    [True, 0, -(2**63), 2**200, 1.0, -0.0, 0.1, 5e-324, math.nan, math.inf, -math.inf],
    {"a": (1, (2, [3]), ()), "": [], "b": {}},
    {1: "int", "1": "str", None: 0, (1, "x"): 1, 2.5: 2, False: 3},
    {"$tuple": [1], "$tensor": "x"},
    OrderedDict([("z", 1), ("a", 2)]),
    Counter({3: 2, 5: 1}),
    b"\x00\xff",
    "ä \ud800 \n",
    [np.float32(0.1), np.float64("nan"), np.int8(-3), np.uint64(2**64 - 1), np.bool_(True)],
    [np.float16(0.1), np.arange(6, dtype=np.uint32).reshape(2, 3), np.array(1.5), np.zeros((0, 2))],
    np.arange(12, dtype=np.float32).reshape(3, 4).T,
    [torch.tensor(1.5), torch.zeros(0, 3), torch.arange(4).bool(), torch.randn(2).half()],
    [
        torch.randn(2, dtype=torch.complex128),
        torch.randn(3, 4).T,
        torch.tensor(3, dtype=torch.int8),
    ],
]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_survives(value: Any, tmp_path: Path) -> None:
    assert_same(through(value), value)
    build(None).save_all(tmp_path, states={"own": Holder(value)})
    loaded = Holder()
    build(None).load_all(tmp_path, states={"own": loaded})
    assert_same(loaded.state, value)


_keys = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
_leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=9)
)
_trees = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(_keys, inner, max_size=4)
    ),
    max_leaves=12,
)


@given(_trees)
def test_any_plain_value_survives(value: Any) -> None:
    assert_same(through(value), value)


class _Own:
    pass


class _Subclass(dict):
    pass


def _endless() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "value",
    [
        _Own(),
        lambda: None,
        {1, 2},
        _Subclass(),
        defaultdict(list),
        1j,
        torch.float32,
        np.array(["text"]),
        np.array([object()]),
        np.longdouble(1),
        torch.zeros(2).to_sparse(),
        torch.zeros(2, device="meta"),
        nn.Linear(1, 1),
        1 << 100_000,
        _endless(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_anything_else_is_refused_before_writing(value: Any, tmp_path: Path) -> None:
    target = tmp_path / "new" / "deep"
    with pytest.raises(CheckpointError, match=r"states\['own'\]\['x'\]\[1\].* cannot be saved|key"):
        build(None).save_all(target, states={"own": Holder({"x": [0, value]})})
    assert list(tmp_path.iterdir()) == []


def test_names_and_methods_of_states(tmp_path: Path) -> None:
    mb = build(None)
    with pytest.raises(CheckpointError, match="strings as names, got 1"):
        mb.save_all(tmp_path / "a", states={1: Holder()})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match=r"states\['x'\]: a object has no state_dict"):
        mb.save_all(tmp_path / "a", states={"x": object()})
    assert not (tmp_path / "a").exists()
    mb.save_all(tmp_path / "a", states={"x": Holder(1), "y": Holder(2)})
    with pytest.raises(CheckpointError, match=r"states\['z'\] is not in .* \['x', 'y'\]"):
        mb.load_all(tmp_path / "a", states={"z": Holder()})
    with pytest.raises(CheckpointError, match=r"states\['x'\]: a object has no load_state_dict"):
        mb.load_all(tmp_path / "a", states={"x": object()})
    only = Holder()
    mb.load_all(tmp_path / "a", states={"y": only, "z": Holder()}, strict=False)
    assert only.state == 2


def test_a_state_that_fails_to_load_changes_nothing(tmp_path: Path) -> None:
    class Failing(Holder):
        def load_state_dict(self, state: Any) -> None:
            self.state = state
            if state == "saved":
                raise RuntimeError("broken")

    build(torch.optim.Adam).save_all(
        tmp_path, states={"first": Holder("saved"), "second": Failing("saved")}
    )
    mb = build(torch.optim.Adam, seed=1)
    before = everything(mb)
    first, second = Holder("mine"), Failing("mine")
    with pytest.raises(CheckpointError, match=r"states\['second'\] cannot be loaded: broken"):
        mb.load_all(tmp_path, states={"first": first, "second": second})
    assert (first.state, second.state) == ("mine", "mine")
    assert_same(everything(mb), before)


def test_loaded_tensors_are_independent_of_the_files(tmp_path: Path) -> None:
    build(None).save_all(tmp_path, states={"x": Holder(torch.ones(4))})
    own = Holder()
    build(None).load_all(tmp_path, states={"x": own})
    (tmp_path / "states.safetensors").write_bytes(b"\xff" * 999)
    own.state.add_(1)
    assert own.state.tolist() == [2.0] * 4


def test_the_generators_outside_of_the_bundle(tmp_path: Path) -> None:
    import random

    def draw() -> list[float]:
        return [random.random(), float(np.random.random()), float(torch.rand(()))]

    python, numpy = random.getstate(), np.random.get_state()
    try:
        mb, state = build(None), GlobalRandomState()
        mb.save_all(tmp_path, states={"random": state})
        expected = draw()
        draw()
        mb.load_all(tmp_path, states={"random": state})
        assert draw() == expected
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
