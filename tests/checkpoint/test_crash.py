"""Whenever a save ends, the directory holds the old checkpoint or the new one, whole."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_case import assert_same, build, everything, train

from modelbatch import CheckpointError, ModelBatch

SAVER = Path(__file__).with_name("saver.py")
ROOT = SAVER.parent.parent.parent


def killed(directory: Path, rounds: int) -> int:
    """Runs the script; returns how many of the kills hit a save."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", str(SAVER), str(directory), str(rounds), "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=directory)
    assert done.returncode == 0, done.stderr
    found = re.search(r"(\d+) killed, (\d+) in the middle", done.stdout)
    assert found is not None
    assert int(found[1]) == rounds
    return int(found[2])


def test_killed_at_random_moments(tmp_path: Path) -> None:
    killed(tmp_path, 5)


@pytest.mark.slow
def test_killed_at_many_random_moments(tmp_path: Path) -> None:
    assert killed(tmp_path, 50) >= 10  # else the kills came at the wrong moments


# ---- every instant between two system calls


CALLS = [(os, name) for name in ("fsync", "replace", "mkdir", "unlink", "rmdir")]


def watch_calls(monkeypatch: pytest.MonkeyPatch, before: Callable[[str], None]) -> None:
    """Calls `before` in front of every call that changes or flushes the file system."""

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before(name)
            return original(*args, **kwargs)

        return call

    for module, name in CALLS:
        monkeypatch.setattr(module, name, wrapped(name, getattr(module, name)))


def trained(steps: int, seed: int = 0) -> ModelBatch:
    mb = build(torch.optim.Adam, rng="torch", seed=seed)
    train(mb, range(steps))
    return mb


def test_a_crash_at_any_instant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "checkpoint"
    old, new = trained(1), trained(2)
    old.save_all(directory, per_model=True)
    instants: list[Path] = []

    originals = [(module, name, getattr(module, name)) for module, name in CALLS]

    def keep_unwatched(name: str) -> None:
        watched = [(module, name, getattr(module, name)) for module, name, _ in originals]
        for entry in originals:
            setattr(*entry)
        try:
            instants.append(tmp_path / f"{len(instants):03d}-{name}")
            shutil.copytree(directory, instants[-1])
        finally:
            for entry in watched:
                setattr(*entry)

    with monkeypatch.context() as patched:
        watch_calls(patched, keep_unwatched)
        new.save_all(directory)
    assert len(instants) > 15
    states = [everything(old), everything(new)]
    found = []
    for instant in instants:
        mb = trained(3, seed=1)
        mb.load_all(instant)
        now = everything(mb)
        found.append([_same(now, state) for state in states].index(True))
        # And the next save leaves nothing behind.
        mb.save_all(instant)
        assert not any(path.name.startswith(".") for path in instant.iterdir()), instant
        fresh = trained(1, seed=2)
        fresh.load_all(instant)
        assert_same(everything(fresh), now)
    assert found == sorted(found)
    assert set(found) == {0, 1}


def _same(a: Any, b: Any) -> bool:
    try:
        assert_same(a, b)
    except AssertionError:
        return False
    return True


def test_an_error_at_any_instant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space left, at each call in turn: the old checkpoint stays, or the new one is there."""
    directory = tmp_path / "checkpoint"
    old, new = trained(1), trained(2)
    refused = completed = 0
    for failing in range(100):
        old.save_all(directory)
        (directory / "notes.txt").write_text("mine")
        calls = 0

        def fail(name: str, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls - 1 == failing:
                raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            watch_calls(patched, fail)
            try:
                new.save_all(directory)
                expected = new
                completed += 1
            except CheckpointError as error:
                message = str(error)
                expected = old
                refused += 1
        mb = trained(3, seed=1)
        mb.load_all(directory)
        assert_same(everything(mb), everything(expected))
        if expected is old:
            assert "No space left on device" in message
            assert str(directory) in message
            assert not any(path.name.startswith(".") for path in directory.iterdir())
        assert (directory / "notes.txt").read_text() == "mine"
        if calls <= failing:
            break
    assert refused > 8
    assert completed > 4


def test_a_first_save_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "a" / "b"

    def fail(name: str) -> None:
        if name == "replace":
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        watch_calls(patched, fail)
        with pytest.raises(CheckpointError, match=r"bundle.json cannot be saved: .*No space left"):
            trained(1).save_all(directory)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_from_the_keyboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = trained(1), trained(2)
    old.save_all(tmp_path)

    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        watch_calls(patched, interrupt)
        with pytest.raises(KeyboardInterrupt):
            new.save_all(tmp_path)
    mb = trained(3, seed=1)
    mb.load_all(tmp_path)
    assert_same(everything(mb), everything(old))
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
