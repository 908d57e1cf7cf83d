"""Plain attributes of modules in a bundle whose models change."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .attributes import PerModelFloat, compare_attributes
from .change import Change
from .errors import StructureMismatchError
from .forward import Forward

__all__ = ["attributes_changed", "per_model_numbers"]

_MISSING: Any = object()


def per_model_numbers(
    forward: Forward, change: Change, fresh: Mapping[int, list[nn.Module]], ignored: frozenset[str]
) -> dict[tuple[int, str], PerModelFloat]:
    """The numbers that differ between the models after a change, if the fresh ones fit.

    Raises:
        StructureMismatchError: naming the attribute that does not fit.
    """
    stack = forward.stack
    structure = stack.structure
    if not fresh:
        numbers = {}
        for place, number in structure.per_model.items():
            values = change.pick(number.values, lambda slot: None)
            if any(value != values[0] for value in values):
                numbers[place] = PerModelFloat(values)
        return numbers
    walks = change.pick(stack.modules, fresh.__getitem__)
    written = structure.recomputed | forward.spread
    numbers = compare_attributes(walks, structure.module_names, ignored, written)
    for index, name in sorted(forward.spread):
        path = f"{structure.module_names[index]}.{name}".lstrip(".")
        if name in ignored or path in ignored:
            continue
        for slot, modules in fresh.items():
            value = modules[index].__dict__.get(name, _MISSING)
            if not _fits(forward, (index, name), value):
                raise StructureMismatchError(
                    f"attribute '{path}' was set by the forward, and model {slot} (new) has none "
                    "like it, so the models cannot go on together; set it on the new model to "
                    "what it is to begin with, or name it in ignore_attributes= of the bundle if "
                    "no forward reads it before setting it"
                )
    return numbers


def _fits(forward: Forward, place: tuple[int, str], value: Any) -> bool:
    index, name = place
    if place not in forward.tensor_attributes:
        own = forward.stack.modules[0][index].__dict__.get(name, _MISSING)
        return value is own or (type(value) is type(own) and _equal(value, own))
    physical, has_axis = forward.tensor_attributes[place]
    like = physical[0] if has_axis else physical
    return isinstance(value, Tensor) and (value.shape, value.dtype, value.device) == (
        like.shape,
        like.dtype,
        like.device,
    )


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except Exception:  # tensors in containers have no yes-or-no comparison
        return False


@torch.no_grad()
def attributes_changed(
    forward: Forward, change: Change, left: Sequence[list[nn.Module]], ignored: frozenset[str]
) -> None:
    """Carry over what forwards have set, after the stack has changed.

    Args:
        forward: whose stack has the models after the change.
        change: what has changed.
        left: the modules of the models that left; their attributes become their own.
        ignored: attribute names that no forward reads.
    """
    for modules in left:
        for index, name in forward.spread:
            state = modules[index].__dict__
            if name in state:
                state[name] = tree_map(_own, state[name])
    modules_now = forward.stack.modules
    for (index, name), (physical, has_axis) in list(forward.tensor_attributes.items()):
        if not has_axis:
            if not change.fresh:
                continue
            physical = physical.expand(change.old_num_models, *physical.shape)
        rows = change.rows(physical)
        for slot in change.fresh:
            value = modules_now[slot][index].__dict__.get(name)
            if isinstance(value, Tensor) and value.shape == rows[slot].shape:
                rows[slot].copy_(value)
        forward.tensor_attributes[index, name] = (rows, True)
        for modules, row in zip(modules_now, rows.unbind(0)):
            modules[index].__dict__[name] = row
    forward.forget_last()


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
