"""Training goes on while callbacks remove models, replace them and take in others."""

import copy
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from modelbatch import ModelBatch, ModelBatchError, OptimizerFactory, accuracy, fit
from modelbatch.callbacks import (
    BestModel,
    Callback,
    EarlyStopping,
    MetricsLogger,
    NaNCallback,
    ProgressBar,
)
from modelbatch.data import PerModelLoader, StratifiedDataRouter


class At(Callback):
    """Does something to the bundle at the end of an epoch, or after a step."""

    def __init__(self, what: Callable[[ModelBatch], Any], epoch: int = 1, step: int = -1) -> None:
        self.what, self.epoch, self.step = what, epoch, step

    def on_train_step(self, event: Any) -> None:
        if event.step == self.step:
            self.what(event.mb)

    def on_epoch_end(self, event: Any) -> None:
        if self.step < 0 and event.epoch == self.epoch:
            self.what(event.mb)


class Lengths(Callback):
    """All vectors that an event carries fit the bundle, also behind a callback that changed it."""

    def check(self, event: Any) -> None:
        vectors = [*event.metrics.values(), *([] if event.losses is None else [event.losses])]
        assert all(len(vector) == len(event.mb) for vector in vectors)

    on_train_step = on_epoch_start = on_epoch_end = on_train_end = check


def fresh(mb: ModelBatch) -> nn.Module:
    model = copy.deepcopy(mb[0])
    for parameter in model.parameters():
        parameter.data.mul_(0.5)
    return model


@pytest.mark.parametrize("step", [-1, 7])
def test_those_who_stay_never_had_the_others(
    build: Any, make_data: Any, same: Any, step: int
) -> None:
    data = make_data()
    mb = build(4, norm=True, dropout=0.2)
    rates = [0.05 * (1 + i) for i in range(4)]
    schedule = {"step_size": 1, "gamma": 0.7}
    scheduler = OptimizerFactory.create_lr_scheduler(mb.optimizer, StepLR, schedule)
    stopping = EarlyStopping(patience=[9, 9, 9, 9])
    best, at = BestModel(), At(lambda mb: mb.prune([0, 2]), step=step)
    callbacks = [stopping, at, Lengths(), best]
    history = fit(
        mb, data, data[:2], epochs=4, scheduler=scheduler, callbacks=callbacks,
        metric_fns={"acc": accuracy},
    )  # fmt: skip
    alone = build(4, norm=True, dropout=0.2)
    alone.prune([0, 2])
    other = OptimizerFactory.create_lr_scheduler(alone.optimizer, StepLR, schedule)
    other_best = BestModel()
    expected = fit(
        alone, data, data[:2], epochs=4, scheduler=other, callbacks=[other_best],
        metric_fns={"acc": accuracy},
    )  # fmt: skip
    assert same(mb, alone)
    assert history.model_ids == [0, 1, 2, 3] and expected.model_ids == [1, 3]
    for name in expected:
        assert torch.equal(history[name][:, [1, 3]], expected[name])
    gone = history["val_loss"][:, [0, 2]].isnan()
    assert gone.tolist() == [[(step == 7 and e > 0) or e > 1] * 2 for e in range(4)]
    assert history["active"][-1].tolist() == [False, True, False, True]
    assert history.best().model in (0, 1, 2, 3) and history["lr"][0].tolist() == rates
    assert stopping.patience == [9, 9] and len(stopping.best_values) == 2
    best.restore()
    other_best.restore()
    assert same(mb, alone)


def test_models_join_and_replace(build: Any, make_data: Any, tmp_path: Path) -> None:
    mb, data = build(3), make_data()

    def change(mb: ModelBatch) -> None:
        assert mb.append([fresh(mb)], lr=0.1) == [3]
        assert mb.replace(0, fresh(mb), lr=0.1) == 4

    logger, best = MetricsLogger(tmp_path / "a.csv"), BestModel()
    callbacks = [EarlyStopping(patience=9), At(change, 0), Lengths(), logger, best, ProgressBar()]
    history = fit(mb, data, data[:2], epochs=3, callbacks=callbacks)
    assert history.model_ids == [0, 1, 2, 3, 4] and mb.model_ids == [4, 1, 2, 3]
    assert history["loss"].isfinite().tolist() == [
        [True, True, True, False, False],
        [False, True, True, True, True],
        [False, True, True, True, True],
    ]
    assert best.best_epochs.tolist()[0] >= 1 and len(best.best_epochs) == 4
    table = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    epochs = [row for row in table if row["event"] == "epoch"]
    filled = [[row[f"loss_model_{i}"] != "" for i in range(5)] for row in epochs]
    # the first epoch's row was written after the change, so it has the models of now
    assert filled[1:] == [[False, True, True, True, True]] * 2
    steps = [row for row in table if row["event"] == "step"]
    assert all(steps[0][f"loss_model_{i}"] for i in range(3)) and not steps[0]["loss_model_4"]
    assert float(epochs[2]["val_loss_model_4"]) == history["val_loss"][2, 4].item()
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    frame = history.to_dataframe()
    assert sorted(frame["model"].unique()) == [0, 1, 2, 3, 4]
    history.plot(tmp_path / "a.png")


