"""Plain attributes of the models: equal, different but understood, or refused.

Stacking covers parameters and buffers only. Everything else that a forward may read lives in the
modules' `__dict__`, and one bundle runs the code of one model, so an attribute that differs between
models must either reach the operation as one value per model or be refused by name.
"""

import enum
import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.loss import _Loss

from .errors import BatchingError, StructureMismatchError

# Numbers that these modules hand unchanged to one torch function: a value per model is possible.
_PER_MODEL: list[tuple[type[nn.Module], frozenset[str]]] = [
    (_DropoutNd, frozenset({"p"})),
    (_NormBase, frozenset({"momentum", "eps"})),
    (nn.LayerNorm, frozenset({"eps"})),
    (nn.GroupNorm, frozenset({"eps"})),
    (nn.RMSNorm, frozenset({"eps"})),
    (nn.LocalResponseNorm, frozenset({"alpha", "beta", "k"})),
    (nn.LeakyReLU, frozenset({"negative_slope"})),
    (nn.ELU, frozenset({"alpha"})),
    (nn.CELU, frozenset({"alpha"})),
    (nn.Hardtanh, frozenset({"min_val", "max_val"})),
    (nn.Threshold, frozenset({"threshold", "value"})),
    (nn.Softplus, frozenset({"beta", "threshold"})),
    (nn.Softshrink, frozenset({"lambd"})),
    (nn.Hardshrink, frozenset({"lambd"})),
    (nn.RReLU, frozenset({"lower", "upper"})),
    (nn.MultiheadAttention, frozenset({"dropout"})),
    (nn.RNNBase, frozenset({"dropout"})),
    (nn.CosineSimilarity, frozenset({"eps"})),
    (_Loss, frozenset({"label_smoothing", "delta", "beta", "margin", "eps"})),
]

# What nn.Module itself keeps in `__dict__`.
MODULE_INTERNALS = frozenset(nn.Module().__dict__)

_LENT = frozenset({"_flat_weights", "_flat_weight_refs", "forward"})
_MISSING: Any = object()

_PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, type, slice, range)


class PerModelFloat(float):
    """A number with one value per model, as it stands on a module while the bundle runs.

    To torch it is a float, so it passes argument checks; ModelBatch's rules read `values`.
    Arithmetic would silently use the first model's number, so it raises; a comparison answers
    only if all models agree.
    """

    values: tuple[float | None, ...]

    def __new__(cls, values: Sequence[float | None]) -> "PerModelFloat":
        """A float that carries one value per model; None where a model has none."""
        first = next((v for v in values if v is not None), 0.0)
        self = super().__new__(cls, first)
        self.values = tuple(values)
        return self

    def __repr__(self) -> str:
        return f"PerModelFloat({list(self.values)})"

    def __reduce__(self) -> Any:
        return PerModelFloat, (self.values,)

    def _refuse(self, *_: Any) -> NoReturn:
        raise BatchingError(
            "a number that differs between the models is used in plain Python arithmetic: "
            f"values {list(self.values)}"
        )

    def _compare(self, name: str, other: Any) -> bool:
        answers = {getattr(float, name)(float(v), other) for v in self.values if v is not None}
        if len(answers) != 1 or None in self.values or NotImplemented in answers:
            self._refuse()
        return bool(answers.pop())

    def __bool__(self) -> bool:
        return self._compare("__ne__", 0.0)

    def __hash__(self) -> int:
        return hash(self.values)


def _install_operators() -> None:
    arithmetic = "add sub mul truediv floordiv mod divmod pow"
    for name in arithmetic.split():
        for prefix in ("", "r"):
            setattr(PerModelFloat, f"__{prefix}{name}__", PerModelFloat._refuse)
    for name in ["neg", "pos", "abs", "int", "round", "trunc", "floor", "ceil"]:
        setattr(PerModelFloat, f"__{name}__", PerModelFloat._refuse)
    for name in ["lt", "le", "gt", "ge", "eq", "ne"]:
        dunder = f"__{name}__"
        setattr(
            PerModelFloat, dunder, lambda self, other, _name=dunder: self._compare(_name, other)
        )


_install_operators()


class _Comparison:
    """Compares attribute values of two models, following references into the module trees."""

    def __init__(self, place_a: dict[int, Any], place_b: dict[int, Any]):
        self.place_a, self.place_b = place_a, place_b
        self.seen: set[tuple[int, int]] = set()

    def difference(self, a: Any, b: Any, path: str) -> str | None:
        """The path at which both values differ, or None."""
        if a is b:
            return None
        if id(a) in self.place_a or id(b) in self.place_b:
            same_place = self.place_a.get(id(a)) == self.place_b.get(id(b))
            return None if same_place else path
        if (id(a), id(b)) in self.seen:
            return None
        self.seen.add((id(a), id(b)))
        if isinstance(a, _PLAIN) or isinstance(b, _PLAIN):
            same = a == b or (a != a and b != b)
            return None if same else path
        if type(a) is not type(b):
            return path
        return self._structured(a, b, path)

    def _structured(self, a: Any, b: Any, path: str) -> str | None:
        if isinstance(a, torch.Tensor):
            same = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
            same = same and (a.is_meta or bool(((a == b) | ((a != a) & (b != b))).all()))
            return None if same else path
        if isinstance(a, np.ndarray):
            same = a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind in "fc")
            return None if same else path
        if isinstance(a, list | tuple):
            if len(a) != len(b):
                return path
            return self._first((x, y, f"{path}[{i}]") for i, (x, y) in enumerate(zip(a, b)))
        if isinstance(a, dict):
            if list(a) != list(b):
                return path
            return self._first((a[k], b[k], f"{path}[{k!r}]") for k in a)
        if isinstance(a, types.FunctionType):
            return self._function(a, b, path)
        if isinstance(a, types.MethodType):
            if a.__func__ is not b.__func__:
                return path
            return self.difference(a.__self__, b.__self__, f"{path}.__self__")
        if isinstance(a, functools.partial):
            pairs = ((a.func, b.func), (a.args, b.args), (a.keywords, b.keywords))
            return self._first((x, y, path) for x, y in pairs)
        return self._object(a, b, path)

    def _object(self, a: Any, b: Any, path: str) -> str | None:
        if any("__eq__" in c.__dict__ for c in type(a).__mro__[:-1]):
            try:
                equal = a == b
                if isinstance(equal, bool):
                    return None if equal else path
            except Exception:  # an __eq__ that cannot judge is no judgement
                pass
        state_a, state_b = getattr(a, "__dict__", None), getattr(b, "__dict__", None)
        if state_a is None or state_b is None:
            return None
        if set(state_a) != set(state_b):
            return path
        return self._first((state_a[k], state_b[k], f"{path}.{k}") for k in state_a)

    def _function(self, a: Any, b: Any, path: str) -> str | None:
        if a.__code__ is not b.__code__ or a.__defaults__ != b.__defaults__:
            return path
        cells_a, cells_b = a.__closure__ or (), b.__closure__ or ()
        return self._first(
            (x.cell_contents, y.cell_contents, f"{path} (closure)")
            for x, y in zip(cells_a, cells_b)
        )

    def _first(self, triples: Any) -> str | None:
        return next((d for t in triples if (d := self.difference(*t)) is not None), None)


