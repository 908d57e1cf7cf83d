"""Which torch optimizer classes one operator computes, and how their options map to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from ..ops import optim as ops

__all__ = ["RULES", "Rule", "read_option"]


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
    """

    name: str
    operator: Callable[..., None]
    rows: tuple[str, ...]
    states: tuple[str, ...]
    needed: Callable[[Mapping[str, Any]], tuple[bool, ...]]
    deciding: frozenset[str]
    first_state: Callable[[Mapping[str, Any]], float] | None = None
    counts: bool = True


def read_option(rule: Rule, group: Mapping[str, Any], row: str) -> Any:
    """The value in a model's group that belongs into a row of the matrix."""
    if row == "beta1":
        return group["betas"][0]
    if row == "beta2":
        return group["betas"][1]
    if row == "decoupled":
        return group.get("decoupled_weight_decay", rule.name == "adamw")
    return group[row]


def as_number(value: Any) -> float:
    """A hyper-parameter as a float; a tensor must have one element."""
    if isinstance(value, Tensor) and value.is_complex():
        raise TypeError(f"a hyper-parameter must be real, got {value}")
    return float(value)


_ADAM_STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def _adam_needs(group: Mapping[str, Any]) -> tuple[bool, ...]:
    return True, True, bool(group["amsgrad"])


def _rule(
    name: str, states: tuple[str, ...], needed: Any, deciding: tuple[str, ...], **more: Any
) -> Rule:
    operator = getattr(torch.ops.modelbatch, f"{name}_step_").default
    return Rule(name, operator, ops.HYPER_ROWS[name], states, needed, frozenset(deciding), **more)


RULES: dict[type[Optimizer], Rule] = {
    SGD: _rule(
        "sgd",
        ("momentum_buffer",),
        lambda group: (group["momentum"] != 0,),
        ("momentum",),
        counts=False,
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
        lambda group: (True,),
        (),
        first_state=lambda group: float(group["initial_accumulator_value"]),
    ),
}
