"""StratifiedDataRouter: who gets what, the same in every epoch, and training on it."""

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bundle_case import assert_relative, state
from torch import Tensor, nn

from modelbatch import ModelBatch, ModelBatchError
from modelbatch.data import PerModelLoader, StratifiedDataRouter

M, N, B = 4, 60, 20

OPTIONS: dict[str, dict[str, Any]] = {
    "round_robin": {},
    "random": {"fraction": 0.6, "seeds": [1, 2, 3, 4]},
    "class_based": {"classes": [[0, 1], [2], [0, 2], [1]]},
    "kfold": {"dataset_size": N},
    "bootstrap": {"dataset_size": N, "seeds": 7},
    "bootstrap_poisson": {"seeds": 7},
}


def make_router(name: str, **more: Any) -> StratifiedDataRouter:
    return StratifiedDataRouter(M, name.split("_poisson")[0], **{**OPTIONS[name], **more})


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, 4, dtype=torch.float64), torch.randint(3, (N,))


def net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
    ).double()


@pytest.mark.parametrize("compact", [None, False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_training_equals_training_on_the_subsets(name: str, compact: Any, data: Any) -> None:
    x, y = data
    router = make_router(name, compact=compact)
    counts = router.sample_weights(torch.arange(N), y).long()
    torch.manual_seed(0)
    models = [net() for _ in range(M)]
    bundle = ModelBatch(
        copy.deepcopy(models), lr_list=[0.05] * M, optimizer_cls=torch.optim.Adam, fallback="error"
    )
    for _ in range(2):
        router.start_epoch()
        for begin in range(0, N, B):
            batch = router.route_batch(x[begin : begin + B], y[begin : begin + B])
            assert compact is None or batch.batched == compact
            inputs, targets, weight = batch.arguments(bundle)
            bundle.train_step(inputs, targets, sample_weight=weight)
    for i, model in enumerate(models):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for begin in (*range(0, N, B), *range(0, N, B)):
            rows = torch.arange(begin, begin + B).repeat_interleave(counts[i, begin : begin + B])
            if len(rows) == 0:  # of one class there may be none in a batch
                continue
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        assert_relative(state(bundle[i]), state(model), 1e-9, f"model {i}")


@pytest.mark.parametrize("name", OPTIONS)
def test_a_sample_belongs_to_the_same_models_however_it_arrives(name: str, data: Any) -> None:
    _, y = data
    router = make_router(name)
    whole = router.sample_weights(torch.arange(N), y)
    order = torch.randperm(N)
    assert torch.equal(router.sample_weights(order, y[order]), whole[:, order])
    ids = order[:7]
    batch = make_router(name, compact=False).route_batch(ids, y[ids], ids)
    assert batch.sample_weight is not None
    assert torch.equal(batch.sample_weight, whole[:, ids])


def test_round_robin() -> None:
    weight = make_router("round_robin").sample_weights(torch.arange(9))
    assert weight.argmax(0).tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert (weight.sum(0) == 1).all()
    assert make_router("round_robin").needs_order
    assert not make_router("class_based").needs_order


def test_random_fractions_are_what_they_say() -> None:
    count = 20000
    router = StratifiedDataRouter(5, "random", fraction=0.3, seeds=[0, 1, 2, 3, 4])
    weight = router.sample_weights(torch.arange(count)).bool()
    deviation = (0.3 * 0.7 / count) ** 0.5
    assert ((weight.double().mean(1) - 0.3).abs() < 5 * deviation).all()
    # independent of each other: two of them share 9 %
    shared = (weight[0] & weight[1]).double().mean()
    assert abs(shared - 0.09) < 5 * (0.09 * 0.91 / count) ** 0.5


def test_classes() -> None:
    labels = torch.tensor([0, 1, 2, 3, -1, 9])
    ids = torch.arange(6)
    own = make_router("class_based").sample_weights(ids, labels)
    assert own.tolist() == [
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
    ]
    few = StratifiedDataRouter(4, "class_based", num_classes=2).sample_weights(ids, labels)
    assert few.argmax(1).tolist() == [0, 1, 0, 1]
    many = StratifiedDataRouter(2, "class_based", num_classes=4).sample_weights(ids, labels)
    assert many[:, :4].tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]


@pytest.mark.parametrize("options", [{}, {"num_folds": 3}, {"shuffle_seed": 5}])
def test_folds_are_a_partition(options: Any) -> None:
    router = make_router("kfold", **options)
    train = router.sample_weights(torch.arange(N))
    val = router.validation().sample_weights(torch.arange(N))
    assert torch.equal(train + val, torch.ones(M, N))
    folds = router.num_folds
    assert (val.sum(1) == N // folds).all()
    assert (val[:folds].sum(0) == 1).all()
    if folds < M:
        assert torch.equal(val[0], val[folds])
    if options.get("shuffle_seed"):
        assert val[0].nonzero().flatten().diff().unique().numel() > 1
    assert router.validation().validation().split == "train"


def test_bootstrap_draws_as_many_as_there_are() -> None:
    router = make_router("bootstrap")
    weight = router.sample_weights(torch.arange(N))
    assert (weight.sum(1) == N).all()
    assert len({tuple(row) for row in weight.tolist()}) == M
    assert torch.equal(weight, make_router("bootstrap").sample_weights(torch.arange(N)))
    assert [len(own) for own in router.subsets()] == [N] * M


def test_poisson_counts() -> None:
    count = 20000
    weight = StratifiedDataRouter(2, "bootstrap", seeds=[0, 1]).sample_weights(torch.arange(count))
    for value, probability in enumerate([0.3679, 0.3679, 0.1839, 0.0613]):
        found = (weight == value).double().mean(1)
        assert ((found - probability).abs() < 5 * (probability / count) ** 0.5).all()


def test_subsets_make_a_loader_of_a_shuffled_cross_validation(data: Any) -> None:
    x, y = data
    router = make_router("kfold")
    loader = PerModelLoader((x, y), 8, seeds=0, subsets=router.subsets())
    held_out = router.validation().subsets()
    for i in range(M):
        assert not set(loader.order(i).tolist()) & set(held_out[i].tolist())
    classes = StratifiedDataRouter(3, "class_based", num_classes=3).subsets(y)
    assert [y[own].unique().tolist() for own in classes] == [[0], [1], [2]]


def test_counting_starts_anew_after_a_whole_data_set(data: Any) -> None:
    x, y = data
    router = make_router("kfold", compact=False)
    first = [router.route_batch(x[:30], y[:30]), router.route_batch(x[30:], y[30:])]
    assert router.epoch == 1
    again = router.route_batch(x[:30], y[:30])
    assert torch.equal(again.sample_weight, first[0].sample_weight)
    with pytest.raises(ModelBatchError, match="call start_epoch"):
        router.route_batch(x[:40], y[:40])
    router.start_epoch()
    assert router.epoch == 2
    router.route_batch(x[:40], y[:40])


@pytest.mark.parametrize("name", OPTIONS)
def test_state_goes_on_in_the_middle_of_an_epoch(name: str, data: Any) -> None:
    x, y = data
    router, other = make_router(name, compact=False), make_router(name, compact=False)
    router.route_batch(x[:25], y[:25])
    other.load_state_dict(json.loads(json.dumps(router.state_dict())))
    for begin in (25, 40):
        end = begin + 15
        a, b = (r.route_batch(x[begin:end], y[begin:end]) for r in (router, other))
        assert torch.equal(a.sample_weight, b.sample_weight)
    assert other.state_dict() == router.state_dict()
    with pytest.raises(ModelBatchError, match="its num_models is 4, not 3"):
        StratifiedDataRouter(3).load_state_dict(make_router("round_robin").state_dict())


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((3, "stratified"), {}, "strategy must be one of"),
        ((0,), {}, "num_models must be at least 1"),
        ((3, "random"), {"fraction": 0.0}, r"fraction must be in \(0, 1\]"),
        ((3, "random"), {"seeds": [1]}, "seeds has 1 entries for 3 models"),
        ((3, "round_robin"), {"fraction": 0.5}, "fraction is not an option"),
        ((3, "kfold"), {"num_folds": 1}, "num_folds must be at least 2"),
        ((3, "kfold"), {"split": "test"}, 'split must be "train" or "val"'),
        ((3, "kfold"), {"shuffle_seed": 1}, "shuffle_seed needs dataset_size"),
        ((3, "class_based"), {}, "either classes or num_classes"),
        ((3, "class_based"), {"classes": [[0]]}, "classes has 1 entries for 3 models"),
        ((2, "class_based"), {"classes": [[0], []]}, "model 1: its classes"),
        ((2, "class_based"), {"num_classes": 0}, "num_classes must be at least 1"),
        ((2, "bootstrap"), {"dataset_size": 0}, "dataset_size must be at least 1"),
    ],
)
def test_bad_options_are_refused(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ModelBatchError, match=message):
        StratifiedDataRouter(*arguments, **options)


def test_bad_batches_are_refused(data: Any) -> None:
    x, y = data
    with pytest.raises(ModelBatchError, match="must be the same in every epoch"):
        StratifiedDataRouter(3, "kfold").route_batch(x, y)
    ids = torch.arange(N)
    assert StratifiedDataRouter(3, "kfold").route_batch(x, y, ids).sample_weight is not None
    router = make_router("kfold")
    with pytest.raises(ModelBatchError, match="sample id 60 is not in a data set of 60"):
        router.route_batch(x, y, ids + 1)
    with pytest.raises(ModelBatchError, match="5 sample_ids for 60"):
        router.route_batch(x, y, ids[:5])
    with pytest.raises(ModelBatchError, match="whole numbers"):
        router.route_batch(x, y, ids.double())
    with pytest.raises(ModelBatchError, match="needs labels"):
        make_router("class_based").route_batch(x, x)
    with pytest.raises(ModelBatchError, match="leaves no samples"):
        make_router("random").validation()
    with pytest.raises(ModelBatchError, match="needs dataset_size"):
        make_router("random").subsets()
