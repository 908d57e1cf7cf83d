"""Training that was interrupted, and goes on as if it had not been."""

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

from modelbatch import BundleGradScaler, CheckpointError, ModelBatchError, OptimizerFactory
from modelbatch.callbacks import Callback, EarlyStopping, MetricsLogger
from modelbatch.data import PerModelLoader, StratifiedDataRouter
from modelbatch.training import History, accuracy, fit

EPOCHS = 3


def tensors(make_data: Any) -> tuple[Tensor, Tensor]:
    x, y = (torch.cat(parts) for parts in zip(*make_data()))
    return x, y


class _Noisy(Dataset[Any]):
    """Draws from every global generator for every sample."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> Any:
        noise = random.random() + float(np.random.rand()) + torch.rand(4)
        return self.x[i] + 0.1 * noise, self.y[i]


def shuffled(make_data: Any, kind: str) -> Any:
    """Loaders whose order comes from different places."""
    x, y = tensors(make_data)
    data = TensorDataset(x, y)
    if kind == "list":
        return make_data()
    if kind == "global generator":
        return DataLoader(data, batch_size=8, shuffle=True)
    if kind == "noise":
        return DataLoader(_Noisy(x, y), batch_size=8, shuffle=True)
    generator = torch.Generator().manual_seed(1)
    if kind == "own generator":
        return DataLoader(data, batch_size=8, shuffle=True, generator=generator)
    if kind == "sampler":
        sampler = RandomSampler(data, generator=generator)
        return DataLoader(data, batch_sampler=BatchSampler(sampler, 8, drop_last=False))
    if kind == "workers":
        return DataLoader(_Noisy(x, y), batch_size=8, shuffle=True, num_workers=1)
    assert kind == "stateful"
    return _Stateful(x, y)


class _Stateful:
    """A loader with a state of its own."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.pass_number = x, y, 0

    def __iter__(self) -> Iterator[Any]:
        self.pass_number += 1
        order = torch.randperm(40, generator=torch.Generator().manual_seed(self.pass_number))
        return iter([(self.x[part], self.y[part]) for part in order.split(8)])

    def state_dict(self) -> dict[str, Any]:
        return {"pass": self.pass_number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pass_number = state["pass"]


class _Interrupt(Callback):
    """Ctrl-C, or what looks like it, at an event of some step."""

    def __init__(self, name: str, step: int, press: bool) -> None:
        def interrupt(event: Any) -> None:
            if event.step == step and not self.done:
                self.done = True
                if not press:
                    raise KeyboardInterrupt
                os.kill(os.getpid(), signal.SIGINT)

        self.done = False
        setattr(self, name, interrupt)


def equal(a: History, b: History) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name].nan_to_num(9.0), b[name].nan_to_num(9.0)) for name in a
    )


Make = Callable[[], tuple[Any, dict[str, Any]]]


def check(
    make: Make,
    same: Any,
    directory: Path,
    interrupts: list[tuple[str, int, bool]],
    epochs: int = EPOCHS,
) -> History:
    """Trains with and without interruptions; every part is made anew after each."""
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    whole, options = make()
    expected = fit(whole, epochs=epochs, checkpoint_dir=directory / "whole", **options)
    assert expected.status == "finished"
    after = torch.rand(1)
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    for name, step, press in interrupts:
        mb, options = make()
        callbacks = [*options.pop("callbacks", []), _Interrupt(name, step, press)]
        history = fit(
            mb,
            epochs=epochs,
            checkpoint_dir=directory / "a",
            resume=True,
            callbacks=callbacks,
            **options,
        )
        assert history.status == "interrupted"
        assert callbacks[-1].done
        # a new process would begin with other generators
        torch.manual_seed(99), random.seed(99), np.random.seed(99)
    mb, options = make()
    history = fit(mb, epochs=epochs, checkpoint_dir=directory / "a", resume=True, **options)
    assert history.status == "finished"
    assert same(mb, whole)
    assert equal(history, expected)
    assert history.epochs == epochs
    assert torch.equal(torch.rand(1), after)  # the generators stand where they would
    return history


