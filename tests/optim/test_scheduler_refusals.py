"""What a per-model scheduler refuses, what it warns of, and that nothing has changed then."""

import copy
import pickle
import warnings

import pytest
import torch
from schedules import CONFIGS, METRICS, NAMES, batch, class_named, new_bundle, options, schedule
from torch.optim import lr_scheduler as schedulers

from modelbatch import ModelBatchError
from modelbatch.optim.scheduler import create_lr_scheduler

# ---- warnings


def recorded(*calls):
    """(category, text) of every warning of some calls, and the files they point at."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls:
            call()
    return {(w.category, str(w.message)) for w in caught}, {w.filename for w in caught}


def stepping(scheduler):
    plateau = isinstance(scheduler, schedulers.ReduceLROnPlateau)
    return lambda: scheduler.step(1.0) if plateau else scheduler.step()


@pytest.mark.parametrize("when", ["never", "before", "after", "overridden"])
@pytest.mark.parametrize("name", NAMES)
def test_torch_warns_of_the_order_as_alone(name, when):
    """Before or after the scheduler was made, or never, the optimizer took a step."""
    bundle, _, optimizers = new_bundle()

    def train():
        bundle.train_step(*batch(0))
        for optimizer in optimizers:
            optimizer.step()

    if when == "before":
        train()
    scheduler = create_lr_scheduler(bundle.optimizer, schedule(name))
    alone = [schedule(name)(optimizer, i) for i, optimizer in enumerate(optimizers)]
    if when == "after":
        train()
    if when == "overridden":
        bundle.optimizer.step = lambda: None
        for optimizer in optimizers:
            optimizer.step = lambda: None
    expected, _ = recorded(*map(stepping, alone))
    own, files = recorded(lambda: scheduler.step(METRICS[0]))
    assert own == expected
    assert files == ({__file__} if expected else set()), "it points at the user's line"
    silent = ("ReduceLROnPlateau", "CosineAnnealingWarmRestarts")  # these never warn
    assert bool(expected) == (when != "after" and name not in silent)
    assert recorded(lambda: scheduler.step(METRICS[1])) == recorded(*map(stepping, alone))


def test_a_step_before_an_earlier_scheduler_counts():
    bundle, _, _ = new_bundle()
    create_lr_scheduler(bundle.optimizer, schedulers.StepLR, {"step_size": 1})
    bundle.train_step(*batch(0))
    create_lr_scheduler(bundle.optimizer, schedulers.StepLR, {"step_size": 1}).step()
    schedulers.StepLR(bundle.optimizer, 1).step()


def test_a_stock_schedulers_note_of_a_step_is_ours_too():
    bundle, _, _ = new_bundle()
    schedulers.StepLR(bundle.optimizer, 1)
    bundle.train_step(*batch(0))
    create_lr_scheduler(bundle.optimizer, schedulers.StepLR, {"step_size": 1}).step()


# ---- construction

STEP = schedulers.StepLR


def not_the_given(optimizer, i):
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    return schedulers.StepLR(other if i == 1 else optimizer, 3)


class NotAScheduler:
    def __init__(self, optimizer):
        self.optimizer = optimizer


REFUSED = {
    "count": (STEP, [{"step_size": 1}] * 2, "2 configs for 3 models"),
    "classes": ([STEP] * 4, None, "4 scheduler classes for 3 models"),
    "no_dict": (STEP, [{"step_size": 1}, 3, None], "model 1: its config must be a dict, got 3"),
    "no_dicts": (STEP, 5, "must be a dict for all models or 3 dicts, got int"),
    "text": (STEP, "gamma", "must be a dict for all models or 3 dicts, got str"),
    "class": (torch.optim.SGD, {}, "model 0: .*SGD.* is neither a class"),
    "one_class": ([STEP, dict, STEP], {"step_size": 1}, "model 1: .*dict.* is neither a class"),
    "duck": (NotAScheduler, None, "model 0: .*NotAScheduler.* is neither a class"),
    "name": ("StepLR", {"step_size": 1}, "model 0: 'StepLR' is neither"),
    "nothing": (None, {"step_size": 1}, "model 0: None is neither"),
    "option": (
        STEP,
        [{"step_size": 1}, {"step_size": 1}, {"step_size": 1, "gama": 2}],
        "model 2: StepLR: .*gama",
    ),
    "missing": (STEP, [{"step_size": 1}, None, {"step_size": 1}], "model 1: StepLR: .*step_size"),
    "value": (
        schedulers.OneCycleLR,
        [{"max_lr": 1.0, "total_steps": 9}, {"max_lr": 1.0, "total_steps": -9}, None],
        "model 1: OneCycleLR: Expected positive integer total_steps, but got -9",
    ),
    "late_value": (
        schedulers.CyclicLR,
        [{"base_lr": 1e-3, "max_lr": 1.0}] * 2 + [{"base_lr": 1e-3, "max_lr": 1.0, "mode": "x"}],
        "model 2: CyclicLR: mode is invalid",
    ),
    "groups": (STEP, {"step_size": 1, "last_epoch": 5}, "model 0: StepLR: .*initial_lr"),
    "base_class": (schedulers.LRScheduler, None, "model 0: LRScheduler"),
    "configs_of_build": (not_the_given, {"step_size": 1}, "configs are for a scheduler class"),
    "returned": (lambda o, i: STEP(o, 1) if i < 2 else o, None, "model 2: build must return a sch"),
    "none": (lambda o, i: None, None, "model 0: build must return .* got NoneType"),
    "other": (not_the_given, None, "model 1: build returned a StepLR of another optimizer"),
    "raises": (lambda o, i: STEP(o, 1 // (1 - i)), None, "model 1: build: .*by zero"),
    "signature": (lambda o: STEP(o, 1), None, "model 0: build: .*positional"),
    "stepping": (lambda o, i: o.step(), None, "model 0: build: this is the view"),
    "grouping": (lambda o, i: o.add_param_group({}), None, "model 0: build: this is the view"),
    "clearing": (lambda o, i: o.zero_grad(), None, "model 0: build: this is the view"),
}


@pytest.mark.parametrize("kind", ["sgd_momentum", "adam_tensor_lr"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_changed(case, kind):
    scheduler, configs, message = REFUSED[case]
    bundle, _, _ = new_bundle(kind)
    groups = bundle.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    before = [options(group) for group in groups]
    with pytest.raises(ModelBatchError, match=message):
        create_lr_scheduler(bundle.optimizer, scheduler, configs)
    assert [options(group) for group in groups] == before
    assert all(group["lr"] is rate for group, rate in zip(groups, rates, strict=True))
    assert "step" not in vars(bundle.optimizer)
    if case in ("option", "value", "late_value", "raises"):
        with pytest.raises(ModelBatchError) as error:
            create_lr_scheduler(bundle.optimizer, scheduler, configs)
        assert error.value.__cause__ is not None


def test_the_scheduler_of_the_whole_bundle_is_no_models():
    bundle, _, _ = new_bundle()
    with pytest.raises(ModelBatchError, match="model 0: build returned a StepLR of another"):
        create_lr_scheduler(bundle.optimizer, lambda _, i: STEP(bundle.optimizer, 3))
    stub = []
    create_lr_scheduler(bundle.optimizer, lambda o, i: stub.append(STEP(o, 3)) or stub[-1])
    with pytest.raises(ModelBatchError, match="model 0: build returned a StepLR of another"):
        create_lr_scheduler(bundle.optimizer, lambda _, i: stub[0])


def test_another_optimizer():
    _, _, optimizers = new_bundle()
    with pytest.raises(ModelBatchError, match="must be that of a bundle, got SGD"):
        create_lr_scheduler(optimizers[0], STEP, {"step_size": 1})


# ---- stepping


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, "model 1: ReduceLROnPlateau needs a metric"),
        ([0.1, None, 0.1], "model 1: ReduceLROnPlateau needs a metric"),
        ([0.1, 0.2], "got 2 metrics for 3 models"),
        (torch.ones(4), "got 4 metrics for 3 models"),
        (torch.ones(1), "got 1 metrics for 3 models"),
        (torch.ones(3, 1), r"3 numbers, got the shape \(3, 1\)"),
        (["a", "b", "c"], "model 1: the metric is no number"),
        ([0.1, torch.ones(2), 0.1], "model 1: the metric is no number"),
        ("abc", "3 numbers or one, got str"),
        ({"loss": 1.0}, "3 numbers or one, got dict"),
        (object(), "3 numbers or one, got object"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_metrics_refused_and_nothing_changed(metrics, message):
    bundle, _, _ = new_bundle()
    scheduler = create_lr_scheduler(bundle.optimizer, schedule("different_classes"))
    bundle.train_step(*batch(0))
    before = scheduler.state_dict()
    with pytest.raises(ModelBatchError, match=message):
        scheduler.step(metrics)
    assert scheduler.state_dict() == before
    scheduler.step([None, 0.5, None])
    bundle.freeze(1)
    scheduler.step()


def test_a_step_to_an_epoch():
    bundle, _, _ = new_bundle()
    scheduler = create_lr_scheduler(bundle.optimizer, STEP, {"step_size": 1})
    bundle.train_step(*batch(0))
    with pytest.raises(ModelBatchError, match="no scheduler here takes metrics"):
        scheduler.step(3)
    with pytest.raises(TypeError, match="epoch"):
        scheduler.step(epoch=3)
    scheduler.step(0.5)  # a loop that always hands over the loss
    assert scheduler.last_epoch == 1


def test_a_schedule_that_ends_leaves_the_others_alone():
    bundle, _, _ = new_bundle()
    configs = [{"max_lr": 0.1, "total_steps": 9 if i else 2} for i in range(3)]
    scheduler = create_lr_scheduler(bundle.optimizer, schedulers.OneCycleLR, configs)
    bundle.train_step(*batch(0))
    for _ in range(2):
        scheduler.step()
    with pytest.raises(ModelBatchError, match="model 0: OneCycleLR: Tried to step 3") as error:
        scheduler.step()
    assert isinstance(error.value.__cause__, ValueError)
    assert [own.last_epoch for own in scheduler.schedulers[1:]] == [3, 3]
    bundle.freeze(0)
    scheduler.step()
    assert [own.last_epoch for own in scheduler.schedulers[1:]] == [4, 4]


def test_no_member_of_sequential_lr_but_of_a_chain():
    bundle, _, _ = new_bundle()
    scheduler = create_lr_scheduler(bundle.optimizer, STEP, {"step_size": 1})
    stock = schedulers.ConstantLR(bundle.optimizer)
    for parts in ([scheduler, stock], [stock, scheduler]):
        with pytest.raises(ModelBatchError, match="cannot be a member of SequentialLR"):  # noqa: PT012
            sequence = schedulers.SequentialLR(bundle.optimizer, parts, [1])
            bundle.train_step(*batch(0))
            sequence.step()
    bundle, _, _ = new_bundle()
    scheduler = create_lr_scheduler(bundle.optimizer, STEP, {"step_size": 1, "gamma": 0.5})
    chain = schedulers.ChainedScheduler([scheduler, schedulers.StepLR(bundle.optimizer, 1, 0.5)])
    bundle.train_step(*batch(0))
    chain.step()
    assert chain.get_last_lr() == [0.1 / 4, 0.03 / 4, 0.01 / 4]


# ---- saving


def broken(change):
    bundle, _, _ = new_bundle()
    state = create_lr_scheduler(bundle.optimizer, schedule("different_classes")).state_dict()
    change(state)
    return state


def without(key):
    return lambda state: state.pop(key)


BROKEN = {
    "count": (lambda s: s["schedulers"].pop(), "of 2 schedulers, the bundle has 3"),
    "no_count": (without("last_epoch"), "lacks 'last_epoch' or 'schedulers'"),
    "no_schedulers": (without("schedulers"), "lacks 'last_epoch' or 'schedulers'"),
    "no_list": (lambda s: s.update(schedulers=3), "'schedulers' is no list"),
    "no_record": (lambda s: s["schedulers"].__setitem__(1, 5), "model 1: .* 'class' or 'state'"),
    "no_state": (lambda s: s["schedulers"][2].pop("state"), "model 2: .* 'class' or 'state'"),
    "not_a_dict": (lambda s: s["schedulers"][2].update(state=[]), "model 2: its state is no dict"),
    "class": (
        lambda s: s["schedulers"].reverse(),
        r"model 0: the state is of SequentialLR\(LinearLR, CosineAnnealingLR\), "
        r"the scheduler is OneCycleLR",
    ),
    "mode": (
        lambda s: s["schedulers"][1]["state"].update(mode="middle"),
        "model 1: ReduceLROnPlateau: the state cannot be loaded: mode middle is unknown",
    ),
    "inner": (
        lambda s: s["schedulers"][2]["state"].pop("_schedulers"),
        "model 2: SequentialLR: the state cannot be loaded: '_schedulers'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_state_that_does_not_fit_changes_nothing(case):
    change, message = BROKEN[case]
    bundle, _, _ = new_bundle()
    scheduler = create_lr_scheduler(bundle.optimizer, schedule("different_classes"))
    for step in range(4):
        bundle.train_step(*batch(step))
        scheduler.step(METRICS[step])
    before = scheduler.state_dict()
    with pytest.raises(ModelBatchError, match=message):
        scheduler.load_state_dict(broken(change))
    assert scheduler.state_dict() == before
    with pytest.raises(ModelBatchError, match="no state of a per-model"):
        scheduler.load_state_dict(scheduler.schedulers[0].state_dict())


def test_a_failed_load_gives_back_the_state_of_functions():
    bundle, _, _ = new_bundle()
    function = CONFIGS["LambdaLR"]()[1]["lr_lambda"]

    def build(optimizer, i):
        if i == 0:
            return schedulers.LambdaLR(optimizer, function)
        return schedulers.ReduceLROnPlateau(optimizer)

    scheduler = create_lr_scheduler(bundle.optimizer, build)
    bundle.train_step(*batch(0))
    state = scheduler.state_dict()
    state["schedulers"][2]["state"]["mode"] = "middle"
    scheduler.step(1.0)
    calls = function[0].calls
    with pytest.raises(ModelBatchError, match="model 2"):
        scheduler.load_state_dict(state)
    assert function[0].calls == calls


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_state_is_a_copy_in_plain_containers(name):
    bundle, _, _ = new_bundle()
    scheduler = create_lr_scheduler(bundle.optimizer, class_named(name), CONFIGS[name]())
    bundle.train_step(*batch(0))
    state = scheduler.state_dict()
    untouched = copy.deepcopy(state)
    scheduler.step(METRICS[0])
    assert state == untouched

    def check(value):
        assert type(value) in (dict, list, tuple, str, int, float, bool, type(None)), value
        items = value.values() if isinstance(value, dict) else value
        for item in items if type(value) in (dict, list, tuple) else ():
            check(item)

    check(state)


def test_no_copies():
    bundle, _, _ = new_bundle()
    scheduler = create_lr_scheduler(bundle.optimizer, STEP, {"step_size": 1})
    for copying in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied"):
            copying(scheduler)
        with pytest.raises(TypeError, match="cannot be copied"):
            copying(scheduler.schedulers[0])
