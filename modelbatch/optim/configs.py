"""Checking and merging the hyper-parameters of a bundle's models.

A torch optimizer checks the options of its constructor but never those inside a parameter group,
and in a bundle every model's options are inside a group. So each model's options are tried on a
throw-away optimizer of the same class first: what torch would refuse for a model trained alone is
refused here too, before anything is built, with the number of the model.
"""

import inspect
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import ModelBatchError

__all__ = ["merge_configs", "separate_tensors", "stock_optimizer"]

# Options that mean the same in every optimizer that has them. Classes outside torch often do not
# check them, and torch itself lets infinities through.
_NON_NEGATIVE = frozenset(
    {"alpha", "eps", "lr", "lr_decay", "momentum", "momentum_decay", "rho", "weight_decay"}
)
_FINITE = _NON_NEGATIVE | {"betas", "dampening", "lambd"}


def merge_configs(
    optimizer_cls: type[Optimizer],
    num_models: int,
    lr_list: Any = None,
    optimizer_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
) -> list[dict[str, Any]]:
    """Merges learning rates and options into one checked config per model.

    Args:
        optimizer_cls: the torch optimizer class.
        num_models: how many models there are (M).
        lr_list: M learning rates: a sequence of floats or one-element tensors, a numpy array or
            a 1-D tensor. They become plain floats. `None` leaves the learning rate to
            `optimizer_kwargs` or to the class.
        optimizer_kwargs: options of `optimizer_cls`: one mapping for all models, or M mappings.
            An option that a mapping does not name has the default of the class.

    Returns:
        M dictionaries; `optimizer_cls(model.parameters(), **configs[i])` is the optimizer that
        model i would have alone.

    Raises:
        ModelBatchError: a wrong count; an option that the class does not know, that it refuses,
            that is not finite, or that it cannot hold per model; a learning rate given twice.
            The message names model and option.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise ModelBatchError(
            f"optimizer_cls must be a class derived from torch.optim.Optimizer, got "
            f"{optimizer_cls!r}"
        )
    if num_models < 1:
        raise ModelBatchError(f"an optimizer needs at least one model, got {num_models}")
    configs = _option_dicts(num_models, optimizer_kwargs)
    for i, lr in enumerate(_learning_rates(num_models, lr_list)):
        if "lr" in configs[i]:
            raise ModelBatchError(
                f"model {i}: option 'lr' is given twice: {configs[i]['lr']} in optimizer_kwargs "
                f"and {lr} in lr_list"
            )
        configs[i]["lr"] = lr
    known = _option_names(optimizer_cls)
    stock: Optimizer | None = None
    for i, config in enumerate(configs):
        for option, value in config.items():
            if option == "params":
                raise ModelBatchError(f"model {i}: 'params' is no option, the bundle sets them")
            if known is not None and option not in known:
                raise ModelBatchError(
                    f"model {i}: {optimizer_cls.__name__} has no option {option!r} "
                    f"(it has {', '.join(known)})"
                )
            _check_value(i, option, value)
        # One mapping for all models needs one trial only.
        if stock is None or lr_list is not None or not isinstance(optimizer_kwargs, Mapping):
            stock = _try_config(optimizer_cls, config, i)
    assert stock is not None
    _check_held_per_model(optimizer_cls, configs, stock)
    return configs


def stock_optimizer(
    optimizer_cls: type[Optimizer], params: Iterable[nn.Parameter], config: dict[str, Any], i: int
) -> Optimizer:
    """Builds the torch optimizer that model i would have alone.

    Args:
        optimizer_cls: the torch optimizer class.
        params: the parameters of model i.
        config: its options.
        i: the model's index, for the message.

    Raises:
        ModelBatchError: torch refuses the parameters or the options, or the options ask for a
            differentiable step.
    """
    try:
        stock = optimizer_cls(params, **config)
    except Exception as error:
        raise ModelBatchError(f"model {i}: {optimizer_cls.__name__}: {error}") from error
    if stock.defaults.get("differentiable"):
        raise ModelBatchError(
            f"model {i}: option 'differentiable' of {optimizer_cls.__name__} is not possible in a "
            f"bundle, whose models' parameters are views that no graph leads through"
        )
    return stock


def separate_tensors(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Gives every model its own copy of an option tensor that several models were given.

    A scheduler multiplies a tensor learning rate in place once per group: were it one tensor, M
    groups would multiply it M times. A tensor that only one model has stays the caller's own.
    """
    owners = Counter(
        key for config in configs for key in {id(t) for v in config.values() for t in _tensors(v)}
    )
    return [
        {option: _separated(value, owners) for option, value in config.items()}
        for config in configs
    ]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _separated(value: Any, owners: Mapping[int, int]) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if owners[id(value)] > 1 else value
    if type(value) in (tuple, list):
        return type(value)(_separated(item, owners) for item in value)
    return value


