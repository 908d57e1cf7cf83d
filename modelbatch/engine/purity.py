"""Whether running the forward of a model once says what every later run would do.

The engine traces a forward once; the general path runs its code at every step. Both are the same
if that code computes with its argument, its submodules and plain values alone, has no effect
besides its result, and the values that it reads are watched. This is decided from the code itself,
before anything of it runs.
"""

import builtins
import dis
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..attributes import MODULE_INTERNALS
from .layers import CONCRETE, FUNCTIONS, LAYERS, METHODS
from .program import Refusal

__all__ = ["Watched", "check_code"]

Watched = list[tuple[Mapping[str, Any], str, Any]]
"""Namespaces, names and what they stood for when the forward was traced."""

_MISSING: Any = object()

# Loops, shapes and arithmetic of plain numbers.
_BUILTINS = frozenset(
    {"len", "range", "zip", "enumerate", "reversed", "tuple", "list", "abs", "min", "max", "sum"}
)
_TORCH_MODULES = (torch, nn, F)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# What may stand after a dot, besides what the modules of the model have.
_ATTRIBUTES = (
    frozenset(METHODS)
    | frozenset(CONCRETE)
    | frozenset(getattr(function, "__name__", "") for function in FUNCTIONS)
    | frozenset({"nn", "functional", "linear", "items", "keys", "values"})
)
_IMMUTABLE = (bool, int, float, str, type(None), torch.dtype)
_MODULE_METHODS = frozenset(dir(nn.Module)) - {"training"}
_REFUSED = {
    **dict.fromkeys(("STORE_ATTR", "DELETE_ATTR"), "writes an attribute"),
    **dict.fromkeys(("STORE_GLOBAL", "DELETE_GLOBAL"), "writes a global name"),
    **dict.fromkeys(("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"), "writes into a container"),
    **dict.fromkeys(("IMPORT_NAME", "IMPORT_FROM", "IMPORT_STAR"), "imports a module"),
    **dict.fromkeys(
        ("SETUP_WITH", "BEFORE_WITH", "LOAD_SPECIAL", "BEFORE_ASYNC_WITH", "SETUP_FINALLY"),
        "has a with or try statement",
    ),
    **dict.fromkeys(("YIELD_VALUE", "YIELD_FROM", "GET_AWAITABLE"), "is a generator"),
    **dict.fromkeys(("LOAD_SUPER_ATTR", "LOAD_BUILD_CLASS"), "calls super() or makes a class"),
}


def _owner(cls: type, name: str) -> Any:
    """The class that has the attribute, among a class and its bases; None if there is none."""
    return next((base for base in cls.__mro__ if name in base.__dict__), None)


_ORIGINAL: dict[type, Any] = {
    cls: _owner(cls, "forward").__dict__["forward"] for cls in (*LAYERS, nn.Sequential)
}


def check_code(modules: Sequence[nn.Module]) -> Watched:
    """Check the code of all modules of a model that would be traced.

    Args:
        modules: all modules of model 0, each once.

    Returns:
        The names that must still stand for the same.

    Raises:
        Refusal: what of the code stands against it.
    """
    return _Check(modules).run()


