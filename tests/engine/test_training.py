"""`fit` and `train_one_epoch` train several steps in one call where nobody notices."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_case import Residual, assert_same, by_engine, make_bundle, mlp
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

from modelbatch import ModelBatch, OptimizerFactory, fit, train_one_epoch
from modelbatch.callbacks import (
    Callback,
    Checkpoint,
    Event,
    MetricsLogger,
    NaNCallback,
    ProgressBar,
)
from modelbatch.data import DataRouter
from modelbatch.training import blocks

Log = list[tuple[Any, ...]]


@pytest.fixture(autouse=True)
def _large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # never short of time: the number of steps in a call is then known
    monkeypatch.setattr(blocks, "_SECONDS", 1e9)
    monkeypatch.setattr(blocks, "_MAX_STEPS", 4)


def _data(count: int = 11, batch: int = 9, dtype: torch.dtype = torch.float64) -> list[Any]:
    torch.manual_seed(3)
    return [(torch.randn(batch, 6, dtype=dtype), torch.randint(4, (batch,))) for _ in range(count)]


class _Listener(Callback):
    """Notes everything that an event says, without looking at the models."""

    reads_models = False

    def __init__(self) -> None:
        self.log: Log = []
        self.losses: list[Tensor] = []

    def on_train_step(self, event: Event) -> None:
        assert event.losses is not None
        self.log.append((event.epoch, event.step, event.batch, event.batch_size, event.num_batches))
        self.losses.append(event.losses.clone())


def _calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each call of the operator takes from now on."""
    from modelbatch.engine import run

    sizes: list[int] = []
    original = run.train_steps_

    def counted(*args: Any) -> Any:
        sizes.append(len(args[4]))
        return original(*args)

    monkeypatch.setattr(run, "train_steps_", counted)
    return sizes


def _same_history(a: Any, b: Any) -> None:
    assert a.status == b.status
    one, two = a.state_dict(), b.state_dict()
    for key in ("loss", "active", "lr"):
        assert torch.equal(torch.nan_to_num(one_of(one, key)), torch.nan_to_num(one_of(two, key)))


