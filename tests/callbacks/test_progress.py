"""What ProgressBar shows, on a terminal and elsewhere."""

import io
import math
import re
from typing import Any

import pytest
import torch
from rich.console import Console

from modelbatch import ModelBatchError
from modelbatch.callbacks import ProgressBar
from modelbatch.callbacks.report import spread


def terminal(width: int = 100) -> Console:
    return Console(force_terminal=True, file=io.StringIO(), width=width, color_system=None)


def frames(console: Console) -> list[str]:
    """What was drawn, one after the other, without the movements of the cursor."""
    assert isinstance(console.file, io.StringIO)
    drawn = re.split(r"\r\x1b\[2K", console.file.getvalue())
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame).strip() for frame in drawn]


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that goes on by half a second at every look."""
    now = [0.0]

    def tick() -> float:
        now[0] += 0.5
        return now[0]

    monkeypatch.setattr("modelbatch.callbacks.progress.time.perf_counter", tick)
    return now


def test_a_terminal_shows_everything(loop: Any) -> None:
    console = terminal()
    run = loop([0.01, 0.02, 0.03, 0.04], [ProgressBar(console, refresh_seconds=0.0)])
    run.mb.freeze(2)
    values = {"val_loss": [0.25, 0.5, 9.0, 1.5], "val_acc": [0.5, 0.25, 0.0, 0.75]}
    run.run(2, metrics=lambda epoch: values)
    text = "\n".join(frames(console))
    for k in (1, 2):
        assert f"epoch {k}/2" in text
    assert "0/3" in text and "2/3" in text and "3/3" in text
    losses = {i: loss for i, loss in enumerate(run.losses[-1]) if i != 2}
    best = min(losses, key=losses.__getitem__)
    assert f"best {losses[best]:.4g} (model {best})" in text
    middle = sorted(losses.values())[1]
    assert f"median {middle:.4g}" in text and f"worst {max(losses.values()):.4g}" in text
    assert re.search(r"val_loss +best 0.25 \(model 0\) +median 0.5 +worst 1.5", text)
    assert re.search(r"val_acc +min 0.25 +median 0.5 +max 0.75", text)
    assert re.search(r"models +3 active +1 frozen +[\d.]+[kM]? model-samples/s", text)
    assert re.search(r"0:00:0\d left", text)
    assert "nan" not in text
    # the cursor is shown again
    assert isinstance(console.file, io.StringIO)
    raw = console.file.getvalue()
    assert raw.rindex("\x1b[?25h") > raw.rindex("\x1b[?25l")


def test_a_narrow_terminal(loop: Any) -> None:
    console = terminal(width=40)
    loop([0.01] * 2, [ProgressBar(console, refresh_seconds=0.0)]).run(2)
    text = "\n".join(frames(console))
    assert "epoch 2/2" in text
    assert max(len(line) for line in text.splitlines()) <= 40


def test_it_redraws_now_and_then_only(loop: Any, seconds: list[float]) -> None:
    """The losses are read from the device when it draws, and not at every step."""
    console = terminal()
    bar = ProgressBar(console, refresh_seconds=5.0)
    run = loop([0.01], [bar], batches=100)
    drawn: list[int] = []
    original = bar._draw

    def draw(event: Any, validating: bool = False) -> None:
        drawn.append(event.step)
        original(event, validating)

    bar._draw = draw  # type: ignore[method-assign]
    run.run(1)
    # a look at the clock for a step, some for drawing: about every ninth step
    assert 10 <= len(drawn) <= 16


def test_speed_and_time_left_are_right(loop: Any, seconds: list[float]) -> None:
    out = io.StringIO()
    run = loop([0.01] * 4, [ProgressBar(Console(file=out, width=200), line_seconds=0.0)])
    run.mb.freeze(0)

    def pause(epoch: int) -> dict[str, Any]:
        seconds[0] += 1000.0  # a validation: no training
        return {}

    run.run(2, metrics=pause)
    first, second = out.getvalue().splitlines()
    # half a second from look to look, 8 samples, 3 models that train
    assert "48 model-samples/s" in first and "48 model-samples/s" in second
    assert re.search(r"0:16:\d\d left", first) and "0:00:00 left" in second


def test_without_a_terminal_there_are_few_lines(loop: Any, seconds: list[float]) -> None:
    out = io.StringIO()
    run = loop([0.01] * 2, [ProgressBar(Console(file=out, width=60), line_seconds=20.0)])
    run.run(40)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("epoch 1/40, step 3; loss best ")
    assert "2 active, 0 frozen" in lines[0] and "left" in lines[0]
    assert lines[-1].startswith("epoch 40/40, step 120;")
    assert 2 < len(lines) < 14
    assert "\x1b" not in out.getvalue()


def test_the_last_line_comes_even_if_training_ends_early(loop: Any, seconds: list[float]) -> None:
    out = io.StringIO()
    run = loop([0.01] * 2, [ProgressBar(Console(file=out, width=60), line_seconds=1e9)])

    def interrupt(event: Any) -> None:
        if event.step == 8:
            raise KeyboardInterrupt

    run.poison = interrupt
    with pytest.raises(KeyboardInterrupt):
        run.run(40)
    lines = out.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch 1/40", "epoch 2/40"]


def test_numbers_that_are_unknown_or_not_finite(loop: Any) -> None:
    for console in (terminal(), Console(file=io.StringIO(), width=100)):
        run = loop([0.01] * 2, [ProgressBar(console, 0.0, 0.0)])
        run.event.num_batches = None
        run.poison = lambda event: event.losses.fill_(math.nan)
        event = run.event
        run.pack.on_train_start(event)
        for event.epoch in range(2):
            run.pack.on_epoch_start(event)
            for event.batch in range(3):
                event.losses = torch.full((2,), math.nan)
                event.step += 1
                run.pack.on_train_step(event)
            event.batch, event.num_batches = 0, 2
            run.pack.on_validation_step(event)
            event.losses, event.num_batches, event.batch = None, None, 2
            event.metrics = {"loss": torch.full((2,), math.nan)}
            run.pack.on_epoch_end(event)
        run.pack.on_train_end(event)
        assert isinstance(console.file, io.StringIO)
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
        assert "loss" in text and "not finite" in text and "nan" not in text
        if console.is_terminal:
            assert "epoch 1 validation" in text and "1/2" in text and "3/3" in text


def test_the_spread_is_that_of_active_finite_models() -> None:
    values = [3.0, math.nan, 1.0, 2.0, -5.0, math.inf]
    active = [True, True, True, True, False, True]
    assert spread(values, active) == (1.0, 2.0, 3.0, 2)
    assert spread(values, [False] * 6) == (-5.0, 1.5, 3.0, 4)
    assert not spread([math.nan], [True]).known


def test_bad_arguments() -> None:
    with pytest.raises(ModelBatchError, match="must not be negative"):
        ProgressBar(refresh_seconds=-1.0)
    with pytest.raises(ModelBatchError, match="must not be negative"):
        ProgressBar(line_seconds=math.nan)
