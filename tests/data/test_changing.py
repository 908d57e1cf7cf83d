"""Loaders and routers of bundles whose models change."""

from typing import Any

import pytest
import torch
from changing_case import Net, nets
from torch import Tensor

from modelbatch import ModelBatch, ModelBatchError
from modelbatch.data import PerModelLoader, StratifiedDataRouter

X, Y = torch.arange(24.0, dtype=torch.float64).reshape(24, 1), torch.arange(24)


def follow(follower: Any, count: int = 3) -> ModelBatch:
    mb = ModelBatch(nets(count))
    mb.follow(follower)
    return mb


def seen(loader: PerModelLoader, i: int) -> list[list[int]]:
    rows = []
    for batch in loader:
        weight = torch.ones_like(batch.targets) if batch.sample_weight is None else None
        own = batch.sample_weight[i] if weight is None else weight[i]
        rows.append(batch.targets[i][own != 0].tolist())
    return [row for row in rows if row]


def test_a_loader_keeps_the_orders_of_those_who_stay() -> None:
    make = lambda: PerModelLoader((X, Y), [4, 5, 6], [1, 2, 3])  # noqa: E731
    loader, whole = make(), make()
    mb = follow(loader)
    assert seen(loader, 2) == seen(whole, 2)
    mb.prune([0])
    for own, i in ((0, 1), (1, 2)):
        loader.set_epoch(3)
        whole.set_epoch(3)
        assert seen(loader, own) == seen(whole, i)
    with pytest.raises(ModelBatchError, match=r"model 2 \(new\).*batch size of its own"):
        mb.append([Net(4)])
    mb.replace(0, Net(4))
    assert loader.batch_sizes == [5, 6] and loader.seeds[0] != 2 and loader.seeds[1] == 3


def test_a_running_epoch_goes_on() -> None:
    loader = PerModelLoader((X, Y), 4, [1, 2, 3])
    mb = follow(loader)
    whole = list(PerModelLoader((X, Y), 4, [1, 2, 3]))
    for number, batch in enumerate(loader):
        expected = whole[number].targets
        if number < 2:
            assert torch.equal(batch.targets, expected)
        else:
            assert torch.equal(batch.targets[:2], expected[1:])
        if number == 1:
            mb.prune(0)
            mb.append([Net(4)])
    assert number == 5 and len(loader.seeds) == 3


def test_a_loader_with_subsets_and_its_state() -> None:
    subsets = [[0, 1, 2, 3], [4, 5, 6], [7, 8]]
    make = lambda: PerModelLoader((X, Y), 2, [1, 2, 3], subsets=subsets)  # noqa: E731
    loader = make()
    mb = follow(loader)
    mb.prune(0)
    with pytest.raises(ModelBatchError, match="subset of its own"):
        mb.append([Net(4)])
    mb.replace(1, Net(4))
    assert sorted(n for row in seen(loader, 1) for n in row) == [7, 8]
    state = loader.state_dict()
    other = make()
    with pytest.raises(ModelBatchError, match="another loader"):
        other.load_state_dict(state)
    follow(other).prune(1)
    other.load_state_dict(state)
    for i in range(2):
        loader.set_epoch(5)
        other.set_epoch(5)
        assert seen(loader, i) == seen(other, i)


OPTIONS: dict[str, dict[str, Any]] = {
    "round_robin": {},
    "random": {"fraction": 0.5, "seeds": 3},
    "class_based": {"num_classes": 5},
    "kfold": {"dataset_size": 24, "shuffle_seed": 1},
    "bootstrap": {"dataset_size": 24, "seeds": 4},
}


@pytest.mark.parametrize("strategy", OPTIONS)
def test_routers_keep_the_parts_of_those_who_stay(strategy: str) -> None:
    make = lambda: StratifiedDataRouter(3, strategy, **OPTIONS[strategy])  # noqa: E731
    ids, labels = torch.arange(24), torch.arange(24) % 5

    def parts(router: StratifiedDataRouter) -> Tensor:
        return router.sample_weights(ids, labels)

    router, whole = make(), make()
    mb = follow(router)
    mb.prune([1])
    assert torch.equal(parts(router), parts(whole)[[0, 2]])
    mb.replace(1, Net(4))
    own = strategy in ("random", "bootstrap")
    assert torch.equal(parts(router)[0], parts(whole)[0])
    assert torch.equal(parts(router)[1], parts(whole)[2]) is not own
    if strategy in ("round_robin", "class_based"):
        with pytest.raises(ModelBatchError, match="has given all samples"):
            mb.append([Net(5)])
    else:
        mb.append([Net(5)])
        assert parts(router).shape == (3, 24)
    if strategy == "kfold":
        held = router.validation().sample_weights(ids)
        assert torch.equal(held + parts(router), torch.ones_like(held))
    other = make()
    bundle = follow(other)
    bundle.replace(0, Net(6))
    if len(mb) == 2:
        bundle.prune(0)
    other.load_state_dict(router.state_dict())
    assert torch.equal(parts(other), parts(router))


def test_a_loader_of_another_bundle() -> None:
    mb = follow(PerModelLoader((X, Y), 4, num_models=3))
    loader = PerModelLoader((X, Y), 4, num_models=2)
    router = StratifiedDataRouter(2)
    mb.follow(loader)
    with pytest.raises(ModelBatchError, match="is for 2 models, the bundle has 3"):
        mb.prune(0)
    del loader
    mb.follow(router)
    with pytest.raises(ModelBatchError, match="router is for 2 models"):
        mb.prune(0)
