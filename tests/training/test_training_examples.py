"""The programs under examples/ that train by `fit`, run as a user runs them."""

import csv
from pathlib import Path

import pytest
from example_case import run

EXAMPLES = ("hyperparameter_sweep.py", "kfold_ensemble.py")


def test_the_sweep_finds_a_learning_rate_and_resumes(tmp_path: Path) -> None:
    """Two halves are the whole, bit for bit."""
    flags = ("--models", "9", "--patience", "2", "--out")
    whole = run("hyperparameter_sweep.py", *flags, str(tmp_path / "a"), "--epochs", "6")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert "epoch 6/6" in whole.stdout
    assert "after 6 epochs" in whole.stdout
    for epochs, more in (("3", ()), ("6", ("--resume",))):
        half = run(
            "hyperparameter_sweep.py", *flags, str(tmp_path / "b"), "--epochs", epochs, *more
        )
        assert half.returncode == 0, half.stdout + half.stderr
    for name in ("results.csv", "curves.csv"):
        one, other = ((tmp_path / d / name).read_text() for d in ("a", "b"))
        assert one == other, name
    with (tmp_path / "a" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == [str(i) for i in range(9)]
    assert rows[0]["lr"] == "0.001" and float(rows[-1]["lr"]) == pytest.approx(100)
    accuracies = [float(row["accuracy"]) for row in rows]
    assert 0.8 < max(accuracies) <= 1 and max(accuracies[:2] + accuracies[-2:]) < 0.6
    assert (tmp_path / "a" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a" / "checkpoint" / "bundle.json").exists()
    assert "\x1b" not in whole.stdout


def test_networks_diverge_or_stop_early_in_the_sweep(tmp_path: Path) -> None:
    done = run(
        "hyperparameter_sweep.py", "--epochs", "12", "--patience", "2", "--out", str(tmp_path)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "networks diverged" in line)
    diverged, stopped, active = (
        int(part.split(word)[0].split()[-1])
        for part, word in zip(line.split(", "), ("networks", "were", "trained"))
    )
    assert diverged > 0 and stopped > 0 and active > 0
    assert diverged + stopped + active == 64


def test_kfold_compares_the_ensemble_with_its_best_member(tmp_path: Path) -> None:
    flags = ("--models", "6", "--folds", "3", "--epochs", "4", "--plot", str(tmp_path / "k.svg"))
    done = run("kfold_ensemble.py", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[3] for line in lines if line.startswith("model ")] == [*"012012"]
    (single,) = (line for line in lines if "best single network" in line)
    assert lines[-1].startswith("test accuracy: ensemble ")
    assert float(lines[-1].split()[-1].rstrip("%")) > 80
    assert float(single.split("%")[0].split()[-1]) > 80
    assert (tmp_path / "k.svg").exists()


@pytest.mark.parametrize("script", EXAMPLES)
def test_help_names_every_flag(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0
    for flag in ("--models", "--epochs", "--device", "--seed", "--batch-size"):
        assert flag in done.stdout


@pytest.mark.parametrize("script", EXAMPLES)
def test_an_unknown_device_is_refused_in_one_line(script: str) -> None:
    done = run(script, "--device", "nonsense")
    assert done.returncode == 1
    assert done.stderr.startswith("--device nonsense:")
    assert len(done.stderr.splitlines()) == 1


def test_one_fold_is_refused() -> None:
    done = run("kfold_ensemble.py", "--models", "1")
    assert done.returncode == 2
    assert "at least 2 folds" in done.stderr
