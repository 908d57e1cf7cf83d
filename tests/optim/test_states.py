"""State dicts: of the whole bundle, and in and out of torch's own optimizers."""

import copy
from functools import partial

import pytest
from torch import nn, optim

from modelbatch.errors import ModelBatchError

# Loading casts a state to its parameter's dtype. torch does so with NAdam's products and ASGD's
# rates too, which are float32 while they are computed, so what is compared here was loaded on both
# sides.


def test_a_model_goes_on_alone(case, hand_made, regression):
    optimizer_cls, configs = case
    bundle, loss = hand_made(optimizer_cls), regression()
    optimizer = bundle.optimizer(optimizer_cls, configs)
    for _ in range(4):
        bundle.step(optimizer, loss)
    bundle.alone = [copy.deepcopy(model) for model in bundle.models]
    # Built without any option: all of them must come from the state dict.
    alone = bundle.alone_optimizers(optimizer_cls, [{}] * 3)
    for i, stock in enumerate(alone):
        saved = optimizer.model_state_dict(i)
        hand_made.assert_same_state(optimizer.model_state_dict(i - 3), saved)
        stock.load_state_dict(copy.deepcopy(saved))
        optimizer.load_model_state_dict(i, saved)
    for _ in range(4):
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
    assert bundle.worst_error() <= 1e-12


def test_a_lone_model_joins(case, hand_made, regression):
    optimizer_cls, configs = case
    bundle, loss = hand_made(optimizer_cls), regression()
    alone = bundle.alone_optimizers(optimizer_cls, configs)
    for _ in range(4):
        bundle.step_alone(alone, loss)
    # With other options and a history of its own, all of which the loaded state must replace.
    optimizer = bundle.optimizer(optimizer_cls, [{}] * 3)
    bundle.step(optimizer, loss)
    for i, stock in enumerate(alone):
        bundle.models[i].load_state_dict(bundle.alone[i].state_dict())
        saved = copy.deepcopy(stock.state_dict())
        optimizer.load_model_state_dict(i, saved)
        hand_made.assert_same_state(saved, stock.state_dict())
        stock.load_state_dict(saved)
    for _ in range(4):
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
    assert bundle.worst_error() <= 1e-12


def test_exported_state_is_a_copy(case, hand_made, regression):
    optimizer_cls, configs = case
    bundle, loss = hand_made(optimizer_cls), regression()
    optimizer = bundle.optimizer(optimizer_cls, configs)
    bundle.step(optimizer, loss)
    exported = optimizer.model_state_dict(2)
    before = copy.deepcopy(exported)
    bundle.step(optimizer, loss)
    hand_made.assert_same_state(exported, before)
    optimizer.load_model_state_dict(2, exported)
    bundle.step(optimizer, loss)
    hand_made.assert_same_state(exported, before)


def test_whole_state_dict(case, hand_made, regression):
    optimizer_cls, configs = case
    bundle, loss = hand_made(optimizer_cls), regression()
    optimizer = bundle.optimizer(optimizer_cls, configs)
    alone = bundle.alone_optimizers(optimizer_cls, configs)
    for _ in range(4):
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
    resumed = bundle.optimizer(optimizer_cls, [{}] * 3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for stock in alone:
        stock.load_state_dict(copy.deepcopy(stock.state_dict()))
    for _ in range(4):
        bundle.step(resumed, loss)
        bundle.step_alone(alone, loss)
    assert bundle.worst_error() <= 1e-12


def test_a_state_that_lacks_one_momentum_buffer(hand_made, regression):
    """As of a model with a part that had no gradient yet; torch's fused kernel cannot go on."""
    configs = [{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}] * 3
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optim.SGD, configs)
    alone = bundle.alone_optimizers(optim.SGD, configs)
    for _ in range(3):
        bundle.step(optimizer, loss)
        bundle.step_alone(alone, loss)
    for whole in (False, True):
        saved = optimizer.state_dict() if whole else optimizer.model_state_dict(1)
        del saved["state"][6 if whole else 2]  # model 1 of 4 parameters each
        load = optimizer.load_state_dict if whole else partial(optimizer.load_model_state_dict, 1)
        load(copy.deepcopy(saved))
        stock = alone[1].state_dict()
        del stock["state"][2]
        alone[1].load_state_dict(stock)
        for _ in range(2):
            bundle.step(optimizer, loss)
            bundle.step_alone(alone, loss)
        assert bundle.worst_error() <= 1e-12


def test_the_users_choice_of_kernel_is_kept(hand_made, regression):
    bundle = hand_made()
    configs = [{}, {"foreach": True}, {"fused": False}]
    optimizer = bundle.optimizer(optim.Adam, configs)
    bundle.step(optimizer, regression())
    kernels = [(group["foreach"], group["fused"]) for group in optimizer.param_groups]
    assert kernels == [(None, None), (True, None), (None, False)]
    # What was saved is what the user chose.
    saved = [optimizer.model_state_dict(i)["param_groups"][0]["fused"] for i in range(3)]
    assert saved == [None, None, False]
    assert [group["fused"] for group in optimizer.state_dict()["param_groups"]] == saved


def test_state_dicts_of_something_else(hand_made, regression):
    bundle, loss = hand_made(), regression()
    optimizer = bundle.optimizer(optim.Adam, [{"lr": 0.5}] * 3)
    bundle.step(optimizer, loss)
    good, before = optimizer.model_state_dict(1), optimizer.model_state_dict(1)
    other = hand_made(lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)))
    wider = other.optimizer(optim.Adam, [{}] * 3)
    other.step(wider, loss)
    sgd = hand_made().optimizer(optim.SGD, [{}] * 3)
    few = {"state": {}, "param_groups": [{**good["param_groups"][0], "params": [0]}]}
    unknown = {**good, "state": {9: good["state"][0]}}
    for bad, message in [
        ({}, "lacks 'state'"),
        (optimizer.state_dict(), "3 parameter groups"),
        (few, "of 1 parameters, the model has 4"),
        (unknown, "a parameter 9"),
        (wider.model_state_dict(1), r"'exp_avg' of parameter 0 .*\(6, 3\)"),
        (sgd.model_state_dict(1), "lacks the option .*betas"),
    ]:
        with pytest.raises(ModelBatchError, match=f"model 1: .*{message}"):
            optimizer.load_model_state_dict(1, bad)
        hand_made.assert_same_state(optimizer.model_state_dict(1), before)
    for method in (
        optimizer.model_state_dict,
        lambda i: optimizer.load_model_state_dict(i, {}),
    ):
        with pytest.raises(ModelBatchError, match="no model 3 in a bundle of 3"):
            method(3)
    optimizer.load_model_state_dict(1, good)
    hand_made.assert_same_state(optimizer.model_state_dict(1), before)
