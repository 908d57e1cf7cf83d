"""Every class of `RULES`, and Adafactor: options, states and frozen models of M models at once."""

import copy

import pytest
import torch
from torch import optim

from modelbatch.optim import FusedOptimizer
from modelbatch.optim.rules import RULES

CLASSES = sorted([*RULES, optim.Adafactor], key=lambda cls: cls.__name__)
CONFIGS = ({"lr": 0.01}, {"lr": 0.03}, {"lr": 0.02, "maximize": True})

every_class = pytest.mark.parametrize("optimizer_cls", CLASSES)
every_rule = pytest.mark.parametrize("optimizer_cls", [cls for cls in CLASSES if cls in RULES])


@every_class
def test_writes_to_options_take_effect(optimizer_cls, hand_made, regression):
    bundle, loss = hand_made(), regression()
    configs = [{"lr": torch.tensor(0.01, dtype=torch.float64)}, *CONFIGS[1:]]
    optimizer = bundle.optimizer(optimizer_cls, configs)
    alone = bundle.alone_optimizers(optimizer_cls, configs)
    for step in range(8):
        for groups in (optimizer.param_groups, [stock.param_groups[0] for stock in alone]):
            if step == 3:
                groups[0]["lr"].mul_(0.5)
                # Not the double of this value.
                groups[1]["lr"] = torch.tensor(0.03, dtype=torch.float64)
            if step == 5:
                groups[1]["lr"] = 0.05
                groups[2]["maximize"] = False
                if "weight_decay" in groups[1]:
                    groups[1]["weight_decay"] = 0.1
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
    assert bundle.worst_error() <= 1e-12


@every_class
def test_an_option_that_is_a_tensor(optimizer_cls, hand_made, regression):
    name, values = {
        optim.Adadelta: ("rho", (0.5,)),
        optim.Adafactor: ("d", (1.5,)),
        optim.Adagrad: ("lr_decay", (0.2,)),
        optim.ASGD: ("lambd", (0.2,)),
        optim.RMSprop: ("alpha", (0.5,)),
        optim.Rprop: ("etas", (0.5, 1.2)),
        optim.SGD: ("dampening", (0.2,)),
    }.get(optimizer_cls, ("betas", (0.5, 0.9)))
    tensors = tuple(torch.tensor(value, dtype=torch.float64) for value in values)
    bundle, loss = hand_made(), regression()
    configs = [{**config} for config in CONFIGS]
    if optimizer_cls is optim.SGD:
        configs[1]["momentum"] = 0.9
    optimizer = bundle.optimizer(optimizer_cls, configs)
    alone = bundle.alone_optimizers(optimizer_cls, configs)
    for step in range(8):
        if step == 2:
            value = tensors if len(tensors) > 1 else tensors[0]
            optimizer.param_groups[1][name] = value
            numbers = tuple(map(float, tensors))
            alone[1].param_groups[0][name] = numbers if len(tensors) > 1 else numbers[0]
        if step == 4:
            factor = 2.0 if optimizer_cls is optim.Adafactor else 0.5
            tensors[0].mul_(factor)
            numbers = tuple(map(float, tensors))
            alone[1].param_groups[0][name] = numbers if len(tensors) > 1 else numbers[0]
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
    assert bundle.worst_error() <= 1e-12


@every_class
def test_writes_to_states_take_effect(optimizer_cls, hand_made, regression):
    bundle, loss = hand_made(), regression()
    configs = [{**config} for config in CONFIGS]
    if optimizer_cls is optim.SGD:
        for config in configs:
            config["momentum"] = 0.9
    optimizer = bundle.optimizer(optimizer_cls, configs)
    alone = bundle.alone_optimizers(optimizer_cls, configs)
    shared = set()
    for step in range(6):
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
        for i, stock in enumerate(alone):
            for ours, own in ((optimizer, bundle.models[i]), (stock, bundle.alone[i])):
                for parameter in own.parameters():
                    state = ours.state[parameter]
                    # What parameters that step together share is to be written once.
                    place = state["step"].data_ptr() if "step" in state else None
                    if place is not None and (ours is not optimizer or (step, place) not in shared):
                        shared.add((step, place))
                        state["step"].add_(1)
                    if step == 2 and i == 1:
                        for name, value in state.items():
                            if value.dim() > 0 and name != "step":
                                value.mul_(0.5)
    assert bundle.worst_error() <= 1e-12


