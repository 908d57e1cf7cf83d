"""Trials of a bundle at epochs of their own: each as if it were alone."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import integers
from sweep.sweep_case import alone, close
from sweep.trial_bundle_case import (
    Curves,
    Noisy,
    bundle_of,
    decay,
    joining,
    make,
    make_settings,
    solo,
)
from torch.utils.data import DataLoader, TensorDataset

from modelbatch import CheckpointError, ModelBatchError, StructureMismatchError
from modelbatch.callbacks import Callback, NaNCallback
from modelbatch.sweep.bundle import TrialBundle


def config_of(number: int) -> dict[str, Any]:
    return {"lr": 0.01 * (1 + number % 3), "weight_decay": 0.01 * (number % 2)}


class Schedule:
    """Trials that come and go at random, with a checkpoint and a new process now and then."""

    def __init__(self, seed: int, config: Any, own: Any) -> None:
        self.random, self.config, self.settings = random.Random(seed), config, own
        self.made = 0
        self.trials: dict[int, Any] = {}
        self.bundle = bundle_of([self.trial() for _ in range(3)], own)
        self.curves = Curves()
        self.weights: dict[int, Any] = {}

    def trial(self) -> Any:
        number = self.made
        self.made += 1
        own = make(number, self.config(number), epochs=self.random.choice([1, 3, 5]))
        self.trials[number] = own
        return own

    def run(self, rounds: int, directory: Path) -> None:
        for _ in range(rounds):
            done = self.curves.add(self.bundle)
            leave = set(done.ended) | {t for t in done.trials if self.random.random() < 0.2}
            for trial in leave:
                self.weights[trial] = self.bundle.state_dict_of(trial)
            join = [self.trial() for _ in range(self.random.randrange(3))]
            if len(leave) == len(done.trials) and not join:
                join = [self.trial()]
            self.bundle.exchange(leave, [joining(trial, self.settings) for trial in join])
            if self.random.random() < 0.3:
                self.bundle.save(directory)
                ids = TrialBundle.saved_trials(directory)
                self.bundle = bundle_of([self.trials[i] for i in ids], self.settings)
                self.bundle.load(directory)


@given(seed=integers(0, 10**6))
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_schedule_of_prunes_refills_and_resumes(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    schedule = Schedule(seed, config_of, make_settings())
    schedule.run(8, tmp_path_factory.mktemp("bundle"))
    for number, own in schedule.curves.values.items():
        losses, val_losses, model = alone(config_of(number), number, len(own))
        assert close(schedule.curves.of(number), losses), number
        assert close(schedule.curves.of(number, "val_loss"), val_losses), number
        if number in schedule.weights:
            for name, value in model.state_dict().items():
                assert close(schedule.weights[number][name], value), (number, name)


@pytest.mark.parametrize("kind", ["schedule", "dropout", "clip", "noisy dataset"])
def test_a_schedule_with(kind: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "schedule": {"scheduler": decay},
        "noisy dataset": {"train": Noisy()},
    }.get(kind, {})

    def config(number: int) -> dict[str, Any]:
        own = config_of(number)
        if kind == "dropout":
            own["dropout"] = 0.1 * (1 + number % 4)
        if kind == "clip":
            own["clip_grad_norm"] = 0.05 * (1 + number % 4)
        if kind == "schedule":
            own["gamma"] = [0.5, 0.9, 0.7][number % 3]
        return own

    own = make_settings(**more)
    schedule = Schedule(7, config, own)
    schedule.run(10, tmp_path)
    assert max(len(values) for values in schedule.curves.values.values()) >= 3
    for number, values in schedule.curves.values.items():
        curves, _ = solo(make(number, config(number), epochs=9), own, len(values))
        for name in ("loss", "val_loss"):
            assert close(schedule.curves.of(number, name), curves.of(number, name)), (number, name)


def test_the_engine_takes_many_steps_of_models_at_different_epochs() -> None:
    own = make_settings()
    bundle = bundle_of([make(0, {"lr": 0.01}), make(1, {"lr": 0.02})], own)
    bundle.run_epoch()
    bundle.exchange([0], [joining(make(2, {"lr": 0.03}), own)])
    assert bundle._loop.blocks.possible
    assert bundle._epochs() == [0, 1]
    batch = next(iter(bundle._loop.loader))
    assert batch.batched and batch.inputs.shape[:2] == (2, 8)


def test_a_diverging_trial_ends_alone() -> None:
    own = make_settings()
    trials = [make(0, {"lr": 0.01}), make(1, {"lr": 1e308, "width": 6}), make(2, {"lr": 0.02})]
    sgd = [make(t.id, t.config, optimizer_cls=torch.optim.SGD) for t in trials]
    bundle, curves = bundle_of(sgd, own), Curves()
    ended: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for _ in range(4):
        done = curves.add(bundle)
        ended |= done.ended
        reasons |= done.reasons
        bundle.exchange(done.ended)
    assert ended == {1: "diverged", 0: "finished", 2: "finished"}
    assert reasons[1].startswith("not finite") and set(reasons) == {1}
    assert len(bundle) == 0
    for number, lr in ((0, 0.01), (2, 0.02)):
        losses, _, _ = alone({"lr": lr}, number, 4, optimizer_cls=torch.optim.SGD)
        assert close(curves.of(number), losses)


@pytest.mark.parametrize("action", ["freeze", "prune"])
def test_callbacks_of_ones_own(action: str) -> None:
    class Stop(Callback):
        def on_epoch_end(self, event: Any) -> None:
            event.stop = event.epoch == 1

    own = make_settings(callbacks=lambda trials: [NaNCallback(action), Stop()])
    trials = [make(0, {"lr": 0.01}), make(1, {"lr": 1e308}), make(2, {"lr": 0.02})]
    sgd = [make(t.id, t.config, optimizer_cls=torch.optim.SGD) for t in trials]
    bundle = bundle_of(sgd, own)
    done = bundle.run_epoch()
    ended = dict(done.ended)
    while not ended.get(1):
        bundle.exchange(done.ended)
        done = bundle.run_epoch()
        ended |= done.ended
    assert ended[1] == "diverged"
    bundle.exchange(done.ended)
    while len(bundle):
        done = bundle.run_epoch()
        ended |= done.ended
        bundle.exchange(done.ended)
    assert ended[0] == ended[2] == "stopped"


def test_going_on_from_another_trial() -> None:
    own = make_settings(scheduler=decay)
    base = {"lr": 0.01, "dropout": 0.2}
    better = {"lr": 0.03, "dropout": 0.4, "weight_decay": 0.1}
    bundle = bundle_of([make(0, base, 9), make(1, {**base, "lr": 0.02}, 9), make(2, base, 9)], own)
    for _ in range(3):
        bundle.run_epoch()
    drawn = bundle.mb._streams.step.tolist()
    bundle.exchange([2], [joining(make(3, base, 9), own)])
    bundle.copy(1, 3, make(3, better, 9))
    assert bundle.epochs_done(3) == 3 and bundle.epochs_done(0) == 3
    assert bundle.trials[2].config == better
    for name, value in bundle.state_dict_of(1).items():
        assert torch.equal(bundle.state_dict_of(3)[name], value)
    states = [bundle.optimizer.model_state_dict(i) for i in (1, 2)]
    for key, value in states[0]["state"].items():
        for name, tensor in value.items():
            assert torch.equal(states[1]["state"][key][name], tensor), (key, name)
    assert states[1]["param_groups"][0]["weight_decay"] == 0.1
    assert states[1]["param_groups"][0]["lr"] == pytest.approx(0.03 * 0.9**3)
    assert bundle.mb._streams.step.tolist()[:2] == drawn[:2]
    rates = bundle.mb[2][2].p
    assert rates == 0.4

    # from there it trains as a model alone does that begins with these weights and states
    before = bundle.state_dict_of(3)
    done = bundle.run_epoch()
    assert done.epochs == [3, 3, 3] and not done.ended
    assert any(not torch.equal(before[k], v) for k, v in bundle.state_dict_of(3).items())


def test_a_copy_with_the_same_options_goes_on_as_the_original() -> None:
    own = make_settings()
    config = {"lr": 0.01}
    bundle = bundle_of([make(0, config, 9), make(1, {"lr": 0.05}, 9)], own)
    for _ in range(2):
        bundle.run_epoch()
    bundle.copy(0, 1, make(1, config, 9))
    curves = Curves()
    curves.values = {0: [{}, {}], 1: [{}, {}]}
    for _ in range(3):
        curves.add(bundle)
    assert [v["loss"] for v in curves.values[0][2:]] == [v["loss"] for v in curves.values[1][2:]]


def test_an_iterable_of_batches_cannot_begin_anew() -> None:
    x, y = torch.randn(16, 5, dtype=torch.float64), torch.randint(3, (16,))
    own = make_settings(train=DataLoader(TensorDataset(x, y), batch_size=8))
    trials = [make(n, {"lr": 0.01}, batch_size=None) for n in range(3)]
    bundle = bundle_of(trials[:1], own)
    joiner = joining(trials[1], own)
    assert bundle.fits(*joiner)
    bundle.exchange(join=[joiner])
    bundle.run_epoch()
    late = joining(trials[2], own)
    assert not bundle.fits(*late)
    with pytest.raises(ModelBatchError, match="trial 2 cannot join: an iterable of batches"):
        bundle.exchange(join=[late])


def test_bundles_that_take_turns_see_the_same_shuffled_loader() -> None:
    x, y = torch.randn(22, 5, dtype=torch.float64), torch.randint(3, (22,))

    def loader() -> Any:
        generator = torch.Generator().manual_seed(3)
        return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=generator)

    trials = [make(n, {"lr": 0.01 * (n + 1)}, batch_size=None) for n in range(2)]
    own = make_settings(train=loader())
    turns = [bundle_of([trial], own) for trial in trials]
    curves = Curves()
    for _ in range(3):
        for bundle in turns:
            curves.add(bundle)
    for trial in trials:
        expected, _ = solo(trial, make_settings(train=loader()), 3)
        assert curves.of(trial.id) == expected.of(trial.id)


def test_what_does_not_fit() -> None:
    own = make_settings()
    bundle = bundle_of([make(0, {"lr": 0.01}), make(1, {"lr": 0.02})], own)
    wide, model = joining(make(2, {"lr": 0.01, "width": 9}), own)
    assert not bundle.fits(wide, model)
    other, plain = joining(make(3, {"lr": 0.01}, optimizer_cls=torch.optim.SGD), own)
    assert not bundle.fits(other, plain)
    before = [p.clone() for p in bundle.mb.parameters()]
    with pytest.raises(StructureMismatchError):
        bundle.exchange([0], [(wide, model)])
    with pytest.raises(ModelBatchError, match="trial 3 cannot join"):
        bundle.exchange([0], [(other, plain)])
    with pytest.raises(ModelBatchError, match="trial 7 is not in this bundle"):
        bundle.exchange([7])
    with pytest.raises(ModelBatchError, match="trial 1 is in the bundle already"):
        bundle.exchange([0], [joining(make(1, {"lr": 0.01}), own)])
    with pytest.raises(ModelBatchError, match="trial 1 cannot go on from trial 1"):
        bundle.copy(1, 1, make(1, {"lr": 0.1}))
    with pytest.raises(ModelBatchError, match="cannot share a bundle"):
        bundle_of([make(0, {}), make(1, {}, batch_size=4)], own)
    assert [trial.id for trial in bundle.trials] == [0, 1]
    assert all(torch.equal(a, b) for a, b in zip(before, bundle.mb.parameters()))


def test_a_checkpoint_of_other_trials_is_refused(tmp_path: Path) -> None:
    own = make_settings()
    bundle = bundle_of([make(0, {"lr": 0.01}), make(1, {"lr": 0.02})], own)
    bundle.run_epoch()
    bundle.save(tmp_path)
    other = bundle_of([make(0, {"lr": 0.01}), make(2, {"lr": 0.02})], own)
    with pytest.raises(CheckpointError, match=r"trials \[0, 1\], not of \[0, 2\]"):
        other.load(tmp_path)
    with pytest.raises(CheckpointError):
        TrialBundle.saved_trials(tmp_path / "nowhere")
