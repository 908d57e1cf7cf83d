"""Bad arguments are refused, with the reason."""

import subprocess
import sys
from typing import Any

import optuna
import pytest
import torch
from integrations.optuna.optuna_case import X, flat_space, make
from sweep.sweep_case import build

from modelbatch import ModelBatchError
from modelbatch.integrations.optuna import OptunaSweep
from modelbatch.integrations.optuna.plan import make_plan


def study() -> optuna.Study:
    return optuna.create_study()


def test_jobs_are_refused() -> None:
    with pytest.raises(
        ModelBatchError, match="n_jobs is refused: the trials of a sweep train side"
    ):
        make(study(), n_jobs=2)
    with pytest.raises(ModelBatchError, match="bundle_size= says how many"):
        make(study()).run(2, n_jobs=-1)


def test_several_objectives_are_refused() -> None:
    several = optuna.create_study(directions=["minimize", "maximize"])
    with pytest.raises(ModelBatchError, match="the study has 2 objectives: Optuna prunes trials"):
        make(several)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be a positive integer, got 0"),
        ({"bundle_size": "many"}, 'bundle_size must be a positive integer or "auto"'),
        ({"report_every": 0}, "report_every must be a positive integer, got 0"),
        ({"value": "first"}, 'value must be "best" or "last", got \'first\''),
        ({"metric": "val_acc"}, "metric must be one of loss, val_loss, got 'val_acc'"),
        ({"keep_weights": "all"}, "keep_weights must be one of"),
        ({"scheduler": 3}, "scheduler must be callable, got int"),
        ({"own_space": 3}, "space must be callable, got int"),
        ({"seed": 0.5}, "seed: seeds"),
        ({"callbacks": [3]}, "expected a Callback, got 3"),
        ({"direction": "maximize"}, "direction is the study's own; give it with a storage only"),
        ({"study_name": "s"}, "study_name is the study's own"),
        ({"pruner": optuna.pruners.NopPruner()}, "pruner is the study's own"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelBatchError, match=message):
        make(study(), **change)


def test_bad_arguments_of_a_run() -> None:
    sweep = make(study())
    for arguments, message in (
        ({"n_trials": 0}, "n_trials must be a positive integer, got 0"),
        ({"total": True}, "total must be a positive integer, got True"),
        ({"n_trials": 3, "total": 3}, "give n_trials"),
    ):
        with pytest.raises(ModelBatchError, match=message):
            sweep.run(**arguments, progress=False)
    with pytest.raises(ModelBatchError, match="must be an optuna.Study, a storage, or the URL"):
        make(3)


def test_a_study_of_another_direction(tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    first = make(url, study_name="s", direction="maximize")
    assert make(url, study_name="s").study.direction == first.study.direction
    with pytest.raises(
        ModelBatchError, match="'s' is there already and wants its value to maximize"
    ):
        make(url, study_name="s", direction="minimize")
    make(url, study_name="s", direction=optuna.study.StudyDirection.MAXIMIZE)


def test_a_sweep_within_a_study() -> None:
    own = study()

    def objective(trial: optuna.Trial) -> float:
        make(own, flat_space).run(1, progress=False)
        return 0.0

    with pytest.raises(ModelBatchError, match="cannot run within Study.optimize"):
        own.optimize(objective, n_trials=1)


@pytest.mark.parametrize(("to_run", "alive"), [(None, 32), (4, 8), (33, 9), (200, 50), (9999, 256)])
def test_how_many_are_alive_by_default(to_run: int | None, alive: int) -> None:
    sweep = make(study(), flat_space)
    assert sweep._plan.most_alive(to_run) == alive


def test_the_memory_limits_how_many_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    import modelbatch.integrations.optuna.plan as plan
    import modelbatch.integrations.optuna.pool as pool
    from modelbatch.sweep import sizing

    assert make_plan is plan.make_plan
    seen: list[Any] = []

    def few(model: Any, trial: Any, batch: Any, device: torch.device) -> int:
        seen.append(batch[0].shape)
        return 2

    sizes: list[int] = []

    class Watched(pool.TrialBundle):
        def run_epoch(self) -> Any:
            sizes.append(len(self))
            return super().run_epoch()

    monkeypatch.setattr(sizing, "automatic_size", few)
    monkeypatch.setattr(pool, "TrialBundle", Watched)
    before = torch.get_rng_state()
    OptunaSweep(study(), flat_space, build, (X, X[:, :3].argmax(1)), epochs=2, batch_size=8).run(
        5, progress=False
    )
    assert torch.equal(before, torch.get_rng_state())
    assert max(sizes) == 2
    assert seen == [(8, 5)]


def test_without_optuna_the_import_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['optuna'] = None\n"
        "import modelbatch.integrations\n"
        "try:\n    import modelbatch.integrations.optuna\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert 'pip install "modelbatch[optuna]"' in done.stdout, done.stderr
