"""Any number of models, batch sizes and widths, empty batches included: together equals alone."""

import copy
from typing import Any

import torch
from bundle_case import assert_relative, gradients
from hypothesis import given, strategies as st
from torch import Tensor, nn

import modelbatch
from modelbatch import ModelBatch

SIZE = st.integers(1, 5)


def check(models: list[nn.Module], x: Tensor, own: bool) -> None:
    """Outputs and gradients for one shared input, or for one input per model."""
    bundle = ModelBatch(copy.deepcopy(models), fallback="error")
    inputs = [x + i for i in range(len(models))] if own else [x] * len(models)
    given_x: Any = modelbatch.per_model(torch.stack(inputs)) if own else x
    out = bundle(given_x)
    out.square().sum().backward()
    for i, (model, one) in enumerate(zip(models, inputs)):
        expected = model(one)
        expected.square().sum().backward()
        assert out[i].shape == expected.shape
        assert_relative(out[i], expected, 1e-10)
        assert_relative(bundle.gradients(i), gradients(model), 1e-10)


@given(
    num_models=SIZE,
    leading=st.lists(st.integers(0, 3), max_size=3),
    widths=st.tuples(SIZE, SIZE, SIZE),
    bias=st.booleans(),
    own=st.booleans(),
)
def test_perceptrons(
    num_models: int, leading: list[int], widths: tuple[int, int, int], bias: bool, own: bool
) -> None:
    a, b, c = widths
    torch.manual_seed(0)
    models: list[nn.Module] = [
        nn.Sequential(nn.Linear(a, b, bias), nn.Tanh(), nn.Linear(b, c, bias)).double()
        for _ in range(num_models)
    ]
    check(models, torch.randn(*leading, a, dtype=torch.float64), own)


@given(
    num_models=SIZE,
    batch=st.integers(1, 3),
    channels=st.tuples(SIZE, SIZE),
    size=st.integers(4, 7),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    own=st.booleans(),
)
def test_convolutional_networks(
    num_models: int,
    batch: int,
    channels: tuple[int, int],
    size: int,
    kernel: int,
    stride: int,
    padding: int,
    own: bool,
) -> None:
    torch.manual_seed(0)
    models: list[nn.Module] = [
        nn.Sequential(
            nn.Conv2d(channels[0], channels[1], kernel, stride, padding, bias=False),
            nn.BatchNorm2d(channels[1]),
            nn.ELU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * channels[1], 2),
        ).double()
        for _ in range(num_models)
    ]
    x = torch.randn(batch, channels[0], size, size, dtype=torch.float64)
    check(models, x, own)


@given(
    num_models=SIZE,
    tokens=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    rows=st.integers(1, 6),
    width=SIZE,
    padded=st.booleans(),
)
def test_embeddings(
    num_models: int, tokens: tuple[int, int], rows: int, width: int, padded: bool
) -> None:
    torch.manual_seed(0)
    models: list[nn.Module] = [
        nn.Embedding(rows, width, padding_idx=0 if padded else None).double()
        for _ in range(num_models)
    ]
    bundle = ModelBatch(copy.deepcopy(models), fallback="error")
    index = torch.randint(rows, tokens)
    bundle(index).square().sum().backward()
    for i, model in enumerate(models):
        model(index).square().sum().backward()
        assert_relative(bundle.gradients(i), gradients(model), 1e-12)
