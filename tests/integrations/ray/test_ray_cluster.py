"""Bundles in a local Ray: two actors, one that dies, and an experiment that is taken up again."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from integrations.ray.ray_case import EPOCHS, Deadly, trainable
from ray import tune
from ray.tune import TuneError
from sweep.sweep_case import alone, build, close, data

from modelbatch import ModelBatchError
from modelbatch.integrations.ray import BundleSearcher, RungBoard, bundle_results
from modelbatch.integrations.ray.checkpoint import read_trials
from modelbatch.sweep import SuccessiveHalving, SweepResult

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    # so that actors find the functions of the tests
    patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()
    patch.undo()


RATES = [0.1, 0.03, 0.01, 0.003, 0.001, 0.0003]
SPACE = {"lr": tune.grid_search(RATES), "dropout": 0.0}


def fit(
    path: Path,
    name: str,
    *,
    shared: dict[str, Any],
    bundle_size: int = 3,
    tune_options: dict[str, Any] | None = None,
    **run_options: Any,
) -> tune.ResultGrid:
    """Bundles of these models, two by default."""
    tuner = tune.Tuner(
        trainable(**shared),
        tune_config=tune.TuneConfig(
            metric="val_loss",
            mode="min",
            search_alg=BundleSearcher(SPACE, bundle_size=bundle_size),
            num_samples=-1,
            **(tune_options or {}),
        ),
        run_config=tune.RunConfig(name=name, storage_path=str(path), verbose=0, **run_options),
    )
    return tuner.fit()


def every_epoch() -> tune.CheckpointConfig:
    return tune.CheckpointConfig(checkpoint_frequency=1, num_to_keep=1)


def assert_as_alone(result: SweepResult) -> None:
    assert sorted(result) == list(range(len(RATES)))
    for number, own in result.items():
        assert (own.status, own.config["lr"]) == ("finished", RATES[number])
        _, expected, model = alone(own.config, number, EPOCHS)
        assert close(own.curves["val_loss"], expected)
        for name, tensor in result.export(number).state_dict().items():
            assert close(tensor, model.state_dict()[name])


def test_two_actors(tmp_path: Path) -> None:
    grid = fit(tmp_path, "two", shared={})
    assert len(grid) == 2 and not grid.errors
    assert len({grid[place].metrics["pid"] for place in range(2)}) == 2
    result = bundle_results(grid, build)
    assert result.status == "finished"
    assert_as_alone(result)
    best = grid.get_best_result()
    assert best.metrics["val_loss"] == result.best.value
    assert best.metrics["best_model"] == f"{result.best.id:05d}"
    table = result.to_dataframe()
    assert list(table["lr"]) == RATES
    with pytest.raises(ModelBatchError, match="needs build="):
        bundle_results(grid).export()


def test_an_actor_that_is_killed_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    deadly = Deadly(str(tmp_path / "died"), epoch=3, model=1)
    shared = {"callbacks": deadly}
    grid = fit(
        tmp_path,
        "killed",
        shared=shared,
        failure_config=tune.FailureConfig(max_failures=1),
        checkpoint_config=every_epoch(),
    )
    assert (tmp_path / "died").exists() and not grid.errors
    restored = {
        grid[place].metrics["best_model"]: grid[place].metrics["iterations_since_restore"]
        for place in range(2)
    }
    assert sorted(restored.values()) == [EPOCHS - 3, EPOCHS]
    assert_as_alone(bundle_results(grid, build))


class Stop(tune.Callback):
    """Ends once what Ray runs the experiment in, as if the program had been killed."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker  # Ray keeps this callback for the experiment that goes on

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: Any, **_: Any
    ) -> None:
        if result["training_iteration"] == 3 and not self.marker.exists():
            self.marker.touch()
            raise KeyError("the end")


def begin(path: Path) -> None:
    """Begin an experiment that breaks off while the first of its bundles trains."""
    with pytest.raises(TuneError, match="the end"):
        fit(
            path,
            "stopped",
            shared={},
            tune_options={"max_concurrent_trials": 1},
            callbacks=[Stop(path / "stopped once")],
            checkpoint_config=every_epoch(),
        )


def test_an_experiment_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # whose files stay open when Ray breaks off
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    begin(tmp_path)
    path = str(tmp_path / "stopped")
    assert tune.Tuner.can_restore(path)
    before = bundle_results(tune.Tuner.restore(path, trainable()).get_results(), build)
    assert before.status == "interrupted" and before.counts == {"running": 3}
    assert close(before.export(1)(data()[0]), alone({"lr": RATES[1]}, 1, 2)[2](data()[0]))

    grid = tune.Tuner.restore(path, trainable(), resume_unfinished=True).fit()
    assert len(grid) == 2 and not grid.errors
    since = [grid[place].metrics["iterations_since_restore"] for place in range(2)]
    assert sorted(since) == [EPOCHS - 2, EPOCHS]
    assert_as_alone(bundle_results(grid, build))


class KillBoard(tune.Callback):
    """The board dies in mid-run."""

    def __init__(self, board: RungBoard) -> None:
        self.board, self.killed = board, False

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: Any, **_: Any
    ) -> None:
        if result["training_iteration"] == 2 and not self.killed:
            self.killed = True
            ray.kill(ray.get_actor(self.board.name))


def test_a_shared_pruner_whose_actor_dies(tmp_path: Path) -> None:
    board = RungBoard(SuccessiveHalving(1, 2))
    callback = KillBoard(board)
    grid = fit(tmp_path, "board", shared={"pruner": board}, callbacks=[callback])
    assert callback.killed and not grid.errors
    result = bundle_results(grid)
    assert result.status == "finished" and result.counts["pruned"] >= 2
    records = {}
    for place in range(2):
        with grid[place].checkpoint.as_directory() as directory:
            for record in read_trials(Path(directory))["board"]["records"]:
                records[record.bundle, record.epoch] = record
    trials = {grid[place].metrics["trial_id"] for place in range(2)}
    assert {bundle for bundle, _ in records} == trials
    told = {number for record in records.values() for number in record.pruned}
    pruned = {number for number, own in result.items() if own.status == "pruned"}
    # who had done all epochs anyway is finished, whatever the board says
    assert pruned == {n for n in told if result[n].epochs < EPOCHS}


def test_bundles_that_cannot_be_trained(tmp_path: Path) -> None:
    # the classes that there are not cannot be seen before the training
    x, y = data()
    grid = fit(tmp_path, "failing", shared={"train_data": (x, y + 100)}, bundle_size=6)
    assert len(grid) == 1 and not grid.errors  # the models failed, not the actor
    result = bundle_results(grid)
    assert result.counts == {"failed": 6}
    with pytest.raises(ModelBatchError, match="no trial has a value of 'val_loss'; trial 0: "):
        _ = result.best


def test_an_actor_that_cannot_begin(tmp_path: Path) -> None:
    grid = fit(tmp_path, "refused", shared={"epochs": 0}, bundle_size=6)
    assert grid.num_errors == 1
    with pytest.raises(ModelBatchError, match="epochs must be a positive integer"):
        bundle_results(grid)
