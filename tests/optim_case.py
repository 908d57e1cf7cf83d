"""The update rules as tests see them: every rule with five models whose options all differ, and
torch.optim for each model alone as the truth."""

import functools
from dataclasses import dataclass

import torch

from modelbatch.ops import optim

M = 5
STATE_DTYPE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


@dataclass(frozen=True)
class Rule:
    """One rule: torch's class, the keys of its states, and the options of each model."""

    name: str
    torch_class: type[torch.optim.Optimizer]
    states: tuple[str, ...]
    models: tuple[dict, ...]

    @property
    def step_(self):
        return getattr(optim, f"{self.name}_step_")

    def hyper(self, models=None):
        """The options as the operator reads them, float64 [K, M]."""
        models = self.models if models is None else models
        flat = []
        for options in models:
            options = dict(options)
            options["beta1"], options["beta2"] = options.pop("betas", (0.9, 0.999))
            options["etaminus"], options["etaplus"] = options.pop("etas", (0.5, 1.2))
            low_high = options.pop("step_sizes", (1e-6, 50))
            options["step_size_min"], options["step_size_max"] = low_high
            options.setdefault("decoupled", options.get("decoupled_weight_decay", 0))
            flat.append(options)
        rows = optim.HYPER_ROWS[self.name]
        defaults = self.torch_class([torch.zeros(1)], lr=1.0).defaults
        values = [[float(o.get(r, defaults.get(r, 0))) for o in flat] for r in rows]
        return torch.tensor(values, dtype=torch.float64).reshape(len(rows), len(models))


ADAM = (
    {"lr": 1e-2},
    {"lr": 3e-3, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1},
    {"lr": 1e-2, "betas": (0.0, 0.99), "amsgrad": True, "maximize": True},
    {"lr": 2e-1, "betas": (0.3, 0.7), "eps": 1e-6, "amsgrad": True, "weight_decay": 0.02},
    {"lr": 5e-2, "betas": (0.8, 0.95), "weight_decay": 0.3, "maximize": True},
)

RULES = {
    rule.name: rule
    for rule in (
        Rule(
            "sgd",
            torch.optim.SGD,
            ("momentum_buffer",),
            (
                {"lr": 1e-2},
                {"lr": 3e-2, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
                {"lr": 1e-1, "momentum": 0.5, "nesterov": True},
                {"lr": 2e-2, "weight_decay": 0.05, "maximize": True},
                {"lr": 5e-2, "momentum": 0.99, "nesterov": True, "weight_decay": 0.2},
            ),
        ),
        Rule(
            "adam",
            torch.optim.Adam,
            ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
            (*ADAM[:-1], ADAM[-1] | {"decoupled_weight_decay": True}),
        ),
        Rule("adamw", torch.optim.AdamW, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), ADAM),
        Rule(
            "rmsprop",
            torch.optim.RMSprop,
            ("square_avg", "grad_avg", "momentum_buffer"),
            (
                {"lr": 1e-2},
                {"lr": 3e-3, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1},
                {"lr": 1e-2, "alpha": 0.4, "centered": True, "maximize": True},
                {"lr": 2e-2, "momentum": 0.9, "eps": 1e-6},
                {"lr": 5e-3, "alpha": 0.8, "momentum": 0.4, "centered": True, "weight_decay": 0.3},
            ),
        ),
        Rule(
            "adagrad",
            torch.optim.Adagrad,
            ("sum",),
            (
                {"lr": 1e-2},
                {"lr": 3e-1, "lr_decay": 0.1, "weight_decay": 0.1},
                {"lr": 1e-1, "eps": 1e-2, "maximize": True},
                {"lr": 2e-1, "lr_decay": 0.7, "initial_accumulator_value": 0.5},
                {"lr": 5e-2, "weight_decay": 0.3, "initial_accumulator_value": 2.0},
            ),
        ),
        Rule(
            "adadelta",
            torch.optim.Adadelta,
            ("square_avg", "acc_delta"),
            (
                {"lr": 1.0},
                {"lr": 0.3, "rho": 0.5, "weight_decay": 0.1},
                {"lr": 2.0, "eps": 1e-3, "maximize": True},
                {"lr": 0.7, "rho": 0.99, "eps": 1e-2},
                {"lr": 1.5, "rho": 0.0, "weight_decay": 0.3, "maximize": True},
            ),
        ),
        Rule(
            "adamax",
            torch.optim.Adamax,
            ("exp_avg", "exp_inf"),
            (
                {"lr": 1e-2},
                {"lr": 3e-2, "betas": (0.5, 0.9), "weight_decay": 0.1},
                {"lr": 1e-1, "betas": (0.0, 0.5), "maximize": True},
                {"lr": 2e-2, "eps": 1e-2},
                {"lr": 5e-2, "betas": (0.3, 0.99), "weight_decay": 0.3, "maximize": True},
            ),
        ),
        Rule(
            "radam",
            torch.optim.RAdam,
            ("exp_avg", "exp_avg_sq"),
            (
                {"lr": 1e-2},
                {"lr": 3e-2, "betas": (0.5, 0.9), "weight_decay": 0.1},
                {"lr": 1e-1, "betas": (0.0, 0.999), "maximize": True},
                {"lr": 2e-2, "eps": 1e-2, "weight_decay": 0.2, "decoupled_weight_decay": True},
                {"lr": 5e-2, "betas": (0.3, 0.5), "weight_decay": 0.3, "maximize": True},
            ),
        ),
        Rule(
            "rprop",
            torch.optim.Rprop,
            ("prev", "step_size"),
            (
                {"lr": 1e-2},
                {"lr": 3e-2, "etas": (0.3, 1.5)},
                {"lr": 1e-1, "step_sizes": (5e-2, 0.2), "maximize": True},
                {"lr": 2e-2, "etas": (0.9, 1.05)},
                {"lr": 5e-2, "step_sizes": (1e-3, 6e-2)},
            ),
        ),
    )
}

