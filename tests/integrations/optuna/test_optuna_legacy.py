"""`ModelBatchStudy` and `ConstraintSpec` of version 0.1.0 do what its documentation said."""

import io
from contextlib import redirect_stdout
from typing import Any

import optuna
import pytest
import torch
from integrations.optuna.optuna_case import X, Y, of_state, tpe
from optuna.trial import TrialState
from sweep.sweep_case import build
from torch import nn
from torch.nn import functional as F

from modelbatch import ModelBatch, ModelBatchError, OptimizerFactory
from modelbatch.integrations.optuna import ConstraintSpec, ModelBatchStudy
from modelbatch.integrations.optuna.recovery import ERROR, is_lost


class Study(ModelBatchStudy):
    def suggest_parameters(self, trial: optuna.Trial) -> dict[str, Any]:
        return {
            "model.width": trial.suggest_categorical("width", [4, 6]),
            "optimizer.lr": trial.suggest_float("lr", 0.001, 0.1, log=True),
            "optimizer.weight_decay": trial.suggest_float("weight_decay", 1e-5, 1e-2, log=True),
            "data.batch_size": 22,
        }


def factory(parameters: dict[str, Any]) -> nn.Module:
    return build({"width": parameters["model.width"]})


class Objective:
    """Trains a bundle, and notes what it was given."""

    def __init__(self) -> None:
        self.given: list[tuple[int, list[dict[str, Any]]]] = []

    def __call__(self, bundle: ModelBatch, configs: list[dict[str, Any]]) -> list[float]:
        self.given.append((bundle.models[0][0].out_features, configs))
        optimizer = OptimizerFactory(torch.optim.Adam).create_optimizer(bundle, configs)
        for _ in range(3):
            optimizer.zero_grad()
            loss = bundle.compute_loss(bundle(X), Y, F.cross_entropy)
            loss.backward()
            optimizer.step()
        assert bundle.latest_losses is not None
        return bundle.latest_losses.tolist()


def new(constraints: ConstraintSpec | None = None, **kwargs: Any) -> Study:
    return Study(optuna.create_study(sampler=tpe()), factory, constraints, **kwargs)


@pytest.mark.parametrize("most", [1, 3, None])
def test_groups_are_trained_by_structure(most: int | None) -> None:
    torch.manual_seed(0)
    own, objective = new(max_models_per_batch=most, periodic_execution_interval=6), Objective()
    own.optimize(objective, n_trials=14, show_progress_bar=False)
    trials = own.study.trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 14
    told = {trial.params["lr"]: trial for trial in trials}
    assert sum(len(configs) for _, configs in objective.given) == 14
    for width, configs in objective.given:
        assert len(configs) <= (most or 14)
        for config in configs:
            assert set(config) == {"lr", "weight_decay"}
            assert told[config["lr"]].params["width"] == width
            assert told[config["lr"]].params["weight_decay"] == config["weight_decay"]
    assert len(objective.given) > 2  # the sampler learns before the last trial
    assert own.get_optimization_summary() == {
        "total_trials": 14,
        "completed_trials": 14,
        "failed_trials": 0,
        "total_groups": len(objective.given),
        "ready_groups": 0,
    }


def test_values_belong_to_their_trials() -> None:
    def objective(bundle: ModelBatch, configs: list[dict[str, Any]]) -> Any:
        return torch.tensor([config["lr"] for config in configs], dtype=torch.float64)

    own = new(max_models_per_batch=4)
    own.optimize(objective, n_trials=9, show_progress_bar=False)
    assert all(trial.value == trial.params["lr"] for trial in own.study.trials)


def test_constraints_separate_groups_of_one_structure() -> None:
    spec = ConstraintSpec(fixed_params=["model.width"], variable_params=["optimizer.lr"])
    objective = Objective()
    own = new(spec, max_models_per_batch=3)
    own.optimize(objective, n_trials=12, show_progress_bar=False)
    assert len(own.study.trials) == 12  # more than one group of each kind
    for _, configs in objective.given:
        assert all(set(config) == {"lr"} for config in configs)


