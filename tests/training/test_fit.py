"""`fit`: epochs, validation, schedules and callbacks."""

import os
import signal
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import lr_scheduler

from modelbatch import ModelBatchError, OptimizerFactory
from modelbatch.callbacks import Callback, EarlyStopping, NaNCallback
from modelbatch.data import StratifiedDataRouter
from modelbatch.training import accuracy, fit, train_one_epoch


def test_it_equals_epochs_by_hand(build: Any, make_data: Any, same: Any) -> None:
    data, held_out = make_data(), make_data(2, 5)
    ours, theirs = build(dropout=0.3, norm=True), build(dropout=0.3, norm=True)
    history = fit(ours, data, held_out, epochs=3, metric_fns={"accuracy": accuracy})
    losses, val = [], []
    for _ in range(3):
        sums = torch.zeros(3, dtype=torch.float64)
        for x, y in data:
            sums += theirs.train_step(x, y).double() * len(y)
        losses.append(sums / 40)
        val.append(theirs.evaluate(held_out, metric_fns={"accuracy": accuracy}))
    assert same(ours, theirs)
    assert torch.equal(history["loss"], torch.stack(losses))
    for name in ("loss", "accuracy"):
        expected = torch.stack([results[name] for results in val]).double()
        assert torch.allclose(history[f"val_{name}"], expected, rtol=1e-6)
    assert history["lr"].tolist() == [[0.05, 0.1, 0.05 * 3]] * 3
    assert history["active"].all()
    assert history.epochs == 3 and history.status == "finished"
    assert ours.training and all(module.training for module in ours.models[0].modules())
    assert torch.equal(ours.latest_losses, theirs.latest_losses)


def test_metrics_without_a_validation(build: Any, make_data: Any) -> None:
    history = fit(build(), make_data(), epochs=2, metric_fns={"accuracy": accuracy})
    mb = build()
    for epoch in range(2):
        results = train_one_epoch(mb, make_data(), metric_fns={"accuracy": accuracy})
        assert torch.equal(history["accuracy"][epoch], results["accuracy"])
    assert "val_loss" not in history


def test_a_validation_of_each_models_own_samples(build: Any, make_data: Any) -> None:
    """Weights `[M, B]` say who is tested on what; batches of unequal total weight."""
    (x, y), (x2, y2) = make_data(2, dtype=torch.float64)
    masks = torch.tensor(
        [[1, 1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 1, 1, 1]]
    )
    ones = torch.ones(3, 8, dtype=torch.float64)
    mb = build(dtype=torch.float64, norm=True)
    val = [(x, y, masks.double()), (x2, y2, ones)]
    history = fit(mb, [(x, y)], val, epochs=1, metric_fns={"accuracy": accuracy})
    mb.eval()
    for i in range(3):
        own_x, own_y = torch.cat([x[masks[i] > 0], x2]), torch.cat([y[masks[i] > 0], y2])
        outputs = mb.models[i](own_x)
        expected = {"loss": F.cross_entropy(outputs, own_y), "accuracy": accuracy(outputs, own_y)}
        for name, value in expected.items():
            assert history[f"val_{name}"][0, i].item() == pytest.approx(value.item(), rel=1e-12)


def test_validation_leaves_training_alone(build: Any, make_data: Any, same: Any) -> None:
    a, b = build(dropout=0.4, norm=True), build(dropout=0.4, norm=True)
    fit(a, make_data(), make_data(2), epochs=2, metric_fns={"accuracy": accuracy})
    fit(b, make_data(), epochs=2)
    assert same(a, b)


