"""TensorBoardCallback: its event files are read back."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modelbatch import ModelBatchError
from modelbatch.callbacks import NaNCallback, TensorBoardCallback

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:DeprecationWarning:tensorboard",
    "ignore:.*:DeprecationWarning:google",
)


def read(directory: Path) -> EventAccumulator:
    found = EventAccumulator(str(directory), size_guidance={"scalars": 0, "histograms": 0})
    found.Reload()
    return found


def scalars(found: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in found.Scalars(tag)}


def hparams(found: EventAccumulator) -> dict[str, Any]:
    content = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    data = plugin_data_pb2.HParamsPluginData.FromString(content)
    values = data.session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}


def values(epoch: int) -> dict[str, Any]:
    return {"val_loss": [3.0, 1.0, 2.0, 9.0], "val_acc": [0.5, 0.25, 0.75, 0.0]}


def test_one_writer_for_the_bundle(loop: Any, tmp_path: Path) -> None:
    callback = TensorBoardCallback(tmp_path, interval=2, hparams=[{"width": i} for i in range(4)])
    run = loop([0.01, 0.02, 0.03, 0.04], [callback])
    run.mb.freeze(3)
    run.run(3, metrics=values)
    assert len([p for p in tmp_path.iterdir() if p.is_file()]) == 1
    found = read(tmp_path)
    steps = range(2, 10, 2)
    losses = {k: sorted(run.losses[k - 1][:3]) for k in steps}
    for k, tag in enumerate(("loss/best", "loss/median", "loss/worst")):
        assert scalars(found, tag) == {step: losses[step][k] for step in steps}
    assert scalars(found, "lr/max") == pytest.approx(dict.fromkeys(steps, 0.03))
    assert scalars(found, "lr/min") == pytest.approx(dict.fromkeys(steps, 0.01))
    assert scalars(found, "val_loss/best") == {3: 1.0, 6: 1.0, 9: 1.0}
    assert scalars(found, "val_loss/median")[9] == 2.0
    assert scalars(found, "val_acc/max")[9] == 0.75 and scalars(found, "val_acc/min")[9] == 0.25
    assert set(scalars(found, "epoch_loss/best")) == {3, 6, 9}
    assert set(scalars(found, "models/active").values()) == {3.0}
    histograms = {h.step: h.histogram_value for h in found.Histograms("loss/models")}
    assert set(histograms) == set(steps)
    for step in steps:
        assert histograms[step].num == 3
        assert (histograms[step].min, histograms[step].max) == (losses[step][0], losses[step][2])
    assert found.Histograms("val_acc/models")[0].histogram_value.num == 3
    for i in range(4):
        own = read(tmp_path / f"model_{i:03d}")
        hyper = hparams(own)
        assert hyper["lr"] == pytest.approx(0.01 * (i + 1)) and hyper["width"] == i
        assert str(hyper["seed"]) == str(run.mb.seeds[i])
        assert "momentum" not in hyper  # all have the same
        assert scalars(own, "result/val_loss") == {9: values(0)["val_loss"][i]}
        assert scalars(own, "result/active") == {9: float(i != 3)}
    assert len(list(tmp_path.iterdir())) == 5


def test_one_writer_per_model(loop: Any, tmp_path: Path) -> None:
    run = loop([0.01, 0.02, 0.03, 0.04], [TensorBoardCallback(tmp_path, 1, runs="per_model")])
    run.run(2, metrics=values)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"model_{i:03d}" for i in range(4)]
    for i in range(4):
        found = read(tmp_path / f"model_{i:03d}")
        assert scalars(found, "loss") == {k + 1: run.losses[k][i] for k in range(6)}
        assert scalars(found, "lr") == pytest.approx(dict.fromkeys(range(1, 7), 0.01 * (i + 1)))
        assert scalars(found, "val_acc") == dict.fromkeys((3, 6), values(0)["val_acc"][i])
        assert hparams(found)["lr"] == pytest.approx(0.01 * (i + 1))


def test_models_that_diverge_do_not_spoil_the_others(
    loop: Any, huge: float, tmp_path: Path
) -> None:
    run = loop([0.01, huge, 0.02], [NaNCallback(), TensorBoardCallback(tmp_path, 1)])
    run.run(4)
    assert any(math.isnan(row[1]) for row in run.losses)
    found = read(tmp_path)
    assert all(map(math.isfinite, scalars(found, "loss/worst").values()))
    assert scalars(found, "models/active")[12] == 2
    assert found.Histograms("loss/models")[-1].histogram_value.num == 2
    assert math.isnan(scalars(read(tmp_path / "model_001"), "result/loss")[12])


def test_nobody_is_finite(loop: Any, huge: float, tmp_path: Path) -> None:
    run = loop([huge, huge], [TensorBoardCallback(tmp_path, 1)])
    run.run(6)
    assert not any(map(math.isfinite, run.losses[-1]))
    assert 18 not in scalars(read(tmp_path), "loss/best")


def test_a_resume_hides_what_is_done_again(loop: Any, tmp_path: Path) -> None:
    first = loop([0.01], [TensorBoardCallback(tmp_path, 1)])
    first.run(2)
    state = first.pack.state_dict()
    second = loop([0.02], [TensorBoardCallback(tmp_path, 1)])
    second.pack.load_state_dict(state)
    second.event.step = 3  # the checkpoint was after one epoch
    second.run(2, first=1)
    found = scalars(read(tmp_path), "loss/best")
    own = [row[0] for row in first.losses[:3]] + [row[0] for row in second.losses]
    assert found == {k + 1: loss for k, loss in enumerate(own)}
    assert first.losses[3:] != second.losses


def test_it_works_without_a_start_and_without_epochs(loop: Any, tmp_path: Path) -> None:
    callback = TensorBoardCallback(tmp_path, 1)
    run = loop([0.01, 0.02], [])
    event = run.event
    event.losses = run.mb.train_step(*run.batches[0], loss_fn=lambda o, t: (o - t).square().mean())
    event.step = 1
    callback.on_train_step(event)
    callback.on_train_end(event)
    assert scalars(read(tmp_path), "loss/best") == {1: event.losses.min().item()}
    result = scalars(read(tmp_path / "model_001"), "result/loss")
    assert result == {1: event.losses[1].item()}
    callback.on_train_end(event)  # nothing is open


def test_many_runs_are_warned_of(loop: Any, tmp_path: Path) -> None:
    callback = TensorBoardCallback(tmp_path, runs="per_model")
    run = loop([0.01] * 51, [])
    with pytest.warns(UserWarning, match="opens 51 runs"):
        callback.on_train_start(run.event)
    callback._close()


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"TensorBoardCallback.*'modelbatch\[tensorboard\]'"):
        TensorBoardCallback(tmp_path)


def test_bad_arguments(loop: Any, tmp_path: Path) -> None:
    for arguments, text in (
        ({"runs": "each"}, 'runs must be "bundle" or "per_model"'),
        ({"interval": -1}, "interval"),
        ({"hparams": [3]}, "one dict per model"),
    ):
        with pytest.raises(ModelBatchError, match=text):
            TensorBoardCallback(tmp_path, **arguments)  # type: ignore[arg-type]
    run = loop([0.01] * 2, [TensorBoardCallback(tmp_path, hparams=[{}])])
    with pytest.raises(ModelBatchError, match="hparams has 1 dicts for a bundle of 2"):
        run.run(1)


def test_a_stock_optimizer_has_one_learning_rate_for_all(loop: Any, tmp_path: Path) -> None:
    run = loop([0.01] * 2, [TensorBoardCallback(tmp_path, 1)])
    optimizer = torch.optim.Adam(run.mb.parameters(), lr=torch.tensor(0.25), betas=(0.5, 0.75))
    run.mb.optimizer = run.event.optimizer = optimizer
    run.run(1)
    assert scalars(read(tmp_path), "lr/median")[1] == 0.25
    assert hparams(read(tmp_path / "model_001"))["lr"] == 0.25
