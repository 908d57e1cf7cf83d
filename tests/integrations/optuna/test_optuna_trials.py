"""Every trial has the result that it has alone, and Optuna is told what it would be told then."""

from typing import Any

import optuna
import pytest
import torch
from integrations.optuna.optuna_case import (
    EPOCHS,
    VAL,
    assert_as_alone,
    assert_same_trials,
    flat_space,
    make,
    of_state,
    sequential,
    space,
    tpe,
)
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PatientPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
    ThresholdPruner,
    WilcoxonPruner,
)
from optuna.trial import TrialState
from sweep.sweep_case import alone, build, close

import modelbatch.integrations.optuna.pool as pool
from modelbatch import accuracy
from modelbatch.integrations.optuna import OptunaSweep
from modelbatch.sweep.bundle import TrialBundle

PRUNERS: dict[str, Any] = {
    "median": lambda: MedianPruner(n_startup_trials=3, n_warmup_steps=1),
    "hyperband": lambda: HyperbandPruner(min_resource=1, max_resource=EPOCHS, reduction_factor=2),
    "halving": lambda: SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    "percentile": lambda: PercentilePruner(30.0, n_startup_trials=2),
    "threshold": lambda: ThresholdPruner(upper=1.05),
    "nop": NopPruner,
}


def new_study(pruner: BasePruner, direction: str = "minimize") -> optuna.Study:
    return optuna.create_study(
        sampler=tpe(), pruner=pruner, direction=direction, study_name="the same for both"
    )


@pytest.mark.parametrize("places", [1, 5])
@pytest.mark.parametrize("name", list(PRUNERS))
def test_optuna_hears_what_it_hears_without_modelbatch(name: str, places: int) -> None:
    study, expected = new_study(PRUNERS[name]()), new_study(PRUNERS[name]())
    result = make(study, bundle_size=places).run(18, progress=False)
    sequential(expected, 18, places)
    assert_same_trials(study, expected)
    assert_as_alone(study, result)
    pruned = of_state(study, TrialState.PRUNED)
    assert bool(pruned) == (name != "nop")
    assert len(of_state(study, TrialState.COMPLETE)) >= 2
    assert result.counts.get("pruned", 0) == len(pruned)


