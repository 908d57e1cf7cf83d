"""When Checkpoint saves, and what it hands to `save_all`."""

from pathlib import Path
from typing import Any

import pytest
import torch

from modelbatch import ModelBatchError
from modelbatch.callbacks import (
    BestModel,
    Callback,
    CallbackPack,
    Checkpoint,
    EarlyStopping,
    MetricsLogger,
    NaNCallback,
)


class Saves:
    """Stands in for `mb.save_all`."""

    def __init__(self, run: Any):
        self.run = run
        self.calls: list[tuple[int, int, str, bool]] = []
        self.states: list[dict[str, Any]] = []
        self.fails = False
        object.__setattr__(run.mb, "save_all", self)

    def __call__(self, directory: Any, *, per_model: bool, states: dict[str, Any]) -> None:
        if self.fails:
            raise OSError("no space left")
        event = self.run.event
        self.calls.append((event.epoch, event.step, str(directory), per_model))
        self.states.append({name: state.state_dict() for name, state in states.items()})


class Scheduler:
    def state_dict(self) -> dict[str, Any]:
        return {"steps": 3}


def test_every_so_many_epochs_and_at_the_end(loop: Any) -> None:
    checkpoint = Checkpoint("runs/a", every_epochs=2, states={"scheduler": Scheduler()})
    run = loop([0.01] * 2, [EarlyStopping("loss", patience=9), checkpoint])
    saves = Saves(run)
    run.run(5)
    assert saves.calls == [(e, 3 * e + 3, str(Path("runs/a")), False) for e in (1, 3, 4)]
    assert [state["callbacks"]["Checkpoint"] for state in saves.states] == [
        {"epoch": e, "step": 3 * e + 3} for e in (1, 3, 4)
    ]
    assert all(state["scheduler"] == {"steps": 3} for state in saves.states)
    # what stands before it in the pack has seen the epoch already
    assert saves.states[0]["callbacks"]["EarlyStopping"]["best_epochs"].tolist() == [1, 1]
    assert checkpoint.path == Path("runs/a") and (checkpoint.epoch, checkpoint.step) == (4, 15)


def test_every_so_many_steps(loop: Any) -> None:
    checkpoint = Checkpoint("r/{epoch}-{step}", None, every_steps=4, per_model=True)
    run = loop([0.01] * 2, [checkpoint])
    saves = Saves(run)
    run.run(3)
    expected = [(1, 4), (2, 8), (2, 9)]  # the last one is the end
    assert [call[:2] for call in saves.calls] == expected
    assert [call[2] for call in saves.calls] == [str(Path(f"r/{e}-{s}")) for e, s in expected]
    assert all(call[3] for call in saves.calls)
    # an epoch that has not ended does not count as done
    assert [s["callbacks"]["Checkpoint"]["epoch"] for s in saves.states] == [0, 1, 2]


def test_nothing_is_saved_twice(loop: Any) -> None:
    run = loop([0.01] * 2, [Checkpoint("a", every_steps=3)])
    saves = Saves(run)
    run.run(1)
    # after step 3, and again when the epoch has ended; not at the end
    assert [s["callbacks"]["Checkpoint"] for s in saves.states] == [
        {"epoch": -1, "step": 3},
        {"epoch": 0, "step": 3},
    ]


def test_what_is_interrupted_is_saved_at_the_end(loop: Any) -> None:
    run = loop([0.01] * 2, [Checkpoint("a")])
    saves = Saves(run)

    def interrupt(event: Any) -> None:
        if event.step == 5:
            raise KeyboardInterrupt

    run.poison = interrupt
    with pytest.raises(KeyboardInterrupt):
        run.run(4)
    assert [s["callbacks"]["Checkpoint"] for s in saves.states] == [
        {"epoch": 0, "step": 3},
        {"epoch": 0, "step": 5},
    ]


def test_a_resumed_checkpoint_knows_where_it_stood(loop: Any) -> None:
    checkpoint = Checkpoint("a")
    CallbackPack([checkpoint]).load_state_dict({"Checkpoint": {"epoch": 7, "step": 24}})
    assert (checkpoint.epoch, checkpoint.step) == (7, 24)
    run = loop([0.01] * 2, [checkpoint])
    saves = Saves(run)
    run.event.step = 24
    run.run(8, first=8)  # no epoch is left
    assert saves.calls == []


def test_a_save_that_fails_is_not_counted(loop: Any) -> None:
    checkpoint = Checkpoint("a")
    run = loop([0.01] * 2, [checkpoint])
    saves = Saves(run)
    saves.fails = True
    with pytest.raises(OSError, match="no space left"):
        run.run(1)
    assert (checkpoint.epoch, checkpoint.step, checkpoint.path) == (-1, 0, None)


def test_bad_arguments() -> None:
    for arguments, text in (
        ({"every_epochs": 0}, "every_epochs must be an integer of at least 1"),
        ({"every_steps": 1.5}, "every_steps"),
        ({"directory": "a/{loss}"}, "only {epoch} and {step} can be filled in"),
        ({"directory": "a/{"}, "filled in"),
        ({"states": {"callbacks": Scheduler()}}, "the callbacks' own state"),
    ):
        with pytest.raises(ModelBatchError, match=text):
            Checkpoint(**{"directory": "a", **arguments})  # type: ignore[arg-type]


def test_a_training_is_resumed_from_its_checkpoint(loop: Any, tmp_path: Path) -> None:
    """With the real `save_all`: interrupted and resumed is as if it had never stopped."""

    def callbacks(folder: str) -> list[Callback]:
        return [
            NaNCallback("reset", keep_every=2),
            EarlyStopping("loss", patience=2, min_delta=0.02, restore_best=True),
            BestModel("loss"),
            MetricsLogger(tmp_path / folder / "log.csv"),
            Checkpoint(tmp_path / folder / "checkpoint"),
        ]

    rates = [0.05, 1e-6, 0.1, 1e30]
    whole = loop(rates, callbacks("whole"), torch.optim.Adam)
    whole.run(6)
    first = loop(rates, callbacks("parts"), torch.optim.Adam)

    def interrupt(event: Any) -> None:
        if event.step == 8:
            raise KeyboardInterrupt

    first.poison = interrupt
    first.pack._listeners["on_train_end"].pop()  # killed: nobody saves at the end
    with pytest.raises(KeyboardInterrupt):
        first.run(6)
    second = loop(rates, callbacks("parts"), torch.optim.Adam)
    second.mb.load_all(tmp_path / "parts" / "checkpoint", states={"callbacks": second.pack})
    checkpoint = second.pack[-1]
    assert isinstance(checkpoint, Checkpoint) and checkpoint.epoch == 1
    second.event.step = checkpoint.step
    second.run(6, first=checkpoint.epoch + 1)
    assert second.mb.active.tolist() == whole.mb.active.tolist()
    for name, tensor in whole.mb.state_dict().items():
        torch.testing.assert_close(second.mb.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
    for k in (1, 2):
        one, other = whole.pack[k], second.pack[k]
        torch.testing.assert_close(other.state_dict(), one.state_dict(), rtol=0, atol=0)
    assert whole.pack[0].resets == second.pack[0].resets != {}  # type: ignore[attr-defined]
    texts = [(tmp_path / folder / "log.csv").read_text() for folder in ("whole", "parts")]
    assert texts[0] == texts[1]
