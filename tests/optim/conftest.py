"""A bundle made by hand, so that the optimizers are tested without the rest of the library."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn, optim
from torch.func import functional_call

from modelbatch.optim import build_optimizer

# Every option differs between the models, and so does whether it is given at all.
CASES = {
    "adadelta": (optim.Adadelta, [{"lr": 0.5}, {"lr": 1.0, "rho": 0.8}, {"weight_decay": 0.1}]),
    "adafactor": (
        optim.Adafactor,
        [{"lr": 0.01}, {"lr": 0.1, "d": 2.0}, {"weight_decay": 0.1, "beta2_decay": -0.6}],
    ),
    "adagrad": (
        optim.Adagrad,
        [{"lr": 0.1}, {"lr_decay": 0.1}, {"initial_accumulator_value": 0.3, "weight_decay": 0.1}],
    ),
    "adam": (
        optim.Adam,
        [{"lr": 0.01}, {"betas": (0.8, 0.9), "amsgrad": True}, {"weight_decay": 0.1, "eps": 1e-3}],
    ),
    "adam_foreach": (optim.Adam, [{"lr": 0.01, "foreach": True}, {"lr": 0.1}, {"foreach": False}]),
    "adam_fused": (optim.Adam, [{"lr": 0.01, "fused": True}, {"lr": 0.1}, {"fused": False}]),
    "adam_maximize": (optim.Adam, [{"maximize": True}, {"lr": 0.1}, {"maximize": True}]),
    "adam_tensor_lr": (
        optim.Adam,
        # In double precision: torch computes the coefficients in the precision of the tensor.
        [
            {"lr": torch.tensor(0.01, dtype=torch.float64)},
            {"lr": 0.1},
            {"lr": torch.tensor([0.001], dtype=torch.float64)},
        ],
    ),
    "adamax": (optim.Adamax, [{"lr": 0.01}, {"betas": (0.8, 0.9)}, {"weight_decay": 0.1}]),
    "adamw": (
        optim.AdamW,
        [{"lr": 0.01}, {"betas": (0.8, 0.9), "amsgrad": True}, {"weight_decay": 0.3}],
    ),
    "asgd": (optim.ASGD, [{"lr": 0.01}, {"lr": 0.1, "lambd": 0.01, "t0": 3}, {"alpha": 0.5}]),
    "muon": (
        optim.Muon,
        [{"lr": 0.01}, {"momentum": 0.5, "nesterov": False}, {"adjust_lr_fn": "match_rms_adamw"}],
    ),
    "nadam": (
        optim.NAdam,
        [{"lr": 0.01}, {"momentum_decay": 0.1}, {"decoupled_weight_decay": True}],
    ),
    "radam": (optim.RAdam, [{"lr": 0.01}, {"betas": (0.8, 0.9)}, {"weight_decay": 0.1}]),
    "rmsprop": (
        optim.RMSprop,
        [{"lr": 0.01}, {"centered": True, "momentum": 0.9}, {"alpha": 0.5, "weight_decay": 0.1}],
    ),
    "rprop": (optim.Rprop, [{"lr": 0.01}, {"etas": (0.4, 1.5)}, {"step_sizes": (1e-4, 0.1)}]),
    "sgd": (optim.SGD, [{"lr": 0.1}, {"weight_decay": 0.1}, {"lr": 0.01, "maximize": True}]),
    "sgd_momentum": (
        optim.SGD,
        [
            {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
            {"lr": 0.1, "momentum": 0.8, "nesterov": True},
            {"lr": 0.01},
        ],
    ),
}


class HandMade:
    """M models whose parameters are views of stacked ones, and M copies that stay alone.

    `build` makes a model; an optimizer class stands for a small network that it can train.
    """

    def __init__(self, build=None, num_models=3, dtype=torch.float64):
        torch.manual_seed(0)
        if build is None or (isinstance(build, type) and issubclass(build, optim.Optimizer)):
            # Muon takes matrices only.
            bias = build is not optim.Muon
            build = partial(_mlp, bias)
        self.models = [build().to(dtype) for _ in range(num_models)]
        self.alone = [copy.deepcopy(model) for model in self.models]
        by_model = [dict(model.named_parameters()) for model in self.models]
        self.stacked = {
            name: nn.Parameter(
                torch.stack([named[name].detach() for named in by_model]),
                requires_grad=by_model[0][name].requires_grad,
            )
            for name in by_model[0]
        }
        for name, parameter in self.stacked.items():
            for named, piece in zip(by_model, parameter.data.unbind(0), strict=True):
                named[name].data = piece
        self.active = [True] * num_models

    def optimizer(self, optimizer_cls, configs):
        return build_optimizer(
            self.stacked, self.models, optimizer_cls, configs, active=lambda: self.active
        )

    def alone_optimizers(self, optimizer_cls, configs):
        return [
            optimizer_cls(model.parameters(), **copy.deepcopy(config))
            for model, config in zip(self.alone, configs, strict=True)
        ]

    def losses(self, loss: Callable[[Callable, int], Tensor]) -> Tensor:
        """Every model's own loss [M], through the stacked parameters."""
        pieces = {name: parameter.unbind(0) for name, parameter in self.stacked.items()}
        results = []
        for i, model in enumerate(self.models):
            own = {name: piece[i] for name, piece in pieces.items()}
            results.append(loss(partial(_call, model, own), i))
        return torch.stack(results)

    def step(self, optimizer, loss):
        optimizer.zero_grad()
        self.losses(loss).sum().backward()
        optimizer.step()

    def step_alone(self, optimizers, loss, which=None):
        for i, optimizer in enumerate(optimizers):
            if which is None or i in which:
                optimizer.zero_grad()
                loss(self.alone[i], i).backward()
                optimizer.step()

    def worst_error(self, other=None):
        """Largest relative difference between a model and its lone copy, over whole models."""
        errors = []
        for a, b in zip(self.models, other or self.alone, strict=True):
            p = torch.cat([t.detach().double().flatten() for t in a.parameters()])
            q = torch.cat([t.detach().double().flatten() for t in b.parameters()])
            errors.append(float((p - q).abs().max() / q.abs().max()))
        return max(errors)

    @staticmethod
    def assert_same_state(a, b):
        """Equal to the bit, tensors and all."""
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        elif isinstance(a, dict):
            assert a.keys() == b.keys()
            for key in a:
                HandMade.assert_same_state(a[key], b[key])
        elif isinstance(a, list | tuple):
            assert len(a) == len(b)
            for x, y in zip(a, b, strict=True):
                HandMade.assert_same_state(x, y)
        else:
            assert a == b


def _mlp(bias):
    return nn.Sequential(nn.Linear(3, 5, bias), nn.Tanh(), nn.Linear(5, 2, bias))


def _call(model, parameters, *args):
    return functional_call(model, parameters, args)


@pytest.fixture
def hand_made():
    return HandMade


@pytest.fixture
def cases():
    return CASES


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


@pytest.fixture
def regression():
    """dtype -> loss(model, i): least squares, with other data for each of up to 8 models."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(8, 8, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(8, 8, 2, generator=generator, dtype=torch.float64)

    def make(dtype=torch.float64):
        return lambda model, i: (model(x[i].to(dtype)) - y[i].to(dtype)).square().mean()

    return make
