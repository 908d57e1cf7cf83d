"""Merging and checking the options of M models."""

import inspect
import math

import numpy as np
import pytest
import torch
from torch import optim

from modelbatch.errors import ModelBatchError
from modelbatch.optim import merge_configs


class Plain(optim.Optimizer):
    """Checks nothing, needs its learning rate, and keeps `smoothing` for the whole optimizer."""

    def __init__(self, params, lr, momentum=0.0, smoothing=0.5):
        self.smoothing = smoothing
        super().__init__(params, {"lr": lr, "momentum": momentum})


class AnyOption(optim.Optimizer):
    def __init__(self, params, **options):
        super().__init__(params, options)


@pytest.mark.parametrize(
    "lr_list",
    [
        [0.5, 0.25, 2],
        (0.5, 0.25, 2.0),
        range(1, 4),
        np.array([0.5, 0.25, 2.0]),
        np.array([0.5, 0.25, 2.0], dtype=np.float32),
        [np.float32(0.5), np.float64(0.25), np.int64(2)],
        torch.tensor([0.5, 0.25, 2.0]),
        [torch.tensor(0.5), torch.tensor([0.25]), torch.tensor([[2.0]])],
        [np.array(0.5), np.array([0.25]), 2.0],
        iter([0.5, 0.25, 2.0]),
    ],
)
def test_learning_rates_become_floats(lr_list):
    expected = [1.0, 2.0, 3.0] if isinstance(lr_list, range) else [0.5, 0.25, 2.0]
    configs = merge_configs(optim.SGD, 3, lr_list)
    assert configs == [{"lr": rate} for rate in expected]
    assert all(type(config["lr"]) is float for config in configs)


def test_options_for_all_or_for_each():
    assert merge_configs(optim.Adam, 2) == [{}, {}]
    both = merge_configs(optim.Adam, 2, [0.1, 0.2], {"betas": (0.5, 0.6)})
    assert both == [{"lr": 0.1, "betas": (0.5, 0.6)}, {"lr": 0.2, "betas": (0.5, 0.6)}]
    both[0]["eps"] = 1.0
    assert "eps" not in both[1], "the models share one dict"
    given = [{"lr": 0.1}, None, {"weight_decay": np.float32(0.5)}]
    assert merge_configs(optim.Adam, 3, None, given) == [{"lr": 0.1}, {}, {"weight_decay": 0.5}]
    assert merge_configs(AnyOption, 1, [0.1], {"whatever": "this"}) == [
        {"whatever": "this", "lr": 0.1}
    ]


def test_values_that_are_unusual_but_right():
    merge_configs(optim.SGD, 1, [0.0])
    merge_configs(optim.ASGD, 1, None, {"t0": math.inf})
    merge_configs(optim.Adafactor, 1, None, {"eps": (None, 1e-3)})
    merge_configs(optim.Adam, 2, None, {"lr": torch.tensor(0.1), "foreach": None})
    merge_configs(optim.LBFGS, 2, [1.0, 0.5], [{"line_search_fn": "strong_wolfe"}, {}])
    merge_configs(optim.Muon, 1, [0.1])
    merge_configs(Plain, 2, [0.1, 0.2], [{"smoothing": 0.5}, {}])


