"""WandbCallback: offline runs are read back from their files."""

import json
import math
import struct
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelbatch import ModelBatchError
from modelbatch.callbacks import NaNCallback, WandbCallback

wandb = pytest.importorskip("wandb")
wandb_internal_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:DeprecationWarning:wandb",
    "ignore:.*:DeprecationWarning:google",
    "ignore:.*:DeprecationWarning:pydantic",
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))


def records(path: Path) -> Iterator[bytes]:
    """The records of a run's file: LevelDB's log format, with a header of its own.

    Blocks of 32 KiB; each piece of a record has a checksum (4 bytes), its length (2) and whether it
    is a whole record (1) or the first (2), a middle (3) or the last (4) part of one.
    """
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, record = 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


class Run:
    """What one offline run wrote."""

    def __init__(self, path: Path):
        self.directory = path.parent
        self.rows: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        self.exit_code: int | None = None
        for data in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            self._take(record)

    def _take(self, record: Any) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            self.id, self.name = record.run.run_id, record.run.display_name
            self.group, self.project = record.run.run_group, record.run.project
            updates = record.run.config.update
            self.config = {u.key: json.loads(u.value_json) for u in updates}
        elif kind == "history":
            items = {
                (".".join(i.nested_key) or i.key): json.loads(i.value_json)
                for i in record.history.item
            }
            self.rows.append({k: v for k, v in items.items() if not k.startswith("_")})
        elif kind == "metric":
            self.metrics[record.metric.name or record.metric.glob_name] = record.metric
        elif kind == "exit":
            self.exit_code = record.exit.exit_code

    def column(self, name: str) -> dict[int, Any]:
        return {row["step"]: row[name] for row in self.rows if name in row}


def runs_in(directory: Path) -> list[Run]:
    """The runs, when the process that writes them has written all."""
    for _ in range(300):
        found = [Run(path) for path in directory.glob("wandb/offline-run-*/run-*.wandb")]
        if all(run.exit_code is not None for run in found):
            break
        time.sleep(0.1)
    return sorted(found, key=lambda run: run.name)


def values(epoch: int) -> dict[str, Any]:
    return {"val_loss": [3.0, 1.0 + epoch, 2.0], "val_acc": [0.5, 0.25, 0.75]}


def test_one_run_for_the_bundle(loop: Any, tmp_path: Path) -> None:
    callback = WandbCallback(
        "a-project",
        name="a-run",
        config={"data": "digits"},
        interval=2,
        hparams=[{"width": i} for i in range(3)],
        dir=str(tmp_path),
        tags=["small"],
    )
    run = loop([0.01, 0.02, 0.03], [callback])
    run.mb.freeze(2)
    seen: list[Any] = []
    run.poison = lambda event: seen.append((wandb.run, len(callback.run_list)))
    run.run(2, metrics=values)
    assert seen == [(None, 1)] * 6 and wandb.run is None  # no global state
    (found,) = runs_in(tmp_path)
    assert (found.name, found.project, found.exit_code) == ("a-run", "a-project", 0)
    assert found.config["data"] == "digits" and found.config["num_models"] == 3
    assert (found.config["lr_min"], found.config["lr_max"]) == (0.01, 0.03)
    assert found.config["momentum"] == 0
    steps = (2, 4, 6)
    assert found.column("loss/best") == {k: min(run.losses[k - 1][:2]) for k in steps}
    assert found.column("loss/worst") == {k: max(run.losses[k - 1][:2]) for k in steps}
    assert found.column("models/active") == dict.fromkeys((2, 3, 4, 6), 2)
    assert found.column("val_loss/best") == {3: 1.0, 6: 2.0}
    assert found.column("val_acc/max") == {3: 0.5, 6: 0.5}
    assert found.column("epoch")[6] == 1
    assert sum(found.column("loss/models.values")[4]) == 2
    assert set(found.column("val_acc/models._type").values()) == {"histogram"}
    assert found.metrics["*"].step_metric == "step"
    for name in ("loss/best", "val_loss/best", "epoch_loss/best"):
        assert found.metrics[name].summary.min and found.metrics[name].step_metric == "step"
    assert found.column("models._type") == {6: "table-file"}
    path = found.directory / "files" / found.column("models.path")[6]
    table = json.loads(path.read_text())
    columns = table["columns"]
    assert columns[:2] == ["model", "active"]
    rows = [dict(zip(columns, row, strict=True)) for row in table["data"]]
    for i, row in enumerate(rows):
        assert (row["model"], row["active"], row["width"]) == (i, i != 2, i)
        assert row["lr"] == 0.01 * (i + 1) and str(row["seed"]) == str(run.mb.seeds[i])
        assert row["val_loss"] == values(1)["val_loss"][i]


