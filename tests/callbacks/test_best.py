"""EarlyStopping and BestModel against what one would do for each model by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from modelbatch import ModelBatchError
from modelbatch.callbacks import BestModel, EarlyStopping, Event

NAN = math.nan
# one column per model
VALUES = [
    [1.0, 5.0, 1.0, NAN],
    [0.9, 4.0, 2.0, NAN],
    [0.8, 4.5, 3.0, NAN],
    [0.7, 4.4, 0.5, 2.0],
    [0.6, 3.0, 0.6, 3.0],
    [0.5, 3.5, 0.7, NAN],
    [0.4, 3.6, 0.8, 9.0],
    [0.3, 3.7, 0.9, 9.0],
]


def by_hand(column: list[float], patience: int, delta: float, sign: float) -> tuple[int, int]:
    """The best epoch, and the one at whose end the model stops (-1: never)."""
    best, best_epoch, waited = math.inf, -1, 0
    for epoch, value in enumerate(column):
        if math.isfinite(value) and sign * value < best - delta:
            best, best_epoch, waited = sign * value, epoch, 0
        else:
            waited += 1
        if waited >= patience:
            return best_epoch, epoch
    return best_epoch, -1


def metrics(sign: float = 1.0) -> Any:
    return lambda epoch: {"val_loss": [sign * value for value in VALUES[epoch]]}


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("delta", [0.0, 0.15])
@pytest.mark.parametrize("patience", [1, 2, 3, [1, 2, 3, 4]])
def test_every_model_stops_by_its_own_values(
    loop: Any, recorder: Any, mode: str, delta: float, patience: Any
) -> None:
    stopping = EarlyStopping(patience=patience, min_delta=delta, mode=mode)
    run = loop([0.01] * 4, [stopping, recorder])
    sign = 1.0 if mode == "min" else -1.0
    event = run.run(len(VALUES), metrics=metrics(sign))
    each = patience if isinstance(patience, list) else [patience] * 4
    expected = [
        by_hand([row[i] for row in VALUES], each[i], delta, 1.0)
        for i in range(4)
    ]  # fmt: skip
    assert stopping.stopped_epochs is not None and stopping.best_epochs is not None
    assert stopping.stopped_epochs.tolist() == [stop for _, stop in expected]
    assert stopping.best_epochs.tolist() == [best for best, _ in expected]
    assert run.mb.active.tolist() == [stop < 0 for _, stop in expected]
    told = {i: step // 3 - 1 for step, models, _ in recorder.seen for i in models}
    assert told == {i: stop for i, (_, stop) in enumerate(expected) if stop >= 0}
    if all(stop >= 0 for _, stop in expected):
        assert event.stop and event.epoch == max(stop for _, stop in expected)
    else:
        assert not event.stop


def test_a_stopped_model_gets_its_best_weights_back(loop: Any, rows: Any) -> None:
    run = loop([0.05] * 4, [EarlyStopping(patience=2, restore_best=True)], torch.optim.Adam)
    kept: dict[int, list[list[Tensor]]] = {}

    def values(epoch: int) -> Any:
        kept[epoch] = [rows(run.mb, i) for i in range(4)]
        return {"val_loss": VALUES[epoch]}

    run.run(len(VALUES), metrics=values)
    expected = [by_hand([row[i] for row in VALUES], 2, 0.0, 1.0) for i in range(4)]
    for i, (best, stop) in enumerate(expected):
        source = best if stop >= 0 and best >= 0 else stop if stop >= 0 else len(VALUES) - 1
        torch.testing.assert_close(rows(run.mb, i), kept[source][i], rtol=0, atol=0)
    assert {best for best, stop in expected if stop >= 0} != {-1}


def test_without_freezing_all_train_until_the_last_stops(loop: Any) -> None:
    stopping = EarlyStopping(patience=2, freeze=False)
    run = loop([0.01] * 3, [stopping])
    event = run.run(8, metrics=lambda epoch: {"val_loss": [1.0, 2.0, -min(epoch, 3)]})
    assert run.mb.active.all()
    assert event.stop and event.epoch == 5
    assert stopping.stopped_epochs.tolist() == [2, 2, 5]  # type: ignore[union-attr]


def test_models_frozen_by_others_do_not_keep_the_training_going(loop: Any) -> None:
    run = loop([0.01] * 3, [EarlyStopping(patience=2)])
    run.mb.freeze(2)
    event = run.run(8, metrics=lambda epoch: {"val_loss": [1.0, 1.0, -float(epoch)]})
    assert event.epoch == 2


def test_whoever_is_unfrozen_gets_another_chance(loop: Any) -> None:
    stopping = EarlyStopping(patience=2)
    run = loop([0.01] * 2, [stopping])

    def values(epoch: int) -> Any:
        if epoch == 4:
            run.mb.unfreeze(0)
        return {"val_loss": [1.0, -float(epoch)]}

    run.run(10, metrics=values)
    assert stopping.stopped_epochs.tolist() == [5, -1]  # type: ignore[union-attr]


@pytest.mark.parametrize("restore_best", [False, True])
def test_early_stopping_goes_on_after_a_resume(loop: Any, rows: Any, restore_best: bool) -> None:
    def fresh() -> EarlyStopping:
        return EarlyStopping(patience=2, restore_best=restore_best)

    whole = loop([0.05] * 4, [fresh()])
    whole.run(len(VALUES), metrics=metrics())
    first = loop([0.05] * 4, [fresh()])
    first.run(3, metrics=metrics())
    second = loop([0.05] * 4, [fresh()])
    second.mb.load_state_dict(first.mb.state_dict())
    second.mb.freeze([i for i, flag in enumerate(first.mb.active.tolist()) if not flag])
    second.pack.load_state_dict(first.pack.state_dict())
    second.run(len(VALUES), first=3, metrics=metrics())
    assert second.mb.active.tolist() == whole.mb.active.tolist()
    for i in range(4):
        torch.testing.assert_close(rows(second.mb, i), rows(whole.mb, i), rtol=0, atol=0)


def test_what_early_stopping_refuses(loop: Any) -> None:
    for arguments, text in (
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"patience": [1, 0]}, "patience"),
        ({"min_delta": -1.0}, "min_delta must be at least 0"),
        ({"min_delta": NAN}, "min_delta"),
        ({"mode": "best"}, 'mode must be "min" or "max"'),
    ):
        with pytest.raises(ModelBatchError, match=text):
            EarlyStopping(**arguments)  # type: ignore[arg-type]
    run = loop([0.01] * 3, [EarlyStopping(patience=[1, 2])])
    with pytest.raises(ModelBatchError, match="patience has 2 values for a bundle of 3"):
        run.run(1)
    run = loop([0.01] * 3, [EarlyStopping()])
    with pytest.raises(ModelBatchError, match="validation set is needed.*gave 'loss'"):
        run.run(1)
    other = EarlyStopping("loss")
    loop([0.01] * 2, [other]).run(1)
    run = loop([0.01] * 3, [EarlyStopping("loss")])
    run.pack.load_state_dict({"EarlyStopping": other.state_dict()})
    with pytest.raises(ModelBatchError, match="state of 2 models.*3"):
        run.run(1)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_best_model_keeps_every_models_own_best(loop: Any, rows: Any, mode: str) -> None:
    best = BestModel(mode=mode)
    run = loop([0.05] * 4, [best])
    kept: dict[int, list[list[Tensor]]] = {}
    sign = 1.0 if mode == "min" else -1.0

    def values(epoch: int) -> Any:
        kept[epoch] = [rows(run.mb, i) for i in range(4)]
        return metrics(sign)(epoch)

    run.run(len(VALUES), metrics=values)
    columns = [[row[i] for row in VALUES] for i in range(4)]
    epochs = [min((v, k) for k, v in enumerate(c) if v == v)[1] for c in columns]
    assert best.best_epochs is not None and best.best_values is not None
    assert best.best_epochs.tolist() == epochs
    expected = torch.tensor([sign * c[e] for c, e in zip(columns, epochs)])
    torch.testing.assert_close(best.best_values, expected, rtol=0, atol=0)
    names = list(run.mb[0].state_dict())
    for i, epoch in enumerate(epochs):
        own = best.model_state_dict(i)
        torch.testing.assert_close([own[n] for n in names], kept[epoch][i], rtol=0, atol=0)
    last = [rows(run.mb, i) for i in range(4)]
    assert best.restore([1]) == [1]
    torch.testing.assert_close(rows(run.mb, 1), kept[epochs[1]][1], rtol=0, atol=0)
    for i in (0, 2, 3):
        torch.testing.assert_close(rows(run.mb, i), last[i], rtol=0, atol=0)
    assert best.restore() == [0, 1, 2, 3]
    for i, epoch in enumerate(epochs):
        torch.testing.assert_close(rows(run.mb, i), kept[epoch][i], rtol=0, atol=0)
    # the bundle still trains on these weights, and the models are still views
    run.mb.train_step(*run.batches[0], loss_fn=lambda o, t: ((o - t) ** 2).mean())
    run.mb._stack.check_views()


def test_a_model_that_was_never_finite_keeps_its_weights(loop: Any, rows: Any) -> None:
    best = BestModel()
    run = loop([0.05] * 2, [best])
    run.run(3, metrics=lambda epoch: {"val_loss": [1.0, math.inf]})
    last = rows(run.mb, 1)
    assert best.restore() == [0]
    torch.testing.assert_close(rows(run.mb, 1), last, rtol=0, atol=0)
    assert best.best_epochs.tolist() == [0, -1]  # type: ignore[union-attr]


def test_best_model_goes_on_after_a_resume(loop: Any, rows: Any) -> None:
    first = loop([0.05] * 4, [BestModel()])
    first.run(4, metrics=metrics())
    best = BestModel()
    second = loop([0.05] * 4, [best])
    second.pack.load_state_dict(first.pack.state_dict())
    second.run(5, first=4, metrics=metrics())
    assert best.best_epochs.tolist() == [4, 4, 3, 3]  # type: ignore[union-attr]
    second.pack[0].restore()
    first.pack[0].restore()
    for i in (2, 3):  # from before the resume
        torch.testing.assert_close(rows(second.mb, i), rows(first.mb, i), rtol=0, atol=0)


def test_what_best_model_refuses(loop: Any) -> None:
    with pytest.raises(ModelBatchError, match='mode must be "min" or "max"'):
        BestModel(mode="auto")
    best = BestModel("val_acc", mode="max")
    with pytest.raises(ModelBatchError, match="no epoch has ended"):
        best.restore()
    with pytest.raises(ModelBatchError, match="no epoch has ended"):
        best.model_state_dict(0)
    with pytest.raises(ModelBatchError, match="BestModel monitors 'val_acc'"):
        loop([0.01] * 2, [best]).run(1)
    own = BestModel("loss")
    loop([0.01] * 2, [own]).run(1)
    with pytest.raises(ModelBatchError, match="no model 2"):
        own.restore(2)
    run = loop([0.01] * 3, [BestModel("loss")])
    run.pack.load_state_dict({"BestModel": own.state_dict()})
    with pytest.raises(
        ModelBatchError, match=r"kept weights: '0.weight' has the shape \(3, 6, 4\)"
    ):
        run.run(1)


def test_buffers_that_change_their_shape_are_followed(loop: Any) -> None:
    from modelbatch.callbacks.weights import StackedCopy

    run = loop([0.01] * 2, [])
    copy = StackedCopy(run.mb)
    slot = next(s for s in run.mb._stack.slots if s.name == "1.running_mean")
    run.mb._stack.register(slot, torch.ones(2, 9))
    copy.update(run.mb, torch.tensor([True, False]))
    run.mb.get_buffer("1.running_mean").zero_()
    copy.restore(run.mb, [0])
    assert run.mb.get_buffer("1.running_mean").tolist() == [[1.0] * 9, [0.0] * 9]


def test_the_read_of_the_device_does_not_grow(loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(num_models: int) -> list[str]:
        run = loop([0.01] * num_models, [EarlyStopping("loss"), BestModel("loss")])
        run.run(1)
        event: Event = run.event
        reads: list[str] = []
        for name in ("__bool__", "tolist", "item", "__float__", "__int__"):
            original = getattr(Tensor, name)

            def counted(self: Tensor, *, _f: Any = original, _n: str = name) -> Any:
                reads.append(_n)
                return _f(self)

            monkeypatch.setattr(Tensor, name, counted)
        run.pack.on_epoch_end(event)
        monkeypatch.undo()
        return reads

    assert count(2) == count(9) == ["tolist"]
