"""Schedules for every scheduler class of torch, each model's different, and their separate run."""

import copy
import math

import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from modelbatch import ModelBatch

NUM_MODELS = 3
STEPS = 32


class Halving:
    """A factor with a state of its own, which torch saves, unlike a function's."""

    def __init__(self, period):
        self.period = period
        self.calls = 0

    def __call__(self, epoch):
        self.calls += 1
        return 0.5 ** (epoch // self.period) + 0.01 * (self.calls % 3)


# For each class the arguments of three models.
CONFIGS = {
    "LambdaLR": lambda: [
        {"lr_lambda": lambda epoch: 0.9**epoch},
        {"lr_lambda": [Halving(5)]},
        {"lr_lambda": lambda epoch: 1 / (1 + epoch)},
    ],
    "MultiplicativeLR": lambda: [
        {"lr_lambda": lambda epoch: 0.9},
        {"lr_lambda": [Halving(50)]},
        {"lr_lambda": lambda epoch: 1 - 1 / (2 + epoch)},
    ],
    "StepLR": lambda: [{"step_size": 3}, {"step_size": 4, "gamma": 0.7}, {"step_size": 1}],
    "MultiStepLR": lambda: [
        {"milestones": [2, 9, 9, 20]},
        {"milestones": [5], "gamma": 0.3},
        {"milestones": []},
    ],
    "ConstantLR": lambda: [{}, {"factor": 0.1, "total_iters": 17}, {"total_iters": 0}],
    "LinearLR": lambda: [
        {},
        {"start_factor": 0.1, "total_iters": 20},
        {"start_factor": 1.0, "end_factor": 0.01, "total_iters": 31},
    ],
    "ExponentialLR": lambda: [{"gamma": 0.9}, {"gamma": 0.99}, {"gamma": 1.01}],
    "CosineAnnealingLR": lambda: [{"T_max": 10}, {"T_max": 32, "eta_min": 1e-4}, {"T_max": 7}],
    "ReduceLROnPlateau": lambda: [
        {"patience": 2},
        {"mode": "max", "factor": 0.5, "patience": 1, "cooldown": 3, "threshold_mode": "abs"},
        {"patience": 0, "min_lr": [1e-4], "factor": 0.3},
    ],
    "CyclicLR": lambda: [
        {"base_lr": 1e-3, "max_lr": 0.1, "step_size_up": 4},
        {"base_lr": 1e-4, "max_lr": 0.05, "step_size_up": 3, "step_size_down": 8, "gamma": 0.9}
        | {"mode": "exp_range", "base_momentum": 0.7, "max_momentum": 0.95},
        {"base_lr": 1e-3, "max_lr": 0.1, "step_size_up": 5, "scale_fn": Halving(2)}
        | {"cycle_momentum": False},
    ],
    "CosineAnnealingWarmRestarts": lambda: [
        {"T_0": 5},
        {"T_0": 3, "T_mult": 2, "eta_min": 1e-4},
        {"T_0": 40},
    ],
    "OneCycleLR": lambda: [
        {"max_lr": 0.1, "total_steps": 40},
        {"max_lr": [0.05], "epochs": 10, "steps_per_epoch": 5, "three_phase": True},
        {"max_lr": 0.2, "total_steps": 33, "anneal_strategy": "linear", "cycle_momentum": False},
    ],
    "PolynomialLR": lambda: [{"total_iters": 33}, {"total_iters": 7, "power": 2.0}, {}],
    "SWALR": lambda: [
        {"swa_lr": 0.05, "anneal_epochs": 7},
        {"swa_lr": [0.001], "anneal_strategy": "linear"},
        {"swa_lr": 0.5, "anneal_epochs": 0},
    ],
}


def _sequential(optimizer, i):
    parts = [schedulers.LinearLR(optimizer, 0.1, total_iters=3 + i)]
    parts += [
        [schedulers.CosineAnnealingLR(optimizer, 20)],
        [schedulers.ExponentialLR(optimizer, 0.9)],
        [schedulers.StepLR(optimizer, 2, 0.7), schedulers.PolynomialLR(optimizer, 20)],
    ][i]
    return schedulers.SequentialLR(optimizer, parts, [3 + i, 11][: len(parts) - 1])


def _chained(optimizer, i):
    parts = [schedulers.ExponentialLR(optimizer, 0.99), schedulers.StepLR(optimizer, 3 + i, 0.8)]
    parts += [[], [schedulers.MultiStepLR(optimizer, [2, 20])], [_sequential(optimizer, 0)]][i]
    return schedulers.ChainedScheduler(parts)


def _different_classes(optimizer, i):
    if i == 0:
        return schedulers.OneCycleLR(optimizer, 0.1, total_steps=40)
    if i == 1:
        return schedulers.ReduceLROnPlateau(optimizer, patience=1)
    return _sequential(optimizer, 0)


def class_named(name):
    return SWALR if name == "SWALR" else getattr(schedulers, name)


def schedule(name):
    """A new `build(optimizer, i)`; what is inside the arguments belongs to this one alone."""
    if name in CONFIGS:
        configs = CONFIGS[name]()
        return lambda optimizer, i: class_named(name)(optimizer, **configs[i])
    return {
        "SequentialLR": _sequential,
        "ChainedScheduler": _chained,
        "different_classes": _different_classes,
    }[name]


NAMES = [*CONFIGS, "SequentialLR", "ChainedScheduler", "different_classes"]

OPTIMIZERS = {
    "sgd_momentum": (torch.optim.SGD, [{"lr": lr, "momentum": 0.9} for lr in (0.1, 0.03, 0.01)]),
    "adam": (
        torch.optim.Adam,
        [{"lr": 0.1}, {"lr": 0.03, "betas": (0.8, 0.99)}, {"lr": 0.01, "amsgrad": True}],
    ),
    "adam_tensor_lr": (
        torch.optim.Adam,
        [{"lr": torch.tensor(lr, dtype=torch.float64)} for lr in (0.1, 0.03, 0.01)],
    ),
}

METRICS = [
    # flat, noisy, and with a model that has diverged
    [1.0, math.sin(step) + 0.1 * step, float("nan") if step > 9 else 1 / (1 + step)]
    for step in range(STEPS)
]


def new_bundle(kind="sgd_momentum"):
    """A bundle of three models, and the separate models and optimizers."""
    optimizer_cls, configs = OPTIMIZERS[kind]
    torch.manual_seed(0)
    models = [nn.Linear(3, 2).double() for _ in range(NUM_MODELS)]
    alone = copy.deepcopy(models)
    optimizers = [
        optimizer_cls(model.parameters(), **copy.deepcopy(config))
        for model, config in zip(alone, configs)
    ]
    bundle = ModelBatch(
        models, optimizer_cls=optimizer_cls, optimizer_kwargs=copy.deepcopy(configs)
    )
    return bundle, alone, optimizers


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(2, (4,), generator=generator)


def train_alone(model, optimizer, step):
    x, y = batch(step)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def options(group):
    """What a scheduler may write in a group, tensors as numbers."""
    return {
        option: value.item() if isinstance(value, torch.Tensor) else value
        for option, value in group.items()
        if option not in ("params", "foreach", "fused")
    }


def step_alone(scheduler, metric):
    if isinstance(scheduler, schedulers.ReduceLROnPlateau):
        scheduler.step(metric)
    else:
        scheduler.step()