def test_folds(build: Any, make_data: Any, same: Any) -> None:
    """Cross-validation by a router: trained on all folds but one, validated on that one."""
    x, y = (torch.cat(parts) for parts in zip(*make_data(dtype=torch.float64)))
    router = StratifiedDataRouter(3, "kfold", dataset_size=40, compact=False)
    mb = build(dtype=torch.float64)
    weights = router.validation().sample_weights(torch.arange(40)).double()
    history = fit(mb, [(x, y)] * 1, [(x, y, weights)], epochs=4, router=router)
    for i, own in enumerate(build(dtype=torch.float64).models):
        optimizer = torch.optim.Adam(own.parameters(), lr=0.05 * (1 + i))
        mine = torch.arange(40) % 3 != i
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(own(x[mine]), y[mine]).backward()
            optimizer.step()
        for p, q in zip(own.parameters(), mb.models[i].parameters()):
            assert torch.allclose(p, q, rtol=1e-9, atol=1e-9)
        held_out = F.cross_entropy(own(x[~mine]), y[~mine]).item()
        assert history["val_loss"][-1, i].item() == pytest.approx(held_out, rel=1e-9)


# ---- schedules


def test_a_schedule_per_model_and_epoch(build: Any, make_data: Any) -> None:
    mb = build()
    scheduler = OptimizerFactory.create_lr_scheduler(
        mb.optimizer, lr_scheduler.ExponentialLR, [{"gamma": g} for g in (1.0, 0.5, 0.1)]
    )
    history = fit(mb, make_data(), epochs=3, scheduler=scheduler)
    expected = [[0.05, 0.1 * 0.5**e, 0.05 * 3 * 0.1**e] for e in range(3)]
    assert torch.allclose(history["lr"], torch.tensor(expected, dtype=torch.float64), rtol=1e-12)
    assert scheduler.last_epoch == 3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_schedule_of_steps(build: Any, make_data: Any, accumulate: int) -> None:
    mb = build()
    scheduler = lr_scheduler.StepLR(mb.optimizer, step_size=3, gamma=0.5)
    history = fit(
        mb,
        make_data(6),
        epochs=2,
        scheduler=scheduler,
        scheduler_interval="step",
        accumulate=accumulate,
    )
    assert scheduler.last_epoch == 12 // accumulate
    factor = 0.5 ** (2 // accumulate)
    assert torch.allclose(history["lr"][1], history["lr"][0] * factor)


def test_a_plateau_of_each_model(build: Any, make_data: Any) -> None:
    """Each model's own validation loss decides; the training loss without a validation."""
    for val_loader in (make_data(2), None):
        mb, alone = build(), build()
        options = {"patience": 0, "factor": 0.5, "threshold": 0.02}
        scheduler = OptimizerFactory.create_lr_scheduler(
            mb.optimizer, lr_scheduler.ReduceLROnPlateau, options
        )
        history = fit(mb, make_data(), val_loader, epochs=8, scheduler=scheduler)
        watched = history["val_loss" if val_loader else "loss"]
        rates = history["lr"]
        for i in range(3):
            optimizer = torch.optim.SGD([torch.zeros(1)], lr=alone.optimizer.param_groups[i]["lr"])
            own = lr_scheduler.ReduceLROnPlateau(optimizer, **options)
            for epoch in range(8):
                assert rates[epoch, i].item() == optimizer.param_groups[0]["lr"]
                own.step(watched[epoch, i].item())
    assert (rates[-1] < rates[0]).any()


def test_one_plateau_of_torch_for_all(build: Any, make_data: Any) -> None:
    """It gets the mean over models that are active and finite."""
    mb = build(lr=[0.0, 0.0, 0.0], optimizer_cls=torch.optim.SGD)
    with torch.no_grad():
        mb.models[2][0].weight.fill_(float("nan"))
    mb.freeze(0)
    seen = []

    class Plateau(lr_scheduler.ReduceLROnPlateau):
        def step(self, metrics: Any, epoch: Any = None) -> None:
            seen.append(metrics)
            super().step(metrics)

    history = fit(mb, make_data(), make_data(2), epochs=1, scheduler=Plateau(mb.optimizer))
    assert seen == [pytest.approx(history["val_loss"][0, 1].item())]


def test_schedules_that_watch_steps(build: Any, make_data: Any) -> None:
    mb = build(lr=[0.1] * 3, optimizer_cls=torch.optim.SGD)
    scheduler = OptimizerFactory.create_lr_scheduler(
        mb.optimizer,
        lr_scheduler.ReduceLROnPlateau,
        {"patience": 0, "threshold": 10.0, "threshold_mode": "abs"},
    )
    fit(mb, make_data(4), epochs=1, scheduler=scheduler, scheduler_interval="step")
    assert scheduler.get_last_lr() == pytest.approx([0.1 * 0.1**3] * 3)


# ---- events and ends


class _Recorder(Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def _note(self, name: str, event: Any, *more: Any) -> None:
        self.seen.append((name, event.epoch, event.step, event.batch, event.num_batches, *more))

    def on_train_start(self, event: Any) -> None:
        assert event.epochs == 2
        self._note("start", event)

    def on_epoch_start(self, event: Any) -> None:
        self._note("epoch", event)

    def on_train_step(self, event: Any) -> None:
        assert event.losses.shape == (3,)
        self._note("step", event, event.batch_size)

    def on_validation_step(self, event: Any) -> None:
        assert event.losses.shape == (3,)
        assert list(event.metrics) == ["val_accuracy"]
        self._note("validation", event, event.batch_size)

    def on_epoch_end(self, event: Any) -> None:
        assert event.losses is None
        self._note("end", event, list(event.metrics))

    def on_train_end(self, event: Any) -> None:
        self._note("over", event)


def test_the_events(build: Any, make_data: Any) -> None:
    recorder = _Recorder()
    metrics = {"accuracy": accuracy}
    fit(build(), make_data(2), make_data(1, 5), epochs=2, callbacks=recorder, metric_fns=metrics)
    names = ["loss", "val_loss", "val_accuracy"]
    expected: list[Any] = [("start", 0, 0, 0, None)]
    for epoch in range(2):
        step = 2 * epoch
        expected += [
            ("epoch", epoch, step, 0, 2),
            ("step", epoch, step + 1, 0, 2, 8),
            ("step", epoch, step + 2, 1, 2, 8),
            ("validation", epoch, step + 2, 0, 1, 5),
            ("end", epoch, step + 2, 1, 2, names),
        ]
    expected.append(("over", 1, 4, 1, 2))
    assert recorder.seen == expected


class _StopAt(Callback):
    def __init__(self, name: str, step: int) -> None:
        def stop(event: Any) -> None:
            if event.step == step:
                event.stop = True

        setattr(self, name, stop)


@pytest.mark.parametrize(
    ("name", "step", "epochs", "steps"),
    [
        ("on_train_start", 0, 0, 0),
        ("on_epoch_start", 5, 1, 5),
        ("on_train_step", 2, 1, 2),
        ("on_validation_step", 5, 1, 5),
        ("on_epoch_end", 10, 2, 10),
    ],
)
def test_a_callback_ends_the_training(
    build: Any, make_data: Any, name: str, step: int, epochs: int, steps: int
) -> None:
    log = _Counter()
    history = fit(
        build(), make_data(5), make_data(1), epochs=4, callbacks=[_StopAt(name, step), log]
    )
    assert (history.epochs, log.steps, log.ends) == (epochs, steps, 1)
    assert history.status == "stopped"
    assert "val_loss" in history or not epochs  # an epoch cut short is validated, too


class _Counter(Callback):
    def __init__(self) -> None:
        self.steps = self.ends = 0

    def on_train_step(self, event: Any) -> None:
        self.steps += 1

    def on_train_end(self, event: Any) -> None:
        self.ends += 1


def test_it_ends_when_all_models_are_frozen(build: Any, make_data: Any) -> None:
    class Freeze(_Counter):
        def on_train_step(self, event: Any) -> None:
            super().on_train_step(event)
            event.mb.freeze((event.step - 1) % 3)

    counter = Freeze()
    mb = build()
    history = fit(mb, make_data(5), make_data(1), epochs=9, callbacks=counter)
    assert (counter.steps, counter.ends, history.epochs) == (3, 1, 1)
    assert history.status == "frozen"
    assert not history["active"].any()
    again = fit(mb, make_data(5), epochs=2, callbacks=counter)
    assert (counter.steps, again.epochs, again.status) == (3, 0, "frozen")


def test_diverging_models_are_frozen_and_the_others_go_on(build: Any, make_data: Any) -> None:
    """The real callbacks: NaN freezes one model, early stopping ends the rest."""
    mb = build(optimizer_cls=torch.optim.SGD, lr=[0.1, 1e30, 0.0])
    early = EarlyStopping("val_loss", patience=2)
    history = fit(
        mb, make_data(), make_data(2), epochs=12, callbacks=[NaNCallback("freeze"), early]
    )
    assert not history["active"][0, 1]
    assert history["active"][:3, 2].all() and not history["active"][3:, 2].any()
    assert history["val_loss"][:, 0].isfinite().all()
    assert torch.isfinite(mb.models[0][0].weight).all()


def test_progress_is_shown(
    build: Any, make_data: Any, capsys: pytest.CaptureFixture[str], same: Any
) -> None:
    a, b = build(), build()
    fit(a, make_data(), epochs=2, progress=True)
    assert "epoch 2/2" in capsys.readouterr().out
    fit(b, make_data(), epochs=2)
    assert capsys.readouterr().out == ""
    assert same(a, b)


# ---- Ctrl-C


def test_ctrl_c_ends_after_the_step(build: Any, make_data: Any) -> None:
    class Press(_Counter):
        def on_train_step(self, event: Any) -> None:
            super().on_train_step(event)
            if event.step == 7:
                os.kill(os.getpid(), signal.SIGINT)

    counter = Press()
    before = signal.getsignal(signal.SIGINT)
    history = fit(build(), make_data(5), epochs=4, callbacks=counter)
    assert history.status == "interrupted"
    assert (history.epochs, counter.steps, counter.ends) == (1, 7, 1)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_raises(build: Any, make_data: Any) -> None:
    class Press(_Counter):
        def on_train_step(self, event: Any) -> None:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("this is not reached")

    counter = Press()
    with pytest.raises(KeyboardInterrupt):
        fit(build(), make_data(5), epochs=4, callbacks=counter)
    assert counter.ends == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_own_is_kept(build: Any, make_data: Any) -> None:
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(1))

    class Press(Callback):
        def on_train_step(self, event: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        history = fit(build(), make_data(3), epochs=1, callbacks=Press())
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed == [1, 1, 1] and history.status == "finished"


def test_it_trains_in_another_thread(build: Any, make_data: Any) -> None:
    """Which may not handle signals."""
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.append(fit(build(), make_data(), epochs=1)))
    thread.start()
    thread.join()
    assert done[0].status == "finished"


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be a positive integer, got 0"),
        ({"epochs": 1.0}, "epochs must be a positive integer"),
        ({"checkpoint_every": 0}, "checkpoint_every must be"),
        ({"resume": True}, "resume needs checkpoint_dir"),
        ({"val_loader": 3}, "val_loader must be iterable"),
        ({"val_loader": []}, "validation loader yielded no batch"),
        ({"val_loader": [torch.zeros(3)]}, "must yield"),
    ],
)
def test_what_is_refused(build: Any, make_data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelBatchError, match=message):
        fit(build(), make_data(), **{"epochs": 1, **options})


def test_a_loader_that_can_be_read_only_once(build: Any, make_data: Any) -> None:
    with pytest.raises(ModelBatchError, match="no batch in epoch 1: can it be iterated again"):
        fit(build(), iter(make_data()), epochs=2)


def test_an_error_of_a_loader_is_the_users_to_see(build: Any, make_data: Any) -> None:
    def broken() -> Any:
        yield make_data()[0]
        raise OSError("the disk is gone")

    counter = _Counter()
    with pytest.raises(OSError, match="the disk is gone"):
        fit(build(), broken(), epochs=1, callbacks=counter)
    assert (counter.steps, counter.ends) == (1, 1)


def test_a_set_epoch_is_called(build: Any, make_data: Any) -> None:
    class Loader(list[tuple[Tensor, Tensor]]):
        epochs: list[int]

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    loader = Loader(make_data())
    loader.epochs = []
    fit(build(), loader, epochs=3)
    assert loader.epochs == [0, 1, 2]