def one_of(state: Any, key: str) -> Tensor:
    found: list[Tensor] = []

    def look(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for k, v in value.items():
                look(v, str(k))
        elif isinstance(value, list):
            for v in value:
                look(v, name)
        elif isinstance(value, Tensor) and name == key:
            found.append(value.double())

    look(state, "")
    assert found, key
    return torch.stack(found)


def test_the_same_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = _calls(monkeypatch)
    many = make_bundle(Residual)
    single, general = copy.deepcopy(many), copy.deepcopy(many)
    general.enable_engine(False)
    listeners = [_Listener() for _ in range(3)]
    data = [*_data(), *_data(2, batch=5)]
    histories = [fit(many, data, data[:2], epochs=2, callbacks=listeners[0])]
    assert sizes == [1, 4, 4, 2, 2, 4, 4, 3, 1, 1]  # of one shape
    del sizes[:]
    monkeypatch.setattr(blocks, "_MAX_STEPS", 1)
    histories.append(fit(single, data, data[:2], epochs=2, callbacks=listeners[1]))
    assert sizes == [1] * 26
    histories.append(fit(general, data, data[:2], epochs=2, callbacks=listeners[2]))
    assert_same(many, single, 0)
    assert_same(many, general, 1e-9)
    _same_history(*histories[:2])
    assert listeners[0].log == listeners[1].log == listeners[2].log
    for a, b, c in zip(*(listener.losses for listener in listeners)):
        assert torch.equal(a, b) and torch.allclose(a, c, rtol=1e-9)


def test_loaders_and_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = _calls(monkeypatch)
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(4, (40,))

    def loader() -> Any:
        generator = torch.Generator().manual_seed(5)
        return DataLoader(TensorDataset(x, y), 8, shuffle=True, generator=generator)

    def generated() -> Iterator[Any]:
        yield from _data(5, 8)

    class Own:
        def __iter__(self) -> Iterator[Any]:
            return generated()

    many = make_bundle(Residual)
    single = copy.deepcopy(many)
    train_one_epoch(many, loader())
    assert sizes == [1, 4]
    weighted = [(*batch, torch.rand(3, 9) > 0.3) for batch in _data(5)]
    train_one_epoch(many, weighted)
    router = DataRouter("passthrough")
    train_one_epoch(many, _data(5), router=router)
    assert sizes[2:] == [1, 4, 1, 4]
    # who knows what a loader of one's own looks at
    train_one_epoch(many, Own())
    assert sizes[6:] == [1] * 5
    monkeypatch.setattr(blocks, "_MAX_STEPS", 1)
    train_one_epoch(single, loader())
    train_one_epoch(single, weighted)
    train_one_epoch(single, _data(5), router=router)
    train_one_epoch(single, Own())
    assert_same(many, single, 0)


class _Reader(Callback):
    def on_train_step(self, event: Event) -> None:
        pass


class _ReaderAfterAll(_Listener):
    def on_train_step(self, event: Event) -> None:
        super().on_train_step(event)


@pytest.mark.parametrize(
    "why", ["callback", "derived", "scheduler", "accumulate", "metrics", "nan"]
)
def test_one_by_one_where_somebody_looks(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = _calls(monkeypatch)
    mb = make_bundle(Residual)
    options: dict[str, Any] = {
        "callback": {"callbacks": [_Reader()]},
        "derived": {"callbacks": [_ReaderAfterAll()]},
        "scheduler": {
            "scheduler": OptimizerFactory.create_lr_scheduler(
                mb.optimizer, ExponentialLR, {"gamma": 0.9}
            ),
            "scheduler_interval": "step",
        },
        "accumulate": {"accumulate": 2},
        "metrics": {"metric_fns": {"norm": lambda o, t: o.norm()}},
        "nan": {"callbacks": [NaNCallback("reset")]},
    }[why]
    train_one_epoch(mb, _data(5), **options)
    assert sizes == ([] if why in ("accumulate", "metrics") else [1] * 5)


def test_loggers_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = _calls(monkeypatch)
    fields = ["loss", "lr", "grad_norm", "active"]
    texts = []
    for limit in (4, 1):
        monkeypatch.setattr(blocks, "_MAX_STEPS", limit)
        path = tmp_path / f"{limit}.jsonl"
        callbacks = [MetricsLogger(path, fields=fields), ProgressBar(), NaNCallback()]
        fit(make_bundle(Residual), _data(), epochs=2, callbacks=callbacks)
        texts.append(path.read_text())
    assert texts[0] == texts[1] and '"grad_norm_model_2"' in texts[0]
    assert sizes[:4] == [1, 4, 4, 2] and set(sizes[7:]) == {1}


@pytest.mark.parametrize("action", ["freeze", "warn"])
@pytest.mark.parametrize("everyone", [False, True])
def test_models_that_are_not_finite(
    action: str, everyone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is frozen after its own step, although the call goes on with the others."""
    results = []
    for limit in (4, 1):
        monkeypatch.setattr(blocks, "_MAX_STEPS", limit)
        mb = make_bundle(lambda: mlp(nn.Tanh()))
        data = [(x.unsqueeze(0).repeat(3, 1, 1), y.unsqueeze(0).repeat(3, 1)) for x, y in _data()]
        mb.shared_input = False
        data[3][0][1, 0] = float("nan")
        if everyone:
            data[2][0][0, 0] = data[6][0][2, 0] = float("inf")
            data[2][0][0, 1] = float("nan")
            data[6][0][2, 1] = float("nan")
        listener, watcher = _Listener(), NaNCallback(action)
        warns = pytest.warns(UserWarning, match="not finite at step")
        with warns if action == "warn" else contextlib.nullcontext():
            history = fit(mb, data, epochs=2, callbacks=[watcher, listener])
        results.append((mb, history, listener))
    (many, one), (single, two) = (r[:2] for r in results)
    _same_history(one, two)
    assert results[0][2].log == results[1][2].log
    assert many.active.tolist() == single.active.tolist()
    expected = [not everyone, False, not everyone] if action == "freeze" else [True] * 3
    assert many.active.tolist() == expected
    for p, q in zip(many.state_dict().values(), single.state_dict().values()):
        assert torch.equal(torch.nan_to_num(p), torch.nan_to_num(q))
    if everyone and action == "freeze":
        assert len(results[0][2].log) == 7 and one.status == "frozen"


@pytest.mark.parametrize("what", ["loss, gradient, weights", "weights"])
def test_what_is_not_finite_is_named(what: str) -> None:
    mb = make_bundle(lambda: mlp(nn.Tanh()), "sgd")
    (x, y), *_ = _data(1)
    if what == "weights":
        mb.optimizer.param_groups[1]["lr"] = float("1e308")
        for group in mb.optimizer.param_groups:
            group["maximize"] = True
        x = x * 1e10
        y = torch.full((9, 4), 1e10, dtype=torch.float64)
        run = nn.MSELoss()
    else:
        x[0] = float("nan")
        run = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=what):
        train_one_epoch(mb, [(x, y)], loss_fn=run, callbacks=NaNCallback("raise"))
    assert by_engine(mb)


class _Stopper(Callback):
    reads_models = False

    def on_train_step(self, event: Event) -> None:
        event.stop = event.stop or event.step == 3


class _Interrupt(Callback):
    reads_models = False

    def on_train_step(self, event: Event) -> None:
        import os
        import signal

        if event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def test_resume_is_exact_with_several_steps_in_a_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = _calls(monkeypatch)
    whole, part = make_bundle(Residual), make_bundle(Residual)
    fit(whole, _data(), epochs=2)
    del sizes[:]
    first = fit(part, _data(), epochs=2, callbacks=_Interrupt(), checkpoint_dir=tmp_path)
    assert first.status == "interrupted" and sizes == [1, 4]  # Ctrl-C acts between calls
    again = make_bundle(Residual)
    fit(again, _data(), epochs=2, checkpoint_dir=tmp_path, resume=True)
    assert_same(whole, again, 0)


def test_a_stop_comes_after_the_steps_that_were_done(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = _calls(monkeypatch)
    mb, other = make_bundle(Residual), make_bundle(Residual)
    listener = _Listener()
    fit(mb, _data(), epochs=2, callbacks=[_Stopper(), listener])
    assert sizes == [1, 4] and len(listener.log) == 5
    for x, y in _data()[:5]:
        other.train_step(x, y)
    assert_same(mb, other, 0)


def test_batches_before_one_that_fails_are_trained_on() -> None:
    class Failing(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, k: int) -> Any:
            if k == 6:
                raise OSError("no such sample")
            return torch.full((6,), float(k), dtype=torch.float64), k % 4

    mb, other = make_bundle(Residual), make_bundle(Residual)
    loader = DataLoader(Failing(), 2)
    with pytest.raises(OSError, match="no such sample"):
        train_one_epoch(mb, loader)
    for k in range(3):
        x = torch.tensor([[2.0 * k] * 6, [2.0 * k + 1] * 6], dtype=torch.float64)
        other.train_step(x, torch.tensor([2 * k % 4, (2 * k + 1) % 4]))
    assert_same(mb, other, 0)
    bad = [*_data(3), "no batch"]
    with pytest.raises(ValueError, match="must yield"):
        train_one_epoch(mb, bad)
    for x, y in bad[:3]:
        other.train_step(x, y)
    assert_same(mb, other, 0)


def test_a_checkpoint_callback_saves_between_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = _calls(monkeypatch)
    fit(make_bundle(Residual), _data(5), epochs=1, callbacks=Checkpoint(tmp_path, every_steps=2))
    assert sizes == [1] * 5
    other = ModelBatch([Residual().double() for _ in range(3)])
    assert not Checkpoint(tmp_path, every_epochs=1, every_steps=None).reads_models
    assert len(other) == 3