def test_small_groups_wait() -> None:
    objective = Objective()
    own = new(min_models_per_batch=4, periodic_execution_interval=2)
    own.optimize(objective, n_trials=12, show_progress_bar=False)
    sizes = [len(configs) for _, configs in objective.given]
    assert sum(sizes) == 12 and all(size >= 4 for size in sizes[:-2])


def test_an_objective_that_raises_fails_its_trials() -> None:
    def objective(bundle: ModelBatch, configs: list[dict[str, Any]]) -> list[float]:
        raise RuntimeError("no training today")

    own = new(max_models_per_batch=2)
    with pytest.raises(RuntimeError, match="no training today"):
        own.optimize(objective, n_trials=9, show_progress_bar=False)
    failed = of_state(own.study, TrialState.FAIL)
    assert [trial.user_attrs.get(ERROR) for trial in failed if not is_lost(trial)] == [
        "RuntimeError: no training today"
    ] * 2
    assert not of_state(own.study, TrialState.RUNNING)
    waiting = of_state(own.study, TrialState.WAITING)
    assert len(waiting) == sum(map(is_lost, failed))
    own.optimize(Objective(), n_trials=4, show_progress_bar=False)
    assert len(of_state(own.study, TrialState.COMPLETE)) == 4


def test_too_few_numbers_and_nan() -> None:
    own = new(max_models_per_batch=2)
    with pytest.raises(ModelBatchError, match="returned 1 numbers for 2 models"):
        own.optimize(lambda bundle, configs: [1.0], n_trials=4, show_progress_bar=False)

    def objective(bundle: ModelBatch, configs: list[dict[str, Any]]) -> list[float]:
        return [float("nan"), *range(1, len(configs))]

    own = new(max_models_per_batch=2)
    own.optimize(objective, n_trials=4, show_progress_bar=False)
    errors = [trial.user_attrs.get(ERROR) for trial in of_state(own.study, TrialState.FAIL)]
    assert errors and set(errors) == {"the objective returned NaN"}


def test_the_bar_and_the_default_number() -> None:
    own, output = new(periodic_execution_interval=50), io.StringIO()
    with redirect_stdout(output):
        own.optimize(lambda bundle, configs: [0.0] * len(configs))
    assert len(own.study.trials) == 100
    assert "trials" in output.getvalue()


def test_refusals() -> None:
    with pytest.raises(ModelBatchError, match="max_models_per_batch must be a positive integer"):
        new(max_models_per_batch=0)
    several = optuna.create_study(directions=["minimize", "minimize"])
    with pytest.raises(ModelBatchError, match="the study has more"):
        Study(several, factory)
    own = ModelBatchStudy(optuna.create_study(), factory)
    with pytest.raises(NotImplementedError, match="suggest_parameters"):
        own.optimize(Objective(), n_trials=1, show_progress_bar=False)
    assert [trial.state for trial in own.study.trials] == [TrialState.FAIL]


def test_constraint_spec() -> None:
    with pytest.raises(ValueError, match="both fixed and variable: \\['a'\\]"):
        ConstraintSpec(["a"], ["a", "b"])
    with pytest.warns(UserWarning, match="are not looked at"):
        auto = ConstraintSpec(["a"], ["a"], use_auto_compatibility=True)
    assert auto.get_constraint_key({}, nn.Linear(2, 3)) == auto.get_constraint_key(
        {"x": 1}, nn.Linear(2, 3)
    )
    assert auto.get_constraint_key({}, nn.Linear(2, 3)) != auto.get_constraint_key(
        {}, nn.Linear(3, 2)
    )
    spec = ConstraintSpec(["a"], ["b"], ["c"])
    key = spec.get_constraint_key({"a": 1, "b": 2, "c": 3})
    assert key == spec.get_constraint_key({"c": 3, "b": 7, "a": 1})
    assert key != spec.get_constraint_key({"a": 1, "b": 2, "c": 4})
    trial = optuna.create_study().ask()
    assert spec.validate_trial(trial)
    spec.variable_params.append("a")
    with pytest.raises(ModelBatchError, match="both fixed and variable"):
        spec.validate_trial(trial)
