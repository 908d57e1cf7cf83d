"""What M models must have in common to share one bundle, checked before anything changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .attributes import PerModelFloat, compare_attributes
from .errors import ModelBatchError, StructureMismatchError

HOOK_DICTS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass
class Slot:
    """One tensor that every model has: a parameter or a buffer."""

    name: str
    """Qualified name in the user's model (of the first place, if tied)."""
    is_parameter: bool
    places: list[tuple[int, str]] = field(default_factory=list)
    """(module index, attribute) pairs; more than one when the tensor is tied."""


@dataclass
class Structure:
    """The common structure of all models of a bundle."""

    module_names: list[str]
    slots: list[Slot]
    per_model: dict[tuple[int, str], PerModelFloat]
    """Plain numbers that differ between models and are honoured, by (module index, attribute)."""
    recomputed: set[tuple[int, str]]
    """Plain attributes that a hook of torch's own writes before each use."""


def walk(model: nn.Module) -> tuple[list[str], list[nn.Module]]:
    """Names and modules of one model, each module once, in registration order."""
    pairs = list(model.named_modules())
    return [name for name, _ in pairs], [module for _, module in pairs]


def find_slots(names: Sequence[str], modules: Sequence[nn.Module]) -> list[Slot]:
    """Every distinct parameter and buffer with all places where it is registered."""
    slots: list[Slot] = []
    by_identity: dict[int, Slot] = {}
    for index, (prefix, module) in enumerate(zip(names, modules)):
        for is_parameter, tensors in ((True, module._parameters), (False, module._buffers)):
            for attribute, tensor in tensors.items():
                if tensor is None:
                    continue
                slot = by_identity.get(id(tensor))
                if slot is None:
                    name = f"{prefix}.{attribute}" if prefix else attribute
                    slot = Slot(name, is_parameter)
                    by_identity[id(tensor)] = slot
                    slots.append(slot)
                slot.places.append((index, attribute))
    return slots


def tensor_at(modules: Sequence[nn.Module], slot: Slot) -> torch.Tensor:
    """The tensor that fills `slot` in one model."""
    index, attribute = slot.places[0]
    module = modules[index]
    tensor = (module._parameters if slot.is_parameter else module._buffers)[attribute]
    assert tensor is not None
    return tensor


def check_models(models: Sequence[Any]) -> None:
    """Refuse what is not a list of separate modules.

    Raises:
        ModelBatchError: empty list, items that are no modules, a module or parameter in two models.
    """
    if not models:
        raise ModelBatchError("a bundle needs at least one model, got an empty list")
    owner: dict[int, tuple[int, str]] = {}
    for i, model in enumerate(models):
        if not isinstance(model, nn.Module):
            raise ModelBatchError(
                f"models[{i}] is a {type(model).__name__}, expected a torch.nn.Module"
            )
        for kind, items in (
            ("module", model.named_modules()),
            ("parameter", model.named_parameters()),
        ):
            for name, item in items:
                other = owner.setdefault(id(item), (i, name))
                if other[0] != i:
                    raise ModelBatchError(
                        f"{kind} '{name}' of models[{i}] is also '{other[1]}' of models"
                        f"[{other[0]}]; the models of a bundle must not share modules or parameters"
                    )


def _same_class(a: nn.Module, b: nn.Module) -> bool:
    if type(a) is type(b):
        return True
    if parametrize.is_parametrized(a) and parametrize.is_parametrized(b):
        return type(a).__bases__ == type(b).__bases__
    if isinstance(a, torch.fx.GraphModule) and isinstance(b, torch.fx.GraphModule):
        return a.code == b.code  # every GraphModule has a class of its own
    return False


def is_library_hook(hook: Any) -> bool:
    """Whether a forward hook is torch's own weight or spectral norm, which can be batched."""
    return isinstance(hook, WeightNorm | SpectralNorm)


def has_user_hooks(module: nn.Module) -> bool:
    """Whether a module carries hooks that must see one model at a time."""
    return any(
        not is_library_hook(hook) for name in HOOK_DICTS for hook in getattr(module, name).values()
    )


def _compare_tree(
    i: int | str,
    reference: tuple[list[str], list[nn.Module]],
    other: tuple[list[str], list[nn.Module]],
) -> None:
    for (name_a, a), (name_b, b) in zip(zip(*reference), zip(*other)):
        where = f"module '{name_a}'" if name_a else "the model"
        if name_a != name_b:
            raise StructureMismatchError(
                f"model {i} has a module '{name_b}' where model 0 has '{name_a}'"
            )
        if not _same_class(a, b):
            raise StructureMismatchError(
                f"{where} is a {type(a).__name__} in model 0 and a {type(b).__name__} in model {i}"
            )
        if a.training != b.training:
            mode = {True: "train", False: "eval"}
            raise StructureMismatchError(
                f"{where} is in {mode[a.training]} mode in model 0 and in {mode[b.training]} mode "
                f"in model {i}"
            )
    if len(reference[0]) != len(other[0]):
        extra = set(reference[0]) ^ set(other[0])
        raise StructureMismatchError(
            f"model {i} has {len(other[0])} modules, model 0 has {len(reference[0])}; "
            f"only one of them has {sorted(extra)}"
        )


