"""A configuration that fails costs only itself, and bad arguments are refused before any runs."""

from typing import Any

import pytest
import torch
from sweep.sweep_case import alone, build, close, data
from torch import nn

import modelbatch.sweep.assembly as assembly
from modelbatch import ModelBatchError
from modelbatch.callbacks import Callback, EarlyStopping
from modelbatch.sweep import run_sweep

X, Y = data()
VAL = (X[:10], Y[:10])


def sweep(configs: Any, own_build: Any = build, **kwargs: Any) -> Any:
    settings = {"epochs": 3, "batch_size": 8, "progress": False} | kwargs
    return run_sweep(own_build, configs, (X, Y), VAL, **settings)


def assert_as_alone(result: Any, number: int) -> None:
    own = result[number]
    assert own.status == "finished"
    assert close(own.curves["val_loss"], alone(own.config, number, 3)[1])


def test_a_build_that_raises_fails_alone() -> None:
    def refusing(config: dict[str, Any]) -> nn.Module:
        if config["lr"] == 0.02:
            raise RuntimeError("no such network")
        return build(config)

    result = sweep([{"lr": 0.01}, {"lr": 0.02}, {"lr": 0.03}], refusing)
    assert result[1].status == "failed"
    assert result[1].error == "RuntimeError: no such network"
    assert result[1].value is None and result[1].epochs == 0
    for number in (0, 2):
        assert_as_alone(result, number)
    with pytest.raises(ModelBatchError, match="trial 1 failed, so it has no weights"):
        result.export(1)


def test_a_build_that_returns_no_module_fails_alone() -> None:
    result = sweep([{"lr": 0.01}, {"lr": 0.02}], lambda c: build(c) if c["lr"] == 0.01 else 3)
    assert result[1].error == "ModelBatchError: build must return a torch.nn.Module, got int"
    assert_as_alone(result, 0)


def test_a_model_that_cannot_train_fails_alone() -> None:
    """Seven share a bundle at first; the one with the wrong index is found by halving."""

    class Indexed(nn.Module):
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__()
            self.model = build(config)
            self.register_buffer("at", torch.tensor(config["at"]))

        def forward(self, x: Any) -> Any:
            return self.model(x[:, torch.arange(5) + self.at])

    configs = [{"lr": 0.01 * (i + 1), "at": 9 if i == 4 else 0} for i in range(7)]
    result = run_sweep(
        lambda c: Indexed(c), configs, (X, Y), VAL, epochs=3, batch_size=8, progress=False
    )
    assert result.counts == {"finished": 6, "failed": 1}
    assert result[4].error
    for number in (0, 1, 2, 3, 5, 6):
        assert_as_alone(result, number)


def test_a_diverged_trial_stops_at_once_and_is_never_the_best() -> None:
    configs = [{"lr": 0.01}, {"lr": 1e300, "weight_decay": 1e10}, {"lr": 0.03}]
    result = sweep(configs, optimizer_cls=torch.optim.SGD)
    assert result[1].status == "diverged"
    assert result[1].epochs == 1
    assert result.best.id != 1
    for number in (0, 2):
        expected = alone(configs[number], number, 3, optimizer_cls=torch.optim.SGD)
        assert close(result[number].curves["loss"], expected[0])


def test_all_may_diverge() -> None:
    result = sweep([{"lr": 1e300, "weight_decay": 1e10}] * 2, optimizer_cls=torch.optim.SGD)
    assert result.counts == {"diverged": 2}
    with pytest.raises(ModelBatchError, match="no trial has a value of 'val_loss'"):
        _ = result.best


def test_out_of_memory_halves_the_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Small(assembly.ModelBatch):
        def __init__(self, models: Any, **kwargs: Any) -> None:
            sizes.append(len(models))
            if len(models) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(models, **kwargs)

    monkeypatch.setattr(assembly, "ModelBatch", Small)
    configs = [{"lr": 0.01 * (i + 1)} for i in range(6)]
    result = sweep(configs, bundle_size=4)
    assert sizes == [4, 2, 2, 2]
    for number in range(6):
        assert_as_alone(result, number)


