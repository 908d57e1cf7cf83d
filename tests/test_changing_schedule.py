"""Random schedules of everything that can happen to a bundle, against models that train alone."""

import copy
import random
import tempfile
import warnings
from typing import Any

import pytest
import torch
from changing_case import Alone, Net, assert_close, batches
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.strategies import booleans, integers, sampled_from
from torch.optim.lr_scheduler import ExponentialLR

from modelbatch import ModelBatch, OptimizerFactory

CLASSES: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.Adam, {"weight_decay": 0.01}),
    (torch.optim.SGD, {"momentum": 0.9}),
    (torch.optim.NAdam, {}),
    (torch.optim.Adafactor, {}),
]


class Pair:
    """A bundle, and the same models trained one by one."""

    def __init__(self, cls: Any, options: dict[str, Any], clip: float | None) -> None:
        self.cls, self.options, self.clip = cls, options, clip
        self.made = 0
        models, self.alone = [], []
        for _ in range(3):
            model, alone = self.model(0.02)
            models.append(model)
            self.alone.append(alone)
        self.mb = self.bundle(models)
        self.ids = [0, 1, 2]
        self.active = [True] * 3
        self.next_id = 3
        self.data = batches(200, 7)
        self.step_number = 0

    def model(self, lr: float) -> tuple[Net, Alone]:
        self.made += 1
        model = Net(self.made)
        alone = Alone(
            model,
            self.cls,
            {"lr": lr, **self.options},
            schedule=lambda optimizer: ExponentialLR(optimizer, 0.9),
            clip=self.clip,
        )
        return model, alone

    def bundle(self, models: list[Any]) -> ModelBatch:
        mb = ModelBatch(models, fallback="silent")
        factory = OptimizerFactory(self.cls, self.options, clip_grad_norm=self.clip)
        factory.create_optimizer(mb, [{"lr": 0.02}] * len(models))
        self.scheduler = OptimizerFactory.create_lr_scheduler(
            mb.optimizer, ExponentialLR, {"gamma": 0.9}
        )
        return mb

    def step(self) -> None:
        x, y = self.data[self.step_number % 200]
        self.step_number += 1
        losses = self.mb.train_step(x, y).tolist()
        for i, alone in enumerate(self.alone):
            if self.active[i]:
                assert losses[i] == pytest.approx(alone.step(x, y), rel=1e-9)

    def schedule(self) -> None:
        with warnings.catch_warnings():  # of models that have taken no step yet
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step()
            for i, alone in enumerate(self.alone):
                if self.active[i] and alone.scheduler is not None:
                    alone.scheduler.step()

    def prune(self, count: int, seed: int) -> None:
        gone = random.Random(seed).sample(range(len(self.ids)), min(count, len(self.ids) - 1))
        self.mb.prune(gone)
        for own in (self.alone, self.ids, self.active):
            own[:] = [value for i, value in enumerate(own) if i not in gone]

    def append(self, count: int, lr: float) -> None:
        pairs = [self.model(lr) for _ in range(count)]
        new = self.mb.append([model for model, _ in pairs], lr=lr)
        assert new == list(range(self.next_id, self.next_id + count))
        self.alone += [alone for _, alone in pairs]
        self.ids += new
        self.active += [True] * count
        self.next_id += count

    def replace(self, seed: int, lr: float) -> None:
        i = seed % len(self.ids)
        model, self.alone[i] = self.model(lr)
        self.ids[i] = self.mb.replace(i, model, lr=lr)
        assert self.ids[i] == self.next_id
        self.next_id += 1
        self.active[i] = True

    def toggle(self, seed: int) -> None:
        i = seed % len(self.ids)
        (self.mb.freeze if self.active[i] else self.mb.unfreeze)(i)
        self.active[i] = not self.active[i]

    def save_and_load(self, from_start: bool) -> None:
        with tempfile.TemporaryDirectory() as directory:
            self.mb.save_all(directory, states={"scheduler": self.scheduler})
            if from_start:
                self.mb = self.bundle([Net(i) for i in range(3)])
            else:
                self.mb.train_step(*self.data[0])
                self.mb.prune(list(range(1, len(self.mb))))
            states = {"scheduler": self.scheduler}
            self.mb.load_all(directory, states=states, resize=True)

    def check(self) -> None:
        assert self.mb.model_ids == self.ids and len(self.mb) == len(self.ids)
        assert self.mb.active.tolist() == self.active
        assert self.scheduler.get_last_lr() == [
            alone.scheduler.get_last_lr()[0] for alone in self.alone if alone.scheduler
        ]
        for own, alone in zip(self.mb.models, self.alone, strict=True):
            assert_close(own, alone.model)


class Machine(RuleBasedStateMachine):
    @initialize(kind=sampled_from(range(len(CLASSES))), clip=sampled_from([None, 0.05]))
    def begin(self, kind: int, clip: float | None) -> None:
        self.pair = Pair(*CLASSES[kind], clip)

    @rule(count=integers(1, 3))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.pair.step()

    @rule()
    def schedule(self) -> None:
        self.pair.schedule()

    @rule(count=integers(0, 2), seed=integers(0, 99))
    def prune(self, count: int, seed: int) -> None:
        self.pair.prune(count, seed)

    @precondition(lambda self: len(self.pair.ids) < 6)
    @rule(count=integers(1, 2), lr=sampled_from([0.01, 0.05]))
    def append(self, count: int, lr: float) -> None:
        self.pair.append(count, lr)

    @rule(seed=integers(0, 99), lr=sampled_from([0.01, 0.05]))
    def replace(self, seed: int, lr: float) -> None:
        self.pair.replace(seed, lr)

    @rule(seed=integers(0, 99))
    def toggle(self, seed: int) -> None:
        self.pair.toggle(seed)

    @rule(from_start=booleans())
    def save_and_load(self, from_start: bool) -> None:
        self.pair.save_and_load(from_start)

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "pair"):
            self.pair.check()


Machine.TestCase.settings = settings(
    max_examples=8,
    stateful_step_count=16,
    phases=[Phase.generate],
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestSchedules = Machine.TestCase


@pytest.mark.parametrize("kind", range(len(CLASSES)))
def test_a_long_schedule(kind: int) -> None:
    random_numbers = random.Random(kind)
    pair = Pair(*CLASSES[kind], 0.05 if kind % 2 else None)
    for _ in range(50):
        what = random_numbers.randrange(9)
        seed = random_numbers.randrange(1000)
        if what < 3:
            pair.step()
        elif what == 3:
            pair.schedule()
        elif what == 4:
            pair.prune(1 + seed % 2, seed)
        elif what == 5 and len(pair.ids) < 6:
            pair.append(1 + seed % 2, 0.03)
        elif what == 6:
            pair.replace(seed, 0.03)
        elif what == 7:
            pair.toggle(seed)
        else:
            pair.save_and_load(bool(seed % 2))
        pair.check()
    assert copy.deepcopy(pair.mb).model_ids == pair.ids
