"""LBFGS: separate line searches, one closure call for all of them."""

import copy
import threading

import pytest
import torch
from torch import nn, optim
from torch.optim.optimizer import register_optimizer_step_post_hook

from modelbatch.errors import ModelBatchError

CONFIGS = {
    "fixed_step": [{"lr": 0.5}, {"lr": 0.1, "max_iter": 3}, {"history_size": 2, "max_iter": 8}],
    "strong_wolfe": [
        {"line_search_fn": "strong_wolfe"},
        {"line_search_fn": "strong_wolfe", "max_iter": 3, "lr": 0.1},
        {"line_search_fn": "strong_wolfe", "tolerance_change": 1e-2, "history_size": 2},
    ],
    "mixed": [{"line_search_fn": "strong_wolfe"}, {"lr": 0.1}, {"tolerance_grad": 10.0}],
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def configs(request):
    return request.param


class Closure:
    """Forward and backward of all models; counts its calls, and who waited for each."""

    def __init__(self, bundle, optimizer, loss):
        self.bundle, self.optimizer, self.loss = bundle, optimizer, loss
        self.evaluating = []
        self.parameters = []

    def __call__(self):
        assert torch.is_grad_enabled()
        assert threading.current_thread() is threading.main_thread()
        self.evaluating.append(self.optimizer.evaluating)
        self.parameters.append(
            [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in self.bundle.models]
        )
        self.optimizer.zero_grad()
        losses = self.bundle.losses(self.loss)
        losses.sum().backward()
        return losses


def step_alone(bundle, optimizers, loss, which=(0, 1, 2)):
    values = []
    for i in which:

        def closure(i=i):
            optimizers[i].zero_grad()
            value = loss(bundle.alone[i], i)
            value.backward()
            return value

        values.append(optimizers[i].step(closure))
    return values


def evaluations(optimizer, model):
    first = next(iter(model.parameters()))
    return optimizer.state[first]["func_evals"] if first in optimizer.state else 0


def test_equals_alone(configs, hand_made, regression):
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optim.LBFGS, configs)
    alone = bundle.alone_optimizers(optim.LBFGS, configs)
    closure = Closure(bundle, optimizer, loss)
    assert isinstance(optimizer, optim.Optimizer)
    assert len(optimizer.param_groups) == 3
    before = copy.deepcopy(bundle.models)
    for _ in range(4):
        calls = len(closure.evaluating)
        counts = [evaluations(optimizer, model) for model in bundle.models]
        with torch.no_grad():
            losses = optimizer.step(closure)
        torch.testing.assert_close(losses, torch.stack(step_alone(bundle, alone, loss)))
        longest = 0
        for i in range(3):
            count = evaluations(optimizer, bundle.models[i])
            assert count == evaluations(alone[i], bundle.alone[i])
            longest = max(longest, count - counts[i])
        assert len(closure.evaluating) - calls == longest, "evaluations were not shared"
    # Each search is the same sequence of operations; only the sums of the batched backward differ.
    assert bundle.worst_error() <= 1e-9
    assert bundle.worst_error(before) > 1e-2
    assert optimizer.evaluating == (False,) * 3


def test_a_model_that_is_done_stays_as_it_is(hand_made, regression):
    bundle = hand_made()
    optimizer = bundle.optimizer(optim.LBFGS, [{"max_iter": 2}, {"max_iter": 9}, {"max_iter": 5}])
    closure = Closure(bundle, optimizer, regression())
    optimizer.step(closure)
    assert closure.evaluating[0] == (True, True, True)
    assert closure.evaluating[-1] == (False, True, False)
    for i, model in enumerate(bundle.models):
        final = torch.cat([p.detach().flatten() for p in model.parameters()])
        done = [
            seen[i]
            for seen, who in zip(closure.parameters, closure.evaluating, strict=True)
            if not who[i]
        ]
        assert i == 1 or done
        assert all(torch.equal(final, parameters) for parameters in done)


def test_float32_is_as_exact_as_torch(configs, hand_made, regression):
    single, double = hand_made(dtype=torch.float32), hand_made()
    for exact, rounded in zip(double.alone, single.alone, strict=True):
        exact.load_state_dict(rounded.state_dict())
    optimizer = single.optimizer(optim.LBFGS, configs)
    alone = single.alone_optimizers(optim.LBFGS, configs)
    truth = double.alone_optimizers(optim.LBFGS, configs)
    for _ in range(2):
        optimizer.step(Closure(single, optimizer, regression(torch.float32)))
        step_alone(single, alone, regression(torch.float32))
        step_alone(double, truth, regression())
    ours = single.worst_error(double.alone)
    single.models = single.alone
    assert ours <= 2 * single.worst_error(double.alone) + torch.finfo(torch.float32).eps


