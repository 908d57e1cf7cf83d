"""The order of callbacks, their states, and what happens when one fails."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from modelbatch import ModelBatch, ModelBatchError
from modelbatch.callbacks import Callback, CallbackPack, Event, freeze
from modelbatch.callbacks.base import EVENTS


class Noting(Callback):
    def __init__(self, name: str, notes: list[tuple[str, str]]):
        self.name, self.notes, self.value = name, notes, 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value = state_dict["value"]


def _noting(event_name: str) -> Any:
    def method(self: Noting, event: Event) -> None:
        self.notes.append((self.name, event_name))

    return method


for _name in EVENTS:
    setattr(Noting, _name, _noting(_name))


class Other(Noting):
    pass


def bundle() -> ModelBatch:
    return ModelBatch([torch.nn.Linear(2, 1) for _ in range(3)])


@pytest.mark.parametrize("name", EVENTS)
def test_every_event_reaches_every_callback_in_order(name: str) -> None:
    notes: list[tuple[str, str]] = []
    pack = CallbackPack([Noting("a", notes), CallbackPack([Noting("b", notes)]), Callback()])
    pack.append(Noting("c", notes))
    event = Event(bundle())
    getattr(pack, name)(event)
    assert notes == [("a", name), ("b", name), ("c", name)]
    assert event.pack is pack  # the outermost, not the inner one


def test_a_pack_of_nothing_of_one_and_of_something_else() -> None:
    assert len(CallbackPack()) == len(CallbackPack([])) == 0
    one = Callback()
    assert list(CallbackPack(one)) == [one]
    assert repr(CallbackPack(one)) == "CallbackPack([Callback])"
    with pytest.raises(ModelBatchError, match="make an instance"):
        CallbackPack([Callback])  # type: ignore[list-item]
    with pytest.raises(ModelBatchError, match="expected a Callback, got 3"):
        CallbackPack([3])  # type: ignore[list-item]
    pack = CallbackPack()
    with pytest.raises(ModelBatchError, match="expected a Callback"):
        pack.append(pack)


def test_states_go_back_to_their_callbacks() -> None:
    first = CallbackPack([Noting("a", []), Other("b", []), Noting("c", [])])
    for k, callback in enumerate(first):
        callback.value = k + 1  # type: ignore[attr-defined]
    state = first.state_dict()
    assert state == {"Noting": {"value": 1}, "Other": {"value": 2}, "Noting_2": {"value": 3}}
    # another order of classes, one callback more and one less
    second = CallbackPack([Callback(), Noting("a", []), Noting("c", []), Noting("new", [])])
    second.load_state_dict(state)
    assert [c.value for c in list(second)[1:]] == [1, 3, 0]  # type: ignore[attr-defined]


def test_the_end_reaches_everybody_even_if_one_fails() -> None:
    class Failing(Callback):
        def __init__(self, text: str):
            self.text = text

        def on_train_end(self, event: Event) -> None:
            raise RuntimeError(self.text)

    notes: list[tuple[str, str]] = []
    pack = CallbackPack([Failing("first"), Noting("a", notes), Failing("second")])
    with pytest.raises(RuntimeError, match="first"):
        pack.on_train_end(Event(bundle()))
    assert notes == [("a", "on_train_end")]


def test_freezing_tells_everybody_once() -> None:
    told: list[tuple[list[int], str, int]] = []

    class Listening(Callback):
        def on_model_frozen(self, event: Event) -> None:
            told.append((event.models, event.reason, event.step))
            event.stop = True

    mb = bundle()
    mb.freeze(1)
    event = Event(mb, step=7, pack=CallbackPack([Listening()]))
    assert freeze(event, [2, 1, 2], "why") == [2]
    assert told == [([2], "why", 7)]
    assert mb.active.tolist() == [True, False, False]
    assert event.stop  # what a listener wants reaches the loop
    assert freeze(event, [1, 2], "again") == []
    assert len(told) == 1


def test_freezing_without_a_pack_only_freezes() -> None:
    mb = bundle()
    assert freeze(Event(mb), [0], "why") == [0]
    assert mb.active.tolist() == [False, True, True]


def test_every_built_in_callback_says_what_it_is_for() -> None:
    import modelbatch.callbacks as callbacks

    for name in re.findall(r"import (\w+) as", Path(callbacks.__file__).read_text()):
        assert getattr(callbacks, name).__doc__
