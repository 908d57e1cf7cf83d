"""What the tests of Optuna sweeps share: sweeps, and what they are compared with."""

import math
from collections.abc import Callable
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from sweep.sweep_case import alone, build, close, data

from modelbatch.integrations.optuna import OptunaSweep
from modelbatch.sweep import SweepResult

EPOCHS = 4
X, Y = data()
VAL = (X[:10], Y[:10])

Space = Callable[[optuna.Trial], Any]


def space(trial: optuna.Trial) -> dict[str, Any]:
    """Networks of two widths, with and without dropout, so of four structures."""
    return {
        "lr": trial.suggest_float("lr", 1e-4, 0.3, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-6, 1e-2, log=True),
        "width": trial.suggest_categorical("width", [4, 6]),
        "activation": trial.suggest_categorical("activation", ["tanh", "gelu"]),
    }


def flat_space(trial: optuna.Trial) -> dict[str, Any]:
    """Networks of one structure."""
    return {
        "lr": trial.suggest_float("lr", 1e-4, 0.3, log=True),
        "weight_decay": trial.suggest_float("weight_decay", 1e-6, 1e-2, log=True),
    }


def tpe(seed: int = 0, startup: int = 5) -> optuna.samplers.TPESampler:
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True, n_startup_trials=startup)


def make(given: Any = None, own_space: Space = space, own_build: Any = build, **kwargs: Any) -> Any:
    if given is None and "sampler" not in kwargs:
        kwargs["sampler"] = tpe()
    settings = {"epochs": EPOCHS, "batch_size": 8} | kwargs
    return OptunaSweep(given, own_space, own_build, (X, Y), VAL, **settings)


def sequential(
    study: optuna.Study,
    n_trials: int,
    places: int,
    *,
    own_space: Space = space,
    epochs: int = EPOCHS,
    report_every: int = 1,
    value: str = "best",
) -> None:
    """A plain ask-and-tell loop over models that are trained alone.

    There are `places`: in a round whoever has one does an epoch, and Optuna hears of it in the
    order of the trials' numbers; then the places that became free are given to new trials.
    """
    curves: dict[int, list[float]] = {}
    alive: dict[int, tuple[optuna.Trial, int]] = {}
    asked = 0
    better = min if study.direction == optuna.study.StudyDirection.MINIMIZE else max
    while True:
        while len(alive) < places and asked < n_trials:
            trial = study.ask()
            curves[trial.number] = alone(own_space(trial), trial.number, epochs)[1]
            alive[trial.number] = (trial, 0)
            asked += 1
        if not alive:
            return
        for number in sorted(alive):
            trial, done = alive[number]
            curve, step = curves[number], done + 1
            alive[number] = (trial, step)
            if step % report_every == 0 or step == epochs:
                trial.report(curve[step - 1], step)
                if trial.should_prune():
                    study.tell(trial, state=TrialState.PRUNED)
                    del alive[number]
                    continue
            if step == epochs:
                study.tell(trial, better(curve) if value == "best" else curve[-1])
                del alive[number]


def assert_same_trials(study: optuna.Study, expected: optuna.Study) -> None:
    """States, parameters and reported steps are equal, values to 1e-9."""
    assert len(study.trials) == len(expected.trials)
    for own, other in zip(study.trials, expected.trials):
        assert (own.number, own.state) == (other.number, other.state)
        assert own.params == other.params, own.number
        assert list(own.intermediate_values) == list(other.intermediate_values)
        for step, value in own.intermediate_values.items():
            assert close(value, other.intermediate_values[step])
        assert (own.values is None) == (other.values is None)
        if own.values is not None:
            assert close(own.values, other.values)


def assert_as_alone(study: optuna.Study, result: SweepResult, epochs: int = EPOCHS) -> None:
    """Every curve is that of the trial alone, as far as it went."""
    assert len(result) == len(study.trials)
    for trial in study.trials:
        own = result[trial.number]
        steps = own.epochs
        expected = alone(own.config, trial.number, epochs)
        assert close(own.curves["val_loss"], expected[1][:steps]), trial.number
        assert close(own.curves["loss"], expected[0][:steps])
        assert list(trial.intermediate_values.values()) == own.curves["val_loss"]


def of_state(study: optuna.Study, state: TrialState) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(state,))


def is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
