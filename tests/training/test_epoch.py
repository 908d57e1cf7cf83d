"""`train_one_epoch`: the loop over batches."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from modelbatch import BundleGradScaler, ModelBatch, ModelBatchError, OptimizerFactory, per_model
from modelbatch.callbacks import Callback, CallbackPack
from modelbatch.training import accuracy, train_one_epoch


def test_it_equals_a_loop_by_hand(build: Any, make_data: Any, same: Any) -> None:
    data = make_data()
    ours, theirs = build(dropout=0.3, norm=True), build(dropout=0.3, norm=True)
    ours.enable_engine(False)  # a loop by hand is the general path, bit for bit
    sums = torch.zeros(3, dtype=torch.float64)
    for _ in range(2):
        results = train_one_epoch(ours, data)
        sums.zero_()
        for x, y in data:
            theirs.zero_grad()
            loss = theirs.compute_loss(theirs(x), y, F.cross_entropy)
            loss.backward()
            theirs.step()
            sums += theirs.latest_losses.double() * len(y)
        assert torch.equal(results["loss"], sums / 40)
    assert same(ours, theirs)
    assert list(results) == ["loss"]


def test_the_loss_is_the_mean_over_samples(build: Any, make_data: Any) -> None:
    """Batches of unequal sizes count for what is in them."""
    mb = build(lr=[0.0] * 3, optimizer_cls=torch.optim.SGD, dtype=torch.float64)
    x, y = (torch.cat(parts) for parts in zip(*make_data(dtype=torch.float64)))
    data = [(x[:30], y[:30]), (x[30:], y[30:])]
    result = train_one_epoch(mb, data, metric_fns={"accuracy": accuracy})
    outputs = mb(x)
    expected = torch.stack([F.cross_entropy(out, y) for out in outputs])
    assert torch.allclose(result["loss"], expected, rtol=1e-14, atol=0)
    right = (outputs.argmax(-1) == y).double().mean(1)
    assert torch.allclose(result["accuracy"], right, rtol=1e-14, atol=0)


@pytest.mark.parametrize("optimizer_cls", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("scaled", [None, "own", "stock"])
def test_accumulation_equals_larger_batches(
    build: Any, make_data: Any, optimizer_cls: Any, scaled: str | None
) -> None:
    """Seven batches, three at a time, the last alone; the first smaller than the others."""
    data = make_data(7, dtype=torch.float64)
    data[0] = (data[0][0][:3], data[0][1][:3])
    large = [
        tuple(torch.cat(parts) for parts in zip(*data[i : i + 3])) for i in range(0, len(data), 3)
    ]
    bundles = [build(optimizer_cls=optimizer_cls, dtype=torch.float64) for _ in range(2)]
    results = []
    for mb, loader, accumulate in ((bundles[0], data, 3), (bundles[1], large, 1)):
        scaler: Any = None
        if scaled is not None:
            options = {"init_scale": 1024.0}
            own = scaled == "own"
            scaler = BundleGradScaler(**options) if own else torch.amp.GradScaler("cpu", **options)
        results.append(
            train_one_epoch(
                mb, loader, accumulate=accumulate, grad_scaler=scaler, metric_fns={"a": accuracy}
            )
        )
        assert mb.grad_scaler is scaler
    for a, b in zip(bundles[0].parameters(), bundles[1].parameters()):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
        assert not torch.equal(a, torch.zeros_like(a))
    assert torch.allclose(results[0]["loss"], results[1]["loss"], rtol=1e-12)
    assert torch.allclose(results[0]["a"], results[1]["a"], rtol=1e-12)
    steps = {float(s["step"]) for s in bundles[0].optimizer.state.values() if "step" in s}
    assert steps <= {3.0}


@pytest.mark.parametrize("optimizer_cls", [torch.optim.AdamW, torch.optim.LBFGS])
def test_accumulation_by_weight(build: Any, make_data: Any, optimizer_cls: Any, same: Any) -> None:
    """Each model has weights of its own; one has no sample in a whole group, and rests then."""
    data = make_data(6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(6, 3, 8, generator=generator, dtype=torch.float64)
    weights[0, 2] = weights[2:4, 1] = weights[4:] = 0
    small = [(x, y, w) for (x, y), w in zip(data, weights)]
    large = [
        tuple(torch.cat(parts, dim) for parts, dim in zip(zip(*small[i : i + 2]), (0, 0, 1)))
        for i in (0, 2, 4)
    ]

    def make() -> ModelBatch:
        return build(optimizer_cls=optimizer_cls, dtype=torch.float64, dropout=0.0)

    a, b = make(), make()
    first = train_one_epoch(a, small, accumulate=2, metric_fns={"accuracy": accuracy})
    # by hand, too, if the optimizer searches or there are metrics
    second = train_one_epoch(b, large, metric_fns={"accuracy": accuracy})
    for name in first:
        assert torch.allclose(first[name], second[name], rtol=1e-11)
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.allclose(p, q, rtol=1e-11, atol=1e-11)
    c, d = make(), make()
    train_one_epoch(c, small[:2], accumulate=2)
    train_one_epoch(d, small[:4], accumulate=2)
    for p, q in zip(c.parameters(), d.parameters()):
        assert torch.equal(p[1], q[1]) and not torch.equal(p[0], q[0])
    if optimizer_cls is torch.optim.AdamW:
        plain = make()
        plain.enable_engine(False)  # as with metrics
        train_one_epoch(plain, large)
        assert same(plain, b)


def test_frozen_models_rest_while_others_accumulate(build: Any, make_data: Any) -> None:
    mb = build(optimizer_kwargs={"weight_decay": 0.1})
    mb.freeze(1)
    before = [p[1].clone() for p in mb.parameters()]
    train_one_epoch(mb, make_data(), accumulate=2)
    assert all(torch.equal(p[1], q) for p, q in zip(mb.parameters(), before))
    assert not torch.equal(mb.models[0][0].weight, before[0])


def test_sample_weights_count(build: Any, make_data: Any) -> None:
    """A sample of weight 0 might as well not be there, in the losses and in the metrics."""
    x, y = make_data(1, dtype=torch.float64)[0]
    keep = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1], dtype=torch.float64)
    masked, plain = build(dtype=torch.float64), build(dtype=torch.float64)
    metrics = {"accuracy": accuracy}
    a = train_one_epoch(masked, [(x, y, keep), (x, y, keep.expand(3, 8))], metric_fns=metrics)
    chosen = (x[keep > 0], y[keep > 0])
    b = train_one_epoch(plain, [chosen, chosen], metric_fns=metrics)
    for name in ("loss", "accuracy"):
        assert torch.allclose(a[name], b[name], rtol=1e-12)
    for p, q in zip(masked.parameters(), plain.parameters()):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-13)


def test_a_model_without_samples_has_no_loss(build: Any, make_data: Any) -> None:
    x, y = make_data(1)[0]
    weight = torch.ones(3, 8)
    weight[1] = 0
    losses = train_one_epoch(build(optimizer_cls=torch.optim.SGD), [(x, y, weight)])["loss"]
    assert losses.isnan().tolist() == [False, True, False]


class _Router:
    """Gives every model its own half of the batch, with the model axis."""

    def __init__(self) -> None:
        self.calls = 0

    def route_batch(self, inputs: Tensor, targets: Tensor) -> Any:
        self.calls += 1
        rows = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [0, 2, 4, 6]])
        return _Routed(inputs[rows], targets[rows], None)


class _Routed:
    def __init__(self, inputs: Tensor, targets: Tensor, sample_weight: Any) -> None:
        self.inputs, self.targets, self.sample_weight = inputs, targets, sample_weight

    def arguments(self, mb: ModelBatch) -> Any:
        return per_model(self.inputs), per_model(self.targets), self.sample_weight


def test_a_router_decides_what_each_model_sees(build: Any, make_data: Any, same: Any) -> None:
    data, router = make_data(), _Router()
    routed, loader, by_hand = (build() for _ in range(3))
    first = train_one_epoch(routed, data, router=router)
    second = train_one_epoch(loader, [_Router().route_batch(x, y) for x, y in data])
    for x, y in data:
        by_hand.train_step(*_Router().route_batch(x, y).arguments(by_hand)[:2])
    assert router.calls == len(data)
    assert same(routed, by_hand) and same(loader, by_hand)
    assert torch.equal(first["loss"], second["loss"])


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.layer(a - 2 * b)


@pytest.mark.parametrize("kind", ["tuple", "dict", "loader of tuples"])
def test_inputs_of_several_tensors(make_data: Any, kind: str) -> None:
    torch.manual_seed(0)
    models = [_Two() for _ in range(2)]
    alone = copy.deepcopy(models)
    mb = ModelBatch(models, [1.0, 1.0], torch.optim.SGD)
    x, y = make_data(1)[0]
    loader: Any = [((x, x + 1), y)]
    if kind == "dict":
        loader = [({"b": x + 1, "a": x}, y)]
    elif kind == "loader of tuples":  # whose collation makes a list of the tuple
        loader = DataLoader([((x[i], x[i] + 1), y[i]) for i in range(8)], batch_size=8)
    train_one_epoch(mb, loader)
    for model, own in zip(models, alone):
        F.cross_entropy(own(x, x + 1), y).backward()
        for p, q in zip(model.parameters(), own.parameters()):
            assert torch.allclose(p, q - q.grad, atol=1e-6)


def test_a_loader_of_torch(build: Any, make_data: Any) -> None:
    x, y = (torch.cat(parts) for parts in zip(*make_data()))
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    a, b = build(), build()
    assert torch.equal(
        train_one_epoch(a, loader)["loss"],
        train_one_epoch(b, [(x[i : i + 16], y[i : i + 16]) for i in (0, 16, 32)])["loss"],
    )


@pytest.mark.parametrize("accumulate", [1, 2])
def test_mixed_precision(build: Any, make_data: Any, same: Any, accumulate: int) -> None:
    data = make_data(4)
    a, b = build(), build()
    train_one_epoch(a, data, amp_dtype=torch.bfloat16, accumulate=accumulate)
    for i in range(0, 4, accumulate):
        b.zero_grad()
        for x, y in data[i : i + accumulate]:
            with torch.autocast("cpu", torch.bfloat16):
                loss = b.compute_loss(b(x), y)
            (loss / accumulate).backward()
        b.step()
    assert same(a, b)
    c = build()
    train_one_epoch(c, data, accumulate=accumulate)
    assert not same(a, c)


def test_float16_gets_a_scaler(build: Any, make_data: Any) -> None:
    mb = build()
    train_one_epoch(mb, make_data(), amp_dtype=torch.float16, accumulate=2)
    assert isinstance(mb.grad_scaler, BundleGradScaler)
    assert all(torch.isfinite(p).all() for p in mb.parameters())


def test_lbfgs_searches(build: Any, make_data: Any) -> None:
    """The loop hands LBFGS its closure."""
    data = make_data(2, dtype=torch.float64)
    options = {"max_iter": 4, "line_search_fn": "strong_wolfe"}

    def make() -> ModelBatch:
        return build(
            optimizer_cls=torch.optim.LBFGS,
            dtype=torch.float64,
            lr=[1.0] * 3,
            optimizer_kwargs=options,
        )

    ours, theirs = make(), make()
    results = train_one_epoch(ours, data, metric_fns={"accuracy": accuracy})
    losses = []
    for x, y in data:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            theirs.zero_grad()
            loss = theirs.compute_loss(theirs(x), y)
            loss.backward()
            return theirs.latest_losses

        losses.append(theirs.step(closure).clone())
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(p, q)
    assert torch.allclose(results["loss"], torch.stack(losses).mean(0), rtol=1e-14)


class _Log(Callback):
    def __init__(self) -> None:
        self.names: list[Any] = []
        self.losses: list[Tensor] = []

    def on_train_start(self, event: Any) -> None:
        self.names.append("start")

    def on_epoch_start(self, event: Any) -> None:
        self.names.append(("epoch", event.epoch))

    def on_train_step(self, event: Any) -> None:
        self.names.append((event.step, event.batch, event.num_batches, event.batch_size))
        self.losses.append(event.losses)
        assert any(p.grad is not None for p in event.mb.parameters())

    def on_epoch_end(self, event: Any) -> None:
        self.names.append(("end", sorted(event.metrics)))

    def on_train_end(self, event: Any) -> None:
        self.names.append("over")


def test_the_events_of_an_epoch(build: Any, make_data: Any) -> None:
    log = _Log()
    mb = build(lr=[0.0] * 3, optimizer_cls=torch.optim.SGD, dtype=torch.float64)
    data = make_data(5, dtype=torch.float64)
    train_one_epoch(mb, data, accumulate=2, callbacks=CallbackPack([log]), epoch=4)
    assert log.names == [
        *("start", ("epoch", 4)),
        *((13, 1, 5, 16), (14, 3, 5, 16), (15, 4, 5, 8)),
        *(("end", ["loss"]), "over"),
    ]
    x, y = (torch.cat(parts) for parts in zip(*data[2:4]))
    expected = torch.stack([F.cross_entropy(out, y) for out in mb(x)])
    assert torch.allclose(log.losses[1], expected, rtol=1e-14)
    assert not log.losses[1].requires_grad


def test_train_end_is_told_of_an_error(build: Any) -> None:
    log = _Log()
    with pytest.raises(ModelBatchError, match="must yield"):
        train_one_epoch(build(), [torch.zeros(8, 4)], callbacks=log)
    assert log.names[-1] == "over"


def test_another_optimizer_becomes_that_of_the_bundle(build: Any, make_data: Any) -> None:
    mb = build()
    first = mb.optimizer
    other = OptimizerFactory(torch.optim.SGD).create_optimizer(mb, [{"lr": 0.1}] * 3)
    mb.optimizer = first
    train_one_epoch(mb, make_data(), other)
    assert mb.optimizer is other
    assert not first.state


def test_eval_mode_ends(build: Any, make_data: Any) -> None:
    mb = build(norm=True)
    mb.eval()
    train_one_epoch(mb, make_data())
    assert mb.training and all(module.training for module in mb.models[1].modules())
    # modes that the user chose for parts of the models are left alone
    mb.train()
    for model in mb.models:
        model[1].eval()
    mb.refresh()
    before = mb.models[0][1].running_mean.clone()
    train_one_epoch(mb, make_data())
    assert not mb.models[0][1].training
    assert torch.equal(mb.models[0][1].running_mean, before)


def _other() -> torch.optim.Optimizer:
    return ModelBatch([nn.Linear(2, 2)], [0.1], torch.optim.SGD).optimizer


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        ([], {}, "yielded no batch"),
        (5, {}, "train_loader must be iterable, got int"),
        ([(torch.zeros(8, 4),)], {}, "got tuple of 1"),
        ([{"x": torch.zeros(8, 4)}], {}, "got dict"),
        (None, {"accumulate": 0}, "accumulate must be a positive integer"),
        (None, {"accumulate": True}, "accumulate must be a positive integer"),
        (None, {"scheduler_interval": "batch"}, '"epoch" or "step"'),
        (None, {"loss_fn": "mse"}, "loss_fn must be callable"),
        (None, {"metric_fns": [accuracy]}, "must be a dict"),
        (None, {"metric_fns": {"loss": accuracy}}, "must not be called 'loss'"),
        (None, {"metric_fns": {"a": 3}}, "'a' must be callable"),
        (None, {"optim": torch.optim.SGD([torch.zeros(1)])}, "an optimizer of a bundle"),
        (None, {"optim": _other()}, "of another bundle"),
        (None, {"router": object()}, "router must be a DataRouter"),
        (None, {"router": _Router(), "weights": True}, "cannot be combined"),
        (None, {"router": _Router(), "routed": True}, "routed already"),
        (None, {"scheduler": 3}, "scheduler must be"),
        (None, {"amp_dtype": torch.float64}, "amp_dtype must be"),
        (None, {"grad_scaler": 3.0}, "grad_scaler must be"),
        (None, {"callbacks": "all"}, "callbacks must be"),
        (None, {"callbacks": [3]}, "expected a Callback"),
        (None, {"epoch": -1}, "epoch must be"),
    ],
)
def test_what_is_refused(
    build: Any, make_data: Any, same: Any, loader: Any, options: dict[str, Any], message: str
) -> None:
    mb = build()
    options = dict(options)
    if options.pop("weights", False):
        loader = [(x, y, torch.ones(8)) for x, y in make_data()]
    if options.pop("routed", False):
        loader = [_Router().route_batch(x, y) for x, y in make_data()]
    with pytest.raises(ModelBatchError, match=message):
        train_one_epoch(mb, make_data() if loader is None else loader, **options)
    assert same(mb, build())


def test_a_bundle_without_an_optimizer(make_data: Any) -> None:
    mb = ModelBatch([nn.Linear(4, 3)])
    with pytest.raises(ModelBatchError, match="has no optimizer"):
        train_one_epoch(mb, make_data())


def test_the_scheduler_of_another_optimizer(build: Any, make_data: Any) -> None:
    scheduler = torch.optim.lr_scheduler.ConstantLR(build().optimizer)
    with pytest.raises(ModelBatchError, match="another optimizer"):
        train_one_epoch(build(), make_data(), scheduler=scheduler)
