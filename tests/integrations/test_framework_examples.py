"""The examples of Optuna, Ray Tune and the Hugging Face Trainer, run as a user runs them."""

from pathlib import Path

import example_case
import pytest


def run(script: str, *flags: str) -> str:
    """Run an example, whatever the framework warns of; returns what it printed."""
    done = example_case.run(script, *flags, options=())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_optuna_sweep_compares_with_one_trial_at_a_time(tmp_path: Path) -> None:
    out = run(
        "optuna_sweep.py",
        *("--trials", "12", "--epochs", "3", "--compare", "--out", str(tmp_path)),
    )
    assert "side by side" in out and "one at a time" in out and "speed-up:" in out
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")


def test_the_optuna_sweep_goes_on_with_its_storage(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'digits.db'}"
    flags = ("--epochs", "1", "--storage", storage)
    run("optuna_sweep.py", "--trials", "4", *flags)
    out = run("optuna_sweep.py", "--trials", "6", *flags)
    summary = next(line for line in out.splitlines() if line.startswith("side by side"))
    assert "6 trials" in summary


def test_the_ray_sweep_trains_in_two_actors(tmp_path: Path) -> None:
    out = run("ray_sweep.py", "--trials", "6", "--epochs", "2", "--out", str(tmp_path))
    lines = out.splitlines()
    assert any(line.startswith("6 networks in 2 bundles") for line in lines)
    assert any(line.startswith("1. trial") for line in lines)
    assert any(line.startswith("test accuracy of the best") for line in lines)
    assert (tmp_path / "report.html").is_file()


@pytest.mark.slow
def test_the_ray_sweep_compares_with_one_network_at_a_time(tmp_path: Path) -> None:
    out = run("ray_sweep.py", "--trials", "6", "--epochs", "2", "--compare", "--out", str(tmp_path))
    assert "the same 6 as Ray trials of their own" in out


def test_the_bundled_trainer_exports_its_best_model() -> None:
    out = run("hf_bundled_trainer.py", "--models", "3", "--epochs", "2")
    *_, head, first, second, third, last = out.splitlines()
    assert head.split()[:2] == ["learning", "rate"]
    assert [line.split()[0] for line in (first, second, third)] == [
        "1.00e-04",
        "1.73e-03",
        "3.00e-02",
    ]
    assert last.startswith("best: learning rate") and last.endswith("reloaded")
    reloaded = last.split("accuracy ")[1].split()[0]
    assert reloaded in {line.split()[1] for line in (first, second, third)}
