"""A trial that fails costs only itself."""

from typing import Any

import optuna
import pytest
import torch
from integrations.optuna.optuna_case import (
    EPOCHS,
    VAL,
    X,
    Y,
    assert_as_alone,
    flat_space,
    make,
    of_state,
    space,
    tpe,
)
from optuna.trial import TrialState
from sweep.sweep_case import alone, build, close
from torch import nn

import modelbatch.integrations.optuna.pool as pool
from modelbatch.callbacks import Callback, EarlyStopping
from modelbatch.integrations.optuna import OptunaSweep
from modelbatch.integrations.optuna.recovery import ENDED_AS, ERROR
from modelbatch.sweep.bundle import TrialBundle


def no_pruning() -> optuna.Study:
    return optuna.create_study(sampler=tpe(), pruner=optuna.pruners.NopPruner())


def assert_the_others_are_well(study: optuna.Study, result: Any, bad: list[int]) -> None:
    for number, own in result.items():
        if number in bad:
            assert study.trials[number].state == TrialState.FAIL
            assert study.trials[number].user_attrs[ERROR] == own.error
        else:
            assert own.status == "finished"
            assert close(own.curves["val_loss"], alone(own.config, number, EPOCHS)[1])


def test_spaces_builds_and_configurations_that_fail() -> None:
    def own_space(trial: optuna.Trial) -> Any:
        config: Any = flat_space(trial)
        if trial.number == 1:
            raise KeyError("no such thing")
        if trial.number == 2:
            raise optuna.TrialPruned
        if trial.number == 4:
            config["lr"] = -1.0
        if trial.number == 5:
            return 3
        if trial.number == 6:
            return {**config, 7: 8}
        config["bad"] = trial.number == 8
        return config

    def own_build(config: dict[str, Any]) -> nn.Module:
        if config.pop("bad"):
            raise RuntimeError("no such network")
        return build(config)

    study = no_pruning()
    result = make(study, own_space, own_build, bundle_size=3).run(12, progress=False)
    assert [own.status for own in result.values()].count("finished") == 6
    assert result[2].status == "pruned" and study.trials[2].state == TrialState.PRUNED
    errors = {number: own.error for number, own in result.items() if own.status == "failed"}
    assert errors.pop(4).startswith("ModelBatchError: ") and "lr" in result[4].error
    assert errors == {
        1: "KeyError: 'no such thing'",
        5: "TypeError: 'int' object is not iterable",
        6: "ModelBatchError: the key 7 is not a string",
        8: "RuntimeError: no such network",
    }
    finished = {n: own for n, own in result.items() if own.status == "finished"}
    for number, own in finished.items():
        assert close(own.curves["val_loss"], alone(own.config, number, EPOCHS)[1])


class _Indexed(nn.Module):
    """Raises in its forward if it looks for a feature that there is not."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.model = build(config)
        self.register_buffer("at", torch.tensor(config.get("at", 0)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x[:, torch.arange(5) + self.at])


def test_who_cannot_be_trained_is_found_by_halving() -> None:
    """Number 8 joins a bundle of five that has trained already; no step is reported twice."""

    def own_space(trial: optuna.Trial) -> Any:
        return {**flat_space(trial), "at": 9 if trial.number in (1, 8) else 0}

    study = no_pruning()
    result = make(study, own_space, _Indexed, bundle_size=6).run(14, progress=False)
    assert result.counts == {"finished": 12, "failed": 2}
    assert_the_others_are_well(study, result, [1, 8])
    assert "IndexError" in result[8].error or "index" in result[8].error
    for trial in of_state(study, TrialState.COMPLETE):
        assert list(trial.intermediate_values) == list(range(1, EPOCHS + 1))


def test_out_of_memory_makes_fewer_trials_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    bundles: list[Any] = []

    class Small(TrialBundle):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bundles.append(self)

        def run_epoch(self) -> Any:
            alive.append(sum(len(b) for b in bundles if not b.gone))
            if len(self) > 4:
                self.gone = True
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().run_epoch()

        gone = False

        def close(self) -> None:
            self.gone = True
            super().close()

    monkeypatch.setattr(pool, "TrialBundle", Small)
    study = no_pruning()
    result = make(study, flat_space, bundle_size=10).run(14, progress=False)
    assert result.counts == {"finished": 14}
    assert_as_alone(study, result)
    assert alive[:2] == [10, 5]
    assert max(alive[2:]) <= 5


def test_a_single_model_without_memory_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(TrialBundle):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise MemoryError("full")

    monkeypatch.setattr(pool, "TrialBundle", Full)
    study = no_pruning()
    result = make(study, flat_space, bundle_size=3).run(4, progress=False)
    assert [own.error for own in result.values()] == ["MemoryError: full"] * 4


def test_a_join_that_fails_costs_the_joiner_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Either nothing has changed, or the whole bundle begins anew."""
    kinds = iter([pool.ModelBatchError("does not fit"), RuntimeError("half done")])

    class Picky(TrialBundle):
        def exchange(self, leave: Any = (), join: Any = ()) -> None:
            error = next(kinds, None) if join else None
            if isinstance(error, RuntimeError):
                super().exchange(leave)
            if error is not None:
                raise error
            super().exchange(leave, join)

    monkeypatch.setattr(pool, "TrialBundle", Picky)
    study = optuna.create_study(
        sampler=tpe(), pruner=optuna.pruners.SuccessiveHalvingPruner(reduction_factor=2)
    )
    result = make(study, flat_space, bundle_size=4).run(14, progress=False)
    assert set(result.counts) == {"finished", "pruned"}
    assert next(kinds, None) is None
    assert_as_alone(study, result)