def _supported_per_model(module: nn.Module, name: str) -> bool:
    return any(isinstance(module, cls) and name in names for cls, names in _PER_MODEL)


def places(walk: Sequence[nn.Module]) -> dict[int, Any]:
    """Where each module, parameter and buffer of one model stands, by object identity."""
    found: dict[int, Any] = {}
    for index, module in enumerate(walk):
        found[id(module)] = index
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None:
                    found.setdefault(id(tensor), (index, name))
    return found


def _describe(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def compare_attributes(
    walks: Sequence[Sequence[nn.Module]],
    names: Sequence[str],
    ignored: frozenset[str],
    recomputed: set[tuple[int, str]],
) -> dict[tuple[int, str], PerModelFloat]:
    """Check every plain attribute of every model against model 0.

    Args:
        walks: for each model its modules in one common order.
        names: the modules' qualified names in that order.
        ignored: attribute names (or qualified names) the caller vouches for.
        recomputed: (module index, attribute) pairs that a hook writes before each use.

    Returns:
        For every attribute that differs and can be honoured, (module index, attribute name) and
        its values.

    Raises:
        StructureMismatchError: naming the attribute, the models and both values.
    """
    all_places = [places(walk) for walk in walks]
    per_model: dict[tuple[int, str], PerModelFloat] = {}
    for index, name in enumerate(names):
        first = walks[0][index].__dict__
        for attribute in first:
            qualified = f"{name}.{attribute}" if name else attribute
            if attribute in MODULE_INTERNALS or attribute in ignored or qualified in ignored:
                continue
            if (index, attribute) in recomputed:
                continue
            differing = _first_difference(walks, all_places, index, attribute, qualified)
            if differing is None:
                continue
            model, path = differing
            module, values = walks[0][index], [w[index].__dict__.get(attribute) for w in walks]
            numbers = all(v is None or isinstance(v, int | float) for v in values)
            if numbers and _supported_per_model(module, attribute):
                per_model[index, attribute] = PerModelFloat(
                    [None if v is None else float(v) for v in values]
                )
                continue
            raise StructureMismatchError(
                f"attribute '{path}' differs between models: {_describe(values[0])} in model 0, "
                f"{_describe(values[model])} in model {model}. A bundle cannot give each model its "
                "own value here; make it a buffer or parameter, put the models in separate "
                "bundles, or name it in ignore_attributes= if the forward never reads it"
            )
    return per_model


def _first_difference(
    walks: Sequence[Sequence[nn.Module]],
    all_places: Sequence[dict[int, Any]],
    index: int,
    attribute: str,
    qualified: str,
) -> tuple[int, str] | None:
    first = walks[0][index].__dict__[attribute]
    simple = isinstance(first, bool | int | float | str)
    for model in range(1, len(walks)):
        state = walks[model][index].__dict__
        if attribute not in state:
            return model, qualified
        value = state[attribute]
        if simple and type(value) is type(first) and value == first:
            continue
        comparison = _Comparison(all_places[0], all_places[model])
        path = comparison.difference(first, value, qualified)
        if path is not None:
            return model, path
    return None


def changed_attributes(
    before: Sequence[Mapping[str, Any]], modules: Sequence[nn.Module]
) -> Iterator[tuple[int, str]]:
    """Where a forward has set plain attributes, as (module index, name).

    Args:
        before: each module's `__dict__` as it was.
        modules: of one model.
    """
    for index, module in enumerate(modules):
        now = module.__dict__
        if _same_entries(before[index], now):
            continue
        for name, value in list(now.items()):
            kept = name in _LENT or name in MODULE_INTERNALS
            if before[index].get(name, _MISSING) is not value and not kept:
                yield index, name


def restore_attributes(before: Sequence[Mapping[str, Any]], modules: Sequence[nn.Module]) -> None:
    """Undo what `changed_attributes` finds."""
    for index, name in list(changed_attributes(before, modules)):
        state = modules[index].__dict__
        if name in before[index]:
            state[name] = before[index][name]
        else:
            del state[name]


def _same_entries(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two namespaces are surely equal; identical values are not looked into."""
    try:
        return a == b
    except Exception:  # values that have no yes-or-no comparison, such as tensors
        return False