PLACES = [
    ("on_train_step", 7, True),
    ("on_train_step", 7, False),
    ("on_train_step", 10, True),  # the last step of an epoch
    ("on_epoch_start", 5, False),
    ("on_epoch_end", 5, False),
    ("on_epoch_end", 5, True),
    ("on_validation_step", 10, False),
    ("on_validation_step", 10, True),
    ("on_train_step", 15, True),  # the very last
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]}-{place[1]}-{place[2]}")
def test_interrupted_anywhere(
    build: Any, make_data: Any, same: Any, tmp_path: Path, place: tuple[str, int, bool]
) -> None:
    def make() -> Any:
        mb = build(dropout=0.3, norm=True)
        val = DataLoader(TensorDataset(*tensors(make_data)), batch_size=16, shuffle=True)
        return mb, {
            "train_loader": shuffled(make_data, "noise"),
            "val_loader": val,
            "metric_fns": {"accuracy": accuracy},
            "scheduler": OptimizerFactory.create_lr_scheduler(
                mb.optimizer, lr_scheduler.ReduceLROnPlateau, {"patience": 0, "threshold": 0.1}
            ),
        }

    check(make, same, tmp_path, [place])


@pytest.mark.parametrize(
    "kind",
    ["list", "global generator", "own generator", "sampler", "noise", "stateful", "workers"],
)
def test_every_kind_of_loader(
    build: Any, make_data: Any, same: Any, tmp_path: Path, kind: str
) -> None:
    """Interrupted twice within one epoch, and once more in the next."""

    def make() -> Any:
        return build(dropout=0.3), {"train_loader": shuffled(make_data, kind)}

    places = [("on_train_step", 2, True), ("on_train_step", 4, False), ("on_train_step", 8, True)]
    check(make, same, tmp_path, places)


@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adadelta])
@pytest.mark.parametrize("schedule", ["own", "torch"])
@pytest.mark.filterwarnings("ignore:.*one model after another")
def test_optimizers_and_schedules(
    build: Any, make_data: Any, same: Any, tmp_path: Path, optimizer_cls: Any, schedule: str
) -> None:
    def make() -> Any:
        options = {"momentum": 0.9} if optimizer_cls is torch.optim.SGD else {}
        mb = build(optimizer_cls=optimizer_cls, optimizer_kwargs=options, fallback="silent")
        scheduler: Any = None
        if schedule == "own":
            scheduler = (
                OptimizerFactory.create_lr_scheduler(
                    mb.optimizer, lr_scheduler.OneCycleLR, {"max_lr": 0.1, "total_steps": 100}
                )
                if optimizer_cls is torch.optim.SGD
                else OptimizerFactory.create_lr_scheduler(
                    mb.optimizer, lr_scheduler.MultiStepLR, {"milestones": [3, 8], "gamma": 0.5}
                )
            )
        else:
            scheduler = lr_scheduler.MultiStepLR(mb.optimizer, [3, 8], gamma=0.5)
        return mb, {
            "train_loader": shuffled(make_data, "own generator"),
            "scheduler": scheduler,
            "scheduler_interval": "step",
        }

    check(make, same, tmp_path, [("on_train_step", 6, True)])


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_mixed_precision_and_accumulation(
    build: Any, make_data: Any, same: Any, tmp_path: Path, amp: torch.dtype
) -> None:
    """Two batches a step: the third step of an epoch has one."""

    def make() -> Any:
        options: dict[str, Any] = {"train_loader": shuffled(make_data, "noise")}
        if amp == torch.float16:
            options["grad_scaler"] = BundleGradScaler(init_scale=2.0**14, growth_interval=2)
        return build(dropout=0.2), {"amp_dtype": amp, "accumulate": 2, **options}

    check(make, same, tmp_path, [("on_train_step", 2, True), ("on_train_step", 5, False)])


def test_random_streams_of_torch(build: Any, make_data: Any, same: Any, tmp_path: Path) -> None:
    def make() -> Any:
        return build(dropout=0.5, rng="torch"), {"train_loader": shuffled(make_data, "noise")}

    check(make, same, tmp_path, [("on_train_step", 8, True)])


