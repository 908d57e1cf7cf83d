"""DataRouter: what each model gets, and that training on it equals training alone."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bundle_case import assert_relative, state
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from modelbatch import ModelBatch, ModelBatchError
from modelbatch.data import DataRouter, RoutedBatch, create_random_masks

M, B = 3, 8


def net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
    ).double()


@pytest.fixture
def models() -> list[nn.Module]:
    torch.manual_seed(0)
    return [net() for _ in range(M)]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(B, 4, dtype=torch.float64), torch.randint(3, (B,))


def train(models: list[nn.Module], routed: RoutedBatch, **kwargs: Any) -> ModelBatch:
    bundle = ModelBatch(
        copy.deepcopy(models), lr_list=[0.1] * M, optimizer_cls=torch.optim.Adam, **kwargs
    )
    for _ in range(3):
        x, y, weight = routed.arguments(bundle)
        bundle.train_step(x, y, sample_weight=weight)
    return bundle


def train_alone(model: nn.Module, x: Tensor, y: Tensor, rows: Any) -> nn.Module:
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3 if len(rows) else 0):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model


def test_passthrough_changes_nothing(batch: Any) -> None:
    routed = DataRouter().route_batch(*batch)
    assert routed.inputs is batch[0] and routed.targets is batch[1]
    assert routed.sample_weight is None and not routed.batched


@pytest.mark.parametrize("shared_input", [True, False])
@pytest.mark.parametrize("form", ["bool", "list", "int"])
def test_a_mask_equals_training_alone(
    form: str, shared_input: bool, models: Any, batch: Any
) -> None:
    masks = torch.rand(M, B) > 0.4
    masks[:, :2] = True
    masks[1] = False
    given_masks = {"bool": masks, "list": list(masks), "int": masks.int()}[form]
    routed = DataRouter("mask").route_batch(*batch, masks=given_masks)
    assert routed.inputs is batch[0]
    bundle = train(models, routed, shared_input=shared_input)
    for i, model in enumerate(models):
        alone = train_alone(model, *batch, masks[i].nonzero().flatten())
        assert_relative(state(bundle[i]), state(alone), 1e-9, f"model {i}")


INDICES: list[Any] = [
    [[0, 1, 2], [5, 3], []],
    [[7, 7, 7, 1], torch.tensor([2, 4]), [6, 0, 3]],
    torch.tensor([[0, 1], [3, 2], [4, 6]]),
    torch.tensor([[0, 1], [3, 2], [4, 7]], dtype=torch.int32),
]


@pytest.mark.parametrize("shared_input", [True, False])
@pytest.mark.parametrize("indices", INDICES, ids=["ragged", "repeats", "matrix", "int32"])
def test_indices_equal_training_alone(
    indices: Any, shared_input: bool, models: Any, batch: Any
) -> None:
    routed = DataRouter("indices").route_batch(*batch, indices=indices)
    bundle = train(models, routed, shared_input=shared_input)
    for i, model in enumerate(models):
        rows = torch.as_tensor(indices[i]).long()
        alone = train_alone(model, *batch, rows)
        assert_relative(state(bundle[i]), state(alone), 1e-9, f"model {i}")


def test_missing_samples_repeat_one_of_the_models_own(batch: Any) -> None:
    x, y = batch
    routed = DataRouter("indices").route_batch(x, y, indices=[[3, 5], [2], [7, 1, 4]])
    assert routed.batched and routed.inputs.shape == (3, 3, 4)
    assert routed.sample_weight is not None
    assert routed.sample_weight.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert torch.equal(routed.inputs[1], x[[2, 2, 2]])
    assert torch.equal(routed.targets[0], y[[3, 5, 3]])
    full = DataRouter("indices").route_batch(x, y, indices=[[3, 5], [2, 2], [7, 1]])
    assert full.sample_weight is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, B - 1), max_size=6), min_size=1, max_size=4))
def test_any_lists(indices: list[list[int]]) -> None:
    x = torch.arange(B).unsqueeze(1)
    routed = DataRouter("indices").route_batch(x, x[:, 0], indices=indices)
    weight = routed.sample_weight
    if weight is None:
        weight = torch.ones(routed.targets.shape)
    for own, rows, counts in zip(indices, routed.targets, weight):
        assert rows[counts == 1].tolist() == own
        assert set(rows[counts == 0].tolist()) <= set(own or [0])


def test_structured_inputs_are_routed_whole(batch: Any) -> None:
    x, y = batch
    inputs = {"a": x, "rest": (x + 1, "a flag")}
    routed = DataRouter("indices").route_batch(inputs, y, indices=[[0, 1], [2, 3], [4, 5]])
    assert routed.inputs["a"].shape == (3, 2, 4)
    assert torch.equal(routed.inputs["rest"][0], routed.inputs["a"] + 1)
    assert routed.inputs["rest"][1] == "a flag"
    moved = routed.to("cpu")
    assert moved.batched and torch.equal(moved.inputs["a"], routed.inputs["a"])


@pytest.mark.parametrize(
    ("mode", "kwargs", "message"),
    [
        ("mask", {}, 'mode "mask" needs masks'),
        ("indices", {"masks": torch.ones(M, B)}, 'mode "indices" does not take masks'),
        ("passthrough", {"indices": [[0]]}, 'mode "passthrough" does not take indices'),
        ("mask", {"masks": torch.ones(M, B + 1)}, r"shape \[M, 8\]"),
        ("mask", {"masks": [torch.ones(2), torch.ones(3)]}, "must be"),
        ("indices", {"indices": [[0], [B]]}, "index 8 is not in a batch of 8"),
        ("indices", {"indices": [[0], [-1]]}, "index -1 is not in a batch of 8"),
        ("indices", {"indices": [[0.5], [1.0]]}, "whole numbers"),
        ("indices", {"indices": [3, 4]}, "whole numbers"),
        ("indices", {"indices": []}, "whole numbers"),
    ],
)
def test_what_does_not_fit_is_refused(mode: str, kwargs: Any, message: str, batch: Any) -> None:
    with pytest.raises(ModelBatchError, match=message):
        DataRouter(mode).route_batch(*batch, **kwargs)


def test_other_refusals(batch: Any) -> None:
    x, y = batch
    with pytest.raises(ModelBatchError, match="mode must be"):
        DataRouter("indexes")
    with pytest.raises(ModelBatchError, match=r"different numbers of samples: \[7, 8\]"):
        DataRouter().route_batch(x, y[:7])
    with pytest.raises(ModelBatchError, match="one entry per sample"):
        DataRouter().route_batch("x", "y")


def test_state(batch: Any) -> None:
    router = DataRouter("mask")
    router.load_state_dict(DataRouter("mask").state_dict())
    with pytest.raises(ModelBatchError, match="mode 'passthrough'"):
        router.load_state_dict(DataRouter().state_dict())


@pytest.mark.parametrize(("ratio", "count"), [(0.8, 8), (0.25, 2), (0.01, 1), (1.0, 10)])
def test_random_masks(ratio: float, count: int) -> None:
    generator = torch.Generator().manual_seed(3)
    masks = create_random_masks(10, 50, ratio, generator=generator)
    assert masks.dtype == torch.bool and masks.shape == (50, 10)
    assert (masks.sum(1) == count).all()
    again = create_random_masks(10, 50, ratio, generator=generator.manual_seed(3))
    assert torch.equal(masks, again)
    if count < 10:
        assert len({tuple(row) for row in masks.tolist()}) > 5
        # every sample is as likely as every other: 50 masks are within 5 deviations of the mean
        spread = (50 * count / 10 * (1 - count / 10)) ** 0.5
        assert ((masks.sum(0) - 50 * count / 10).abs() <= 5 * spread).all()


@pytest.mark.parametrize("arguments", [(0, 3), (4, 0), (4, 3, 0.0), (4, 3, 1.5)])
def test_random_masks_refuse_what_makes_none(arguments: Any) -> None:
    with pytest.raises(ModelBatchError):
        create_random_masks(*arguments)