def test_a_model_that_joins_amid_an_epoch(build: Any, make_data: Any) -> None:
    mb, data = build(2), make_data()
    seen: list[float] = []

    class Note(Callback):
        def on_train_step(self, event: Any) -> None:
            if event.step > 2:
                seen.append(event.losses[2].item())

    def change(mb: ModelBatch) -> None:
        mb.append([fresh(mb)], lr=0.1)

    history = fit(mb, data, epochs=1, callbacks=[At(change, step=2), Note()])
    assert history["loss"][0, 2].item() == pytest.approx(sum(seen) / len(seen), rel=1e-6)


def test_not_during_a_validation(build: Any, make_data: Any) -> None:
    class Bad(Callback):
        def on_validation_step(self, event: Any) -> None:
            event.mb.prune(0)

    with pytest.raises(ModelBatchError, match="during a validation"):
        fit(build(2), make_data(), make_data(2), epochs=1, callbacks=[Bad()])


def test_a_router_that_cannot_follow(build: Any, make_data: Any) -> None:
    class Router:
        num_models = 3

        def route_batch(self, x: Any, y: Any) -> Any:
            from modelbatch.data import DataRouter

            return DataRouter().route_batch(x, y)

    mb = build(3)
    at = At(lambda mb: mb.prune(0), 0)
    with pytest.raises(ModelBatchError, match="Router of this training is for 3 models"):
        fit(mb, make_data(), epochs=2, router=Router(), callbacks=[at])
    assert len(mb) == 3


def changes(mb: ModelBatch) -> None:
    mb.prune(1)
    mb.replace(0, fresh(mb), lr=0.02)
    mb.append([fresh(mb)], lr=0.03)


@pytest.mark.parametrize("where", ["fold", "orders"])
def test_a_resumed_training_has_the_models_of_then(
    build: Any, make_data: Any, same: Any, tmp_path: Path, where: str
) -> None:
    data = make_data(4)

    def start(epochs: int, directory: Path, resume: bool) -> tuple[ModelBatch, Any, Any]:
        mb = build(3, dropout=0.1)
        scheduler = OptimizerFactory.create_lr_scheduler(mb.optimizer, StepLR, {"step_size": 2})
        best = BestModel("loss")
        options: dict[str, Any] = {}
        loader: Any = data
        if where == "fold":
            router = StratifiedDataRouter(3, "kfold", dataset_size=32)
            options["router"] = router
        else:
            xs, ys = (torch.cat(parts) for parts in zip(*data))
            loader = PerModelLoader((xs, ys), 8, [1, 2, 3])
        history = fit(
            mb, loader, epochs=epochs, checkpoint_dir=directory, resume=resume,
            scheduler=scheduler, callbacks=[At(changes, step=6), best, EarlyStopping("loss")],
            **options,
        )  # fmt: skip
        return mb, history, best

    whole, expected, expected_best = start(4, tmp_path / "a", False)
    start(2, tmp_path / "b", False)
    mb, history, best = start(4, tmp_path / "b", True)
    assert mb.model_ids == whole.model_ids == [3, 2, 4]
    assert same(mb, whole) and mb.seeds == whole.seeds
    assert history.model_ids == expected.model_ids
    for name in expected:
        assert torch.equal(history[name].nan_to_num(7), expected[name].nan_to_num(7))
    assert torch.equal(best.best_values, expected_best.best_values)
    assert mb.append([fresh(mb)]) == [5]


def test_models_that_diverge_leave(build: Any, make_data: Any) -> None:
    mb, data = build(4, torch.optim.SGD, lr=[0.1] * 4), make_data()
    mb.optimizer.param_groups[1]["lr"] = 1e38
    history = fit(mb, data, epochs=3, callbacks=[NaNCallback("prune"), Lengths()])
    assert mb.model_ids == [0, 2, 3]
    assert history["loss"][-1].isnan().tolist() == [False, True, False, False]
