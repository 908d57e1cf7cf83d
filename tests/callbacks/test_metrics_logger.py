"""MetricsLogger: what is read back, bit by bit, and what becomes of a file that is there."""

import csv
import gc
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from modelbatch import ModelBatchError
from modelbatch.callbacks import MetricsLogger
from modelbatch.callbacks.table_file import TableFile


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(None not in row and None not in row.values() for row in rows)  # no cell too many
    return rows


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def column(rows: list[dict[str, Any]], kind: str, name: str) -> list[float]:
    return [float(row[name]) for row in rows if row["event"] == kind]


def accuracy(epoch: int) -> dict[str, Any]:
    return {"val_loss": [0.5 + epoch, 1 / 3, math.nan], "val_acc": torch.tensor([1, epoch, 3])}


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_numbers_come_back_bit_by_bit(loop: Any, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"log.{suffix}"
    run = loop([0.05, 1 / 30, 1e-4], [MetricsLogger(path)])
    run.run(2, metrics=accuracy)
    rows = read_csv(path) if suffix == "csv" else read_jsonl(path)
    assert [row["event"] for row in rows] == (["step"] * 3 + ["epoch"]) * 2
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert [int(row["epoch"]) for row in rows] == [0] * 4 + [1] * 4
    for i in range(3):
        read = torch.tensor(column(rows, "step", f"loss_model_{i}"))
        assert read.tolist() == [losses[i] for losses in run.losses]
        assert column(rows, "step", f"lr_model_{i}") == [[0.05, 1 / 30, 1e-4][i]] * 6
    means = [torch.tensor([row[1] for row in run.losses[k : k + 3]]).sum() / 3 for k in (0, 3)]
    assert torch.tensor(column(rows, "epoch", "loss_model_1")).tolist() == [m.item() for m in means]
    third = torch.tensor(1 / 3).item()  # of float32
    assert torch.tensor(column(rows, "epoch", "val_loss_model_1")).tolist() == [third] * 2
    assert column(rows, "epoch", "val_acc_model_2") == [3, 3]
    last = rows[3]["val_loss_model_2"]
    assert last == "nan" if suffix == "csv" else last is None
    steps = [row for row in rows if row["event"] == "step"]
    if suffix == "csv":
        assert all(row["val_loss_model_0"] == "" for row in steps)
        assert list(rows[0])[:3] == ["event", "epoch", "step"]
    else:
        assert all("val_loss_model_0" not in row for row in steps)


def test_float64_keeps_all_digits(tmp_path: Path) -> None:
    values = torch.rand(4, dtype=torch.float64) * 10.0 ** torch.arange(-200.0, 200, 100).double()
    for suffix in ("csv", "jsonl"):
        path = tmp_path / f"a.{suffix}"
        file = TableFile(path, suffix, ["x%s"], range(4), None, 0.0)
        file.add_row(("step", 0, 1), {"x%s": values}, None)
        file.close()
        (row,) = read_csv(path) if suffix == "csv" else read_jsonl(path)
        assert [float(row[f"x%s_model_{i}"]) for i in range(4)] == values.tolist()


def test_changing_learning_rates_and_infinities(loop: Any, huge: float, tmp_path: Path) -> None:
    for suffix in ("csv", "jsonl"):
        path = tmp_path / f"log.{suffix}"
        run = loop([0.01, huge], [MetricsLogger(path)])

        def halve(event: Any) -> None:
            event.optimizer.param_groups[0]["lr"] /= 2

        run.poison = halve
        run.run(2)
        rows = read_csv(path) if suffix == "csv" else read_jsonl(path)
        expected = [0.01 / 2**k for k in range(1, 7)]
        assert column(rows, "step", "lr_model_0") == expected
        assert any(not math.isfinite(losses[1]) for losses in run.losses)
        for row, losses in zip((r for r in rows if r["event"] == "step"), run.losses, strict=True):
            cell = row["loss_model_1"]
            if suffix == "jsonl":
                assert (cell is None) == (not math.isfinite(losses[1]))
            else:
                assert repr(float(cell)) == repr(losses[1]) or float(cell) == pytest.approx(
                    losses[1], rel=1e-8
                )


def test_fields_and_interval(loop: Any, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    fields = ["loss", "grad_norm", "active", "val_acc"]
    run = loop([0.01, 0.02, 0.03], [MetricsLogger(path, interval=2, fields=fields)])
    run.mb.freeze(1)
    run.run(2, metrics=accuracy)
    rows = read_csv(path)
    names = [f"{name}_model_{i}" for name in fields for i in range(3)]
    assert list(rows[0]) == ["event", "epoch", "step", *names]
    assert [int(row["step"]) for row in rows if row["event"] == "step"] == [2, 4, 6]
    assert column(rows, "step", "active_model_1") == [0, 0, 0]
    assert column(rows, "epoch", "val_acc_model_1") == [0, 1]
    norm = torch.sqrt(sum(p.grad[2].square().sum() for p in run.mb.parameters()))
    assert column(rows, "step", "grad_norm_model_2")[-1] == pytest.approx(norm.item(), rel=1e-6)
    only = tmp_path / "epochs.jsonl"
    loop([0.01], [MetricsLogger(only, interval=0)]).run(3)
    assert [row["event"] for row in read_jsonl(only)] == ["epoch"] * 3


def test_the_format_may_be_given(loop: Any, tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    loop([0.01], [MetricsLogger(path, "jsonl")]).run(1)
    assert len(read_jsonl(path)) == 4


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_new_training_appends_or_begins_anew(loop: Any, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"log.{suffix}"
    read: Any = read_csv if suffix == "csv" else read_jsonl
    for count in (4, 8):
        loop([0.01] * 2, [MetricsLogger(path)]).run(1)
        assert len(read(path)) == count
    logger = MetricsLogger(path, overwrite=True)
    for count in (4, 8):  # the second training of the same logger is not a new one
        loop([0.01] * 2, [logger]).run(1)
        assert len(read(path)) == count


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_resume_drops_what_its_checkpoint_does_not_know(
    loop: Any, tmp_path: Path, suffix: str
) -> None:
    path, other = tmp_path / f"log.{suffix}", tmp_path / f"whole.{suffix}"
    loop([0.01] * 3, [MetricsLogger(other)]).run(3, metrics=accuracy)
    first = loop([0.01] * 3, [MetricsLogger(path)])
    states: list[Any] = []

    def remember(event: Any) -> None:
        if event.step == 4:  # without the row about this step
            states.append((event.mb.state_dict(), first.pack.state_dict()))
            states[-1] = ({k: v.clone() for k, v in states[-1][0].items()}, states[-1][1])

    first.poison = remember
    first.run(2, metrics=accuracy)
    with path.open("ab") as file:
        file.write(b"half a ro")  # killed in the middle of a row
    ((weights, state),) = states
    assert state == {"MetricsLogger": {"rows": 4}}
    second = loop([0.01] * 3, [MetricsLogger(path)])
    second.mb.load_state_dict(weights)
    second.pack.load_state_dict(state)
    second.pack.on_train_start(second.event)
    second.event.epoch = 1
    second.event.losses = torch.tensor(first.losses[3])
    second.event.step = 4
    second.pack.on_train_step(second.event)
    for x, y in second.batches[1:]:
        second.event.losses = second.mb.train_step(x, y, loss_fn=lambda o, t: ((o - t) ** 2).mean())
        second.event.step += 1
        second.pack.on_train_step(second.event)
    second.pack.on_train_end(second.event)
    lines = path.read_text().splitlines()
    assert lines == other.read_text().splitlines()[: len(lines)]
    rows: Any = read_csv(path) if suffix == "csv" else read_jsonl(path)
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 3, 4, 5, 6]


def test_a_resume_without_the_file_begins_one(loop: Any, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    run = loop([0.01], [MetricsLogger(path)])
    run.pack.load_state_dict({"MetricsLogger": {"rows": 10}})
    assert run.pack.state_dict() == {"MetricsLogger": {"rows": 10}}
    run.run(1)
    assert len(read_csv(path)) == 4


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("name,age\nA,3\n", "is no file of MetricsLogger"),
        ('{"name": 3}\n', "is no file of MetricsLogger"),
        ("\x00\xff\n", "is no file of MetricsLogger"),
        ("event,epoch,step,remark\n", "is no file of MetricsLogger"),
        ("event", "has no rows"),
    ],
)
def test_the_file_of_somebody_else_is_not_touched(
    loop: Any, tmp_path: Path, suffix: str, content: str, text: str
) -> None:
    path = tmp_path / f"log.{suffix}"
    path.write_text(content, encoding="latin-1")
    before = path.read_bytes()
    with pytest.raises(ModelBatchError, match=text):
        loop([0.01] * 2, [MetricsLogger(path)]).run(1)
    assert path.read_bytes() == before


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_other_columns_are_refused(loop: Any, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"log.{suffix}"
    loop([0.01] * 2, [MetricsLogger(path)]).run(1)
    before = path.read_bytes()
    with pytest.raises(ModelBatchError, match="columns 'loss' of 2 models, this bundle has 3"):
        loop([0.01] * 3, [MetricsLogger(path)]).run(1)
    if suffix == "csv":
        fields = ["loss", "grad_norm"]
        with pytest.raises(ModelBatchError, match="no columns 'grad_norm'"):
            loop([0.01] * 2, [MetricsLogger(path, fields=fields)]).run(1)
    assert path.read_bytes() == before


def test_rows_wait_for_each_other_but_not_for_ever(
    loop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("modelbatch.callbacks.table_file.time.monotonic", lambda: now[0])
    path = tmp_path / "log.jsonl"
    run = loop([0.01], [MetricsLogger(path, flush_seconds=2.0)], batches=100)
    seen: list[int] = []

    def look(event: Any) -> None:  # before the row of this step is there
        seen.append(len(path.read_text().splitlines()))
        now[0] += 0.125

    run.poison = look
    run.run(1)
    assert seen[1] == 1  # the first is written at once
    assert max(b - a for a, b in pairwise(seen)) == 16  # two seconds
    assert len(read_jsonl(path)) == 101
    at_once = loop([0.01], [MetricsLogger(tmp_path / "b.jsonl", flush_seconds=0.0)])
    seen.clear()
    path = tmp_path / "b.jsonl"
    at_once.poison = look
    at_once.run(1)
    assert seen == [0, 1, 2]


def test_a_loop_that_never_says_it_has_ended_loses_nothing(loop: Any, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    logger = MetricsLogger(path)
    run = loop([0.01], [])
    event = run.event
    event.losses = torch.tensor([0.5])
    for event.step in range(1, 6):  # no on_train_start either
        logger.on_train_step(event)
    del logger
    gc.collect()
    assert [row["step"] for row in read_jsonl(path)] == [1, 2, 3, 4, 5]


def test_losses_that_a_loop_overwrites(loop: Any, tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path / "log.jsonl")
    event = loop([0.01], []).event
    event.losses = torch.zeros(1)
    for event.step in range(1, 5):
        event.losses.fill_(event.step)
        logger.on_train_step(event)
    logger.on_train_end(event)
    rows = read_jsonl(tmp_path / "log.jsonl")
    assert [row["loss_model_0"] for row in rows] == [1, 2, 3, 4]


def test_an_interrupted_training_leaves_complete_rows(loop: Any, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    run = loop([0.01] * 2, [MetricsLogger(path)])

    def interrupt(event: Any) -> None:
        if event.step == 6:
            raise KeyboardInterrupt

    run.poison = interrupt
    with pytest.raises(KeyboardInterrupt):
        run.run(3)
    assert [int(row["step"]) for row in read_csv(path)] == [1, 2, 3, 3, 4, 5]


def test_bad_arguments(tmp_path: Path) -> None:
    for arguments, text in (
        ({"path": "log.txt"}, "neither .csv nor .jsonl"),
        ({"format": "xml"}, 'must be "csv" or "jsonl"'),
        ({"interval": -1}, "interval must be an integer of at least 0"),
        ({"fields": "loss"}, "sequence of names"),
        ({"fields": []}, "fields names nothing"),
        ({"flush_seconds": -1.0}, "flush_seconds"),
    ):
        with pytest.raises(ModelBatchError, match=text):
            MetricsLogger(**{"path": tmp_path / "a.csv", **arguments})  # type: ignore[arg-type]


def test_a_bundle_without_an_optimizer_has_no_learning_rates(loop: Any, tmp_path: Path) -> None:
    run = loop([0.01] * 2, [])
    run.mb.optimizer = run.event.optimizer = None
    logger = MetricsLogger(tmp_path / "a.csv")
    logger.on_train_start(run.event)
    run.event.losses = torch.ones(2)
    logger.on_train_step(run.event)
    logger.on_train_end(run.event)
    header, _ = (tmp_path / "a.csv").read_text().splitlines()
    assert header == "event,epoch,step,loss_model_0,loss_model_1"


def test_other_numbers_of_models_are_refused(loop: Any, tmp_path: Path) -> None:
    run = loop([0.01] * 2, [])
    logger = MetricsLogger(tmp_path / "a.csv")
    logger.on_train_start(run.event)
    run.event.losses = torch.ones(3)
    with pytest.raises(ModelBatchError, match="columns for 2 models, 'loss' has 3 values"):
        logger.on_train_step(run.event)
    logger.on_train_end(run.event)
