"""Models that leave a bundle, replace others and join: the others keep every bit, the new ones
train as they would alone."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from changing_case import (
    OPTIMIZERS,
    Alone,
    Net,
    assert_close,
    assert_same_bits,
    batches,
    nets,
    tensors,
)
from torch import nn

from modelbatch import ModelBatch, OptimizerFactory

RATES = [0.01, 0.02, 0.03, 0.04, 0.05]


def bundle(count: int = 5, cls: Any = torch.optim.Adam, **options: Any) -> ModelBatch:
    options.setdefault("fallback", "silent")
    models = options.pop("models", None) or nets(count)
    return ModelBatch(models, RATES[: len(models)], cls, seeds=range(len(models)), **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_those_who_stay_never_had_the_others(name: str) -> None:
    cls, options = OPTIMIZERS[name]
    mb = bundle(cls=cls, optimizer_kwargs=options)
    keep = [1, 3, 4]
    alone = ModelBatch(
        [Net(i) for i in keep],
        [RATES[i] for i in keep],
        cls,
        optimizer_kwargs=options,
        seeds=keep,
        fallback="silent",
    )
    for number, (x, y) in enumerate(batches(6)):
        if number == 3:
            mb.prune([0, -3])
            assert mb.model_ids == keep and len(mb) == 3
        losses = mb.train_step(x, y)
        expected = alone.train_step(x, y)
        assert torch.equal(losses if number >= 3 else losses[keep], expected)
    assert_same_bits(mb, alone)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("how", ["append", "replace"])
def test_a_fresh_model_trains_as_it_would_alone(name: str, how: str) -> None:
    cls, options = OPTIMIZERS[name]
    mb = bundle(3, cls, optimizer_kwargs=options)
    others = [Alone(Net(i), cls, {"lr": RATES[i], **options}) for i in range(3)]
    data = batches(7)
    for x, y in data[:3]:
        mb.train_step(x, y)
        for other in others:
            other.step(x, y)
    model = Net(9)
    fresh = Alone(model, cls, {"lr": 0.015, **options})
    if how == "append":
        assert mb.append([model], lr=0.015) == [3]
        expected = [*others, fresh]
    else:
        assert mb.replace(1, model, lr=0.015) == 3
        expected = [others[0], fresh, others[2]]
    assert mb.models[3 if how == "append" else 1] is model
    for x, y in data[3:]:
        losses = mb.train_step(x, y)
        wanted = torch.tensor([one.step(x, y) for one in expected], dtype=torch.float64)
        torch.testing.assert_close(losses, wanted, rtol=1e-9, atol=0)
    for own, one in zip(mb.models, expected):
        assert_close(own, one.model)
    index = expected.index(fresh)
    for key, value in fresh.optimizer.state_dict()["state"].items():
        saved = mb.optimizer.model_state_dict(index)["state"][key]
        if "step" in value:
            assert float(saved["step"]) == float(value["step"]) == 4


def test_lbfgs_follows() -> None:
    cls, options = torch.optim.LBFGS, {"max_iter": 4, "line_search_fn": "strong_wolfe"}
    models = [nn.Linear(4, 3).double() for _ in range(4)]
    alone = [Alone(model, cls, {"lr": 0.5, **options}) for model in models]
    mb = ModelBatch(models[:3], [0.5] * 3, cls, optimizer_kwargs=options)

    def step(x: Any, y: Any, own: list[Alone]) -> None:
        def closure() -> Any:
            mb.zero_grad()
            total = mb.compute_loss(mb(x), y)
            total.backward()
            return mb.latest_losses

        mb.step(closure)
        for one in own:

            def evaluate(one: Alone = one) -> Any:
                one.optimizer.zero_grad()
                loss = F.cross_entropy(one.model(x), y)
                loss.backward()
                return loss

            one.optimizer.step(evaluate)

    data = batches(5)
    step(*data[0], alone[:3])
    step(*data[1], alone[:3])
    mb.prune(0)
    step(*data[2], alone[1:3])
    mb.append([models[3]], lr=0.5)
    step(*data[3], alone[1:])
    step(*data[4], alone[1:])
    for own, one in zip(mb.models, alone[1:]):
        assert_close(own, one.model)


@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_random_streams_go_with_their_models(rng: str) -> None:
    models = nets(3, dropout=0.4)
    extra = Net(7, dropout=0.4)
    alone = [
        ModelBatch([copy.deepcopy(m)], [0.01], torch.optim.SGD, seeds=[s], rng=rng)
        for m, s in zip([*models, extra], (5, 6, 7, 8))
    ]
    mb = ModelBatch(models, [0.01] * 3, torch.optim.SGD, seeds=[5, 6, 7], rng=rng)
    order = [0, 1, 2]
    for number, (x, y) in enumerate(batches(6)):
        if number == 2:
            mb.prune(1)
            order = [0, 2]
        if number == 4:
            mb.append([extra], lr=0.01, seeds=[8])
            order = [0, 2, 3]
        mb.train_step(x, y)
        for i in order:
            alone[i].train_step(x, y)
    assert mb.seeds == [5, 7, 8]
    for own, i in zip(mb.models, order):
        assert_close(own, alone[i].models[0])


def test_a_fresh_stream_has_the_seed_of_its_number() -> None:
    torch.manual_seed(3)
    mb, larger = ModelBatch(nets(2)), ModelBatch(nets(4))
    mb.append(nets(1, 5))
    mb.prune(2)
    mb.append(nets(1, 5))
    assert mb.model_ids == [0, 1, 3] and mb.seeds == [larger.seeds[i] for i in (0, 1, 3)]


def test_numbers_that_differ_between_models() -> None:
    def model(p: float, momentum: float) -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=momentum), nn.Dropout(p))
        return net.double()

    options = [(0.1, 0.1), (0.5, 0.3), (0.1, 0.1)]
    models = [model(*own) for own in options]
    extra = model(0.7, 0.9)
    single = [
        ModelBatch([copy.deepcopy(m)], seeds=[s]) for s, m in enumerate([*models, extra], start=10)
    ]
    mb = ModelBatch(models, seeds=[10, 11, 12])
    x = batches(1)[0][0]

    def compare(order: list[int]) -> None:
        out = mb(x)
        for own, i in zip(out, order):
            torch.testing.assert_close(own, single[i](x)[0], rtol=1e-12, atol=1e-12)

    compare([0, 1, 2])
    mb.append([extra], seeds=[13])
    compare([0, 1, 2, 3])
    mb.prune([1, 3])
    assert not mb._stack.structure.per_model  # those that are left agree
    compare([0, 2])
    mb.replace(0, model(0.2, 0.1), seed=1)
    values = {name: number.values for (_, name), number in mb._stack.structure.per_model.items()}
    assert values == {"p": (0.2, 0.1)}


def test_modules_that_leave_become_independent() -> None:
    mb = bundle(3)
    for x, y in batches(2):
        mb.train_step(x, y)
    held = mb.models
    before = [copy.deepcopy(model.state_dict()) for model in held]
    hidden = held[1].scale.clone()
    mb.prune(1)
    mb.replace(0, Net(8))
    for slot, tensor in tensors(mb).items():
        storage = tensor.untyped_storage().data_ptr()
        for model in (held[0], held[1]):
            own = dict([*model.named_parameters(), *model.named_buffers()])
            assert own[slot].untyped_storage().data_ptr() != storage
    for model, state in zip(held[:2], before):
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(held[1].scale, hidden)
    assert held[1].again.weight is held[1].middle.weight
    stacked = copy.deepcopy(tensors(mb))
    optimizer = torch.optim.SGD(held[1].parameters(), lr=0.1)
    F.cross_entropy(held[1](x), y).backward()
    optimizer.step()
    assert not torch.equal(held[1].first.weight, before[1]["first.weight"])
    assert all(torch.equal(stacked[name], value) for name, value in tensors(mb).items())
    held[2].first.weight.data.zero_()  # who stayed is a view as ever
    assert not mb.get_parameter("first.weight")[1].any()


def test_a_model_that_left_can_come_back() -> None:
    mb = bundle(3)
    data = batches(4)
    mb.train_step(*data[0])
    gone = mb[1]
    state = mb.optimizer.model_state_dict(1)
    single = copy.deepcopy(gone)
    mb.prune(1)
    assert mb.append([gone], lr=RATES[1]) == [3] and mb[2] is gone
    mb.optimizer.load_model_state_dict(2, state)
    one = Alone(single, torch.optim.Adam, {"lr": RATES[1]})
    one.optimizer.load_state_dict(state)
    for x, y in data[1:]:
        mb.train_step(x, y)
        one.step(x, y)
    assert_close(mb[2], one.model)


def test_parameters_and_hooks_stay_the_same_objects() -> None:
    mb = bundle(3)
    x, y = batches(1)[0]
    before = list(mb.parameters())
    shapes: list[int] = []
    before[0].register_post_accumulate_grad_hook(lambda p: shapes.append(len(p.grad)))
    kept = mb.compute_loss(mb(x), y)  # a graph that is still held must not be in the way
    mb.prune(0)
    assert all(a is b for a, b in zip(before, mb.parameters()))
    mb.compute_loss(mb(x), y).backward()
    with pytest.raises(RuntimeError):
        kept.backward()
    assert shapes == [2] and before[0].grad is not None and len(before[0].grad) == 2


def test_held_gradients_stay() -> None:
    mb = bundle(4)
    x, y = batches(1)[0]
    mb.compute_loss(mb(x), y).backward()
    grads = {name: p.grad.clone() for name, p in mb.named_parameters()}
    mb.optimizer.param_groups[0]["params"]  # shows them in the models
    left = mb[2]
    mb.prune(2)
    for name, p in mb.named_parameters():
        assert torch.equal(p.grad, grads[name][[0, 1, 3]])
        assert torch.equal(mb.get_parameter(name).grad[2], grads[name][3])
        assert torch.equal(dict(mb[2].named_parameters())[name].grad, grads[name][3])
        assert torch.equal(dict(left.named_parameters())[name].grad, grads[name][2])
    mb.append(nets(1, 9), lr=0.1)
    for name, p in mb.named_parameters():
        assert torch.equal(p.grad[:3], grads[name][[0, 1, 3]]) and not p.grad[3].any()
    separate = bundle(4)
    separate.compute_loss(separate(x), y).backward()
    separate.step()
    mb.step()
    for own, one in zip(mb.models[:3], (separate[0], separate[1], separate[3])):
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), one.parameters()))


def test_sparse_gradients_are_carried_over() -> None:
    mb = ModelBatch([nn.Embedding(6, 3) for _ in range(3)], [0.1] * 3, torch.optim.SGD)
    (parameter,) = mb.parameters()
    dense = torch.randn(3, 6, 3)
    dense[:, 1] = 0
    parameter.grad = dense.to_sparse(2)
    mb.prune(0)
    mb.append([nn.Embedding(6, 3)])
    assert parameter.grad.is_sparse
    assert torch.equal(parameter.grad.to_dense(), torch.cat([dense[1:], torch.zeros(1, 6, 3)]))


def test_frozen_models_losses_and_clips() -> None:
    factory = OptimizerFactory(torch.optim.SGD, {"lr": 0.1}, clip_grad_norm=[0.1, 0.2, 0.3, 0.4])
    mb = ModelBatch(nets(4))
    factory.create_optimizer(mb)
    mb.freeze([1, 3])
    x, y = batches(1)[0]
    losses = mb.train_step(x, y)
    mb.prune([0])
    assert mb.active.tolist() == [False, True, False]
    assert torch.equal(mb.latest_losses, losses[1:])
    assert mb.optimizer.clip_grad_norm == [0.2, 0.3, 0.4]
    mb.append(nets(1, 6), lr=0.1, clip_grad_norm=0.05)
    mb.unfreeze([0, 2])
    assert mb.active.tolist() == [True] * 4 and mb._active_tensor is None
    assert mb.optimizer.clip_grad_norm == [0.2, 0.3, 0.4, 0.05]
    assert mb.latest_losses.isnan().tolist() == [False, False, False, True]
    alone = Alone(mb.export(3), torch.optim.SGD, {"lr": 0.1}, clip=0.05)
    mb.train_step(x, y)
    alone.step(x, y)
    assert_close(mb[3], alone.model)
    names = {key for key in mb.metrics() if key.startswith("loss_model")}
    assert names == {f"loss_model_{i}" for i in (1, 2, 3, 4)}


def test_options_of_fresh_models() -> None:
    mb = ModelBatch(nets(2), [0.1, 0.2], torch.optim.AdamW, optimizer_kwargs={"weight_decay": 0.3})
    assert mb.append(nets(2, 5), lr=[0.3, 0.4], betas=(0.5, 0.6)) == [2, 3]
    assert mb.replace(0, Net(7), weight_decay=0.0) == 4
    groups = mb.optimizer.param_groups
    assert [g["lr"] for g in groups] == [0.001, 0.2, 0.3, 0.4]
    assert [g["weight_decay"] for g in groups] == [0.0, 0.3, 0.3, 0.3]
    assert [g["betas"] for g in groups] == [(0.9, 0.999)] * 2 + [(0.5, 0.6)] * 2
    groups[3]["lr"] = 0.9  # they are watched like all others
    mb.train_step(*batches(1)[0])
    assert mb.optimizer.learning_rates() == [0.001, 0.2, 0.3, 0.9]
    assert mb.append([]) == [] and mb.prune([]) is None and len(mb) == 4


def test_a_held_group_is_that_of_its_model() -> None:
    mb = bundle(3)
    first, last = mb.optimizer.param_groups[0], mb.optimizer.param_groups[2]
    mb.prune(0)
    last["lr"] = 0.5
    first["lr"] = 9.0  # of a model that has left
    mb.train_step(*batches(1)[0])
    assert mb.optimizer.learning_rates() == [RATES[1], 0.5]


def test_attributes_that_the_forward_sets() -> None:
    class Stateful(nn.Module):
        def __init__(self, start: float) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4).double()
            self.state = torch.full((4,), start, dtype=torch.float64)

        def forward(self, x: Any) -> Any:
            out = self.layer(x + self.state)
            self.state = out.mean(0).detach()
            return out

    models = [Stateful(0.0) for _ in range(3)]
    extra = Stateful(2.0)
    alone = [copy.deepcopy(model) for model in (*models, extra)]
    mb = ModelBatch(models)
    data = [x for x, _ in batches(5)]
    order = [0, 1, 2]
    for number, x in enumerate(data):
        if number == 2:
            mb.prune(0)
            order = [1, 2]
        if number == 3:
            mb.append([extra])
            order = [1, 2, 3]
        out = mb(x)
        for own, i in zip(out, order):
            torch.testing.assert_close(own, alone[i](x), rtol=1e-12, atol=1e-12)
    held = models[0].state.clone()
    mb(data[0])
    assert torch.equal(models[0].state, held)


def test_compiled_graphs_are_made_anew() -> None:
    mb = bundle(3)
    mb.enable_compile(backend="eager")
    plain = bundle(3)
    for number, (x, y) in enumerate(batches(3)):
        if number == 1:
            mb.prune(0)
            plain.prune(0)
        if number == 2:
            mb.append(nets(1, 4), lr=0.1)
            plain.append(nets(1, 4), lr=0.1)
        torch.testing.assert_close(mb.train_step(x, y), plain.train_step(x, y), rtol=1e-9, atol=0)


def test_copies_of_a_changed_bundle_are_independent() -> None:
    mb = bundle(4)
    mb.train_step(*batches(1)[0])
    mb.prune(0)
    mb.append(nets(1, 9), lr=0.07)
    twin = copy.deepcopy(mb)
    assert twin.model_ids == mb.model_ids == [1, 2, 3, 4]
    for x, y in batches(2, 1):
        assert torch.equal(mb.train_step(x, y), twin.train_step(x, y))
    twin.prune([0, 1])
    assert len(mb) == 4 and twin.model_ids == [3, 4]
    mb.train_step(x, y)
    twin.train_step(x, y)
    assert twin.append(nets(1)) == [5] and mb.append(nets(1)) == [5]


def test_followers_of_ones_own() -> None:
    class Follower:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def models_changed(self, change: Any) -> None:
            self.seen.append((change.source, change.ids, change.old_num_models))

    mb, follower = bundle(3), Follower()
    mb.follow(follower)
    mb.follow(follower)
    mb.prune(1)
    mb.replace(-1, Net(5))
    assert follower.seen == [((0, 2), (0, 2), 3), ((0, None), (0, 3), 2)]
    mb.unfollow(follower)
    mb.replace(0, Net(6))
    assert len(follower.seen) == 2
    mb.follow(follower)
    gone = weakref.ref(follower)
    del follower
    gc.collect()
    assert gone() is None
    mb.prune(0)
    assert mb.model_ids == [3]
    mb.unfollow(mb)


def test_bundles_without_parameters_or_optimizer() -> None:
    mb = ModelBatch([nn.Dropout(0.5) for _ in range(3)], seeds=[1, 2, 3])
    x = torch.ones(50)
    mb.prune(0)
    expected = ModelBatch([nn.Dropout(0.5) for _ in range(2)], seeds=[2, 3])
    assert torch.equal(mb(x), expected(x))
    mb.append([nn.Dropout(0.1)])
    assert mb(x).shape == (3, 50)