def test_one_at_a_time_is_study_optimize() -> None:
    def objective(trial: optuna.Trial) -> float:
        curve = alone(space(trial), trial.number, EPOCHS)[1]
        for step, value in enumerate(curve, 1):
            trial.report(value, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return min(curve)

    study, expected = new_study(MedianPruner(3)), new_study(MedianPruner(3))
    result = make(study, bundle_size=1).run(20, progress=False)
    expected.optimize(objective, n_trials=20)
    assert_same_trials(study, expected)
    assert {"finished", "pruned"} == set(result.counts)
    assert result.best.id == expected.best_trial.number


def test_the_larger_the_better_and_the_last_value() -> None:
    """A study that maximises is told values as they are."""
    study = new_study(MedianPruner(3), "maximize")
    expected = new_study(MedianPruner(3), "maximize")
    sweep = make(study, bundle_size=4, value="last", report_every=3)
    result = sweep.run(12, progress=False)
    sequential(expected, 12, 4, report_every=3, value="last")
    assert_same_trials(study, expected)
    assert result.mode == "max"
    assert result.best.value == max(r.value for r in result.values() if r.value is not None)
    for trial in of_state(study, TrialState.COMPLETE):
        assert list(trial.intermediate_values) == [3, 4]
        assert result[trial.number].value == trial.value == trial.intermediate_values[4]


def test_a_metric_of_ones_own() -> None:
    study = optuna.create_study(direction="maximize", sampler=tpe())
    sweep = make(study, bundle_size=6, metric="val_acc", metric_fns={"acc": accuracy})
    result = sweep.run(8, progress=False)
    assert result.metric == "val_acc"
    for trial in study.trials:
        assert set(result[trial.number].curves) == {"loss", "val_loss", "val_acc"}
        model = alone(result[trial.number].config, trial.number, EPOCHS)[2]
        with torch.no_grad():
            right = accuracy(model(VAL[0]), VAL[1]).item()
        if trial.state == TrialState.COMPLETE:
            assert trial.intermediate_values[EPOCHS] == pytest.approx(right)


def test_places_are_refilled_at_once_with_one_change_of_each_bundle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes, changes = [], []

    class Watched(TrialBundle):
        def run_epoch(self) -> Any:
            sizes.append(len(self))
            return super().run_epoch()

        def exchange(self, leave: Any = (), join: Any = ()) -> None:
            changes.append((len(sizes), len(list(leave)), len(list(join))))
            super().exchange(leave, join)

    monkeypatch.setattr(pool, "TrialBundle", Watched)
    study = optuna.create_study(sampler=tpe(), pruner=SuccessiveHalvingPruner(reduction_factor=2))
    result = make(study, flat_space, bundle_size=6).run(30, progress=False)
    assert_as_alone(study, result)
    full = sizes[: next(i for i, size in enumerate(sizes) if size < 6)]
    assert len(full) > 8  # while there are trials to come, no place is empty
    assert sum(join for _, _, join in changes) == 30 - 6  # all went into the one bundle
    assert max(join for _, _, join in changes) > 1
    rounds = [when for when, _, _ in changes]
    assert len(set(rounds)) == len(rounds)


def test_who_is_alive_does_not_matter() -> None:
    """The same parameters and numbers, in bundles of other sizes."""
    parameters = [
        {"lr": 0.003 * 1.5**i, "weight_decay": 1e-4, "width": 4 + 2 * (i % 2), "activation": "tanh"}
        for i in range(11)
    ]
    curves = []
    for places in (1, 4, 11):
        study = optuna.create_study(pruner=NopPruner())
        for own in parameters:
            study.enqueue_trial(own)
        result = make(study, bundle_size=places).run(len(parameters), progress=False)
        assert [trial.params for trial in study.trials] == parameters
        curves.append([result[i].curves["val_loss"] for i in range(len(parameters))])
    for other in curves[1:]:
        assert close(other, curves[0])


def test_own_epochs_batch_sizes_and_schedules() -> None:
    def own_space(trial: optuna.Trial) -> dict[str, Any]:
        config = flat_space(trial)
        config["epochs"] = trial.suggest_int("epochs", 2, 5)
        config["batch_size"] = trial.suggest_categorical("batch_size", [4, 8])
        config["optimizer_cls"] = trial.suggest_categorical("optimizer", ["Adam", "SGD"])
        config["dropout"] = 0.0
        return config

    study = optuna.create_study(sampler=tpe(), pruner=NopPruner())
    result = make(study, own_space, bundle_size=7).run(16, progress=False)
    for number, own in result.items():
        epochs = study.trials[number].params["epochs"]
        assert own.epochs == epochs == study.trials[number].last_step
        assert close(own.curves["val_loss"], alone(own.config, number, epochs)[1])


def test_without_a_configuration_the_parameters_are_it() -> None:
    def own_space(trial: optuna.Trial) -> None:
        trial.suggest_float("lr", 0.001, 0.1, log=True)

    study = optuna.create_study(sampler=tpe())
    result = make(study, own_space, bundle_size=3).run(4, progress=False)
    assert [own.config for own in result.values()] == [trial.params for trial in study.trials]
    assert_as_alone(study, result)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("name", ["patient", "wilcoxon"])
def test_experimental_pruners(name: str) -> None:
    def pruner() -> BasePruner:
        if name == "patient":
            return PatientPruner(MedianPruner(2), patience=1)
        return WilcoxonPruner(p_threshold=0.4, n_startup_steps=1)

    study, expected = new_study(pruner()), new_study(pruner())
    make(study, bundle_size=4, epochs=6).run(14, progress=False)
    sequential(expected, 14, 4, epochs=6)
    assert_same_trials(study, expected)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_weights_can_be_exported(keep: str, tmp_path: Any) -> None:
    sweep = make(bundle_size=4, keep_weights=keep, directory=tmp_path / "weights", epochs=6)
    result = sweep.run(9, progress=False)
    assert result.counts["pruned"] >= 1
    for number, own in result.items():
        epochs = own.epochs if keep == "last" else own.epoch + 1
        expected = alone(own.config, number, epochs)[2]
        for mine, other in zip(result.export(number).parameters(), expected.parameters()):
            assert close(mine.detach(), other.detach())


def test_trials_of_earlier_runs_are_among_the_results(tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    first = make(url, study_name="s", directory=tmp_path / "w", bundle_size=4, report_every=2)
    known = first.run(5, progress=False)
    again = make(url, study_name="s", directory=tmp_path / "w", bundle_size=4, report_every=2)
    result = again.run(3, progress=False)
    assert len(result) == 8
    for number in range(5):
        own, other = known[number], result[number]
        assert (own.config, own.status, own.value) == (other.config, other.status, other.value)
        for a, b in zip(result.export(number).parameters(), known.export(number).parameters()):
            assert torch.equal(a, b)
        assert other.seconds > 0
    assert len({tuple(trial.params.values()) for trial in again.study.trials}) == 8
    assert "trial" in result.report(tmp_path / "report.html").read_text()
    assert list(result.to_dataframe()["trial"]) == list(range(8))
    result.plot_curves(tmp_path / "curves.png")
    third = again.run(total=9, progress=False)
    assert len(third) == 9


def test_loaders_of_ones_own() -> None:
    """Nobody joins a bundle that has begun; the trials are trained all the same."""
    loader = list(zip(VAL[0].split(5), VAL[1].split(5)))
    study = optuna.create_study(sampler=tpe(), pruner=MedianPruner(2))
    result = OptunaSweep(study, flat_space, build, loader, epochs=3, bundle_size=3).run(
        7, progress=False
    )
    assert result.metric == "loss"
    assert sum(result.counts.values()) == 7
    assert set(result.counts) == {"finished", "pruned"}
    for trial in study.trials:
        assert list(trial.intermediate_values.values()) == result[trial.number].curves["loss"]
