"""PerModelLoader: own order, own batch size, own samples; position."""

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bundle_case import assert_relative, state
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from modelbatch import ModelBatch, ModelBatchError
from modelbatch.data import PerModelLoader, RoutedBatch

N = 30
SIZES = [4, 10, 7]


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, 4, dtype=torch.float64), torch.randint(3, (N,))


def numbers(count: int = N) -> tuple[Tensor, Tensor]:
    """Data that say which sample they are."""
    return torch.arange(count).unsqueeze(1), torch.arange(count)


def seen(batches: list[RoutedBatch], i: int) -> list[list[int]]:
    """The samples of model i, batch by batch, without those of weight 0 and empty batches."""
    found = []
    for batch in batches:
        own = batch.targets[i] if batch.batched else batch.targets
        if batch.sample_weight is not None:
            own = own[batch.sample_weight[i] > 0]
        found.append(own.tolist())
    return [rows for rows in found if rows]


def net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
    ).double()


@pytest.mark.parametrize("subsets", [False, True])
@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.Adam])
def test_training_equals_training_alone(optimizer_cls: Any, subsets: bool, data: Any) -> None:
    own = [list(range(0, N, 2)), [3, 4, 5, 6, 7, 8, 8, 8], list(range(N))] if subsets else None
    x, y = data
    options = {"momentum": 0.9} if optimizer_cls is torch.optim.SGD else {}
    torch.manual_seed(0)
    models = [net() for _ in range(3)]
    bundle = ModelBatch(
        copy.deepcopy(models),
        lr_list=[0.05] * 3,
        optimizer_cls=optimizer_cls,
        optimizer_kwargs=options,
        fallback="error",
    )
    loader = PerModelLoader(data, SIZES, seeds=[5, 6, 7], subsets=own)
    for _ in range(2):
        for batch in loader:
            inputs, targets, weight = batch.arguments(bundle)
            bundle.train_step(inputs, targets, sample_weight=weight)
    for i, model in enumerate(models):
        optimizer = optimizer_cls(model.parameters(), lr=0.05, **options)
        for epoch in range(2):
            for rows in loader.order(i, epoch).split(SIZES[i]):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
        assert_relative(state(bundle[i]), state(model), 1e-9, f"model {i}")
        assert bundle[i][1].num_batches_tracked == 2 * loader.batches_per_model[i]  # type: ignore[index]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.integers(12, 25),
    st.booleans(),
    st.booleans(),
)
def test_every_model_sees_each_of_its_samples_once(
    sizes: list[int], count: int, shuffle: bool, drop_last: bool
) -> None:
    loader = PerModelLoader(numbers(count), sizes, seeds=3, shuffle=shuffle, drop_last=drop_last)
    batches = list(loader)
    assert len(batches) == len(loader)
    for i, size in enumerate(sizes):
        rows = seen(batches, i)
        assert len(rows) == loader.batches_per_model[i]
        assert all(len(own) == size for own in rows[:-1])
        whole = [row for own in rows for row in own]
        kept = count - count % size if drop_last else count
        assert len(whole) == len(set(whole)) == kept == loader.samples_per_model[i]
        assert whole == loader.order(i)[:kept].tolist()
        assert shuffle or whole == list(range(kept))


def test_missing_samples_repeat_one_of_the_models_own() -> None:
    subsets = [[0, 1], [20, 21, 22, 23, 24]]
    for batch in PerModelLoader(numbers(), 2, seeds=0, subsets=subsets):
        for i, own in enumerate(subsets):
            assert set(batch.targets[i].tolist()) <= set(own)


def test_orders_depend_on_seed_and_epoch_alone() -> None:
    loader = PerModelLoader(numbers(), 5, seeds=[1, 2, 1])
    epochs = []
    for _ in range(3):
        batches = list(loader)
        epochs.append([seen(batches, i) for i in range(3)])
    assert epochs[0][0] == epochs[0][2] != epochs[0][1]
    orders = [str(epoch[i]) for epoch in epochs for i in (0, 1)]
    assert len(set(orders)) == 6
    alone = PerModelLoader(numbers(), [8], seeds=[2])
    assert torch.equal(alone.order(0, 2), loader.order(1, 2))
    loader.set_epoch(1)
    batches = list(loader)
    assert [seen(batches, i) for i in range(3)] == epochs[1]


