"""What callbacks keep for each model goes with the models."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from changing_case import Net, nets

from modelbatch import ModelBatch, ModelBatchError
from modelbatch.callbacks import (
    BestModel,
    CallbackPack,
    EarlyStopping,
    Event,
    MetricsLogger,
    NaNCallback,
    TensorBoardCallback,
    WandbCallback,
)


def bundle(count: int = 3) -> ModelBatch:
    return ModelBatch(nets(count), [0.1] * count, torch.optim.SGD)


def epoch(pack: Any, mb: ModelBatch, number: int, values: list[float]) -> Event:
    metrics = {"loss": torch.tensor(values, dtype=torch.float64)}
    event = Event(mb, mb.optimizer, epoch=number, step=number, metrics=metrics)
    pack.on_epoch_end(event)
    return event


def test_early_stopping_and_best_weights() -> None:
    mb = bundle()
    stopping, best = EarlyStopping("loss", patience=[1, 2, 3], restore_best=True), BestModel("loss")
    pack = CallbackPack([stopping, best])
    pack.on_train_start(Event(mb))
    epoch(pack, mb, 0, [1.0, 1.0, 1.0])
    kept = mb[2].last.weight.clone()
    mb.prune(0)
    fresh = Net(9)
    mb.replace(0, fresh)
    with pytest.raises(ModelBatchError, match="EarlyStopping has a patience for each model"):
        mb.append([Net(4)])
    assert stopping.patience == [2, 3]
    assert stopping.best_epochs.tolist() == [-1, 0] and best.best_values.tolist()[1] == 1.0
    for parameter in mb.parameters():
        parameter.data.zero_()
    for number in (1, 2, 3):
        epoch(pack, mb, number, [2.0, 2.0])
    assert stopping.stopped_epochs.tolist() == [3, 3] and stopping.best_epochs.tolist() == [1, 0]
    assert torch.equal(mb[1].last.weight, kept) and not mb[0].last.weight.any()
    assert torch.equal(best.model_state_dict(1)["last.weight"], kept)


def test_nan_callbacks_remember_by_model() -> None:
    mb = bundle()
    callback = NaNCallback("reset", max_resets=3)
    pack = CallbackPack([callback])
    pack.on_train_start(Event(mb))
    callback.resets, callback.warned = {0: 1, 2: 2}, {1}
    pack.on_epoch_start(Event(mb))
    mb.prune(0)
    assert callback.resets == {1: 2} and callback.warned == {0}
    mb.append([Net(5)])
    losses = torch.tensor([1.0, torch.nan, 1.0], dtype=torch.float64)
    pack.on_train_step(Event(mb, mb.optimizer, step=1, losses=losses))
    assert callback.resets == {1: 3}


def test_an_event_on_its_way_follows() -> None:
    mb = bundle()
    nan = NaNCallback("prune")
    event = Event(mb, mb.optimizer, step=1, losses=torch.tensor([1.0, torch.nan, 2.0]))
    nan.on_train_step(event)  # by itself, without a pack
    assert event.losses.tolist() == [1.0, 2.0] and mb.model_ids == [0, 2]


def log(path: Path, **options: Any) -> tuple[ModelBatch, CallbackPack]:
    mb = bundle()
    pack = CallbackPack([MetricsLogger(path, flush_seconds=0.0, **options)])
    pack.on_train_start(Event(mb))
    return mb, pack


def test_tables_have_columns_by_id(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    mb, pack = log(path)
    epoch(pack, mb, 0, [1.0, 2.0, 3.0])
    mb.prune(1)
    epoch(pack, mb, 1, [4.0, 5.0])
    mb.append([Net(5), Net(6)], lr=0.5)
    epoch(pack, mb, 2, [6.0, 7.0, 8.0, 9.0])
    mb.prune([0, -1])
    epoch(pack, mb, 3, [1.5, 2.5])
    state = pack.state_dict()
    pack.on_train_end(Event(mb))
    table = list(csv.DictReader(path.read_text().splitlines()))
    assert list(table[0])[3:] == [f"{n}_model_{i}" for n in ("loss", "lr") for i in range(5)]
    cells = [[row[f"loss_model_{i}"] for i in range(5)] for row in table]
    assert cells == [
        ["1.0", "2.0", "3.0", "", ""],
        ["4.0", "", "5.0", "", ""],
        ["6.0", "", "7.0", "8.0", "9.0"],
        ["", "", "1.5", "2.5", ""],
    ]
    assert [row["lr_model_3"] for row in table] == ["", "", "0.5", "0.5"]
    again = CallbackPack([MetricsLogger(path)])
    again.load_state_dict(state)
    again.on_train_start(Event(mb))
    epoch(again, mb, 4, [0.25, 0.5])
    again.on_train_end(Event(mb))
    assert path.read_text().splitlines()[5].startswith("epoch,4,4,,,0.25,0.5,,")
    with pytest.raises(ModelBatchError, match="of 5 models, this bundle has 2"):
        CallbackPack([MetricsLogger(path)]).on_train_start(Event(mb))


def test_json_lines_have_the_models_of_then(tmp_path: Path) -> None:
    mb, pack = log(tmp_path / "a.jsonl", fields=["loss"])
    epoch(pack, mb, 0, [1.0, 2.0, 3.0])
    mb.prune(0)
    mb.append([Net(5)])
    epoch(pack, mb, 1, [4.0, 5.0, float("inf")])
    pack.on_train_end(Event(mb))
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [sorted(row)[2:5] for row in rows] == [
        [f"loss_model_{i}" for i in (0, 1, 2)],
        [f"loss_model_{i}" for i in (1, 2, 3)],
    ]
    assert rows[1]["loss_model_3"] is None and rows[1]["loss_model_2"] == 5.0


@pytest.mark.parametrize("runs", ["bundle", "per_model"])
def test_event_files_by_id(tmp_path: Path, runs: str) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    mb = bundle()
    hparams = [{"a": float(i)} for i in range(3)]
    pack = CallbackPack([TensorBoardCallback(tmp_path, runs=runs, hparams=hparams)])
    pack.on_train_start(Event(mb))
    epoch(pack, mb, 0, [1.0, 2.0, 3.0])
    mb.prune(0)
    mb.append([Net(4)])
    epoch(pack, mb, 1, [4.0, 5.0, 6.0])
    pack.on_train_end(Event(mb, step=1))
    directories = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    expected = {1, 2, 3} if runs == "bundle" else {0, 1, 2, 3}
    assert directories == {f"model_{i:03d}" for i in expected}
    if runs == "per_model":
        found = {}
        for i in range(4):
            events = EventAccumulator(str(tmp_path / f"model_{i:03d}"))
            events.Reload()
            found[i] = [event.value for event in events.Scalars("epoch_loss")]
        assert found == {0: [1.0], 1: [2.0, 4.0], 2: [3.0, 5.0], 3: [6.0]}


def test_runs_of_wandb_by_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")

    class Run:
        def __init__(self, **options: Any) -> None:
            self.name, self.logged, self.ended = options["name"], [], None
            self.id, self.summary = options["name"], {}
            runs.append(self)

        def define_metric(self, *args: Any, **options: Any) -> None: ...

        def log(self, row: Any) -> None:
            self.logged.append(row.get("epoch_loss"))

        def finish(self, exit_code: int) -> None:
            self.ended = exit_code

    runs: list[Run] = []
    mb = bundle()
    callback = WandbCallback(name="x", runs="per_model")
    monkeypatch.setattr(callback._wandb, "init", lambda **options: Run(**options))
    pack = CallbackPack([callback])
    pack.on_train_start(Event(mb))
    epoch(pack, mb, 0, [1.0, 2.0, 3.0])
    mb.prune(1)
    mb.append([Net(4)])
    epoch(pack, mb, 1, [4.0, 5.0, 6.0])
    assert [run.name for run in callback.run_list] == [f"x-model_00{i}" for i in (0, 2, 3)]
    assert [run.ended for run in runs] == [None, 0, None, None]
    pack.on_train_end(Event(mb))
    assert [run.logged for run in runs] == [[1.0, 4.0], [2.0], [3.0, 5.0], [6.0]]