SHAPES = [(16, 5), (7,), (), (3, 2, 4)]


def make_tensors(shapes=SHAPES, m=M, dtype=torch.float64, steps=10, seed=0):
    """Parameters, and gradients for every step; equal values for every dtype up to rounding."""
    drawn = draw(tuple(map(tuple, shapes)), m, steps, seed)
    params = [d[0].to(dtype, copy=True) for d in drawn]
    return params, [[d[i + 1].to(dtype, copy=True) for d in drawn] for i in range(steps)]


@functools.cache
def draw(shapes, m, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(steps + 1, m, *s) for s in shapes]
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def make_states(rule, params, models=None, fill=0.0):
    """Every list of states full, as before the first step."""
    models = rule.models if models is None else models
    states = [
        [torch.full_like(p, fill, dtype=STATE_DTYPE[p.dtype]) for p in params] for _ in rule.states
    ]
    if rule.name == "rprop":
        for size in states[1]:
            for model, options in enumerate(models):
                size[model] = options["lr"]
    if rule.name == "adagrad":
        for total in states[0]:
            for model, options in enumerate(models):
                total[model] = options.get("initial_accumulator_value", 0.0)
    return states


def run(rule, params, grads, states=None, step=None, models=None, **common):
    """Steps copies of the parameters; returns them, the states and the step counts."""
    models = rule.models if models is None else models
    params = [p.clone() for p in params]
    states = make_states(rule, params, models) if states is None else states
    step = torch.zeros(len(models)) if step is None else step.clone()
    for now in grads:
        rule.step_(params, now, *states, step, rule.hyper(models), **common)
    return params, states, step


def run_torch(rule, params, grads, models=None, halve=None):
    """What torch.optim makes of each model alone: parameters and states stacked again. With
    `halve`, the parameters are rounded to that dtype after every step."""
    models = rule.models if models is None else models
    params = [p.clone() for p in params]
    states = [[torch.zeros_like(p) for p in params] for _ in rule.states]
    for model, options in enumerate(models):
        own = [p[model].clone() for p in params]
        optimizer = rule.torch_class(own, **options, foreach=False)
        for now in grads:
            for p, g in zip(own, now, strict=True):
                p.grad = g[model].clone()
            optimizer.step()
            if halve is not None:
                for p in own:
                    p.copy_(p.to(halve))
        for i, p in enumerate(own):
            params[i][model] = p
            for name, stacked in zip(rule.states, states, strict=True):
                value = optimizer.state[p].get(name)
                if value is not None:
                    stacked[i][model] = value
    return params, states


def assert_same_bits(a, b):
    """The same tensors, NaN bit by bit."""
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        assert torch.equal(x.contiguous().view(ints), y.contiguous().view(ints))
