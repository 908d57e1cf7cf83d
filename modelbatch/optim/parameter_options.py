"""Options that single parameters have in all models, whatever the models' groups say."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..errors import ModelBatchError
from .rules import Rule, as_number, option_of

__all__ = ["OwnNumbers", "ParameterOptions", "set_parameter_options"]

OwnNumbers = tuple[tuple[int, float], ...]
"""Rows of the matrix of hyper-parameters and what stands in them for one parameter."""

_NONE: Mapping[str, Mapping[str, float]] = MappingProxyType({})


class ParameterOptions:
    """The options of single parameters of a fused optimizer.

    They replace rows of the matrix of hyper-parameters, so that parameters with options of their
    own are updated by a call of the operator of their own.

    Args:
        by_name: options by the parameter's name in the model, checked.
    """

    def __init__(self, by_name: Mapping[str, Mapping[str, float]] = _NONE) -> None:
        self.by_name = by_name

    @classmethod
    def checked(
        cls, rule: Rule, names: Iterable[str], options: Mapping[str, Mapping[str, Any]]
    ) -> "ParameterOptions":
        """Take over options that the rule can have for a parameter.

        Raises:
            ModelBatchError: naming the parameter or the option that cannot be.
        """
        known = set(names)
        allowed = {option_of(row)[0] for row in rule.rows if option_of(row) == (row, None)}
        allowed -= {"lr", *rule.deciding}
        by_name: dict[str, Mapping[str, float]] = {}
        for name, own in options.items():
            if name not in known:
                raise ModelBatchError(f"parameter_options: the models have no parameter {name!r}")
            numbers = {}
            for option, value in own.items():
                if option not in allowed:
                    raise ModelBatchError(
                        f"parameter_options of {name!r}: {option!r} cannot differ between the "
                        f"parameters of a model; {', '.join(sorted(allowed))} can"
                    )
                try:
                    numbers[option] = as_number(value)
                except (TypeError, ValueError, RuntimeError):
                    numbers[option] = -1.0
                if not numbers[option] >= 0:
                    raise ModelBatchError(
                        f"parameter_options of {name!r}: {option!r} must be a number that is not "
                        f"negative, got {value!r}"
                    )
            if numbers:
                by_name[name] = MappingProxyType(numbers)
        return cls(MappingProxyType(by_name))

    def numbers(self, rule: Rule, name: str) -> OwnNumbers:
        """What stands in the matrix's rows for this parameter alone."""
        own = self.by_name.get(name)
        if own is None:
            return ()
        return tuple((k, own[row]) for k, row in enumerate(rule.rows) if row in own)

    def matrix(self, shared: Tensor, own: OwnNumbers) -> Tensor:
        """The hyper-parameters `[K, M]` of parameters with these numbers of their own."""
        if not own:
            return shared
        matrix = shared.clone()
        for row, value in own:
            matrix[row] = value
        return matrix


def set_parameter_options(optimizer: Optimizer, options: Mapping[str, Mapping[str, float]]) -> None:
    """Give single parameters of a bundle's optimizer options of their own.

    Raises:
        ModelBatchError: a bad option, or an optimizer that no operator computes.
    """
    from .fused import FusedOptimizer

    if not isinstance(optimizer, FusedOptimizer):
        raise ModelBatchError(
            f"{type(optimizer).__name__} steps model by model here, with one group of options for "
            "all parameters of a model, so parameter_options are not possible"
        )
    optimizer.parameter_options = options
