"""Every trial of a sweep has the result that it has alone."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from sweep.sweep_case import SAMPLES, alone, build, close, data
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from modelbatch import ModelBatch, fit
from modelbatch.random import derive_seed
from modelbatch.sweep import SweepResult, run_sweep

X, Y = data()
VAL = (X[:10], Y[:10])
CONFIGS: list[dict[str, Any]] = [
    {"lr": 0.01},
    {"lr": 0.03, "width": 4},
    {"lr": 0.02, "betas": (0.8, 0.99), "weight_decay": 0.01},
    {"lr": 0.05, "width": 4, "seed": 77},
    {"lr": 0.01, "batch_size": 5},
    {"lr": 0.1, "optimizer_cls": "SGD", "momentum": 0.9},
    {"lr": 0.2, "optimizer_cls": torch.optim.SGD},
    {"lr": 0.02, "activation": "gelu", "epochs": 2},
    {"lr": 0.03, "epochs": 3},
    {"lr": 0.03, "clip_grad_norm": 0.1},
    {"lr": 0.03, "clip_grad_norm": 5.0},
]
EPOCHS = 4
ALONE = [alone(c, i, c.get("epochs", EPOCHS)) for i, c in enumerate(CONFIGS)]


def sweep(configs: Any = CONFIGS, **kwargs: Any) -> SweepResult:
    settings = {"epochs": EPOCHS, "batch_size": 8, "progress": False} | kwargs
    return run_sweep(build, configs, (X, Y), VAL, **settings)


@pytest.mark.parametrize("bundle_size", ["auto", 1, 2])
def test_every_trial_is_what_it_is_alone(bundle_size: Any) -> None:
    result = sweep(bundle_size=bundle_size)
    assert result.counts == {"finished": len(CONFIGS)}
    for number, (losses, val_losses, model) in enumerate(ALONE):
        own = result[number]
        assert close(own.curves["loss"], losses)
        assert close(own.curves["val_loss"], val_losses)
        assert own.value == min(own.curves["val_loss"])
        assert own.curves["val_loss"][own.epoch or 0] == own.value
        exported = result.export(number).state_dict()
        for name, tensor in model.state_dict().items():
            assert close(exported[name], tensor), (number, name)


class _Random:
    """Prunes what a table says."""

    def __init__(self, when: Mapping[int, int]) -> None:
        self.when = when
        self.told: list[tuple[int, dict[int, float]]] = []

    def prune(self, epoch: int, values: Mapping[int, float]) -> list[int]:
        self.told.append((epoch, dict(values)))
        return [trial for trial in values if self.when.get(trial, 99) <= epoch]


@settings(max_examples=12)
@given(
    st.integers(1, 6),
    st.dictionaries(st.integers(0, len(CONFIGS) - 1), st.integers(0, EPOCHS - 1)),
    st.permutations(range(len(CONFIGS))),
)
def test_neither_bundles_nor_pruned_neighbours_matter(
    bundle_size: int, when: dict[int, int], order: list[int]
) -> None:
    seeds = [derive_seed(number, 0) for number in order]
    place = {number: slot for slot, number in enumerate(order)}
    pruner = _Random({place[number]: epoch for number, epoch in when.items()})
    result = sweep(
        [CONFIGS[number] for number in order], seeds=seeds, bundle_size=bundle_size, pruner=pruner
    )
    for number, (losses, val_losses, _) in enumerate(ALONE):
        own = result[place[number]]
        length = min(when.get(number, 99) + 1, len(losses))
        assert own.epochs == length
        assert own.status == ("finished" if length == len(losses) else "pruned")
        assert close(own.curves["loss"], losses[:length])
        assert close(own.curves["val_loss"], val_losses[:length])
    for epoch, values in pruner.told:
        for trial, value in values.items():
            assert value == result[trial].curves["val_loss"][epoch]


def test_dropout_shares_a_bundle_and_draws_from_the_trials_own_stream() -> None:
    configs = [{"lr": 0.01, "dropout": p, "seed": 10 + i} for i, p in enumerate((0.1, 0.5, 0.3))]
    bundles: list[list[int]] = []

    def note(trials: list[int]) -> list[Any]:
        bundles.append(trials)
        return []

    result = sweep(configs, callbacks=note)
    assert bundles == [[0, 1, 2]]
    for number, config in enumerate(configs):
        mb = ModelBatch.from_factory(
            lambda config=config: build(config),  # type: ignore[misc]
            1,
            seeds=[config["seed"]],
            lr_list=[config["lr"]],
            optimizer_cls=torch.optim.Adam,
        )
        from modelbatch.sweep.data import Data

        loader = Data("train_data", (X, Y), 0, None).training(8)
        history = fit(mb, loader, [VAL], epochs=EPOCHS)
        assert close(result[number].curves["loss"], history["loss"][:, 0])


def test_only_what_must_be_separate_is_separate() -> None:
    bundles: list[list[int]] = []

    def note(trials: list[int]) -> list[Any]:
        bundles.append(trials)
        return []

    sweep(callbacks=note)
    assert bundles == [[0, 2, 8], [1, 3], [4], [5, 6], [7], [9, 10]]
    bundles.clear()
    sweep(callbacks=note, bundle_size=2)
    assert bundles == [[0, 2], [1, 3], [4], [5, 6], [7], [8], [9, 10]]


class _Pairs(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return X[i], Y[i]


@pytest.mark.parametrize("form", [_Pairs(), TensorDataset(X, Y)])
def test_a_dataset_is_as_good_as_tensors(form: Any) -> None:
    result = run_sweep(build, CONFIGS[:2], form, form, epochs=2, batch_size=8, progress=False)
    for number in range(2):
        assert close(result[number].curves["loss"], ALONE[number][0][:2])


@pytest.mark.parametrize("own_generator", [False, True])
def test_every_bundle_sees_a_loader_in_the_same_order(own_generator: bool) -> None:
    generator = torch.Generator().manual_seed(3) if own_generator else None
    loader = DataLoader(TensorDataset(X, Y), 8, shuffle=True, generator=generator)
    configs = [{"lr": 0.01}, {"lr": 0.02}, {"lr": 0.03}]
    first = run_sweep(build, configs, loader, epochs=3, progress=False)
    before = torch.get_rng_state()
    second = run_sweep(build, configs, loader, epochs=3, bundle_size=1, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    for number in range(3):
        assert close(second[number].curves["loss"], first[number].curves["loss"])
    assert first.metric == "loss"


def test_a_grid_is_all_combinations() -> None:
    grid = {"lr": [0.1, 0.2], "betas": (0.9, 0.99), "width": [4, 6]}
    result = sweep(grid, epochs=1)
    assert [(r.config["lr"], r.config["width"]) for r in result.values()] == [
        (0.1, 4),
        (0.1, 6),
        (0.2, 4),
        (0.2, 6),
    ]
    assert all(r.config["betas"] == (0.9, 0.99) for r in result.values())


def test_each_trial_has_its_own_schedule() -> None:
    def schedule(optimizer: Any, config: dict[str, Any]) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, config["gamma"])

    configs = [{"lr": 0.05, "gamma": 1.0, "seed": 1}, {"lr": 0.05, "gamma": 1e-12, "seed": 1}]
    result = sweep(configs, scheduler=schedule)
    moving, resting = result[0].curves["val_loss"], result[1].curves["val_loss"]
    assert moving[0] == resting[0] and moving[3] < moving[1]
    assert close(resting[1], resting[3])


def test_the_best_weights_are_those_of_the_best_epoch() -> None:
    configs = [{"lr": 3.0, "optimizer_cls": "SGD", "seed": s} for s in range(6)]
    result = sweep(configs, keep_weights="best", epochs=6)
    for own in result.values():
        assert own.epoch is not None
        _, val_losses, model = alone(own.config, own.id, own.epoch + 1)
        assert close(own.curves["val_loss"][: own.epoch + 1], val_losses)
        exported = result.export(own.id)
        for name, tensor in model.state_dict().items():
            assert close(exported.state_dict()[name], tensor)
    assert any(own.epoch != 5 for own in result.values())


def test_a_metric_may_be_one_to_maximise() -> None:
    from modelbatch import accuracy

    result = sweep(CONFIGS[:4], metric="val_acc", mode="max", metric_fns={"acc": accuracy})
    values = [max(own.curves["val_acc"]) for own in result.values()]
    assert result.best.value == max(values)
    ranked = [own.value for own in result.ranking()]
    assert ranked == sorted(ranked, reverse=True)  # type: ignore[type-var]


def test_models_of_another_attribute_go_elsewhere() -> None:
    """A string that decides about the forward cannot differ within a bundle."""

    class Named(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = kind
            self.layer = nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x if self.kind == "plain" else x.tanh())

    configs = [{"kind": kind, "lr": 0.1, "seed": 3} for kind in ("plain", "squashed", "plain")]
    result = run_sweep(
        lambda config: Named(config["kind"]), configs, (X, Y), epochs=1, progress=False
    )
    assert result[0].value == result[2].value != result[1].value
