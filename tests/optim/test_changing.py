"""Learning rate schedules of bundles whose models change."""

import copy
from typing import Any

import pytest
import torch
from changing_case import Alone, Net, assert_close, batches, nets
from torch.optim import lr_scheduler

from modelbatch import BundleGradScaler, ModelBatch, ModelBatchError, OptimizerFactory

create = OptimizerFactory.create_lr_scheduler


def bundle(count: int = 3, cls: Any = torch.optim.SGD, rates: Any = None) -> ModelBatch:
    return ModelBatch(nets(count), rates or [0.1] * count, cls)


def warm(optimizer: Any, i: int = 0) -> Any:
    first = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    rest = lr_scheduler.CosineAnnealingLR(optimizer, 5)
    return lr_scheduler.SequentialLR(optimizer, [first, rest], [3])


def test_a_fresh_model_begins_its_schedule() -> None:
    mb, extra = bundle(), [Net(7), Net(8)]
    alone = [Alone(m, torch.optim.SGD, {"lr": 0.1}, schedule=warm) for m in (*mb.models, *extra)]
    scheduler = create(mb.optimizer, warm)
    order = [0, 1, 2]
    for number, (x, y) in enumerate(batches(9)):
        if number == 2:
            mb.replace(1, extra[0], lr=0.1)
            order[1] = 3
        if number == 4:
            mb.append(extra[1:], lr=0.1)
            mb.prune(0)
            order = [3, 2, 4]
        assert scheduler.get_last_lr() == [
            alone[i].scheduler.get_last_lr()[0]
            for i in order  # type: ignore[union-attr]
        ]
        mb.train_step(x, y)
        scheduler.step()
        for i in order:
            alone[i].step(x, y)
            alone[i].scheduler.step()  # type: ignore[union-attr]
    for own, i in zip(mb.models, order):
        assert_close(own, alone[i].model)
    other = bundle(3)
    again = create(other.optimizer, warm)
    again.load_state_dict(scheduler.state_dict())
    assert again.state_dict() == scheduler.state_dict()


def test_schedules_that_differ() -> None:
    mb = bundle(3)
    gammas = [{"gamma": 0.5}, {"gamma": 0.7}, {"gamma": 0.9}]
    scheduler = create(mb.optimizer, lr_scheduler.ExponentialLR, gammas)
    mb.train_step(*batches(1)[0])
    scheduler.step()
    assert scheduler.build_new is None
    with pytest.raises(ModelBatchError, match=r"model 3 \(new\).*build_new"):
        mb.append(nets(1, 5), lr=0.2)
    assert len(mb) == 3 and len(scheduler.schedulers) == 3
    mb.replace(1, Net(5), lr=0.2)
    scheduler.build_new = lambda optimizer, i: lr_scheduler.StepLR(optimizer, 1, 0.25)
    mb.append(nets(1, 6), lr=0.4)
    mb.train_step(*batches(1)[0])
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.025, 0.14, 0.081, 0.1])
    mb.prune(0)
    scheduler.restart(1)
    assert scheduler.get_last_lr() == pytest.approx([0.14, 0.1, 0.1])
    scheduler.restart(-1, lambda optimizer, i: lr_scheduler.ExponentialLR(optimizer, 0.1))
    mb.train_step(*batches(1)[0])
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.098, 0.09, 0.04])
    with pytest.raises(ModelBatchError, match="no model 3"):
        scheduler.restart(3)
    with pytest.raises(ModelBatchError, match="must return a scheduler"):
        scheduler.restart(0, lambda optimizer, i: 3)  # type: ignore[arg-type,return-value]
    assert scheduler.get_last_lr() == pytest.approx([0.098, 0.09, 0.04])


def test_a_schedule_that_cannot_be_built() -> None:
    mb = bundle(2)
    made: list[int] = []

    def build(optimizer: Any, i: int) -> Any:
        made.append(i)
        if len(made) > 2:
            raise ValueError("no more")
        return lr_scheduler.StepLR(optimizer, 1)

    scheduler = create(mb.optimizer, build)
    with pytest.raises(ModelBatchError, match="no more"):
        mb.append([Net(3)], lr=0.1)
    assert len(mb) == 2 == len(scheduler.schedulers)


TORCHS: dict[str, Any] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 7),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda e, k=k: k / (e + k) for k in (1, 2, 3)]),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2, 0.3], total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, [0.1, 0.2, 0.3], [1.0, 2.0, 3.0]),
    "sequential": warm,
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, min_lr=1e-3, patience=0),
}


@pytest.mark.parametrize("name", TORCHS)
def test_schedulers_of_torch_follow_those_who_stay(name: str) -> None:
    rates = [0.1, 0.2, 0.3]
    mb, whole = (ModelBatch(nets(3), rates, torch.optim.SGD) for _ in range(2))
    scheduler, other = (TORCHS[name](one.optimizer) for one in (mb, whole))
    metrics = [1.0] if name == "plateau" else []
    for number, (x, y) in enumerate(batches(6)):
        if number == 3:
            mb.prune(1)
        mb.train_step(x, y)
        whole.train_step(x, y)
        scheduler.step(*metrics)
        other.step(*metrics)
    own = [group["lr"] for group in mb.optimizer.param_groups]
    assert own == [whole.optimizer.param_groups[i]["lr"] for i in (0, 2)]


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize(
    ("name", "message"),
    [("step", ""), ("lambda", "keeps lr_lambdas"), ("one cycle", "'base_momentum|'initial|'max_")],
)
def test_fresh_models_under_schedulers_of_torch(name: str, message: str) -> None:
    mb = bundle(3)
    scheduler = TORCHS[name](mb.optimizer)
    if message:
        with pytest.raises(ModelBatchError, match=f"model 3 .new.*({message})"):
            mb.append([Net(5)], lr=0.4)
        assert len(mb) == 3
        return
    mb.append([Net(5)], lr=0.4)
    scheduler.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.05, 0.05, 0.05, 0.2]


def test_a_scheduler_of_ones_own() -> None:
    class Own(lr_scheduler.LRScheduler):
        def __init__(self, optimizer: Any) -> None:
            self.factors = [0.5, 0.6, 0.7]
            super().__init__(optimizer)

        def get_lr(self) -> Any:
            return self.base_lrs

    mb = bundle(3)
    scheduler = Own(mb.optimizer)
    with pytest.raises(ModelBatchError, match="Own.factors may have a value for each model"):
        mb.prune(0)
    assert len(scheduler.base_lrs) == len(mb) == 3


def test_a_scaler_between_unscale_and_update() -> None:
    mb = bundle(3)
    scaler = BundleGradScaler(init_scale=4.0, growth_interval=1)
    x, y = batches(1)[0]
    scaler.scale(mb.compute_loss(mb(x), y)).backward()
    scaler.unscale_(mb.optimizer)
    mb.prune(0)
    mb.append([Net(5)], lr=0.1)
    scaler.step(mb.optimizer)
    scaler.update()
    assert scaler.get_scale() == [8.0, 8.0, 4.0]
    state = copy.deepcopy(scaler.state_dict())
    other = BundleGradScaler()
    other.load_state_dict(state)
    late = bundle(3)
    late.grad_scaler = other
    late.prune(1)
    assert other.get_scale() == [8.0, 4.0]
