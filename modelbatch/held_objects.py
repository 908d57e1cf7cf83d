"""Plain objects that modules hold, such as a configuration, and what a forward writes to them.

A batched forward runs the code of one model. What that writes to an object of model 0 with
`config.problem_type = ...` each model alone would have written to its own.
"""

import copy
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .attributes import _PLAIN, MODULE_INTERNALS

__all__ = ["HeldObjects"]

_OTHERS = (
    *(*_PLAIN, nn.Module, torch.Tensor, torch.Generator, types.ModuleType),
    *(types.FunctionType, types.MethodType, types.BuiltinFunctionType),
)
_MISSING: Any = object()


def _is_held(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, _OTHERS)


class HeldObjects:
    """The objects with attributes of their own that the modules of a model hold.

    Args:
        modules: those of one model, in the common order.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        places: dict[int, tuple[int, str]] = {}
        for index, module in enumerate(modules):
            for name, value in module.__dict__.items():
                if name not in MODULE_INTERNALS and _is_held(value):
                    places.setdefault(id(value), (index, name))
        self._places = list(places.values())

    def state(self, modules: Sequence[nn.Module]) -> list[tuple[Any, dict[str, Any]]]:
        """The objects of one model and what they have at the moment."""
        found = []
        for index, name in self._places:
            held = modules[index].__dict__.get(name)
            if _is_held(held):
                found.append((held, dict(held.__dict__)))
        return found

    @staticmethod
    def restore(state: list[tuple[Any, dict[str, Any]]]) -> None:
        """Give objects back what they had."""
        for held, before in state:
            if _differences(held, before):
                held.__dict__.clear()
                held.__dict__.update(before)

    def spread(
        self, before: list[tuple[Any, dict[str, Any]]], models: Sequence[Sequence[nn.Module]]
    ) -> None:
        """Write what has changed in the objects of model 0 to those of all other models.

        Args:
            before: the `state` of model 0 before the forward.
            models: the modules of all models.
        """
        for held, old in before:
            names = _differences(held, old)
            if not names:
                continue
            index, name = next(
                (index, name)
                for index, name in self._places
                if models[0][index].__dict__.get(name) is held
            )
            new = {key: held.__dict__.get(key, _MISSING) for key in names}
            for modules in models[1:]:
                other = modules[index].__dict__.get(name)
                if other is not held and type(other) is type(held):
                    _write(other.__dict__, new)


def _differences(held: Any, before: dict[str, Any]) -> list[str]:
    now = held.__dict__
    if len(now) == len(before) and all(before.get(k, _MISSING) is now[k] for k in now):
        return []
    names = [*now, *(name for name in before if name not in now)]
    return [name for name in names if before.get(name, _MISSING) is not now.get(name, _MISSING)]


def _write(state: dict[str, Any], new: dict[str, Any]) -> None:
    for name, value in new.items():
        if value is _MISSING:
            state.pop(name, None)
        elif isinstance(value, _PLAIN):
            state[name] = value
        elif isinstance(value, list | tuple | dict | set):
            state[name] = copy.deepcopy(value)