def _option_dicts(num_models: int, optimizer_kwargs: Any) -> list[dict[str, Any]]:
    if optimizer_kwargs is None:
        return [{} for _ in range(num_models)]
    if isinstance(optimizer_kwargs, Mapping):
        given = [optimizer_kwargs] * num_models
    elif isinstance(optimizer_kwargs, Iterable) and not isinstance(optimizer_kwargs, (str, bytes)):
        given = list(optimizer_kwargs)
    else:
        raise ModelBatchError(
            f"optimizer_kwargs must be a dict for all models or {num_models} dicts, got "
            f"{type(optimizer_kwargs).__name__}"
        )
    if len(given) != num_models:
        raise ModelBatchError(f"optimizer_kwargs has {len(given)} dicts for {num_models} models")
    configs = []
    for i, options in enumerate(given):
        if options is not None and not isinstance(options, Mapping):
            raise ModelBatchError(
                f"model {i}: optimizer_kwargs[{i}] must be a dict, got {type(options).__name__}"
            )
        configs.append(
            {
                str(option): value.item() if isinstance(value, np.generic) else value
                for option, value in (options or {}).items()
            }
        )
    return configs


def _learning_rates(num_models: int, lr_list: Any) -> list[float]:
    if lr_list is None:
        return []
    if isinstance(lr_list, (torch.Tensor, np.ndarray)):
        if lr_list.ndim != 1:
            raise ModelBatchError(
                f"lr_list must have one axis of {num_models} learning rates, got the shape "
                f"{tuple(lr_list.shape)}"
            )
        lr_list = lr_list.tolist()
    elif not isinstance(lr_list, Iterable) or isinstance(lr_list, (str, bytes, Mapping)):
        raise ModelBatchError(
            f"lr_list must be a sequence of {num_models} learning rates, got "
            f"{type(lr_list).__name__}; one learning rate for all models is "
            f"optimizer_kwargs={{'lr': ...}}"
        )
    rates = list(lr_list)
    if len(rates) != num_models:
        raise ModelBatchError(f"lr_list has {len(rates)} learning rates for {num_models} models")
    return [_learning_rate(i, rate) for i, rate in enumerate(rates)]


def _learning_rate(i: int, rate: Any) -> float:
    if isinstance(rate, (torch.Tensor, np.ndarray)):
        size = rate.numel() if isinstance(rate, torch.Tensor) else rate.size
        if size != 1:
            raise ModelBatchError(f"model {i}: option 'lr' must have one element, got {size}")
        rate = rate.item()
    if isinstance(rate, (bool, np.bool_)) or not isinstance(rate, Real):
        raise ModelBatchError(
            f"model {i}: option 'lr' must be a number, got {rate!r} of type {type(rate).__name__}"
        )
    return float(rate)


def _option_names(optimizer_cls: type[Optimizer]) -> tuple[str, ...] | None:
    """The names of the constructor's options; None if it takes any."""
    try:
        parameters = list(inspect.signature(optimizer_cls).parameters.values())[1:]
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return tuple(p.name for p in parameters if p.kind is not p.VAR_POSITIONAL)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, torch.Tensor):
        if value.numel() == 1 and value.device.type != "meta" and not value.is_complex():
            yield float(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, Real) and not isinstance(value, bool):
        yield float(value)


def _check_value(i: int, option: str, value: Any) -> None:
    for number in _numbers(value):
        if math.isnan(number):
            problem = "is NaN"
        elif math.isinf(number) and option in _FINITE:
            problem = "is not finite"
        elif number < 0 and option in _NON_NEGATIVE:
            problem = "is negative"
        elif option == "betas" and not 0 <= number < 1:
            problem = "is not in [0, 1)"
        else:
            continue
        raise ModelBatchError(f"model {i}: option {option!r} {problem}: {value}")


def _try_config(optimizer_cls: type[Optimizer], config: dict[str, Any], i: int) -> Optimizer:
    # Two axes, because some classes take matrices only.
    def build(options: dict[str, Any]) -> Optimizer:
        with warnings.catch_warnings():
            # Whatever there is to warn of is said again when the optimizer itself is built.
            warnings.simplefilter("ignore")
            return stock_optimizer(optimizer_cls, [nn.Parameter(torch.zeros(1, 1))], options, i)

    try:
        return build(config)
    except ModelBatchError as error:
        culprits = []
        for option in config:
            try:
                build({name: value for name, value in config.items() if name != option})
            except ModelBatchError:
                continue
            culprits.append(f"{option!r} = {config[option]!r}")
        if not culprits:
            raise
        raise ModelBatchError(f"{error} (option {' or '.join(culprits)})") from error.__cause__


def _check_held_per_model(
    optimizer_cls: type[Optimizer], configs: Sequence[Mapping[str, Any]], stock: Optimizer
) -> None:
    """Refuses differing values of an option that the class does not keep in its groups."""
    parameters = inspect.signature(optimizer_cls).parameters
    for option in dict.fromkeys(option for config in configs for option in config):
        if option in stock.param_groups[0]:
            continue
        default = parameters[option].default if option in parameters else None
        first = configs[0].get(option, default)
        for i, config in enumerate(configs):
            value = config.get(option, default)
            if value is not first and not _equal(value, first):
                raise ModelBatchError(
                    f"model {i}: option {option!r} differs from model 0, but "
                    f"{optimizer_cls.__name__} keeps it once per optimizer, not per parameter "
                    f"group: it must be the same for all models"
                )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    return bool(np.all(a == b))