ONE_BAD = [
    (optim.SGD, {"lr": -0.1}, r"'lr' is negative: -0.1"),
    (optim.SGD, {"lr": math.nan}, "'lr' is NaN"),
    (optim.SGD, {"lr": math.inf}, "'lr' is not finite"),
    (optim.SGD, {"lr": torch.tensor(-0.1)}, "'lr' is negative"),
    (optim.SGD, {"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
    (optim.SGD, {"lr": "fast"}, "'lr' = 'fast'"),
    (optim.SGD, {"lr": None}, "'lr' = None"),
    (optim.SGD, {"momentum": -0.1}, "'momentum' is negative"),
    (optim.SGD, {"dampening": math.inf}, "'dampening' is not finite"),
    (optim.SGD, {"nesterov": True}, "Nesterov momentum requires a momentum"),
    (optim.SGD, {"weight_decay": -1}, "'weight_decay' is negative"),
    (optim.SGD, {"momentun": 0.9}, "SGD has no option 'momentun' .*momentum"),
    (optim.SGD, {"params": []}, "'params' is no option"),
    (optim.SGD, {"differentiable": True}, "'differentiable' of SGD is not possible"),
    (optim.Adam, {"betas": (0.9, 1.0)}, r"'betas' is not in \[0, 1\)"),
    (optim.Adam, {"betas": (-0.1, 0.9)}, r"'betas' is not in \[0, 1\)"),
    (optim.Adam, {"betas": (math.nan, 0.9)}, "'betas' is NaN"),
    (optim.Adam, {"betas": 0.9}, "'betas' = 0.9"),
    (optim.Adam, {"eps": -1e-8}, "'eps' is negative"),
    (optim.Adam, {"foreach": True, "fused": True}, "cannot be `True` together"),
    (optim.RMSprop, {"alpha": -0.5}, "'alpha' is negative"),
    (optim.Adadelta, {"rho": 1.5}, "Invalid rho value: 1.5 .*'rho' = 1.5"),
    (optim.Adadelta, {"rho": -0.5}, "'rho' is negative"),
    (optim.Adagrad, {"lr_decay": -0.5}, "'lr_decay' is negative"),
    (optim.Adagrad, {"initial_accumulator_value": -1}, "'initial_accumulator_value' = -1"),
    (optim.NAdam, {"momentum_decay": -1}, "'momentum_decay' is negative"),
    (optim.Rprop, {"etas": (1.5, 1.2)}, r"Invalid eta values.*'etas' = \(1.5, 1.2\)"),
    (optim.Rprop, {"step_sizes": (math.nan, 1.0)}, "'step_sizes' is NaN"),
    (optim.Adafactor, {"d": 0.5}, "'d' = 0.5"),
    (optim.Muon, {"adjust_lr_fn": "nothing"}, "'adjust_lr_fn' = 'nothing'"),
    (optim.LBFGS, {"lr": -1.0}, "'lr' is negative"),
    (optim.LBFGS, {"tolerance_grad": math.nan}, "'tolerance_grad' is NaN"),
    (Plain, {"lr": 0.1, "momentum": -1.0}, "'momentum' is negative"),
    (Plain, {}, "missing 1 required positional argument: 'lr'"),
]


@pytest.mark.parametrize(("optimizer_cls", "options", "message"), ONE_BAD)
def test_one_models_bad_option_is_named(optimizer_cls, options, message):
    good = {"lr": 0.1}
    with pytest.raises(ModelBatchError, match=f"model 1: .*{message}"):
        merge_configs(optimizer_cls, 3, None, [good, options, good])
    with pytest.raises(ModelBatchError, match=f"model 0: .*{message}"):
        merge_configs(optimizer_cls, 3, None, options)


def test_an_option_that_the_class_holds_only_once():
    with pytest.raises(ModelBatchError, match="model 2: option 'smoothing' differs from model 0"):
        merge_configs(Plain, 3, [0.1] * 3, [{}, {}, {"smoothing": 0.9}])


@pytest.mark.parametrize(
    "optimizer_cls",
    [
        value
        for value in vars(optim).values()
        if isinstance(value, type)
        and issubclass(value, optim.Optimizer)
        and value is not optim.Optimizer
    ],
)
def test_torchs_classes_hold_every_option_per_group(optimizer_cls):
    """What makes it right that no option of theirs is refused for differing."""
    stock = optimizer_cls([torch.nn.Parameter(torch.zeros(1, 1))])
    options = list(inspect.signature(optimizer_cls).parameters)[1:]
    assert set(options) <= stock.param_groups[0].keys()


@pytest.mark.parametrize(
    ("lr_list", "message"),
    [
        ([0.1, 0.2], "lr_list has 2 learning rates for 3 models"),
        (np.ones(4), "lr_list has 4 learning rates for 3 models"),
        (torch.ones(3, 1), r"one axis of 3 learning rates, got the shape \(3, 1\)"),
        (0.1, r"sequence of 3 learning rates, got float; .*optimizer_kwargs=\{'lr': ...\}"),
        ("abc", "sequence of 3 learning rates, got str"),
        ({"lr": 0.1}, "sequence of 3 learning rates, got dict"),
        ([0.1, "0.2", 0.3], "model 1: option 'lr' must be a number, got '0.2' of type str"),
        ([0.1, 0.2, None], "model 2: option 'lr' must be a number"),
        ([0.1, True, 0.3], "model 1: option 'lr' must be a number"),
        ([0.1, torch.ones(2), 0.3], "model 1: option 'lr' must have one element, got 2"),
        ([0.1, 0.2, -0.3], "model 2: option 'lr' is negative: -0.3"),
        ([math.nan, 0.2, 0.3], "model 0: option 'lr' is NaN"),
        (torch.tensor([0.1, math.inf, 0.3]), "model 1: option 'lr' is not finite"),
    ],
)
def test_bad_learning_rates(lr_list, message):
    with pytest.raises(ModelBatchError, match=message):
        merge_configs(optim.Adam, 3, lr_list)


def test_other_bad_arguments():
    with pytest.raises(ModelBatchError, match=r"model 1: option 'lr' is given twice: 0.3 .*0.2"):
        merge_configs(optim.Adam, 2, [0.1, 0.2], [{}, {"lr": 0.3}])
    with pytest.raises(ModelBatchError, match="model 0: option 'lr' is given twice"):
        merge_configs(optim.Adam, 2, [0.1, 0.2], {"lr": 0.3})
    with pytest.raises(ModelBatchError, match="optimizer_kwargs has 1 dicts for 2 models"):
        merge_configs(optim.Adam, 2, None, [{}])
    with pytest.raises(ModelBatchError, match=r"model 1: optimizer_kwargs\[1\] must be a dict"):
        merge_configs(optim.Adam, 2, None, [{}, 0.1])
    with pytest.raises(ModelBatchError, match=r"optimizer_kwargs must be a dict .*got float"):
        merge_configs(optim.Adam, 2, None, 0.1)
    with pytest.raises(ModelBatchError, match="at least one model, got 0"):
        merge_configs(optim.Adam, 0)
    for bad in ("adam", optim.Adam([torch.nn.Parameter(torch.ones(1))]), dict):
        with pytest.raises(ModelBatchError, match="must be a class derived from"):
            merge_configs(bad, 2)
