"""A process that was killed loses no trial, and counts none twice."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import optuna
import pytest
from integrations.optuna.optuna_case import (
    EPOCHS,
    flat_space,
    make,
    of_state,
    tpe,
)
from integrations.optuna.optuna_program import TOTAL, run, storage
from optuna.trial import TrialState
from sweep.sweep_case import alone, close

from modelbatch.callbacks import Callback
from modelbatch.integrations.optuna import processes, recovery
from modelbatch.integrations.optuna.recovery import RETRIES, is_lost

ROOT = Path(__file__).resolve().parents[3]


def assert_complete(study: optuna.Study, total: int, enqueued: tuple[float, ...] = ()) -> None:
    """So many trials have ended by themselves; each lost one was trained again, and only once."""
    trials = study.trials
    assert not of_state(study, TrialState.RUNNING)
    assert not of_state(study, TrialState.WAITING)
    lost = [trial for trial in trials if is_lost(trial)]
    assert len(trials) - len(lost) == total
    retries = [trial.user_attrs[RETRIES] for trial in trials if RETRIES in trial.user_attrs]
    assert len(set(retries)) == len(retries)
    known = {t.number for t in lost if t.params or "fixed_params" in t.system_attrs}
    assert known == set(retries)
    for trial in trials:
        if RETRIES in trial.user_attrs:
            before = trials[trial.user_attrs[RETRIES]]
            assert before.number < trial.number
            assert before.params.items() <= trial.params.items()
        if trial.state == TrialState.COMPLETE:
            config = {"width": 6, **trial.params}
            curve = alone(config, trial.number, EPOCHS)[1]
            assert close(list(trial.intermediate_values.values()), curve)
            assert close(trial.value, min(curve))
    rates = [trial.params.get("lr") for trial in trials if not is_lost(trial)]
    for rate in enqueued:
        assert rates.count(rate) == 1


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_killed_and_started_again(kind: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    program, file = str(Path(__file__).parent / "optuna_program.py"), str(tmp_path / "study")
    done = subprocess.run(
        [sys.executable, program, kind, file, "23"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = optuna.load_study(study_name="killed", storage=storage(kind, file))
    running = [trial.number for trial in of_state(left, TrialState.RUNNING)]
    assert running
    sweep, result = run(kind, file)
    assert_complete(sweep.study, TOTAL, (0.0123, 0.0234))
    assert [trial.number for trial in sweep.study.trials if is_lost(trial)] == running
    assert result.status == "finished"
    assert all("ended before" in result[number].error for number in running)
    again = run(kind, file)[1]
    assert len(again) == len(result)  # nothing was left to do


class _Killed(BaseException):
    """The process is gone: no write of its gets through any more."""


class _Dying(optuna.storages.InMemoryStorage):
    """Lets so many writes through, and then none."""

    def __init__(self) -> None:
        super().__init__()
        self.left: float = math.inf
        self.last_left: float = math.inf


def _dies(name: str) -> Any:
    def write(self: _Dying, *args: Any, **kwargs: Any) -> Any:
        if self.left <= 0:
            raise _Killed
        self.left -= 1
        self.last_left = self.left
        return getattr(optuna.storages.InMemoryStorage, name)(self, *args, **kwargs)

    return write


for _name in (
    "create_new_trial",
    "set_trial_param",
    "set_trial_state_values",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
    "set_trial_system_attr",
):
    setattr(_Dying, _name, _dies(_name))


def _run(memory: _Dying, writes: float) -> optuna.Study:
    """The sweep as a program does it, which is killed after so many writes."""
    sweep = make(
        memory,
        flat_space,
        study_name="dying",
        sampler=tpe(),
        pruner=optuna.pruners.SuccessiveHalvingPruner(reduction_factor=2),
        bundle_size=3,
    )
    if not sweep.study.trials:
        sweep.study.enqueue_trial({"lr": 0.0123})
    memory.left = writes
    with contextlib.suppress(_Killed):
        sweep.run(total=5, progress=False)
    memory.left = math.inf
    return sweep.study


@pytest.mark.parametrize(("step", "again_after"), [(1, math.inf), (3, 7)])
def test_killed_at_any_write(step: int, again_after: float) -> None:
    """Every single write is tried as the last one; with 7 the next process is killed, too."""
    whole = _Dying()
    _run(whole, 10**6)
    count = 10**6 - int(whole.last_left)
    assert count > 40
    for writes in range(1, count, step):
        memory = _Dying()
        _run(memory, writes)
        assert memory.last_left == 0, "it died"
        _run(memory, again_after)
        assert_complete(_run(memory, math.inf), 5, (0.0123,))


class _CtrlC(Callback):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_train_step(self, event: Any) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_amid_an_epoch_and_then_on() -> None:
    study = optuna.create_study(sampler=tpe(), pruner=optuna.pruners.NopPruner())
    result = make(study, flat_space, bundle_size=4, callbacks=[_CtrlC(15)]).run(9, progress=False)
    assert result.status == "interrupted"
    assert result.counts == {"finished": 4, "failed": 4, "pending": 4}
    assert {own.error for own in result.values() if own.status == "failed"} == {
        "interrupted by Ctrl-C"
    }
    assert len(of_state(study, TrialState.WAITING)) == 4
    final = make(study, flat_space, bundle_size=4).run(total=9, progress=False)
    assert final.status == "finished"
    assert_complete(study, 9)


def test_ctrl_c_while_optuna_is_told() -> None:
    """What is being told is told to the end, of all trials."""
    study = optuna.create_study(sampler=tpe(), pruner=optuna.pruners.NopPruner())

    def interrupt(_: optuna.Study, trial: Any) -> None:
        if trial.number == 1:
            signal.raise_signal(signal.SIGINT)

    sweep = make(study, flat_space, bundle_size=4)
    result = sweep.run(9, callbacks=[interrupt], progress=False)
    assert result.status == "interrupted"
    assert result.counts == {"finished": 4}
    sweep.run(total=9, progress=False)
    assert_complete(study, 9)


def test_an_error_leaves_no_trial_running() -> None:
    study = optuna.create_study(sampler=tpe(), pruner=optuna.pruners.NopPruner())

    def callback(_: optuna.Study, trial: Any) -> None:
        raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        make(study, flat_space, bundle_size=4).run(9, callbacks=[callback], progress=False)
    assert len(of_state(study, TrialState.COMPLETE)) == 1
    assert len(of_state(study, TrialState.WAITING)) == 3
    make(study, flat_space, bundle_size=4).run(total=9, progress=False)
    assert_complete(study, 9)


def _foreign(study: optuna.Study, **mark: Any) -> optuna.Trial:
    trial = study.ask()
    trial.set_user_attr(recovery.RUN, {**processes.new_mark(), **mark})
    flat_space(trial)
    return trial


def test_trials_of_others_are_left_alone() -> None:
    study = optuna.create_study(sampler=tpe(), pruner=optuna.pruners.NopPruner())
    by_hand = study.ask()
    by_hand.suggest_float("lr", 1e-4, 0.3, log=True)
    here = _foreign(study)  # of another call in this process
    parent = os.getppid()
    elsewhere = _foreign(study, pid=parent, started=processes._started(parent))
    renumbered = _foreign(study, pid=parent, started="another boot/1")
    ended = _foreign(study, pid=2**22 + 1)  # no process can have this number
    sweep = make(study, flat_space, bundle_size=2)
    sweep.run(4, progress=False)
    running = [trial.number for trial in of_state(study, TrialState.RUNNING)]
    assert running == [by_hand.number, here.number, elsewhere.number]
    retried = [trial.user_attrs.get(RETRIES) for trial in study.trials[5:]]
    assert retried == [renumbered.number, ended.number, None, None]


def test_another_machine_needs_a_word() -> None:
    study = optuna.create_study(sampler=tpe(), pruner=optuna.pruners.NopPruner())
    there = _foreign(study, host="another machine")
    sweep = make(study, flat_space, bundle_size=2)
    with pytest.warns(UserWarning, match=r"trials 0 are being trained by process \d+ on another"):
        sweep.run(1, progress=False)
    assert study.trials[there.number].state == TrialState.RUNNING
    sweep.run(1, take_over=True, progress=False)
    assert is_lost(study.trials[there.number])
    assert study.trials[2].params == study.trials[0].params
    assert study.trials[2].user_attrs == {**study.trials[2].user_attrs, RETRIES: 0}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_storage_with_heartbeats(tmp_path: Path) -> None:
    """While trials are trained it hears of all of them; one that went silent is trained again."""
    beats: dict[int, int] = {}
    heard = threading.Event()

    class Heard(optuna.storages.RDBStorage):
        def record_heartbeat(self, trial_id: int) -> None:
            super().record_heartbeat(trial_id)
            beats[trial_id] = beats.get(trial_id, 0) + 1
            heard.set()

    rdb = Heard(f"sqlite:///{tmp_path}/study.db", heartbeat_interval=1, grace_period=2)
    study = optuna.create_study(storage=rdb, sampler=tpe(), pruner=optuna.pruners.NopPruner())
    with recovery.Heartbeat(study, lambda: []):
        pass
    with pytest.warns(UserWarning, match="Heartbeat of storage"):
        silent = _foreign(study, host="another machine")
    rdb.record_heartbeat(silent._trial_id)
    with rdb.engine.begin() as connection:
        from sqlalchemy import text

        connection.execute(text("update trial_heartbeats set heartbeat = '2020-01-01 00:00:00'"))
    heard.clear()

    class Wait(Callback):
        def on_train_step(self, event: Any) -> None:
            assert heard.wait(30)

    make(study, flat_space, bundle_size=3, callbacks=[Wait()]).run(4, progress=False)
    assert is_lost(study.trials[silent.number])
    assert study.trials[1].params == study.trials[0].params
    assert len(beats) >= 1
    assert not of_state(study, TrialState.RUNNING)
