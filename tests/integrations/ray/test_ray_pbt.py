"""Population based training inside a bundle."""

import copy
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from integrations.ray.ray_case import curves, entries, run, trainable
from ray import tune
from sweep.sweep_case import SAMPLES, alone, build, close, data

from modelbatch import ModelBatchError
from modelbatch.integrations.ray import BundlePBT
from modelbatch.random import derive_seed
from modelbatch.sweep.data import epoch_order

EPOCHS = 7
MUTATIONS = {"lr": tune.loguniform(1e-4, 1e-1), "weight_decay": [0.0, 1e-4, 1e-2]}


def population(count: int = 8) -> list[dict[str, Any]]:
    generator = random.Random(1)
    return [{"lr": 10 ** generator.uniform(-4, -1), "weight_decay": 1e-4} for _ in range(count)]


def reference(
    pbt: BundlePBT, configs: list[dict[str, Any]]
) -> tuple[dict[int, list[float]], dict[int, dict[str, Any]], dict[int, torch.nn.Module]]:
    """The same with plain torch, one model after the other."""
    x, y = data()
    models, optimizers, own = {}, {}, dict(enumerate(configs))
    for number, config in own.items():
        torch.manual_seed(derive_seed(number, 0))
        models[number] = build(config)
        optimizers[number] = torch.optim.Adam(models[number].parameters(), **config)
    values: dict[int, list[float]] = {number: [] for number in own}
    for epoch in range(EPOCHS):
        for number, model in models.items():
            for rows in epoch_order(SAMPLES, 0, epoch).split(8):
                optimizers[number].zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizers[number].step()
            with torch.no_grad():
                values[number].append(F.cross_entropy(model(x[:10]), y[:10]).item())
        if pbt.due(epoch + 1) and epoch + 1 < EPOCHS:
            last = {number: known[-1] for number, known in values.items()}
            for planned in pbt.plan(epoch + 1, last, own, 0):
                source, target = planned.source, planned.target
                models[target].load_state_dict(models[source].state_dict())
                state = copy.deepcopy(optimizers[source].state_dict())
                optimizers[target].load_state_dict(state)
                for group in optimizers[target].param_groups:
                    group.update(planned.config)
                own = {**own, target: planned.config}
    return values, own, models


@pytest.mark.parametrize("interval", [2, 3])
def test_it_equals_plain_torch(interval: int) -> None:
    pbt = BundlePBT(interval, MUTATIONS)
    values, configs, models = reference(pbt, population())
    bundle = trainable(pbt=pbt, epochs=EPOCHS)({"trials": entries(population())})
    results = run(bundle)
    for number, expected in values.items():
        assert close(curves(results)[f"{number:05d}"], expected)
    table = bundle._bundles.table
    assert {number: result.config for number, result in table.results.items()} == configs
    copies = [row for result in results for row in result["models"] if "copied_from" in row]
    assert len(copies) == 2 * ((EPOCHS - 1) // interval)
    assert {row["training_iteration"] for row in copies} == set(range(interval, EPOCHS, interval))
    assert all(set(row["operations"]) == {"lr", "weight_decay"} for row in copies)
    for number, model in models.items():
        for name, tensor in model.state_dict().items():
            assert close(bundle._bundles.weights[number][name], tensor)
    untouched = [n for n, own in table.lineage.items() if not own]
    assert untouched
    for number in untouched:
        assert close(values[number], alone(population()[number], number, EPOCHS)[1])


def test_it_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    def fresh() -> Any:
        pbt = BundlePBT(2, {"lr": lambda: 10 ** random.uniform(-4, -1), "dropout": [0.1, 0.4]})
        return trainable(pbt=pbt, epochs=EPOCHS)({"trials": entries([{}] * 6)})

    whole = run(fresh())
    first = fresh()
    for _ in range(3):
        first.train()
    second = fresh()
    second.restore(first.save(str(tmp_path / "saved")))
    assert [r["models"] for r in run(second)] == [r["models"] for r in whole[3:]]


def test_a_change_that_a_bundle_cannot_take_is_refused() -> None:
    for mutations in ({"width": [4, 6]}, {"batch_size": [4, 11]}):
        pbt = BundlePBT(1, mutations, resample_probability=0.0, quantile_fraction=0.5)
        first = {"width": 4, "batch_size": 4}
        bundle = trainable(pbt=pbt)({"trials": entries([first] * 4)})
        with pytest.raises(ModelBatchError, match="in mid-training, because models of one bundle"):
            run(bundle)


def test_a_configuration_that_cannot_be_used_is_that_of_the_source() -> None:
    pbt = BundlePBT(2, {"lr": [0.01, -1.0]}, resample_probability=1.0, quantile_fraction=0.5)
    bundle = trainable(pbt=pbt)({"trials": entries([{"lr": 0.01}] * 8)})
    results = run(bundle)
    copies = [row for result in results for row in result["models"] if "copied_from" in row]
    refused = [row for row in copies if "refused" in row["operations"]]
    assert refused and len(refused) < len(copies)
    assert {row["config"]["lr"] for row in copies} == {0.01}


# ---- decisions


def test_when() -> None:
    def due(**arguments: Any) -> list[int]:
        pbt = BundlePBT(hyperparam_mutations={"lr": [1, 2]}, **arguments)
        return [epoch for epoch in range(1, 12) if pbt.due(epoch)]

    assert due(perturbation_interval=4) == [4, 8]
    assert due(perturbation_interval=4, burn_in_period=3) == [4, 8]
    assert due(perturbation_interval=4, burn_in_period=5) == [5, 9]
    assert due(perturbation_interval=1) == list(range(1, 12))


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(8, 0.25, 2), (9, 0.25, 3), (3, 0.5, 1), (1, 0.25, 0), (2, 0.25, 1), (8, 0.0, 0)],
)
def test_who(count: int, fraction: float, expected: int) -> None:
    pbt = BundlePBT(1, {"lr": [1, 2]}, quantile_fraction=fraction)
    values = {number: float((number * 5) % 11) for number in range(count)}
    worst, best = pbt.quantiles(values)
    order = sorted(values.values())
    assert sorted(values[n] for n in worst) == order[count - expected :]
    assert sorted(values[n] for n in best) == order[:expected]


