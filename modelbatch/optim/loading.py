"""Loading of state dicts into a fused optimizer."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelBatchError
from .base import PerModelOptimizer
from .configs import stock_optimizer
from .rules import Rule
from .states import StateViews

__all__ = ["LoadingOptimizer"]


class LoadingOptimizer(PerModelOptimizer):
    """The part of `FusedOptimizer` that takes state dicts in torch's form.

    Everything is checked before anything is changed.
    """

    _rule: Rule
    _state: StateViews

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` of a bundle of as many models gave.

        Args:
            state_dict: its groups are the models, in order.

        Raises:
            ModelBatchError: another number of models or parameters, or options or shapes that do
                not fit; nothing has been changed then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        saved = state_dict["param_groups"]
        groups = self.__dict__["param_groups"]
        if len(saved) != len(groups):
            raise ModelBatchError(
                f"the state dict is of {len(saved)} models, the bundle has {len(groups)}"
            )
        loaded = [
            self._checked_state(i, {"state": _state_of(state_dict, group), "param_groups": [group]})
            for i, group in enumerate(saved)
        ]
        for i, (options, states) in enumerate(loaded):
            self._take(i, options, states)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def load_model_state_dict(  # noqa: D102 - inherited
        self, i: int, state_dict: Mapping[str, Any]
    ) -> None:
        i = self._model_index(i)
        self._take(i, *self._checked_state(i, state_dict))

    def _checked_state(
        self, i: int, state_dict: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[Mapping[str, Any] | None]]:
        """The options and the parameters' states of model i, once they fit it."""
        params = self._views.params[i]
        saved = self._checked_group(i, state_dict)
        indices = {key: index for index, key in enumerate(saved["params"])}
        states: list[Mapping[str, Any] | None] = [None] * len(params)
        for key, values in state_dict["state"].items():
            if key not in indices:
                raise ModelBatchError(
                    f"model {i}: the state dict has state of a parameter {key!r} that is in none "
                    f"of its groups"
                )
            self._check_state(i, indices[key], params[indices[key]], values)
            states[indices[key]] = values
        stock = stock_optimizer(self._optimizer_cls, params, self._configs[i], i)
        needed = stock.param_groups[0].keys()
        try:
            stock.load_state_dict({"state": {}, "param_groups": [copy.deepcopy(saved)]})
        except Exception as error:
            raise ModelBatchError(f"model {i}: the state dict cannot be loaded: {error}") from error
        options = stock.param_groups[0]
        if missing := needed - options.keys():
            raise ModelBatchError(
                f"model {i}: the state dict lacks the option {', '.join(sorted(missing))} of "
                f"{self._optimizer_cls.__name__}; another class may have saved it"
            )
        for k, values in enumerate(states):
            self._check_names(i, k, options, values)
        return {name: value for name, value in options.items() if name != "params"}, states

    def _check_names(
        self, i: int, k: int, options: Mapping[str, Any], values: Mapping[str, Any] | None
    ) -> None:
        if not values:
            return
        names = zip(self._rule.states, self._rule.needed(options), strict=True)
        wanted = [*(name for name, has in names if has), *self._rule.scalars]
        missing = [name for name in wanted if values.get(name) is None]
        if self._rule.counts and "step" not in values:
            missing.append("step")
        # SGD's momentum begins with the first step in which the option is set.
        if missing and self._rule.counts:
            raise ModelBatchError(
                f"model {i}: the state of parameter {k} lacks {', '.join(missing)}; another class "
                f"than {self._optimizer_cls.__name__} may have saved it"
            )

    def _take(
        self, i: int, options: Mapping[str, Any], states: list[Mapping[str, Any] | None]
    ) -> None:
        self.__dict__["param_groups"][i].update(options)
        for param, values in zip(self._views.params[i], states, strict=True):
            self._state[param] = self._cast(param, values or {})

    def _cast(self, param: Tensor, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The state with its scalars in the dtype that torch gives them by loading."""
        if not (self._rule.loading_widens and param.dtype == torch.float64):
            return values
        names = [name for name in self._rule.scalars if name in values]
        wide = {name: torch.as_tensor(values[name], dtype=torch.float64) for name in names}
        return {**values, **wide}


def _state_of(state_dict: Mapping[str, Any], group: Mapping[str, Any]) -> dict[Any, Any]:
    own = set(group["params"])
    return {key: values for key, values in state_dict["state"].items() if key in own}