def test_freezing_in_the_middle(hand_made, regression):
    bundle, loss = hand_made(), regression()
    configs = [{"lr": 0.5}, {"lr": 0.3}, {"line_search_fn": "strong_wolfe"}]
    optimizer = bundle.optimizer(optim.LBFGS, configs)
    alone = bundle.alone_optimizers(optim.LBFGS, configs)
    for step in range(5):
        bundle.active[1] = step not in (2, 3)
        parameters = [p.detach().clone() for p in bundle.models[1].parameters()]
        state = optimizer.model_state_dict(1)
        optimizer.step(Closure(bundle, optimizer, loss))
        step_alone(bundle, alone, loss, which=(0, 1, 2) if bundle.active[1] else (0, 2))
        if not bundle.active[1]:
            for p, kept in zip(bundle.models[1].parameters(), parameters, strict=True):
                assert torch.equal(p, kept)
            hand_made.assert_same_state(optimizer.model_state_dict(1), state)
    assert bundle.worst_error() <= 1e-9


def test_all_frozen(hand_made, regression):
    bundle = hand_made()
    optimizer = bundle.optimizer(optim.LBFGS, [{}] * 3)
    bundle.active[:] = [False] * 3
    closure = Closure(bundle, optimizer, regression())
    before = copy.deepcopy(bundle.models)
    assert optimizer.step(closure).shape == (3,)
    assert closure.evaluating == [(False,) * 3]
    assert bundle.worst_error(before) == 0