@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loader_that_is_interrupted(
    build: Any, make_data: Any, same: Any, tmp_path: Path, number: int, accumulate: int
) -> None:
    """Ctrl-C while the loader reads, amid the batches of one step."""
    fail = [False]

    class Loader:
        passes = 0

        def __init__(self) -> None:
            self.inner = shuffled(make_data, "noise")

        def __iter__(self) -> Iterator[Any]:
            Loader.passes += 1
            for i, batch in enumerate(self.inner):
                if fail[0] and i == number and Loader.passes == 2:
                    raise KeyboardInterrupt
                yield batch

    def run(resume: bool = False) -> Any:
        mb = build(dropout=0.3)
        options = {"epochs": EPOCHS, "accumulate": accumulate, "resume": resume}
        return mb, fit(mb, Loader(), checkpoint_dir=tmp_path / f"{fail[0]}", **options)

    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    whole, expected = run()
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    Loader.passes, fail[0] = 0, True
    assert run()[1].status == "interrupted"
    torch.manual_seed(99), random.seed(99), np.random.seed(99)
    mb, history = run(resume=True)
    assert same(mb, whole) and equal(history, expected)


def test_callbacks_go_on(build: Any, make_data: Any, same: Any, tmp_path: Path) -> None:
    """Early stopping waits as long as without the interruption, and no row is logged twice."""
    stops = []

    def make() -> Any:
        mb = build(lr=[0.1, 0.0, 0.05])
        directory = tmp_path / f"{len(stops)}"
        stops.append(EarlyStopping("loss", patience=3, min_delta=1e-4))
        loader = shuffled(make_data, "own generator")
        log = MetricsLogger((directory if len(stops) == 1 else tmp_path / "rest") / "log.csv")
        return mb, {"train_loader": loader, "callbacks": [stops[-1], log]}

    history = check(make, same, tmp_path, [("on_train_step", 12, True)], epochs=6)
    assert history["active"][:, 1].tolist() == [True] * 4 + [False] * 2
    assert torch.equal(stops[0].stopped_epochs, stops[-1].stopped_epochs)
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("0", "rest")]
    assert logs[0] == logs[1]


class _Draws(Callback):
    """Uses the generators that the loader uses, and lets the training depend on it."""

    def on_train_start(self, event: Any) -> None:
        if event.step:  # the start of the whole training is not repeated
            torch.rand(3), random.random(), np.random.rand()

    def on_train_step(self, event: Any) -> None:
        factor = 0.9 + 0.2 * float(torch.rand(()) * random.random())
        for group in event.optimizer.param_groups:
            group["lr"] *= factor


@pytest.mark.parametrize("place", [("on_train_step", 7, True), ("on_validation_step", 5, False)])
def test_callbacks_that_draw_random_numbers(
    build: Any, make_data: Any, same: Any, tmp_path: Path, place: tuple[str, int, bool]
) -> None:
    def make() -> Any:
        loader = shuffled(make_data, "noise")
        return build(), {
            "train_loader": loader,
            "val_loader": shuffled(make_data, "noise"),
            "callbacks": [_Draws()],
        }

    check(make, same, tmp_path, [place])


def test_interrupted_while_it_passes_over_batches(
    build: Any, make_data: Any, same: Any, tmp_path: Path
) -> None:
    def run(directory: str, interrupt: int = 0, fail: bool = False) -> Any:
        inner = shuffled(make_data, "noise")

        class Loader:
            def __iter__(self) -> Iterator[Any]:
                for i, batch in enumerate(inner):
                    if fail and i == 1:
                        raise KeyboardInterrupt
                    yield batch

        mb = build(dropout=0.3)
        callbacks = [_Draws(), _Interrupt("on_train_step", interrupt, True)]
        place = {"checkpoint_dir": tmp_path / directory, "resume": True}
        return mb, fit(mb, Loader(), epochs=EPOCHS, callbacks=callbacks, **place)

    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    whole, expected = run("whole")
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    for options in ({"interrupt": 8}, {"fail": True}, {"fail": True}):
        assert run("parts", **options)[1].status == "interrupted"
        torch.manual_seed(99), random.seed(99), np.random.seed(99)
    mb, history = run("parts")
    assert same(mb, whole) and equal(history, expected)


