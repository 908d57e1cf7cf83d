"""Which torch optimizer classes one operator computes, and how their options map to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from ..ops import optim as ops

__all__ = ["RULES", "Rule", "as_number", "option_of", "read_option"]


@dataclass(frozen=True)
class Rule:
    """How one torch optimizer class is computed for all models by one operator.

    Args:
        name: the operator is `modelbatch::<name>_step_`.
        operator: it.
        rows: the rows of its matrix of hyper-parameters, `[K, M]`.
        states: torch's names of the state tensors, in the operator's order.
        needed: which of the states a model with these options has.
        deciding: the options that `needed` reads.
        first_state: the initial value of the states; None while they begin with the first step.
        counts: whether torch's own state has the number of steps.
        scalars: torch's names of the states with one number per model, in the operator's order,
            besides the number of steps.
        loading_widens: whether torch computes the scalars of float64 parameters in float64 once
            they were loaded. Before that they have the default dtype.
        check_sparse: raises where torch refuses sparse gradients with these options; None where
            it always does. For the others, a zero in place of no gradient makes no difference.
    """

    name: str
    operator: Callable[..., None]
    rows: tuple[str, ...]
    states: tuple[str, ...]
    needed: Callable[[Mapping[str, Any]], tuple[bool, ...]]
    deciding: frozenset[str]
    first_state: Callable[[Mapping[str, Any]], float] | None = None
    counts: bool = True
    scalars: tuple[str, ...] = ()
    loading_widens: bool = False
    check_sparse: Callable[[Mapping[str, Any]], None] | None = None


# Rows that are not the option of their own name: the option, and the place in it.
_ROW_OPTIONS: dict[str, tuple[str, int | None]] = {
    "beta1": ("betas", 0),
    "beta2": ("betas", 1),
    "etaminus": ("etas", 0),
    "etaplus": ("etas", 1),
    "step_size_min": ("step_sizes", 0),
    "step_size_max": ("step_sizes", 1),
    "decoupled": ("decoupled_weight_decay", None),
}


def option_of(row: str) -> tuple[str, int | None]:
    """The option that a row of the matrix is read from, and its place where that has several."""
    return _ROW_OPTIONS.get(row, (row, None))


def read_option(rule: Rule, group: Mapping[str, Any], row: str) -> Any:
    """The value in a model's group that belongs into a row of the matrix."""
    option, place = option_of(row)
    if place is not None:
        return group[option][place]
    if row == "decoupled":
        return group.get(option, rule.name == "adamw")
    return group[option]


def as_number(value: Any) -> float:
    """A hyper-parameter as a float; a tensor must have one element."""
    if isinstance(value, Tensor) and value.is_complex():
        raise TypeError(f"a hyper-parameter must be real, got {value}")
    return float(value)


def _sparse_without_decay(group: Mapping[str, Any]) -> None:
    if group["weight_decay"] != 0:
        raise RuntimeError("weight_decay option is not compatible with sparse gradients")


_ADAM_STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def _adam_needs(group: Mapping[str, Any]) -> tuple[bool, ...]:
    return True, True, bool(group["amsgrad"])


def _rule(
    name: str,
    states: tuple[str, ...],
    needed: Callable[[Mapping[str, Any]], tuple[bool, ...]] | None = None,
    deciding: tuple[str, ...] = (),
    **more: Any,
) -> Rule:
    operator = getattr(torch.ops.modelbatch, f"{name}_step_").default
    needed = needed or (lambda group: (True,) * len(states))
    return Rule(name, operator, ops.HYPER_ROWS[name], states, needed, frozenset(deciding), **more)


RULES: dict[type[Optimizer], Rule] = {
    SGD: _rule(
        "sgd",
        ("momentum_buffer",),
        lambda group: (group["momentum"] != 0,),
        ("momentum",),
        counts=False,
        check_sparse=lambda group: None,
    ),
    Adam: _rule("adam", _ADAM_STATES, _adam_needs, ("amsgrad",)),
    AdamW: _rule("adamw", _ADAM_STATES, _adam_needs, ("amsgrad",)),
    RMSprop: _rule(
        "rmsprop",
        ("square_avg", "grad_avg", "momentum_buffer"),
        lambda group: (True, bool(group["centered"]), group["momentum"] > 0),
        ("centered", "momentum"),
    ),
    Adagrad: _rule(
        "adagrad",
        ("sum",),
        first_state=lambda group: float(group["initial_accumulator_value"]),
        check_sparse=_sparse_without_decay,
    ),
    Adadelta: _rule("adadelta", ("square_avg", "acc_delta")),
    Adamax: _rule("adamax", ("exp_avg", "exp_inf")),
    RAdam: _rule("radam", ("exp_avg", "exp_avg_sq")),
    Rprop: _rule("rprop", ("prev", "step_size")),
    NAdam: _rule("nadam", ("exp_avg", "exp_avg_sq"), scalars=("mu_product",), loading_widens=True),
    # It rounds its scalars to the default dtype at every step, loaded or not.
    ASGD: _rule("asgd", ("ax",), scalars=("eta", "mu")),
}
