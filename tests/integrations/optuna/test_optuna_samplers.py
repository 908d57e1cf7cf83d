"""Samplers, enqueued trials, limits, and callbacks of Optuna."""

import io
import json
from typing import Any

import optuna
import pytest
from integrations.optuna.optuna_case import (
    assert_as_alone,
    assert_same_trials,
    flat_space,
    make,
    of_state,
    sequential,
    tpe,
)
from optuna.samplers import (
    BruteForceSampler,
    CmaEsSampler,
    GridSampler,
    PartialFixedSampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import TrialState
from rich.console import Console

NO_PRUNER = optuna.pruners.NopPruner()


@pytest.mark.parametrize("name", ["tpe", "tpe apart", "cma", "random", "qmc"])
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_samplers_suggest_what_they_suggest_without_modelbatch(name: str) -> None:
    def sampler() -> Any:
        return {
            "tpe": lambda: tpe(3),
            "tpe apart": lambda: TPESampler(
                seed=1, multivariate=False, constant_liar=True, n_startup_trials=4
            ),
            "cma": lambda: CmaEsSampler(
                seed=2, n_startup_trials=3, warn_independent_sampling=False
            ),
            "random": lambda: RandomSampler(seed=4),
            "qmc": lambda: QMCSampler(seed=5),
        }[name]()

    study = optuna.create_study(sampler=sampler(), pruner=NO_PRUNER)
    expected = optuna.create_study(sampler=sampler(), pruner=NO_PRUNER)
    result = make(study, flat_space, bundle_size=4, epochs=2).run(18, progress=False)
    sequential(expected, 18, 4, own_space=flat_space, epochs=2)
    assert_same_trials(study, expected)
    assert len({trial.params["lr"] for trial in study.trials}) == 18
    assert_as_alone(study, result, epochs=2)


@pytest.mark.parametrize("places", [1, 4, 20])
def test_a_grid_is_visited_once(places: int) -> None:
    """The sampler stops the study by itself, and every point has been trained once."""
    grid = {"lr": [0.001, 0.01, 0.1], "weight_decay": [0.001, 0.0001, 0.00001]}
    study = optuna.create_study(sampler=GridSampler(grid, seed=0), pruner=NO_PRUNER)
    make(study, flat_space, bundle_size=places, epochs=1).run(progress=False)
    points = [tuple(trial.params.values()) for trial in of_state(study, TrialState.COMPLETE)]
    assert len(points) == len(set(points)) == 9
    make(study, flat_space, bundle_size=places, epochs=1).run(5, progress=False)
    assert len(study.trials) == 9


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_all_combinations_of_a_space_of_ones_own() -> None:
    def own_space(trial: optuna.Trial) -> None:
        trial.suggest_categorical("lr", [0.01, 0.1])
        trial.suggest_float("weight_decay", 0.0, 0.002, step=0.001)

    study = optuna.create_study(sampler=BruteForceSampler(seed=0), pruner=NO_PRUNER)
    make(study, own_space, bundle_size=2, epochs=1).run(progress=False)
    points = {tuple(trial.params.values()) for trial in study.trials}
    assert len(points) == 6


def test_enqueued_trials_come_first_with_their_attributes() -> None:
    study = optuna.create_study(sampler=tpe(), pruner=NO_PRUNER)
    study.enqueue_trial({"lr": 0.05, "weight_decay": 1e-3}, user_attrs={"memo": "mine"})
    study.enqueue_trial({"lr": 0.02})
    result = make(study, flat_space, bundle_size=3).run(4, progress=False)
    assert study.trials[0].params == {"lr": 0.05, "weight_decay": 1e-3}
    assert study.trials[0].user_attrs["memo"] == "mine"
    assert study.trials[1].params["lr"] == 0.02
    assert len(study.trials) == 4
    assert_as_alone(study, result)


def test_n_trials_is_so_many_more_and_total_so_many_in_all() -> None:
    study = optuna.create_study(sampler=tpe(), pruner=NO_PRUNER)
    sweep = make(study, flat_space, bundle_size=4, epochs=1)
    assert len(sweep.run(3, progress=False)) == 3
    assert len(sweep.run(3, progress=False)) == 6
    assert len(sweep.run(total=10, progress=False)) == 10
    assert len(sweep.run(total=10, progress=False)) == 10
    elsewhere = study.ask()  # somebody else trains the eleventh
    assert len(sweep.run(total=12, progress=False)) == 12
    assert study.trials[elsewhere.number].state == TrialState.RUNNING


def test_after_the_timeout_no_trial_begins() -> None:
    study = optuna.create_study(sampler=tpe(), pruner=NO_PRUNER)
    result = make(study, flat_space, bundle_size=2, epochs=1).run(timeout=0.05, progress=False)
    assert result.status == "finished"
    assert all(own.status == "finished" for own in result.values())
    count = len(result)
    assert count < 2000
    result = make(study, flat_space, bundle_size=2).run(5, timeout=1e-9, progress=False)
    assert len(result) == count


def test_callbacks_of_optuna_may_stop_the_study() -> None:
    told: list[tuple[int, TrialState]] = []

    def note(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        told.append((trial.number, trial.state))
        assert trial.state.is_finished()

    study = optuna.create_study(sampler=tpe(), pruner=optuna.pruners.MedianPruner(2))
    most = optuna.study.MaxTrialsCallback(6, states=(TrialState.COMPLETE,))
    make(study, flat_space, bundle_size=3).run(callbacks=[note, most], progress=False)
    assert sorted(number for number, _ in told) == [trial.number for trial in study.trials]
    assert 6 <= len(of_state(study, TrialState.COMPLETE)) <= 8  # those alive go on to their end
    assert {state for _, state in told} == {TrialState.COMPLETE, TrialState.PRUNED}


def test_what_is_shown() -> None:
    output = io.StringIO()
    console = Console(file=output, width=200)
    make(None, flat_space, bundle_size=3, epochs=2, pruner=NO_PRUNER).run(5, console=console)
    lines = output.getvalue().splitlines()
    assert "5/5 trials: 5 finished; best val_loss" in lines[-1]
    output = io.StringIO()
    terminal = Console(file=output, width=200, force_terminal=True)
    make(None, flat_space, bundle_size=3, epochs=2, pruner=NO_PRUNER).run(5, console=terminal)
    assert "5/5 trials" in output.getvalue()


def test_attributes_are_json(tmp_path: Any) -> None:
    """What the sweep writes to a trial, any storage and any tool can read."""
    sweep = make(f"sqlite:///{tmp_path}/study.db", flat_space, bundle_size=2, epochs=1)
    sweep.run(2, progress=False)
    attributes = sweep.study.trials[0].user_attrs
    assert set(attributes) == {"modelbatch_run"}
    assert set(json.loads(json.dumps(attributes["modelbatch_run"]))) == {
        "host",
        "pid",
        "started",
        "run",
    }


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_sampler_without_a_liar_is_warned_of() -> None:
    def study(sampler: Any) -> optuna.Study:
        return optuna.create_study(sampler=sampler, pruner=NO_PRUNER)

    blind = TPESampler(seed=0, constant_liar=False)
    with pytest.warns(UserWarning, match=r"Make it with TPESampler\(constant_liar=True\)"):
        make(study(blind), flat_space, bundle_size=2, epochs=1).run(2, progress=False)
    fixed = PartialFixedSampler({"lr": 0.01}, blind)
    with pytest.warns(UserWarning, match="constant_liar=False"):
        make(study(fixed), flat_space, bundle_size=2, epochs=1).run(2, progress=False)
    make(study(blind), flat_space, bundle_size=1, epochs=1).run(2, progress=False)  # no matter


def test_the_default_sampler_goes_on_with_other_numbers(tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    settings = {"study_name": "s", "bundle_size": 3, "epochs": 1, "sampler": None, "seed": 11}
    for _ in range(2):
        sweep = make(url, flat_space, **settings)
        sweep.run(3, progress=False)
    assert isinstance(sweep.study.sampler, TPESampler)
    assert len({trial.params["lr"] for trial in sweep.study.trials}) == 6
    alone = optuna.create_study(sampler=TPESampler(seed=11), pruner=NO_PRUNER)
    assert flat_space(alone.ask())["lr"] == sweep.study.trials[0].params["lr"]
