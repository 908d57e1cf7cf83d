"""Adafactor on the stacked tensors: what it does to the views, and what it leaves to torch."""

import pytest
import torch
from torch.optim import Adafactor

CONFIGS = ({"lr": 0.01}, {"lr": 0.03}, {"lr": 0.02, "maximize": True})


def test_no_view_is_made_after_the_first_step(hand_made, regression):
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(Adafactor, CONFIGS)
    for step in range(3):
        bundle.step(optimizer, loss)
        assert optimizer._views.shown == (step == 0)
        assert (bundle.models[0][0].weight.grad is None) == (step > 0)


def test_half_precision_steps_as_torch_does(hand_made, regression):
    bundle, loss = hand_made(dtype=torch.bfloat16), regression(torch.bfloat16)
    optimizer = bundle.optimizer(Adafactor, CONFIGS)
    alone = bundle.alone_optimizers(Adafactor, CONFIGS)
    for _ in range(3):
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
    assert bundle.worst_error() == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", torch.tensor(0.03)),  # torch goes on in single precision with it
        ("d", torch.tensor(1.5, dtype=torch.float64)),
    ],
)
def test_tensors_that_are_left_to_torch(option, value, hand_made, regression):
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(Adafactor, CONFIGS)
    alone = bundle.alone_optimizers(Adafactor, CONFIGS)
    for step in range(8):
        if step in (2, 5):
            chosen = value if step == 2 else float(value)
            optimizer.param_groups[1][option] = alone[1].param_groups[0][option] = chosen
        bundle.step(optimizer, loss)
        assert optimizer._views.shown == (step == 0 or 2 <= step < 5)
        bundle.step_alone(alone, loss)
    assert bundle.worst_error() <= 1e-12


def test_writes_to_numbers_of_steps_take_effect(hand_made, regression):
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(Adafactor, CONFIGS)
    alone = bundle.alone_optimizers(Adafactor, CONFIGS)
    for _ in range(6):
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
        for i, stock in enumerate(alone):
            optimizer.state[bundle.models[i][2].weight]["step"].add_(1)
            stock.state[bundle.alone[i][2].weight]["step"].add_(1)
    assert bundle.worst_error() <= 1e-12