def test_states_go_both_ways(configs, hand_made, regression):
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optim.LBFGS, configs)
    optimizer.step(Closure(bundle, optimizer, loss))
    bundle.alone = copy.deepcopy(bundle.models)
    alone = bundle.alone_optimizers(optim.LBFGS, [{}] * 3)
    for i, stock in enumerate(alone):
        stock.load_state_dict(optimizer.model_state_dict(i))
    resumed = bundle.optimizer(optim.LBFGS, [{}] * 3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for i in range(2):
        resumed.step(Closure(bundle, resumed, loss))
        step_alone(bundle, alone, loss)
        if i == 0:  # and back
            for k, stock in enumerate(alone):
                saved = copy.deepcopy(stock.state_dict())
                resumed.load_model_state_dict(k, saved)
                hand_made.assert_same_state(resumed.model_state_dict(k), stock.state_dict())
                hand_made.assert_same_state(saved, stock.state_dict())
    assert bundle.worst_error() <= 1e-9


def test_schedulers(hand_made, regression):
    bundle, loss = hand_made(), regression()
    configs = [{"lr": 0.5}, {"lr": 0.3}, {"lr": 1.0}]
    optimizer = bundle.optimizer(optim.LBFGS, configs)
    alone = bundle.alone_optimizers(optim.LBFGS, configs)
    schedulers = [optim.lr_scheduler.ExponentialLR(o, 0.5) for o in [optimizer, *alone]]
    for _ in range(3):
        optimizer.step(Closure(bundle, optimizer, loss))
        step_alone(bundle, alone, loss)
        for scheduler in schedulers:
            scheduler.step()
    assert schedulers[0].get_last_lr() == [0.0625, 0.0375, 0.125]
    assert bundle.worst_error() <= 1e-9


def test_nan_stays_in_its_model(hand_made, regression):
    results = []
    for factor in (1.0, float("nan")):
        bundle, plain = hand_made(), regression()

        def loss(model, i, plain=plain, factor=factor):
            return plain(model, i) * (factor if i == 1 else 1.0)

        optimizer = bundle.optimizer(optim.LBFGS, [{"line_search_fn": "strong_wolfe"}] * 3)
        for _ in range(2):
            optimizer.step(Closure(bundle, optimizer, loss))
        results.append(bundle)
    for name, parameter in results[0].stacked.items():
        assert torch.equal(parameter[[0, 2]], results[1].stacked[name][[0, 2]])


def test_autocast_of_the_caller_reaches_the_searches(hand_made, regression):
    seen = []

    class Watching(optim.LBFGS):
        def _gather_flat_grad(self):
            seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return super()._gather_flat_grad()

    bundle = hand_made(dtype=torch.float32)
    optimizer = bundle.optimizer(Watching, [{"max_iter": 2}] * 3)
    closure = Closure(bundle, optimizer, regression(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step(closure)
    assert set(seen) == {(True, torch.bfloat16)}
    seen.clear()
    optimizer.step(closure)
    assert {enabled for enabled, _ in seen} == {False}


@pytest.mark.parametrize("compiled", [False, True])
def test_hooks_run_once_in_the_calling_thread(hand_made, regression, monkeypatch, compiled):
    bundle = hand_made()
    optimizer = bundle.optimizer(optim.LBFGS, [{}] * 3)
    if compiled:  # the first torch.compile of a process puts this around the class's step
        monkeypatch.setattr(optim.LBFGS, "step", torch._dynamo.disable(optim.LBFGS.step))
    seen = []

    def hook(opt, args, kwargs):
        seen.append((opt, threading.current_thread()))

    handle = register_optimizer_step_post_hook(hook)
    try:
        optimizer.step(Closure(bundle, optimizer, regression()))
    finally:
        handle.remove()
    assert seen == [(optimizer, threading.main_thread())]


class TestErrors:
    @pytest.mark.parametrize("fails_at", [0, 4])
    def test_in_the_closure(self, fails_at, hand_made, regression):
        bundle = hand_made()
        optimizer = bundle.optimizer(optim.LBFGS, [{"line_search_fn": "strong_wolfe"}] * 3)
        closure = Closure(bundle, optimizer, regression())
        threads = threading.active_count()
        saved = copy.deepcopy(optimizer.state_dict())

        def failing():
            if len(closure.evaluating) == fails_at:
                raise KeyError("data ran out")
            return closure()

        with pytest.raises(KeyError, match="data ran out"):
            optimizer.step(failing)
        assert threading.active_count() == threads
        assert optimizer.evaluating == (False,) * 3
        # As with a lone LBFGS, whose history an error leaves in the middle of a search.
        optimizer.load_state_dict(saved)
        optimizer.step(closure)

    def test_losses_of_the_wrong_shape(self, hand_made, regression):
        bundle = hand_made()
        optimizer = bundle.optimizer(optim.LBFGS, [{}] * 3)
        closure = Closure(bundle, optimizer, regression())
        before = copy.deepcopy(bundle.models)
        for bad, what in [(lambda: closure().sum(), r"\(\)"), (lambda: None, "NoneType")]:
            with pytest.raises(ModelBatchError, match=rf"shape \(3,\), got {what}"):
                optimizer.step(bad)
        assert bundle.worst_error(before) == 0

    def test_in_one_search(self, hand_made, regression):
        """The others end their step, as they would have alone."""
        bundle, loss = hand_made(), regression()
        configs = [{}, {"line_search_fn": "weak_wolfe"}, {"line_search_fn": "strong_wolfe"}]
        optimizer = bundle.optimizer(optim.LBFGS, configs)
        alone = bundle.alone_optimizers(optim.LBFGS, configs)
        threads = threading.active_count()
        message = "model 1: LBFGS: only 'strong_wolfe' is supported"
        with pytest.raises(ModelBatchError, match=message) as info:
            optimizer.step(Closure(bundle, optimizer, loss))
        assert isinstance(info.value.__cause__, RuntimeError)
        step_alone(bundle, alone, loss, which=(0, 2))
        assert bundle.worst_error() <= 1e-9
        assert threading.active_count() == threads

    def test_state_of_another_network(self, hand_made, regression):
        bundle, loss = hand_made(), regression()
        optimizer = bundle.optimizer(optim.LBFGS, [{}] * 3)
        optimizer.step(Closure(bundle, optimizer, loss))
        wide = hand_made(lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)))
        other = wide.optimizer(optim.LBFGS, [{}] * 3)
        other.step(Closure(wide, other, loss))
        before = optimizer.model_state_dict(2)
        with pytest.raises(ModelBatchError, match=r"model 2: state 'd' has 38 elements.* have 32"):
            optimizer.load_model_state_dict(2, other.model_state_dict(0))
        hand_made.assert_same_state(optimizer.model_state_dict(2), before)

    def test_options_and_groups(self, hand_made):
        bundle = hand_made()
        with pytest.raises(ModelBatchError, match="model 1: LBFGS: Invalid learning rate: -1"):
            bundle.optimizer(optim.LBFGS, [{}, {"lr": -1.0}, {}])
        optimizer = bundle.optimizer(optim.LBFGS, [{}] * 3)
        with pytest.raises(ModelBatchError, match="one parameter group per model"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