def explored(config: Mapping[str, Any], times: int = 200, **arguments: Any) -> list[dict[str, Any]]:
    pbt = BundlePBT(1, **arguments)
    return [pbt.explore(config, np.random.default_rng(seed))[0] for seed in range(times)]


def test_factors_and_neighbours() -> None:
    space = {"lr": tune.uniform(0, 1), "layers": [1, 2, 4], "net": {"width": tune.randint(1, 9)}}
    config = {"lr": 0.5, "layers": 2, "net": {"width": 10, "bias": True}, "other": 3}
    found = explored(config, hyperparam_mutations=space, resample_probability=0.0)
    assert {own["lr"] for own in found} == {0.5 * 1.2, 0.5 * 0.8}
    assert {own["layers"] for own in found} == {1, 4}
    assert {own["net"]["width"] for own in found} == {8, 12}
    assert all(own["net"]["bias"] is True and own["other"] == 3 for own in found)
    edge = explored({**config, "layers": 4}, hyperparam_mutations=space, resample_probability=0.0)
    assert {own["layers"] for own in edge} == {2, 4}
    assert config["lr"] == 0.5 and config["net"]["width"] == 10  # nothing was changed in place


def test_values_drawn_anew() -> None:
    space = {
        "lr": tune.uniform(2, 3),
        "layers": [1, 2],
        "bias": lambda: random.random() < 0.5,
        "decay": lambda: np.random.uniform(4, 5),
    }
    config = {"lr": 0.5, "layers": 2, "bias": True, "decay": 0.1}
    before = random.getstate()
    found = explored(config, hyperparam_mutations=space, resample_probability=1.0)
    assert random.getstate() == before
    assert all(2 <= own["lr"] <= 3 and 4 <= own["decay"] <= 5 for own in found)
    assert {own["layers"] for own in found} == {1, 2}
    assert {own["bias"] for own in found} == {True, False}
    assert all(type(own["decay"]) is float for own in found)
    assert found == explored(config, hyperparam_mutations=space, resample_probability=1.0)
    mixed = explored(config, hyperparam_mutations=space)
    share = sum(2 <= own["lr"] <= 3 for own in mixed) / len(mixed)
    # 200 draws of probability 0.25: five standard deviations
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 200) ** 0.5


def test_what_a_configuration_lacks_is_drawn_at_the_beginning() -> None:
    pbt = BundlePBT(3, {"lr": tune.uniform(0, 1), "net": {"width": [4, 6]}})
    filled = [pbt.fill({"net": {}, "seed": 3}, number, 0) for number in range(20)]
    assert len({own["lr"] for own in filled}) == 20
    assert {own["net"]["width"] for own in filled} == {4, 6}
    assert filled[3] == pbt.fill({"net": {}, "seed": 3}, 3, 0)
    assert pbt.fill({"lr": 7.0, "net": {"width": 5}}, 3, 0) == {"lr": 7.0, "net": {"width": 5}}


def test_a_function_of_ones_own() -> None:
    def halve(config: dict[str, Any]) -> dict[str, Any]:
        return {**config, "lr": config["lr"] / 2}

    (own,) = explored({"lr": 8.0}, 1, custom_explore_fn=halve)
    assert own == {"lr": 4.0}
    with pytest.raises(ModelBatchError, match="must return a dict"):
        explored({"lr": 8.0}, 1, custom_explore_fn=lambda config: None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"perturbation_interval": 0}, "perturbation_interval must be"),
        ({"burn_in_period": -1}, "burn_in_period must be"),
        ({"quantile_fraction": 0.6}, "quantile_fraction must be between 0 and 0.5"),
        ({"resample_probability": 1.1}, "resample_probability must be"),
        ({"hyperparam_mutations": {}}, "give hyperparam_mutations or custom_explore_fn"),
        ({"hyperparam_mutations": {"a": {"b": 3}}}, "'a/b' must be a list"),
        ({"hyperparam_mutations": {"a": []}}, "'a' has no choices"),
        ({"hyperparam_mutations": {"a": tune.sample_from(lambda spec: 1)}}, "tune.sample_from"),
    ],
)
def test_bad_arguments_of_the_training_are_named(arguments: dict[str, Any], words: str) -> None:
    given = {"perturbation_interval": 1, "hyperparam_mutations": {"lr": [1, 2]}, **arguments}
    with pytest.raises(ModelBatchError, match=words):
        BundlePBT(**given)