@every_class
def test_states_thrown_away(optimizer_cls, hand_made, regression):
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optimizer_cls, CONFIGS)
    alone = bundle.alone_optimizers(optimizer_cls, CONFIGS)
    if optimizer_cls is optim.Adagrad:
        pytest.skip("torch makes its state at construction only")
    for step in range(6):
        if step == 2:
            for each in (optimizer, *alone):
                each.state.clear()
        if step == 4:
            optimizer.state.pop(bundle.models[1][0].weight, None)
            alone[1].state.pop(bundle.alone[1][0].weight, None)
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
    assert bundle.worst_error() <= 1e-12


@every_class
def test_a_model_frozen_from_the_start(optimizer_cls, hand_made, regression):
    """Its state begins with the options of its own first step, whatever they were before."""
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optimizer_cls, CONFIGS)
    alone = bundle.alone_optimizers(optimizer_cls, CONFIGS)
    for step in range(8):
        for i, stock in enumerate(alone):
            optimizer.param_groups[i]["lr"] *= 0.9
            stock.param_groups[0]["lr"] *= 0.9
        bundle.active = [step > 2, True, step < 6]
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss, which={i for i in range(3) if bundle.active[i]})
    assert bundle.worst_error() <= 1e-12


@every_class
def test_all_frozen(optimizer_cls, hand_made, regression):
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optimizer_cls, CONFIGS)
    for _ in range(2):
        bundle.step(optimizer, loss)
    before = copy.deepcopy(bundle.models)
    states = [optimizer.model_state_dict(i) for i in range(3)]
    bundle.active[:] = [False] * 3
    bundle.step(optimizer, loss)
    assert bundle.worst_error(before) == 0
    hand_made.assert_same_state([optimizer.model_state_dict(i) for i in range(3)], states)


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_its_state_in_single(dtype, optimizer_cls, hand_made, regression):
    """One step from equal numbers is that of a float32 model, rounded once."""
    half, single = hand_made(dtype=dtype), hand_made(dtype=torch.float32)
    for name, parameter in single.stacked.items():
        parameter.data.copy_(half.stacked[name])
    optimizers = [each.optimizer(optimizer_cls, CONFIGS) for each in (half, single)]
    assert all(isinstance(optimizer, FusedOptimizer) for optimizer in optimizers)
    for _ in range(3):
        half.losses(regression(dtype)).sum().backward()
        for name, parameter in single.stacked.items():
            parameter.data.copy_(half.stacked[name])
            parameter.grad = half.stacked[name].grad.float()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for name, parameter in half.stacked.items():
            assert torch.equal(parameter, single.stacked[name].to(dtype))
    for states in zip(*(optimizer.state.values() for optimizer in optimizers), strict=True):
        assert all(value.dtype == torch.float32 for value in states[0].values())
        hand_made.assert_same_state(*states)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@every_rule
def test_sparse_gradients_are_refused_where_torch_refuses_them(optimizer_cls, hand_made):
    if RULES[optimizer_cls].check_sparse is not None:
        pytest.skip("it takes them")
    bundle = hand_made()
    optimizer = bundle.optimizer(optimizer_cls, CONFIGS)
    before = copy.deepcopy(bundle.models)
    messages = []
    for each, parameters in (
        (optimizer, bundle.stacked.values()),
        (bundle.alone_optimizers(optimizer_cls, CONFIGS)[0], bundle.alone[0].parameters()),
    ):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter).to_sparse()
        with pytest.raises(RuntimeError, match="sparse gradients") as refusal:
            each.step()
        messages.append(str(refusal.value))
    assert bundle.worst_error(before) == 0
    if optimizer_cls not in (optim.Adam, optim.AdamW):  # torch names another class to use
        assert messages[0] == messages[1]


