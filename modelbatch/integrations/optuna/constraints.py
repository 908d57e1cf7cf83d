"""Which trials of a `ModelBatchStudy` may share a bundle, by their parameters."""

import hashlib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import torch
from torch import nn

from ...errors import ModelBatchError

__all__ = ["ConstraintSpec"]

_PREFIX = "optimizer."


class ConstraintSpec:
    """Parameters that the trials of a bundle must have in common.

    Models of different structure never share a bundle, whatever is said here.

    Args:
        fixed_params: must be equal.
        variable_params: may differ; those that are options of an optimizer are what an objective
            gets, see `ModelBatchStudy.optimize`.
        batch_aware_params: must be equal, too.
        use_auto_compatibility: look at the structure of the models alone.

    Raises:
        ModelBatchError: a parameter is both fixed and variable.
    """

    def __init__(
        self,
        fixed_params: Sequence[str] | None = None,
        variable_params: Sequence[str] | None = None,
        batch_aware_params: Sequence[str] | None = None,
        *,
        use_auto_compatibility: bool = False,
    ) -> None:
        self.fixed_params = list(fixed_params or ())
        self.variable_params = list(variable_params or ())
        self.batch_aware_params = list(batch_aware_params or ())
        self.use_auto_compatibility = use_auto_compatibility
        if not use_auto_compatibility:
            self._check()
        elif self.fixed_params or self.variable_params or self.batch_aware_params:
            warnings.warn(
                "use_auto_compatibility=True: the lists of parameters are not looked at",
                stacklevel=2,
            )

    def _check(self) -> None:
        both = sorted(set(self.fixed_params) & set(self.variable_params))
        if both:
            raise ModelBatchError(f"parameters cannot be both fixed and variable: {both}")

    def get_constraint_key(
        self, trial_params: Mapping[str, Any], model: nn.Module | None = None
    ) -> str:
        """A digest that trials of one bundle have in common.

        Args:
            trial_params: of a trial.
            model: its model; used with `use_auto_compatibility`.
        """
        if self.use_auto_compatibility and model is not None:
            tensors = model.state_dict(keep_vars=True).items()
            return _digest(sorted((name, str(tuple(value.shape))) for name, value in tensors))
        names = sorted({*self.fixed_params, *self.batch_aware_params} & set(trial_params))
        return _digest([(name, repr(trial_params[name])) for name in names])

    def validate_trial(self, trial: optuna.Trial) -> bool:
        """True.

        Raises:
            ModelBatchError: the lists were changed, and a parameter is both fixed and variable now.
        """
        if not self.use_auto_compatibility:
            self._check()
        return True

    def optimizer_options(self, trial_params: Mapping[str, Any]) -> dict[str, Any]:
        """The options of an optimizer among the parameters of a trial, by their own names.

        Args:
            trial_params: `optimizer.lr` is taken as `lr`; other names only if an optimizer of torch
                has such an option. If there are `variable_params`, no others are taken.
        """
        only = None if self.use_auto_compatibility else self.variable_params or None
        return {
            name.removeprefix(_PREFIX): value
            for name, value in trial_params.items()
            if (only is None or name in only) and (name.startswith(_PREFIX) or name in _OPTIONS)
        }


def _digest(pairs: list[tuple[str, str]]) -> str:
    return hashlib.sha256(repr(pairs).encode()).hexdigest()[:32]


def _option_names() -> frozenset[str]:
    """The names of options of torch's optimizers."""
    names: set[str] = set()
    for value in vars(torch.optim).values():
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer):
            names.update(inspect.signature(value).parameters)
    return frozenset(names - {"params", "args", "kwargs", "defaults"})


_OPTIONS = _option_names()