@pytest.mark.parametrize("routed", [True, False])
def test_routers_and_their_loader(
    build: Any, make_data: Any, same: Any, tmp_path: Path, routed: bool
) -> None:
    """Bootstrap samples, drawn by position or by a loader with an order for each model."""

    def make() -> Any:
        x, y = tensors(make_data)
        router = StratifiedDataRouter(3, "bootstrap", dataset_size=40, seeds=[1, 2, 3])
        mb = build(dropout=0.3, norm=True)
        if routed:
            return mb, {"train_loader": make_data(), "router": router, "accumulate": 2}
        sizes = [4, 8, 12]
        return mb, {"train_loader": PerModelLoader((x, y), sizes, 5, subsets=router.subsets())}

    check(make, same, tmp_path, [("on_train_step", 2, True), ("on_train_step", 4, False)])


def test_nothing_is_left_to_do(build: Any, make_data: Any, same: Any, tmp_path: Path) -> None:
    a, b = build(), build()
    first = fit(a, make_data(), epochs=2, checkpoint_dir=tmp_path)
    second = fit(b, make_data(), epochs=2, checkpoint_dir=tmp_path, resume=True)
    assert same(a, b) and equal(first, second)
    assert second.seconds == first.seconds


def test_more_epochs_than_before(build: Any, make_data: Any, same: Any, tmp_path: Path) -> None:
    a, b, c = build(), build(), build()
    fit(a, make_data(), epochs=2, checkpoint_dir=tmp_path)
    longer = fit(b, make_data(), epochs=5, checkpoint_dir=tmp_path, resume=True)
    whole = fit(c, make_data(), epochs=5)
    assert same(b, c) and equal(longer, whole)


def test_the_directory_may_be_new_or_have_other_files(
    build: Any, make_data: Any, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    history = fit(build(), make_data(), epochs=1, checkpoint_dir=tmp_path, resume=True)
    assert history.epochs == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"
    mb = build()
    mb.load_all(tmp_path)  # a checkpoint like any other


def test_how_often_it_is_saved(
    build: Any, make_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mb = build()
    saved, save_all, log = [], type(mb).save_all, []
    monkeypatch.setattr(
        type(mb),
        "save_all",
        lambda self, *a, **k: (saved.append(len(log)), save_all(self, *a, **k)),
    )

    class Log(Callback):
        def on_epoch_end(self, event: Any) -> None:
            log.append(event.epoch)

        def on_train_end(self, event: Any) -> None:
            log.append("end")

    fit(mb, make_data(), epochs=5, checkpoint_dir=tmp_path, checkpoint_every=2, callbacks=Log())
    assert saved == [2, 4, 5]  # and at the end, before callbacks put other weights in place


def test_a_loader_with_fewer_batches(build: Any, make_data: Any, tmp_path: Path) -> None:
    stop = _Interrupt("on_train_step", 4, True)
    fit(build(), make_data(), epochs=1, checkpoint_dir=tmp_path, callbacks=stop)
    with pytest.raises(ModelBatchError, match="after 4 batches, but the loader yields only 3"):
        fit(build(), make_data(3), epochs=1, checkpoint_dir=tmp_path, resume=True)


def test_a_checkpoint_of_another_bundle(
    build: Any, make_data: Any, same: Any, tmp_path: Path
) -> None:
    fit(build(), make_data(), epochs=1, checkpoint_dir=tmp_path)
    mb = build(4)
    with pytest.raises(CheckpointError):
        fit(mb, make_data(), epochs=2, checkpoint_dir=tmp_path, resume=True)
    assert same(mb, build(4))
    plain = build()
    plain.save_all(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="training"):
        fit(build(), make_data(), epochs=2, checkpoint_dir=tmp_path / "plain", resume=True)
