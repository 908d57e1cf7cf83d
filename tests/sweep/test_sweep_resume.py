"""A sweep that was killed goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep.sweep_program import CONFIGS, Deadly, run

from modelbatch import CheckpointError, ModelBatchError
from modelbatch.callbacks import Callback
from modelbatch.sweep import SweepResult

ROOT = Path(__file__).resolve().parents[2]


def start(directory: Path, dies_in: int, checkpoint_every: int) -> int:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    program = str(Path(__file__).parent / "sweep_program.py")
    done = subprocess.run(
        [sys.executable, program, str(directory), str(dies_in), str(checkpoint_every)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def assert_same(result: SweepResult, expected: SweepResult) -> None:
    assert result.keys() == expected.keys()
    for number, own in expected.items():
        other = result[number]
        assert (other.status, other.curves) == (own.status, own.curves), number
        assert (other.value, other.epoch, other.seed) == (own.value, own.epoch, own.seed)
        if own.status != "failed":
            states = result.export(number).state_dict(), expected.export(number).state_dict()
            for name, tensor in states[1].items():
                assert torch.equal(states[0][name], tensor)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    directory = str(tmp_path_factory.mktemp("whole"))
    result = run(None, Deadly(directory, -1))
    assert result.counts["pruned"] >= 2 and result.counts["finished"] >= 2
    return result


@pytest.mark.parametrize(("dies_in", "checkpoint_every"), [(3, 1), (9, 2)])
def test_killed_and_started_again(
    dies_in: int, checkpoint_every: int, tmp_path: Path, whole: SweepResult
) -> None:
    assert start(tmp_path, dies_in, checkpoint_every) == -signal.SIGKILL
    with (tmp_path / "sweep.jsonl").open("a") as file:
        file.write('{"kind": "epo')  # the line that the process was writing
    assert any(tmp_path.glob("bundle_*/bundle.json")) or dies_in == 1
    result = run(str(tmp_path), Deadly(str(tmp_path), -1), checkpoint_every=checkpoint_every)
    assert result.status == "finished"
    assert_same(result, whole)
    assert not list(tmp_path.glob("bundle_*"))
    lines = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    bundles = [line["trials"] for line in lines if line["kind"] == "bundle"]
    assert sorted(trial for bundle in bundles for trial in bundle) == list(
        range(len(CONFIGS))
    )  # none begun twice

    built: list[Any] = []
    again = run(str(tmp_path), Deadly(str(tmp_path), -1), callbacks=lambda t: built.append(t) or [])
    assert built == []
    assert_same(again, whole)


class _CtrlC(Callback):
    """One Ctrl-C after some steps."""

    left = 12

    def on_train_step(self, event: Any) -> None:
        _CtrlC.left -= 1
        if _CtrlC.left == 0:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_amid_an_epoch_and_then_on(tmp_path: Path, whole: SweepResult) -> None:
    _CtrlC.left = 12
    first = run(str(tmp_path), Deadly(str(tmp_path), -1), callbacks=[_CtrlC()])
    assert first.status == "interrupted"
    assert set(first.counts) > {"pending"}
    assert "running" in first.counts
    second = run(str(tmp_path), Deadly(str(tmp_path), -1), callbacks=[_CtrlC()])
    assert_same(second, whole)


def test_a_directory_of_another_sweep_is_refused(tmp_path: Path) -> None:
    def go(**kwargs: Any) -> SweepResult:
        return run(str(tmp_path), None, **({"epochs": 1} | kwargs))

    go()
    with pytest.raises(ModelBatchError, match="epochs is 1 there and 2 here"):
        go(epochs=2)
    with pytest.raises(ModelBatchError, match="holds a sweep already: resume=True"):
        go(resume=False)
    with pytest.raises(ModelBatchError, match="seed is 0 there and 1 here"):
        go(seed=1)
    CONFIGS.append({"lr": 0.5})
    try:
        grown = go()
        assert grown[len(CONFIGS) - 1].status == "finished"
        CONFIGS[0]["lr"] *= 2
        with pytest.raises(ModelBatchError, match="trial 0 has 'lr' = 0.004 there and 0.008 here"):
            go()
    finally:
        CONFIGS[0]["lr"] = 0.004
        CONFIGS.pop()
    with pytest.raises(ModelBatchError, match="it has 15 trials, not 14"):
        go()


def test_an_altered_journal_is_refused(tmp_path: Path) -> None:
    run(str(tmp_path), None, epochs=1)
    path = tmp_path / "sweep.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = lines[3][:-4]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(CheckpointError, match="sweep.jsonl, line 4 was altered"):
        run(str(tmp_path), None, epochs=1)