class _Check:
    def __init__(self, modules: Sequence[nn.Module]):
        self.modules = modules
        # of these the code is torch's, and known
        self.own = [m for m in modules if type(m) not in LAYERS and not _is_torchs(m)]
        self.watched: Watched = []
        self.seen: set[types.CodeType] = set()

    def run(self) -> Watched:
        for module in self.modules:
            cls = type(module)
            if "forward" in module.__dict__ or "__call__" in module.__dict__:
                raise Refusal(f"a {cls.__name__} has a forward of its own")
            owner = _owner(cls, "forward")
            if owner is None or _owner(cls, "__call__") is not nn.Module:
                raise Refusal(f"{cls.__name__} has a __call__ of its own")
            self._watch(owner.__dict__, "forward")
            original = _ORIGINAL.get(cls)
            if original is not None and owner.__dict__["forward"] is not original:
                raise Refusal(f"the forward of nn.{cls.__name__} was replaced")
        for module in self.own:
            if _owner(type(module), "__getattr__") is not nn.Module:
                raise Refusal(f"{type(module).__name__} has a __getattr__ of its own")
            self._function(type(module).forward, f"{type(module).__name__}.forward")
        return self.watched

    def _watch(self, space: Mapping[str, Any], name: str) -> None:
        entry = (space, name, space.get(name, _MISSING))
        if not any(s is space and n == name for s, n, _ in self.watched):
            self.watched.append(entry)

    def _function(self, function: Any, where: str) -> None:
        if not isinstance(function, types.FunctionType):
            raise Refusal(f"{where} is no plain function")
        code = function.__code__
        if code in self.seen:
            return
        self.seen.add(code)
        if code.co_freevars:
            raise Refusal(f"{where} is decorated, or reads variables of an outer function")
        if code.co_flags & (0x20 | 0x80 | 0x100 | 0x200):
            raise Refusal(f"{where} is a generator or coroutine")
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        if not all(isinstance(value, _IMMUTABLE) for value in defaults):
            raise Refusal(f"{where} has a default that may change")
        for instruction in _instructions(code):
            why = _REFUSED.get(instruction.opname)
            if why is not None:
                raise Refusal(f"{where} {why}")
            name = instruction.argval
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                self._global(function, name, where)
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                self._attribute(name, where)

    def _global(self, function: types.FunctionType, name: str, where: str) -> None:
        space = function.__globals__
        if name not in space:
            known = name in _BUILTINS and hasattr(builtins, name)
            if not known and not _is_exception(getattr(builtins, name, None)):
                raise Refusal(f"{where} calls '{name}'")
            self._watch(space, name)
            return
        value = space[name]
        self._watch(space, name)
        if any(value is module for module in _TORCH_MODULES) or isinstance(value, _IMMUTABLE):
            return
        if _is_known(value):
            return
        if isinstance(value, types.FunctionType) and not _of_torch(value):
            self._function(value, f"'{name}'")
            return
        raise Refusal(f"{where} uses '{name}', which the engine does not know")

    def _attribute(self, name: str, where: str) -> None:
        found = name in _ATTRIBUTES
        for module in self.modules:
            found |= self._attribute_of(module, name, where)
        if not found:
            raise Refusal(f"{where} uses '.{name}', which the engine does not know")

    def _attribute_of(self, module: nn.Module, name: str, where: str) -> bool:
        """Whether a module has this attribute, and may be asked for it."""
        if name in module._modules or name in module._parameters:
            return True
        if name in module._buffers:
            raise Refusal(f"{where} reads the buffer '{name}'")
        if type(module) in LAYERS or isinstance(module, _CONTAINERS):
            return False
        if name in module.__dict__:
            if name in MODULE_INTERNALS and name != "training":
                raise Refusal(f"{where} reads '{name}'")
            value = module.__dict__[name]  # kept in the snapshot of the module
            if not _is_plain(value) and not _is_known(value):
                raise Refusal(f"{where} reads '{name}', which may change")
            return True
        owner = _owner(type(module), name)
        if owner is None or (owner is nn.Module and name in _ATTRIBUTES):
            return False
        if owner is nn.Module or name in _MODULE_METHODS:
            raise Refusal(f"{where} uses nn.Module.{name}")
        value = owner.__dict__[name]
        self._watch(owner.__dict__, name)
        if isinstance(value, types.FunctionType):
            self._function(value, f"{type(module).__name__}.{name}")
        elif not _is_plain(value):
            raise Refusal(f"{where} uses '.{name}', which the engine does not know")
        return True


def _instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    yield from dis.get_instructions(code)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _instructions(constant)


def _is_torchs(module: nn.Module) -> bool:
    """Whether a module's code is torch's own."""
    return _of_torch(type(module)) and _of_torch(type(module).forward)


def _of_torch(value: Any) -> bool:
    name = getattr(value, "__module__", None) or ""
    return name == "torch" or name.startswith("torch.")


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _IMMUTABLE)


def _is_known(value: Any) -> bool:
    """Whether a value is a function of the vocabulary."""
    try:
        return value in FUNCTIONS or value is F.linear
    except TypeError:
        return False


def _is_exception(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Exception)