def _compare_tensors(i: int | str, slot: Slot, a: torch.Tensor, b: torch.Tensor) -> None:
    kind = "parameter" if slot.is_parameter else "buffer"
    for what, x, y in (
        ("shape", tuple(a.shape), tuple(b.shape)),
        ("dtype", a.dtype, b.dtype),
        ("device", a.device, b.device),
        ("layout", a.layout, b.layout),
        ("requires_grad", a.requires_grad, b.requires_grad),
    ):
        if x != y:
            raise StructureMismatchError(
                f"{kind} '{slot.name}' has {what} {x} in model 0 and {y} in model {i}"
            )


def _check_tensor(slot: Slot, tensor: torch.Tensor, device: torch.device) -> None:
    if is_lazy(tensor):
        raise StructureMismatchError(
            f"'{slot.name}' is not initialised yet; run each lazy model once before bundling"
        )
    if tensor.layout is not torch.strided:
        raise StructureMismatchError(f"'{slot.name}' has layout {tensor.layout}, expected strided")
    if tensor.device != device:
        raise StructureMismatchError(
            f"'{slot.name}' is on {tensor.device}, the model's other tensors on {device}; "
            "a bundle lives on one device"
        )
    if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        raise StructureMismatchError(
            f"parameter '{slot.name}' has a gradient hook of its own, which would never run: "
            "gradients of a bundle belong to the stacked parameter; register the hook there"
        )


def analyse(models: Sequence[nn.Module], ignore: frozenset[str] = frozenset()) -> Structure:
    """The structure that all models share.

    Raises:
        ModelBatchError: see `check_models`.
        StructureMismatchError: naming the module, tensor or attribute, the model and both values.
    """
    check_models(models)
    reference = walk(models[0])
    slots = find_slots(*reference)
    walks = [reference[1]]
    for i, model in enumerate(models):
        trees = walk(model) if i else reference
        _compare_tree(i, reference, trees)
        if i:
            walks.append(trees[1])
        own = find_slots(*trees)
        _compare_slots(i, slots, own, reference[1], trees[1])
    recomputed = {
        (index, getattr(hook, "name"))  # noqa: B009 a hook of torch's has one
        for index, module in enumerate(reference[1])
        for hook in module._forward_pre_hooks.values()
        if is_library_hook(hook)
    }
    per_model = compare_attributes(walks, reference[0], ignore, recomputed)
    return Structure(reference[0], slots, per_model, recomputed)


def _compare_slots(
    i: int | str,
    slots: list[Slot],
    own: list[Slot],
    first: Sequence[nn.Module],
    modules: Sequence[nn.Module],
) -> None:
    ours = {(s.is_parameter, s.name): s.places for s in slots}
    theirs = {(s.is_parameter, s.name): s.places for s in own}
    if ours != theirs:
        different = sorted({n for _, n in ours.keys() ^ theirs.keys()}) or [
            name for key, name in ((k, k[1]) for k in ours) if ours[key] != theirs[key]
        ]
        raise StructureMismatchError(
            f"model {i} and model 0 do not have the same parameters and buffers, or tie them "
            f"differently: {different}"
        )
    device = tensor_at(modules, own[0]).device if own else torch.device("cpu")
    for slot in slots:
        tensor = tensor_at(modules, slot)
        _check_tensor(slot, tensor, device)
        if i:
            _compare_tensors(i, slot, tensor_at(first, slot), tensor)


def check_joining(
    structure: Structure, walks: Sequence[Sequence[nn.Module]], fresh: Mapping[int, Any]
) -> dict[int, list[nn.Module]]:
    """Refuse models that cannot join others.

    Args:
        structure: that of the others.
        walks: for each of the others its modules.
        fresh: the models that are to join, by the slots that they are to get.

    Returns:
        The modules of each of them.

    Raises:
        ModelBatchError: something that is no module, or one that another model has already.
        StructureMismatchError: naming the module or tensor, the model and both values.
    """
    for slot, model in fresh.items():
        if not isinstance(model, nn.Module):
            raise ModelBatchError(
                f"model {slot} (new) is a {type(model).__name__}, expected a torch.nn.Module"
            )
    owner: dict[int, int | str] = {}
    for i, modules in enumerate(walks):
        for module in modules:
            owner[id(module)] = i
            owner.update((id(p), i) for p in module._parameters.values() if p is not None)
    reference = (structure.module_names, list(walks[0]))
    found = {}
    for slot, model in fresh.items():
        label = f"{slot} (new)"
        for kind, items in (
            ("module", model.named_modules()),
            ("parameter", model.named_parameters()),
        ):
            for name, item in items:
                other = owner.setdefault(id(item), label)
                if other != label:
                    raise ModelBatchError(
                        f"{kind} '{name}' of model {label} is also one of model {other}; the "
                        "models of a bundle must not share modules or parameters"
                    )
        trees = walk(model)
        _compare_tree(label, reference, trees)
        _compare_slots(label, structure.slots, find_slots(*trees), reference[1], trees[1])
        found[slot] = trees[1]
    return found


def same_structure(reference: nn.Module, model: nn.Module) -> bool:
    """Whether two models can share a bundle."""
    try:
        analyse([reference, model])
    except StructureMismatchError:
        return False
    return True