def test_one_run_per_model(loop: Any, tmp_path: Path) -> None:
    callback = WandbCallback(name="sweep", interval=3, runs="per_model", dir=str(tmp_path))
    run = loop([0.01, 0.02, 0.03], [callback])
    run.run(2, metrics=values)
    found = runs_in(tmp_path)
    assert [own.name for own in found] == [f"sweep-model_{i:03d}" for i in range(3)]
    assert {own.group for own in found} == {"sweep"}
    for i, own in enumerate(found):
        assert own.config["lr"] == 0.01 * (i + 1) and own.config["model"] == i
        assert own.column("loss") == {3: run.losses[2][i], 6: run.losses[5][i]}
        assert own.column("val_loss") == {e * 3 + 3: values(e)["val_loss"][i] for e in (0, 1)}
        assert own.metrics["val_loss"].summary.min


def test_two_bundles_and_a_run_of_the_users_own(loop: Any, tmp_path: Path) -> None:
    own = wandb.init(project="mine", dir=str(tmp_path / "own"))
    try:
        loops = [
            loop([0.01], [WandbCallback(name=f"run{k}", interval=1, dir=str(tmp_path))])
            for k in range(2)
        ]
        for run in loops:
            run.pack.on_train_start(run.event)
        for run in loops:
            run.run(1)
        assert wandb.run is own
    finally:
        own.finish()
    # each was started twice: a second start ends the first run
    assert [run.name for run in runs_in(tmp_path)] == ["run0", "run0", "run1", "run1"]
    assert max(len(run.rows) for run in runs_in(tmp_path)) == 5


def test_a_failed_training_is_a_failed_run(loop: Any, tmp_path: Path) -> None:
    run = loop([0.01], [WandbCallback(interval=1, dir=str(tmp_path))])

    def fail(event: Any) -> None:
        raise RuntimeError("broken")

    run.poison = fail
    with pytest.raises(RuntimeError, match="broken"):
        run.run(1)
    (found,) = runs_in(tmp_path)
    assert found.exit_code == 1


def test_models_that_diverge(loop: Any, huge: float, tmp_path: Path) -> None:
    run = loop([0.01, huge], [NaNCallback(), WandbCallback(interval=1, dir=str(tmp_path))])
    run.run(4)
    assert any(not math.isfinite(row[1]) for row in run.losses)
    (found,) = runs_in(tmp_path)
    assert all(isinstance(v, float) for v in found.column("loss/worst").values())
    assert found.column("models/active")[12] == 1


def test_a_resume_goes_on_with_the_same_run(loop: Any, tmp_path: Path) -> None:
    first = loop([0.01], [WandbCallback(interval=1, dir=str(tmp_path / "a"))])
    first.run(1)
    state = first.pack.state_dict()
    second = loop([0.01], [WandbCallback(interval=1, dir=str(tmp_path / "b"))])
    second.pack.load_state_dict(state)
    second.event.step = 3
    second.run(2, first=1)
    (one,), (two,) = runs_in(tmp_path / "a"), runs_in(tmp_path / "b")
    assert one.id == two.id == state["WandbCallback"]["ids"][0]
    assert set(two.column("loss/best")) == {4, 5, 6}
    second.run(1)  # without a resume it is another run
    assert len({run.id for run in runs_in(tmp_path / "b")}) == 2


def test_many_runs_are_warned_of(loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = WandbCallback(runs="per_model")
    begun: list[int] = []
    monkeypatch.setattr(callback, "_begin", lambda i, *_, **__: begun.append(i))
    with pytest.warns(UserWarning, match="opens 51 runs"):
        callback.on_train_start(loop([0.01] * 51, []).event)
    assert begun == list(range(51))


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"WandbCallback.*'modelbatch\[wandb\]'"):
        WandbCallback()
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # ./wandb, of old runs
    with pytest.raises(ImportError, match="plain directory"):
        WandbCallback()


def test_bad_arguments() -> None:
    for arguments, text in (
        ({"runs": "each"}, 'runs must be "bundle" or "per_model"'),
        ({"interval": -1}, "interval"),
        ({"reinit": True, "id": "x"}, "id, reinit: WandbCallback sets this itself"),
    ):
        with pytest.raises(ModelBatchError, match=text):
            WandbCallback(**arguments)  # type: ignore[arg-type]