def test_a_single_model_without_memory_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(assembly.ModelBatch):
        def __init__(self, models: Any, **kwargs: Any) -> None:
            raise MemoryError("full")

    monkeypatch.setattr(assembly, "ModelBatch", Full)
    result = sweep([{"lr": 0.1}, {"lr": 0.2}])
    assert [own.error for own in result.values()] == ["MemoryError: full"] * 2


def test_callbacks_stop_trials_one_by_one() -> None:
    configs = [{"lr": 0.01, "seed": 1}, {"lr": 0.0, "seed": 1}]
    result = sweep(configs, callbacks=[EarlyStopping("val_loss", patience=1)])
    assert [own.status for own in result.values()] == ["finished", "stopped"]
    assert [own.epochs for own in result.values()] == [3, 2]
    result.export(1)


def test_a_callback_that_ends_the_training_stops_the_rest() -> None:
    class Stop(Callback):
        def on_train_step(self, event: Any) -> None:
            event.stop = True

    result = sweep([{"lr": 0.01}, {"lr": 0.02}], callbacks=[Stop()])
    assert result.counts == {"stopped": 2}
    assert [own.epochs for own in result.values()] == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"configs": []}, "a sweep needs at least one config"),
        ({"configs": [{"lr": 0.1}, 3]}, "trial 1: a config must be a dict, got int"),
        ({"configs": [{"lr": 0.1}, {"lr": -1.0}]}, "trial 1: option 'lr' is negative"),
        ({"configs": [{"batch_size": 0}]}, "trial 0: 'batch_size' must be a positive integer"),
        ({"configs": [{"epochs": 1.5}]}, "trial 0: 'epochs' must be a positive integer"),
        ({"configs": [{"optimizer_cls": "Sgd"}]}, "trial 0: 'optimizer_cls' must be a class"),
        ({"configs": [{"optimizer_cls": "LBFGS"}]}, "does not bundle LBFGS"),
        ({"configs": [{"loss_fn": "mse"}]}, "trial 0: 'loss_fn' must be callable, got str"),
        ({"configs": [{"seed": "a"}]}, "trial 0: 'seed': seeds.0. must be a 64-bit integer"),
        ({"configs": [{"clip_grad_norm": 0}]}, "trial 0: clip_grad_norm must be above 0"),
        ({"configs": "lr"}, "configs must be a list of dicts or a dict of lists, got str"),
        ({"epochs": 0}, "epochs must be a positive integer, got 0"),
        ({"bundle_size": "big"}, "bundle_size must be a positive integer or \"auto\", got 'big'"),
        ({"mode": "best"}, 'mode must be one of "min", "max"'),
        ({"metric": "acc"}, "metric must be one of loss, val_loss, got 'acc'"),
        ({"val_data": None, "metric": "val_loss"}, "there is no val_data"),
        ({"pruner": object()}, "pruner must have a method prune"),
        ({"callbacks": [3]}, "expected a Callback, got 3"),
        ({"seeds": [1, 2]}, "seeds has 2 entries for 1 models"),
        ({"train_data": (X, Y[:3])}, r"\(22, 5\), \(3,\)"),
        ({"train_data": 3}, "train_data must be tensors"),
        ({"train_data": (X[:0], Y[:0])}, "train_data has no samples"),
        ({"train_data": [(X, Y)], "configs": [{"batch_size": 4}]}, "needs data as tensors"),
        ({"keep_weights": "all"}, 'keep_weights must be one of "last", "best", None'),
        ({"build": 3}, "build must be callable, got int"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_built(
    arguments: dict[str, Any], message: str
) -> None:
    def never(config: dict[str, Any]) -> nn.Module:
        raise AssertionError("built")

    given = {
        "build": never,
        "configs": [{"lr": 0.1}],
        "train_data": (X, Y),
        "val_data": VAL,
        "epochs": 2,
        "progress": False,
    } | arguments
    with pytest.raises(ModelBatchError, match=message):
        run_sweep(**given)


def test_a_pruner_that_names_others_is_an_error_of_each_trial() -> None:
    class Wrong:
        def prune(self, epoch: int, values: Any) -> list[int]:
            return [99]

    result = sweep([{"lr": 0.1}], pruner=Wrong())
    assert "Wrong.prune returned 99" in result[0].error
