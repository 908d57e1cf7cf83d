"""Flatten and rebuild any structure a model may take or return.

torch's own pytree covers tuples, lists, dicts, named tuples and every class that its owner has
registered (Hugging Face registers its `ModelOutput` classes). Plain dataclasses are opened here.
"""

import copy
import dataclasses
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


class _Dataclass:
    """The place of an unregistered dataclass in a flattened structure."""

    def __init__(self, template: Any, spec: Any, count: int):
        self.template, self.spec, self.count = template, spec, count

    def rebuild(self, leaves: list[Any]) -> Any:
        values = unflatten(leaves, self.spec)
        new = copy.copy(self.template)
        for name, value in values.items():
            object.__setattr__(new, name, value)
        return new


class Spec:
    """How to rebuild what `flatten` took apart."""

    def __init__(self, spec: Any, nested: list[tuple[int, _Dataclass]]):
        self.spec, self.nested = spec, nested


_ONE_TENSOR = Spec(pytree.tree_flatten(0)[1], [])
_CALLS: dict[int, Spec] = {}
_TUPLES: dict[int, Spec] = {}


def flatten_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Spec]:
    """`flatten((args, kwargs))`, at once where all arguments are positional tensors."""
    if kwargs or not all(isinstance(arg, Tensor) for arg in args):
        return flatten((args, kwargs))
    spec = _CALLS.get(len(args))
    if spec is None:
        spec = _CALLS[len(args)] = flatten(((0,) * len(args), {}))[1]
    return list(args), spec


def _is_dataclass_instance(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def flatten(tree: Any) -> tuple[list[Any], Spec]:
    """The leaves of `tree` in a fixed order, and what `unflatten` needs to put them back."""
    if isinstance(tree, Tensor):
        return [tree], _ONE_TENSOR
    if type(tree) is tuple and all(isinstance(leaf, Tensor) for leaf in tree):
        known = _TUPLES.get(len(tree))
        if known is None:
            known = _TUPLES[len(tree)] = Spec(pytree.tree_flatten((0,) * len(tree))[1], [])
        return list(tree), known
    outer, spec = pytree.tree_flatten(tree)
    leaves: list[Any] = []
    nested: list[tuple[int, _Dataclass]] = []
    for index, leaf in enumerate(outer):
        if _is_dataclass_instance(leaf):
            fields = {f.name: getattr(leaf, f.name) for f in dataclasses.fields(leaf)}
            inner, inner_spec = flatten(fields)
            nested.append((index, _Dataclass(leaf, inner_spec, len(inner))))
            leaves.extend(inner)
        else:
            leaves.append(leaf)
    return leaves, Spec(spec, nested)


def unflatten(leaves: list[Any], spec: Spec) -> Any:
    """The structure that `flatten` described, around other leaves."""
    if spec is _ONE_TENSOR:
        return leaves[0]
    if spec is _CALLS.get(len(leaves)):
        return tuple(leaves), {}
    if spec is _TUPLES.get(len(leaves)):
        return tuple(leaves)
    if not spec.nested:
        return pytree.tree_unflatten(leaves, spec.spec)
    outer: list[Any] = []
    position, slots = 0, dict(spec.nested)
    while position < len(leaves) or len(outer) in slots:
        node = slots.get(len(outer))
        if node is None:
            outer.append(leaves[position])
            position += 1
        else:
            outer.append(node.rebuild(leaves[position : position + node.count]))
            position += node.count
    return pytree.tree_unflatten(outer, spec.spec)
