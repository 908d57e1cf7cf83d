"""Bundles and data of the training tests."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelbatch import ModelBatch

Data = list[tuple[Tensor, Tensor]]


@pytest.fixture
def build() -> Callable[..., ModelBatch]:
    """`build(M, cls, **options)` makes equal bundles for equal arguments."""

    def make(
        num_models: int = 3,
        optimizer_cls: Any = torch.optim.Adam,
        *,
        dtype: torch.dtype = torch.float32,
        dropout: float = 0.0,
        norm: bool = False,
        lr: Any = 0.05,
        optimizer_kwargs: Any = None,
        **kwargs: Any,
    ) -> ModelBatch:
        generator = torch.random.fork_rng()
        with generator:
            torch.manual_seed(5)
            layers = [nn.Linear(4, 6), nn.ReLU(), nn.Dropout(dropout), nn.Linear(6, 3)]
            if norm:
                layers.insert(1, nn.BatchNorm1d(6))
            models = [copy.deepcopy(nn.Sequential(*layers)) for _ in range(num_models)]
            for model in models:
                for parameter in model.parameters():
                    nn.init.normal_(parameter, std=0.5)
                model.to(dtype)
        rates = lr if isinstance(lr, list) else [lr * (1 + i) for i in range(num_models)]
        return ModelBatch(
            models,
            rates,
            optimizer_cls,
            optimizer_kwargs=optimizer_kwargs,
            seeds=list(range(num_models)),
            **kwargs,
        )

    return make


@pytest.fixture
def make_data() -> Callable[..., Data]:
    """`make_data(batches, size)` makes classified points."""

    def make(batches: int = 5, size: int = 8, dtype: torch.dtype = torch.float32) -> Data:
        generator = torch.Generator().manual_seed(11)
        xs = torch.randn(batches, size, 4, generator=generator, dtype=torch.float64).to(dtype)
        ys = torch.randint(3, (batches, size), generator=generator)
        return list(zip(xs, ys))

    return make


@pytest.fixture
def same() -> Callable[[ModelBatch, ModelBatch], bool]:
    """Whether two bundles have equal parameters, buffers and optimizer states, bit for bit."""

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return torch.equal(a.nan_to_num(7e30), b.nan_to_num(7e30)) and a.dtype == b.dtype
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
        if isinstance(a, list | tuple):
            return len(a) == len(b) and all(map(equal, a, b))
        return bool(a == b)

    def check(a: ModelBatch, b: ModelBatch) -> bool:
        assert a.optimizer is not None and b.optimizer is not None
        return equal(a.state_dict(), b.state_dict()) and equal(
            a.optimizer.state_dict(), b.optimizer.state_dict()
        )

    return check