def test_a_trial_that_diverges_is_failed_at_once() -> None:
    def own_space(trial: optuna.Trial) -> Any:
        wild = trial.number in (1, 4)
        return (
            {**flat_space(trial), "lr": 1e300, "weight_decay": 1e10} if wild else flat_space(trial)
        )

    study = no_pruning()
    sweep = make(study, own_space, bundle_size=3, optimizer_cls=torch.optim.SGD)
    result = sweep.run(7, progress=False)
    assert result.counts == {"finished": 5, "diverged": 2}
    for number in (1, 4):
        trial = study.trials[number]
        assert trial.state == TrialState.FAIL and trial.intermediate_values == {}
        assert trial.user_attrs[ENDED_AS] == "diverged"
        assert trial.user_attrs[ERROR].startswith("not finite")
    again = make(study, own_space, bundle_size=3)
    assert again.run(1, progress=False).counts["diverged"] == 2


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of Optuna's MedianPruner
@pytest.mark.parametrize("value", ["best", "last"])
def test_values_that_are_not_finite_are_no_values(value: str) -> None:
    """The network is well, its metric is not: a NaN metric is pruned by MedianPruner."""

    def metric(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.where(outputs.sum() > -1e9, torch.nan, outputs.sum())

    study = no_pruning()
    sweep = make(study, flat_space, metric="val_odd", metric_fns={"odd": metric}, value=value)
    result = sweep.run(3, progress=False)
    assert result.counts == {"failed": 3}
    assert result[0].error == "no value of val_odd was finite"
    median = optuna.create_study(sampler=tpe(), pruner=optuna.pruners.MedianPruner(0))
    median.add_trial(optuna.create_trial(value=1.0, intermediate_values={1: 1.0}))
    sweep = make(median, flat_space, metric="val_odd", metric_fns={"odd": metric}, value=value)
    assert sweep.run(3, progress=False).counts == {"finished": 1, "pruned": 3}


def test_early_stopping_ends_trials_by_themselves() -> None:
    study = no_pruning()
    stops = EarlyStopping("val_loss", patience=1, min_delta=0.05)
    sweep = make(study, flat_space, bundle_size=4, epochs=10, callbacks=[stops])
    result = sweep.run(9, progress=False)
    assert result.counts["stopped"] >= 2
    for number, own in result.items():
        trial = study.trials[number]
        assert trial.state == TrialState.COMPLETE
        assert trial.last_step == own.epochs and trial.value == min(own.curves["val_loss"])
        assert trial.user_attrs.get(ENDED_AS, "finished") == own.status
        assert close(own.curves["val_loss"], alone(own.config, number, 10)[1][: own.epochs])


def test_a_callback_may_end_a_bundle_and_remove_models() -> None:
    class Ends(Callback):
        def on_epoch_end(self, event: Any) -> None:
            event.stop = event.epoch == 1

    study = no_pruning()
    result = make(study, bundle_size=4, callbacks=[Ends()]).run(6, progress=False)
    assert "stopped" in result.counts
    assert not of_state(study, TrialState.RUNNING)

    class Removes(Callback):
        def on_epoch_end(self, event: Any) -> None:
            if len(event.mb) > 2:
                event.mb.prune([0])

    study = no_pruning()
    sweep = make(study, flat_space, bundle_size=4, callbacks=[Removes()])
    result = sweep.run(5, progress=False)
    assert sum(result.counts.values()) == 5
    assert not of_state(study, TrialState.RUNNING)


def test_a_trial_that_somebody_else_ended_is_let_go() -> None:
    study = no_pruning()

    class Ends(Callback):
        done = False

        def on_epoch_end(self, event: Any) -> None:
            if not Ends.done:
                Ends.done = True
                study.tell(1, state=TrialState.FAIL)

    sweep = make(study, flat_space, bundle_size=3, callbacks=[Ends()])
    result = sweep.run(5, progress=False)
    assert result[1].status == "failed" and result[1].error == "ended by somebody else"
    assert study.trials[1].state == TrialState.FAIL
    assert result.counts == {"finished": 4, "failed": 1}


def test_a_broken_loader_fails_every_trial() -> None:
    sweep = OptunaSweep(no_pruning(), space, build, [(X[:, :2], Y)], VAL, epochs=2, bundle_size=4)
    result = sweep.run(5, progress=False)
    assert result.counts == {"failed": 5}
    assert all("RuntimeError" in own.error for own in result.values())
