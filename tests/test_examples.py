"""The programs under examples/, run as a user runs them."""

from pathlib import Path

import pytest
from example_case import ROOT, run

EXAMPLES = (
    "simple_demo.py",
    "quick_consistency_test.py",
    "per_model_schedules.py",
    "lstm_sweep.py",
    "lightning_example.py",
)


def test_simple_demo_trains_every_model_and_finds_both_trainings_equal() -> None:
    done = run("simple_demo.py", "--models", "3", "--epochs", "2", "--batch-size", "64")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    for lr in ("1.00e-04", "1.00e-03", "1.00e-02"):
        assert sum(lr in line for line in lines) == 1
    assert sum("best" in line for line in lines) == 1
    for start in ("epoch 2/2", "seconds together", "seconds one by one", "speed-up"):
        assert any(line.startswith(start) for line in lines), start
    assert sum(line.startswith("largest difference") for line in lines) == 2
    assert lines[-1].startswith("equal")
    assert "\x1b" not in done.stdout


def test_simple_demo_notices_a_difference(tmp_path: Path) -> None:
    """One model trained with a wrong learning rate must show."""
    program = tmp_path / "wrong.py"
    program.write_text(
        "import runpy, sys\n"
        "import modelbatch\n"
        "right = modelbatch.ModelBatch\n"
        "def wrong(models, lr_list, **kwargs):\n"
        "    return right(models, lr_list=[*lr_list[:-1], 1.001 * lr_list[-1]], **kwargs)\n"
        "modelbatch.ModelBatch = wrong\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    script = str(ROOT / "examples" / "simple_demo.py")
    done = run(str(program), script, "--models", "2", "--epochs", "1", "--batch-size", "64")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("NOT equal")


def test_quick_consistency_test_finds_every_configuration_consistent() -> None:
    done = run("quick_consistency_test.py", "--epochs", "2", "--models", "5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("CONSISTENT") == 3
    assert done.stdout.count("  model ") == 15
    assert "DIVERGENT" not in done.stdout
    assert done.stdout.startswith("quick: 5 models 8-4-2, 100 samples, 2 epochs")
    assert done.stdout.isascii()


def test_per_model_schedules_gives_every_model_its_own() -> None:
    done = run("per_model_schedules.py", "--epochs", "4", "--models", "6")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 + 6
    assert done.stdout.count("(best)") == 1
    first, *_, last = (line.split()[4:] for line in lines[:4])
    # constant, step, exponential, warm-up; the sixth has the first's
    assert first[:4] == ["0.02000", "0.02000", "0.02000", "0.00400"]
    assert last[:3] == ["0.02000", "0.00054", "0.01024"]
    assert last[5] == last[0]


def test_lstm_sweep_finds_a_learning_rate() -> None:
    done = run("lstm_sweep.py", "--models", "3", "--epochs", "2", "--hidden", "16")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.strip("│ ").split("│") for line in done.stdout.splitlines() if "│" in line]
    assert [row[1].strip() for row in rows] == ["1.00e-04", "3.16e-03", "1.00e-01"]
    accuracies = [float(row[3].split("%")[0]) for row in rows]
    assert max(accuracies) > 50
    assert done.stdout.count("% best") == 1
    assert "speed-up: " in done.stdout
    assert "Warning" not in done.stderr


@pytest.mark.parametrize("script", EXAMPLES)
def test_help_names_every_flag(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0
    for flag in ("--models", "--epochs", "--device", "--seed"):
        assert flag in done.stdout


@pytest.mark.parametrize("script", EXAMPLES)
def test_an_unknown_device_is_refused_in_one_line(script: str) -> None:
    done = run(script, "--device", "nonsense")
    assert done.returncode == 1
    assert done.stderr.startswith("--device nonsense:")
    assert len(done.stderr.splitlines()) == 1


def test_no_models_are_refused() -> None:
    done = run("simple_demo.py", "--models", "0")
    assert done.returncode == 2
    assert "must be at least 1" in done.stderr


def test_lightning_example_finds_a_learning_rate() -> None:
    done = run("lightning_example.py", "--models", "4", "--epochs", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" best") == 1 and done.stdout.count("model ") >= 5
    assert "exported model" in done.stdout
