"""How many models `bundle_size="auto"` puts into a bundle."""

from typing import Any

import pytest
import torch
from torch import nn

import modelbatch.sweep.sizing as sizing
from modelbatch.sweep.trials import make_trials

CPU = torch.device("cpu")


def size(
    model: nn.Module, batch: int, free: int, monkeypatch: pytest.MonkeyPatch, **config: Any
) -> int:
    (trial,) = make_trials(
        [config],
        seed=0,
        seeds=None,
        epochs=1,
        batch_size=batch,
        optimizer_cls=torch.optim.SGD,
        loss_fn=nn.functional.cross_entropy,
    )
    monkeypatch.setattr(sizing, "free_memory", lambda device: free)
    return sizing.automatic_size(model, trial, (torch.zeros(batch, 100), None), CPU)


def test_parameters_states_and_what_backward_needs_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(100, 250, bias=False), nn.Tanh())
    parameters, kept = 4 * 100 * 250, 4 * 8 * (100 + 250)
    for config, states in (
        ({}, 0),
        ({"momentum": 0.9}, 1),
        ({"optimizer_cls": "Adam"}, 2),
        ({"optimizer_cls": "Adam", "amsgrad": True}, 3),
    ):
        need = (2 + states) * parameters + 2 * kept
        free = round(10.5 * need / 0.4)
        assert size(model, 8, free, monkeypatch, **config) == 10


def test_there_is_one_at_least_and_there_are_not_too_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(100, 2)
    assert size(model, 8, 0, monkeypatch) == 1
    assert size(model, 8, 1 << 50, monkeypatch) == sizing.MOST


def test_measuring_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(100, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    size(model, 8, 1 << 30, monkeypatch)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_free_memory_is_a_sensible_number() -> None:
    assert 0 < sizing.free_memory(CPU) < 1 << 50


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert sizing.is_out_of_memory(error) is expected
