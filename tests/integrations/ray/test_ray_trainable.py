"""One bundle as a trial of Ray Tune, without a cluster."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.ray.ray_case import EPOCHS, configs, curves, entries, picky, run, trainable
from sweep.sweep_case import alone, build, close, data

from modelbatch import ModelBatchError
from modelbatch.integrations.ray import BundleTrainable, RungBoard
from modelbatch.sweep import MedianPruner, SuccessiveHalving, run_sweep


def test_each_model_equals_training_alone() -> None:
    given = configs(7)
    bundle = trainable()({"trials": entries(given, first=3)})
    results = run(bundle)
    assert len(results) == EPOCHS
    for place, config in enumerate(given):
        _, expected, _ = alone(config, 3 + place, EPOCHS)
        assert close(curves(results)[f"{3 + place:05d}"], expected)
    values = [min(own) for own in curves(results).values()]
    last = results[-1]
    assert last["best"] == last["val_loss"] == min(values)
    assert last["best_model"] == f"{3 + values.index(min(values)):05d}"
    assert [r["models_active"] for r in results] == [7] * (EPOCHS - 1) + [0]
    assert [r["done"] for r in results] == [False] * (EPOCHS - 1) + [True]
    assert last["should_checkpoint"] is True and "should_checkpoint" not in results[0]
    assert {row["status"] for row in last["models"]} == {"finished"}
    assert [row["training_iteration"] for row in last["models"]] == [EPOCHS] * 7


def test_structures_get_bundles_of_their_own() -> None:
    bundle = trainable()({"trials": entries(configs(7))})
    widths = [[t.config["width"] for t in own.trials] for own in bundle._bundles.bundles]
    assert len(widths) == 2 and all(len(set(own)) == 1 for own in widths)


def test_several_epochs_in_a_step() -> None:
    given = configs(4)
    one = run(trainable()({"trials": entries(given)}))
    two = run(trainable(epochs_per_step=2)({"trials": entries(given)}))
    assert len(two) == math.ceil(EPOCHS / 2)
    assert curves(two) == curves(one)
    assert [row["training_iteration"] for row in two[0]["models"]] == [1] * 4 + [2] * 4


def test_lists_of_configurations_and_a_single_one() -> None:
    given = configs(3)
    listed = curves(run(trainable()({"trials": given})))
    assert listed == curves(run(trainable()({"trials": [{"config": own} for own in given]})))
    assert list(listed) == ["0", "1", "2"]
    assert close(curves(run(trainable()(dict(given[0]))))["0"], alone(given[0], 0, EPOCHS)[1])


@pytest.mark.parametrize("pruner", [MedianPruner(), SuccessiveHalving(1, 2)])
def test_a_pruner_does_what_it_does_in_a_sweep(pruner: Any) -> None:
    x, y = data()
    given = [{"lr": own["lr"]} for own in configs(9)]
    options = {"epochs": EPOCHS, "batch_size": 8, "pruner": pruner}
    expected = run_sweep(build, given, (x, y), (x[:10], y[:10]), progress=False, **options)
    bundle = trainable(**options)({"trials": entries(given)})
    results = run(bundle)
    assert expected.counts["pruned"] > 2
    found = bundle._bundles.table.results
    assert [r.status for r in found.values()] == [r.status for r in expected.values()]
    for number, own in expected.items():
        assert close(found[number].curves["val_loss"], own.curves["val_loss"])
    active = [r["models_active"] for r in results]
    assert active == sorted(active, reverse=True) and len(set(active)) > 2


def test_a_failing_configuration_costs_only_itself() -> None:
    good = configs(4)
    given = [
        good[0],
        {"lr": 0.1, "raises": True},
        good[1],
        {"lr": -1.0},
        {"lr": 1e300, "weight_decay": 1e10},
        *good[2:],
    ]
    results = run(trainable(build=picky)({"trials": entries(given)}))
    rows = {row["id"]: row for result in results for row in result["models"]}
    assert [rows[f"{n:05d}"]["status"] for n in range(7)] == [
        "finished", "failed", "finished", "failed", "diverged", "finished", "finished",
    ]  # fmt: skip
    assert "such a network cannot be built" in rows["00001"]["error"]
    assert "-1.0" in rows["00003"]["error"]
    assert [row["id"] for row in results[0]["models"]].count("00001") == 1
    assert [row["id"] for row in results[1]["models"]].count("00001") == 0
    for number in (0, 2, 5, 6):
        _, expected, _ = alone(given[number], number, EPOCHS)
        assert close(curves(results)[f"{number:05d}"], expected)


def test_a_bundle_that_raises_in_training_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelbatch.sweep.bundle import TrialBundle

    whole, tried = TrialBundle.run_epoch, []

    def run_epoch(self: TrialBundle) -> Any:
        ids = [trial.id for trial in self.trials]
        if 2 in ids and self.epochs_done(2) == 2:
            tried.append(ids)
            raise RuntimeError("CUDA out of memory")
        return whole(self)

    monkeypatch.setattr(TrialBundle, "run_epoch", run_epoch)
    given = [{"lr": own["lr"]} for own in configs(5)]
    results = run(trainable()({"trials": entries(given)}))
    assert tried == [[0, 1, 2, 3, 4], [0, 1, 2], [2]]
    rows = {row["id"]: row for result in results for row in result["models"]}
    assert rows["00002"]["status"] == "failed" and "out of memory" in rows["00002"]["error"]
    assert len(curves(results)["00002"]) == 3  # two epochs, and the row that says that it failed
    for number in (0, 1, 3, 4):
        _, expected, _ = alone(given[number], number, EPOCHS)
        assert close(curves(results)[f"{number:05d}"], expected)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_checkpoint_goes_on_bit_for_bit(steps: int, tmp_path: Path) -> None:
    def fresh() -> Any:
        # 0.5 of dropout: random streams go on too
        given = [{**own, "dropout": 0.5} for own in configs(8)]
        return trainable(pruner=MedianPruner(2), build=picky)(
            {"trials": entries([*given, {"raises": True}])}
        )

    whole = run(fresh())
    first = fresh()
    for _ in range(steps):
        first.train()
    saved = first.save(str(tmp_path / "saved"))
    second = fresh()
    second.restore(saved)
    rest = run(second)
    assert len(rest) == EPOCHS - steps
    for ours, theirs in zip(rest, whole[steps:]):
        assert ours["models"] == theirs["models"]
        assert (ours["best"], ours["best_model"]) == (theirs["best"], theirs["best_model"])
        assert ours["training_iteration"] == theirs["training_iteration"]
    first.stop()


def test_a_checkpoint_of_other_models_is_refused(tmp_path: Path) -> None:
    first = trainable()({"trials": entries(configs(3))})
    saved = first.save(str(tmp_path / "saved"))
    with pytest.raises(ModelBatchError, match="of other models"):
        trainable()({"trials": entries(configs(4))}).restore(saved)


def test_reset_takes_another_bundle() -> None:
    given = configs(5)
    bundle = trainable()({"trials": entries(given[:2])})
    bundle.train()
    assert bundle.reset({"trials": entries(given[2:], first=2)})
    results = run(bundle)
    assert curves(results) == curves(run(trainable()({"trials": entries(given[2:], first=2)})))
    assert list(curves(results)) == ["00002", "00003", "00004"]


def test_arguments_of_a_class_of_ones_own() -> None:
    class Own(BundleTrainable):
        def arguments(self, config: dict[str, Any]) -> dict[str, Any]:
            return {"epochs": config["length"]}

    given = configs(2)
    assert len(run(trainable(Own)({"trials": entries(given), "length": 2}))) == 2


def test_nothing_can_be_trained() -> None:
    (result,) = run(trainable(build=picky)({"trials": [{"raises": True}] * 2}))
    assert math.isnan(result["best"]) and result["best_model"] is None
    assert [row["status"] for row in result["models"]] == ["failed"] * 2


def test_a_value_is_nan_as_long_as_there_is_none() -> None:
    diverging = {"lr": 1e300, "weight_decay": 1e10}
    (result,) = run(trainable(mode="max")({"trials": [diverging]}))
    assert math.isnan(result["val_loss"]) and result["best_model"] is None
    assert result["models"][0]["status"] == "diverged"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"epochs": None}, "needs epochs"),
        ({"epochs": 0}, "epochs must be a positive integer"),
        ({"epochs_per_step": True}, "epochs_per_step must be"),
        ({"build": 3}, "build must be callable"),
        ({"metric": "accuracy"}, "metric must be one of loss, val_loss"),
        ({"mode": "least"}, "mode must be one of"),
        ({"pruner": MedianPruner}, "pruner must be a RungBoard or have"),
        ({"pbt": 3}, "pbt must be a BundlePBT"),
        ({"seed": 0.5}, "seed"),
        ({"pruner": RungBoard(MedianPruner())}, "needs its own: {'number'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelBatchError, match=words):
        trainable(**arguments)({"trials": configs(2)})


@pytest.mark.parametrize(
    ("trials", "words"),
    [
        ([], "must be a list of configurations"),
        ("many", "must be a list of configurations"),
        ([3], r"\['trials'\]\[0\] must be a dict"),
        ([{"number": 1, "config": {}}, {"number": 1, "config": {}}], "the same number"),
        ([{"id": 1, "config": {}}, {"id": 1, "config": {}}], "the same id"),
    ],
)
def test_bad_trials_are_named(trials: Any, words: str) -> None:
    with pytest.raises(ModelBatchError, match=words):
        trainable()({"trials": trials})


def test_one_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in ((False, {"CPU": 1}), (True, {"CPU": 1, "GPU": 1})):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        asked = BundleTrainable.default_resource_request({})
        assert asked.required_resources == expected