# ---- numbers that a state has besides the number of steps

SCALARS = {cls: rule.scalars for cls, rule in RULES.items() if rule.scalars}
with_scalars = pytest.mark.parametrize("optimizer_cls", SCALARS)


@with_scalars
def test_scalars_are_shown_as_torch_has_them(optimizer_cls, hand_made, regression):
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optimizer_cls, CONFIGS)
    alone = bundle.alone_optimizers(optimizer_cls, CONFIGS)
    for _ in range(3):
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
    for i, stock in enumerate(alone):
        own = stock.state[bundle.alone[i][0].weight]
        state = optimizer.state[bundle.models[i][0].weight]
        assert state.keys() == own.keys()
        for name in SCALARS[optimizer_cls]:
            assert (state[name].dtype, state[name].shape) == (torch.float32, ())
            # pow may differ by a unit of the last place before it is rounded.
            torch.testing.assert_close(state[name], own[name], rtol=2.0**-23, atol=0)
    # They are views: what is written there is used.
    for each, parameter in (
        (optimizer, bundle.models[1][0].weight),
        *((alone[1], parameter) for parameter in bundle.alone[1].parameters()),
    ):
        each.state[parameter][SCALARS[optimizer_cls][0]].fill_(0.25)
    for _ in range(3):
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
    assert bundle.worst_error() <= 1e-12


@with_scalars
@pytest.mark.parametrize("loads", [False, True])
def test_scalars_of_a_wide_default_dtype(loads, optimizer_cls, hand_made, regression):
    torch.set_default_dtype(torch.float64)
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optimizer_cls, CONFIGS)
    alone = bundle.alone_optimizers(optimizer_cls, CONFIGS)
    for step in range(8):
        if loads and step == 4:
            for i, stock in enumerate(alone):
                stock.load_state_dict(copy.deepcopy(stock.state_dict()))
                optimizer.load_model_state_dict(i, optimizer.model_state_dict(i))
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
    assert bundle.worst_error() <= 1e-12
    for name in SCALARS[optimizer_cls]:
        assert optimizer.state[bundle.models[0][0].weight][name].dtype == torch.float64


@with_scalars
def test_scalars_of_parameters_with_steps_of_their_own(optimizer_cls, hand_made, regression):
    """A state dict whose parameters have other numbers than one another comes back as it was."""
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optimizer_cls, CONFIGS)
    for step in range(5):
        optimizer.zero_grad()
        bundle.losses(loss).sum().backward()
        if step in (0, 3):
            bundle.stacked["2.weight"].grad = None
        optimizer.step()
    saved = optimizer.model_state_dict(0)
    first, other = saved["state"][0], saved["state"][2]
    assert first["step"] == 5
    assert other["step"] == 3
    fresh = hand_made().optimizer(optimizer_cls, [{}] * 3)
    fresh.load_model_state_dict(0, saved)
    again = fresh.model_state_dict(0)["state"]
    for k, state in saved["state"].items():
        for name, value in state.items():
            assert torch.equal(again[k][name].to(value.dtype), value)


def test_asgd_does_not_care_about_foreach(hand_made, regression):
    """Torch's foreach variant rounds its rate in another way; ours has one way."""
    bundles = [hand_made(), hand_made()]
    options = {"lambd": 0.1, "alpha": 0.5, "t0": 2}
    for bundle, foreach in zip(bundles, (False, True), strict=True):
        configs = [{**config, **options, "foreach": foreach} for config in CONFIGS]
        optimizer = bundle.optimizer(optim.ASGD, configs)
        alone = bundle.alone_optimizers(optim.ASGD, configs)
        for _ in range(6):
            bundle.step(optimizer, regression())
            bundle.step_alone(alone, regression())
        assert bundle.worst_error() <= (1e-6 if foreach else 1e-12)
    assert bundles[0].worst_error(bundles[1].models) == 0