def test_equal_batches_need_no_weights_and_an_equal_order_no_model_axis() -> None:
    assert all(b.sample_weight is None for b in PerModelLoader(numbers(), 10, seeds=[1, 2]))
    batches = list(PerModelLoader(numbers(), 8, num_models=2, shuffle=False))
    assert all(not b.batched and b.sample_weight is None for b in batches)
    assert [len(b.targets) for b in batches] == [8, 8, 8, 6]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("after", [0, 1, 3, 8, 11])
def test_position_is_resumed(after: int, shuffle: bool) -> None:
    def make() -> PerModelLoader:
        return PerModelLoader(numbers(), SIZES, seeds=[5, 6, 7], shuffle=shuffle)

    def endless(loader: PerModelLoader) -> Any:
        while True:
            yield from loader

    loader, other = make(), make()
    stream = endless(loader)
    for _ in range(after):
        next(stream)
    other.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    resumed = endless(other)
    for _ in range(20):
        a, b = next(stream), next(resumed)
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
        assert (a.sample_weight is None) == (b.sample_weight is None)
    assert loader.state_dict() == other.state_dict()


def test_a_left_epoch_is_not_taken_up_again() -> None:
    loader = PerModelLoader(numbers(), 10, seeds=[1])
    first = iter(loader)
    next(first)
    assert len(list(loader)) == 3
    assert loader.epoch == 1
    loader.set_epoch(1)
    with pytest.raises(ModelBatchError, match="later epoch"):
        next(first)


class Pairs(Dataset[Any]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, k: int) -> Any:
        return (torch.full((2,), float(k)), torch.tensor([k])), k


def test_forms_of_data(data: Any) -> None:
    x, y = data
    for form in ((x, y), [x, y], TensorDataset(x, y)):
        batch = next(iter(PerModelLoader(form, 5, seeds=[1, 2])))
        assert batch.inputs.shape == (2, 5, 4) and batch.targets.shape == (2, 5)
    several = next(iter(PerModelLoader(TensorDataset(x, x + 1, y), 5, seeds=[1, 2])))
    assert torch.equal(several.inputs[1], several.inputs[0] + 1)
    read = PerModelLoader(Pairs(), 3, seeds=[1, 2])
    batch = next(iter(read))
    assert isinstance(batch.inputs, tuple)
    assert torch.equal(batch.inputs[0][:, :, 0].long(), batch.targets)
    named = PerModelLoader(({"a": x, "b": x}, y), 5, seeds=[1, 2], device="cpu")
    assert next(iter(named)).inputs["b"].shape == (2, 5, 4)
    assert named.inputs["a"].data_ptr() == x.data_ptr()  # one copy of the data


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_sizes": 4}, "say how many models"),
        ({"batch_sizes": [4, 4], "seeds": [1]}, "do not agree"),
        ({"batch_sizes": [4, 0]}, "model 1: its batch size must be at least 1"),
        ({"batch_sizes": [4, 31], "drop_last": True}, "model 1 has 30 samples, not one batch"),
        ({"batch_sizes": 4, "subsets": [[1], []]}, "model 1 has 0 samples"),
        ({"batch_sizes": 4, "subsets": [[1], [30]]}, "model 1: its subset goes from 30"),
        ({"batch_sizes": 4, "subsets": [[1.5], [3]]}, "model 0: its subset must be"),
        ({"batch_sizes": 4, "seeds": ["a"]}, r"seeds\[0\] must be"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ModelBatchError, match=message):
        PerModelLoader(numbers(), **arguments)


def test_bad_data_and_states_are_refused(data: Any) -> None:
    x, y = data
    with pytest.raises(ModelBatchError, match="different numbers of samples"):
        PerModelLoader((x, y[:5]), 5, seeds=[1])
    with pytest.raises(ModelBatchError, match="got Tensor"):
        PerModelLoader(x, 5, seeds=[1])
    loader = PerModelLoader((x, y), 5, seeds=[1])
    with pytest.raises(ModelBatchError, match=r"its seeds is \[2\], not \[1\]"):
        loader.load_state_dict(PerModelLoader((x, y), 5, seeds=[2]).state_dict())
