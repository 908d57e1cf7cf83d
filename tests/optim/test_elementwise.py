"""Updates of all models at once on the stacked tensors: options, states and frozen models."""

import copy

import pytest
import torch
from torch import optim

from modelbatch.optim.elementwise_rules import RULES

pytestmark = pytest.mark.parametrize("optimizer_cls", sorted(RULES, key=lambda cls: cls.__name__))

CONFIGS = ({"lr": 0.01}, {"lr": 0.03}, {"lr": 0.02, "maximize": True})


def test_writes_to_options_take_effect(optimizer_cls, hand_made, regression):
    bundle, loss = hand_made(), regression()
    configs = [{"lr": torch.tensor(0.01, dtype=torch.float64)}, *CONFIGS[1:]]
    optimizer = bundle.optimizer(optimizer_cls, configs)
    alone = bundle.alone_optimizers(optimizer_cls, configs)
    for step in range(8):
        for groups in (optimizer.param_groups, [stock.param_groups[0] for stock in alone]):
            if step == 3:
                groups[0]["lr"].mul_(0.5)
                # Not the double of this value, and torch goes on in single precision with it.
                groups[1]["lr"] = torch.tensor(0.03)
            if step == 5:
                groups[1]["lr"] = 0.05
                groups[2]["maximize"] = False
                if "weight_decay" in groups[1]:
                    groups[1]["weight_decay"] = 0.1
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
        if step == 2:
            assert optimizer._elementwise._stack is not None
    assert bundle.worst_error() <= 1e-12


def test_an_option_that_is_a_tensor(optimizer_cls, hand_made, regression):
    """Torch has no rule for it but the arithmetic of tensors."""
    name, values = {
        optim.Adadelta: ("rho", (0.5,)),
        optim.Adafactor: ("d", (1.5,)),
        optim.ASGD: ("lambd", (0.2,)),
        optim.Rprop: ("etas", (0.5, 1.2)),
    }.get(optimizer_cls, ("betas", (0.5, 0.9)))
    tensors = tuple(torch.tensor(value, dtype=torch.float64) for value in values)
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optimizer_cls, CONFIGS)
    alone = bundle.alone_optimizers(optimizer_cls, CONFIGS)
    for step in range(8):
        if step == 2:
            value = tensors if len(tensors) > 1 else tensors[0]
            optimizer.param_groups[1][name] = alone[1].param_groups[0][name] = value
        if step == 4:
            tensors[0].mul_(0.5 if optimizer_cls is not optim.Adafactor else 2.0)
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
    assert bundle.worst_error() <= 1e-12


def test_writes_to_states_take_effect(optimizer_cls, hand_made, regression):
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optimizer_cls, CONFIGS)
    alone = bundle.alone_optimizers(optimizer_cls, CONFIGS)
    for step in range(6):
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
        for i, stock in enumerate(alone):
            for ours, own in ((optimizer, bundle.models[i]), (stock, bundle.alone[i])):
                state = ours.state[own[2].weight]
                state["step"].add_(1)
                if step == 2 and i == 1:
                    for value in state.values():
                        value.mul_(0.5)
    assert bundle.worst_error() <= 1e-12


def test_states_thrown_away(optimizer_cls, hand_made, regression):
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optimizer_cls, CONFIGS)
    alone = bundle.alone_optimizers(optimizer_cls, CONFIGS)
    for step in range(6):
        if step == 2:
            for each in (optimizer, *alone):
                each.state.clear()
        if step == 4:
            del optimizer.state[bundle.models[1][0].weight]
            del alone[1].state[bundle.alone[1][0].weight]
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
    assert bundle.worst_error() <= 1e-12


def test_a_model_frozen_from_the_start(optimizer_cls, hand_made, regression):
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optimizer_cls, CONFIGS)
    alone = bundle.alone_optimizers(optimizer_cls, CONFIGS)
    for step in range(8):
        bundle.active = [step > 2, True, step < 6]
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss, which={i for i in range(3) if bundle.active[i]})
    assert bundle.worst_error() <= 1e-12


def test_all_frozen(optimizer_cls, hand_made, regression):
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optimizer_cls, CONFIGS)
    for _ in range(2):
        bundle.step(optimizer, loss)
    before = copy.deepcopy(bundle.models)
    states = [optimizer.model_state_dict(i) for i in range(3)]
    bundle.active[:] = [False] * 3
    bundle.step(optimizer, loss)
    assert bundle.worst_error(before) == 0
    hand_made.assert_same_state([optimizer.model_state_dict(i) for i in range(3)], states)


def test_half_precision_steps_as_torch_does(optimizer_cls, hand_made, regression):
    bundle, loss = hand_made(dtype=torch.bfloat16), regression(torch.bfloat16)
    optimizer = bundle.optimizer(optimizer_cls, CONFIGS)
    alone = bundle.alone_optimizers(optimizer_cls, CONFIGS)
    for _ in range(3):
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
    assert bundle.worst_error() == 0


def test_no_view_is_made(optimizer_cls, hand_made, regression):
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optimizer_cls, CONFIGS)
    for step in range(3):
        bundle.step(optimizer, loss)
        assert optimizer._views.shown == (step == 0)
        assert (bundle.models[0][0].weight.grad is None) == (step > 0)
