"""The stacked tensors of a bundle, and the users' modules as views into them."""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .attributes import PerModelFloat, compare_attributes
from .change import Change
from .errors import ModelBatchError, StructureMismatchError
from .structure import HOOK_DICTS, Slot, Structure, has_user_hooks, tensor_at, walk


class StackNode(nn.Module):
    """One module of the user's tree, holding its tensors for all models under their own names."""

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: a part of a bundle has no forward of its own."""
        raise ModelBatchError("call the bundle, or one model: mb.models[i].<submodule>(x)")

    def _refuse_hook(self, *_: Any, **__: Any) -> NoReturn:
        raise ModelBatchError(
            "a part of a bundle is never called, so this hook would never run; register it on the "
            "submodules of mb.models (the models then run one by one) or on the bundle itself"
        )

    register_forward_hook = _refuse_hook
    register_forward_pre_hook = _refuse_hook
    register_full_backward_hook = _refuse_hook
    register_full_backward_pre_hook = _refuse_hook


class _WatchedHooks(OrderedDict[int, Any]):
    """A module's dictionary of hooks that tells the bundle when one is added or removed."""

    owner: "weakref.ref[Stack] | None" = None

    def _changed(self) -> None:
        stack = self.owner() if self.owner is not None else None
        if stack is not None:
            stack.hooks_changed = True

    def __setitem__(self, key: int, value: Any) -> None:
        super().__setitem__(key, value)
        self._changed()

    def __delitem__(self, key: int) -> None:
        super().__delitem__(key)
        self._changed()

    def __reduce__(self) -> Any:
        return OrderedDict, (list(self.items()),)


class Stack:
    """All parameters and buffers of M models, stacked along dim 0, and the views into them.

    The stacked tensors are registered on a tree of `StackNode`s (the bundle itself is the root),
    so that `named_parameters`, `state_dict` and `.to()` of `nn.Module` work by the user's names.

    Args:
        models: the users' modules; on return their parameters and buffers are views.
        structure: what `structure.analyse` found.
        root: the bundle.
        stacked: the stacked tensors if they exist already, else they are made here.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        structure: Structure,
        root: nn.Module,
        stacked: dict[str, Tensor] | None = None,
    ):
        self.models = list(models)
        self.num_models = len(self.models)
        self.structure = structure
        self.slots = structure.slots
        self.modules = [walk(model)[1] for model in self.models]
        self.nodes = self._build_tree(root)
        for slot in self.slots:
            tensor = stacked[slot.name] if stacked is not None else self._stack(slot)
            self.register(slot, tensor)
            self.repoint(slot)
        self._places: dict[int, list[tuple[dict[str, Any], str, int]]] = {}
        self.hooks_changed = True
        self._user_hooks = False
        self.watch_hooks()

    def _build_tree(self, root: nn.Module) -> list[nn.Module]:
        modules = self.modules[0]
        index_of = {id(module): i for i, module in enumerate(modules)}
        nodes: list[nn.Module] = [root, *(StackNode() for _ in modules[1:])]
        for module, node in zip(modules, nodes):
            for name, child in module._modules.items():
                node._modules[name] = None if child is None else nodes[index_of[id(child)]]
            for name in module._parameters:
                node._parameters[name] = None
            for name in module._buffers:
                node._buffers[name] = None
            node._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        return nodes

    def _stack(self, slot: Slot) -> Tensor:
        tensors = [tensor_at(modules, slot) for modules in self.modules]
        return torch.stack([t.detach() for t in tensors])

    def places(self, i: int) -> list[tuple[dict[str, Any], str, int]]:
        """Where model i's modules hold their tensors: (dictionary, name, number of the slot)."""
        found = self._places.get(i)
        if found is None:
            found = []
            for number, slot in enumerate(self.slots):
                for index, attribute in slot.places:
                    module: Any = self.modules[i][index]
                    holder = module._parameters if slot.is_parameter else module._buffers
                    found.append((holder, attribute, number))
            self._places[i] = found
        return found

    def tensor(self, slot: Slot) -> Tensor:
        """The stacked tensor `[M, ...]` of a slot."""
        return tensor_at(self.nodes, slot)

    def parameters(self) -> list[Tensor]:
        """All stacked parameters."""
        return [self.tensor(slot) for slot in self.slots if slot.is_parameter]

    def register(self, slot: Slot, tensor: Tensor) -> None:
        """Register a stacked tensor under all names of a slot."""
        value = tensor
        if slot.is_parameter and not isinstance(tensor, nn.Parameter):
            requires_grad = tensor_at(self.modules[0], slot).requires_grad
            value = nn.Parameter(tensor, requires_grad=requires_grad)
        for index, attribute in slot.places:
            node = self.nodes[index]
            if slot.is_parameter:
                assert isinstance(value, nn.Parameter)
                node._parameters[attribute] = value
            else:
                node._buffers[attribute] = value

    def repoint(self, slot: Slot) -> None:
        """Make the tensors of all models views of the stacked one; the objects stay the same."""
        for modules, view in zip(self.modules, self.tensor(slot).detach().unbind(0)):
            tensor = tensor_at(modules, slot)
            if slot.is_parameter:
                tensor.grad = None
            tensor.data = view

    def repoint_all(self) -> None:
        """Renew all views, after the stacked tensors moved or changed their dtype."""
        for slot in self.slots:
            self.repoint(slot)

    def check_views(self) -> None:
        """Notice a model whose tensors were replaced, so that it no longer belongs to the bundle.

        Raises:
            ModelBatchError: naming model and tensor.
        """
        for slot in self.slots:
            stacked = self.tensor(slot)
            size = stacked.element_size() * (stacked.stride(0) if self.num_models > 1 else 0)
            start = stacked.data_ptr()
            for i, modules in enumerate(self.modules):
                index, attribute = slot.places[0]
                kind = "_parameters" if slot.is_parameter else "_buffers"
                tensor = getattr(modules[index], kind).get(attribute)
                detached = tensor is None or tensor.dtype != stacked.dtype
                if detached or (stacked.numel() and tensor.data_ptr() != start + i * size):
                    raise ModelBatchError(
                        f"'{slot.name}' of models[{i}] no longer shares memory with the bundle "
                        "(moved, converted or replaced on its own); convert and move the bundle "
                        "as a whole, and change single models in place"
                    )

    def refresh(self, ignored: frozenset[str], written: set[tuple[int, str]]) -> None:
        """Compare the models' plain attributes again.

        Args:
            ignored: attribute names that may differ.
            written: (module index, attribute) pairs that the forward itself keeps per model.

        Raises:
            StructureMismatchError: naming what differs now.
        """
        names = self.structure.module_names
        modes = [module.training for module in self.modules[0]]
        for i, modules in enumerate(self.modules):
            for name, module, mode in zip(names, modules, modes):
                if module.training != mode:
                    raise StructureMismatchError(
                        f"module '{name}' of model {i} has training={module.training}, model 0 has "
                        f"{mode}"
                    )
        recomputed = self.structure.recomputed | written
        self.structure.per_model = compare_attributes(self.modules, names, ignored, recomputed)

    # ---- buffers that a forward gives another tensor

    def replace_buffer(self, slot: Slot, tensor: Tensor) -> None:
        """Take over a buffer that the forward assigned anew (`self.steps = self.steps + 1`)."""
        old = self.tensor(slot)
        if old.shape == tensor.shape and old.dtype == tensor.dtype:
            old.data.copy_(tensor)
            return
        self.register(slot, tensor.detach().clone(memory_format=torch.contiguous_format))
        self.repoint_buffer_objects(slot)

    def repoint_buffer_objects(self, slot: Slot) -> None:
        """Give every model a new buffer object that views the stacked tensor."""
        for modules, view in zip(self.modules, self.tensor(slot).detach().unbind(0)):
            for index, attribute in slot.places:
                modules[index]._buffers[attribute] = view

    def add_buffer(self, index: int, attribute: str, tensor: Tensor) -> Slot:
        """A buffer that was None until the forward filled it."""
        prefix = self.structure.module_names[index]
        slot = Slot(f"{prefix}.{attribute}" if prefix else attribute, False, [(index, attribute)])
        self.slots.append(slot)
        self._places.clear()
        self.register(slot, tensor.detach().clone(memory_format=torch.contiguous_format))
        self.repoint_buffer_objects(slot)
        return slot

    def drop_buffers(self, num_slots: int) -> None:
        """Undo `add_buffer` for all but the first slots: the buffers are None again."""
        for slot in self.slots[num_slots:]:
            for index, attribute in slot.places:
                for modules in (self.nodes, *self.modules):
                    modules[index]._buffers[attribute] = None
        del self.slots[num_slots:]
        self._places.clear()

    # ---- models that come and go

    @torch.no_grad()
    def models_changed(
        self,
        change: Change,
        fresh: Mapping[int, list[nn.Module]],
        per_model: dict[tuple[int, str], PerModelFloat],
    ) -> None:
        """Carry all tensors over to the models after a change.

        The stacked tensors stay the same objects, of another size. Those of models that leave
        become tensors of their own.

        Args:
            change: what has changed.
            fresh: the modules of the fresh models, by slot.
            per_model: the plain numbers that then differ between the models.
        """
        old_modules, old_models = self.modules, self.models
        for old in change.removed:
            self._let_go(old_modules[old])
        in_place = change.in_place
        for slot in self.slots:
            stacked = self.tensor(slot)
            added = {j: tensor_at(modules, slot).detach() for j, modules in fresh.items()}
            if in_place:
                rows = stacked.detach()
            else:
                rows = change.rows(stacked)
                _set_size(stacked, rows, change)
            for j, tensor in added.items():
                rows[j].copy_(tensor)
            if in_place and stacked.grad is not None and fresh:
                stacked.grad = change.rows(stacked.grad)
            torch.autograd.graph.increment_version(stacked)
        self.modules = change.pick(old_modules, fresh.__getitem__)
        self.models = change.pick(old_models, lambda slot: fresh[slot][0])
        self.num_models = len(self.models)
        self._places.clear()
        self.structure.per_model = per_model
        for slot in self.slots:
            views = self.tensor(slot).detach().unbind(0)
            for j, (modules, view) in enumerate(zip(self.modules, views)):
                if in_place and j not in fresh:
                    continue
                tensor = tensor_at(modules, slot)
                if j in fresh and slot.is_parameter:
                    tensor.grad = None
                tensor.data = view
        self.watch_hooks()
        self.hooks_changed = True

    def _let_go(self, modules: Sequence[nn.Module]) -> None:
        """Make the tensors of one model its own."""
        for slot in self.slots:
            tensor = tensor_at(modules, slot)
            tensor.data = tensor.detach().clone()
            if tensor.grad is not None:
                tensor.grad = tensor.grad.detach().clone()
        for module in modules:
            for name in HOOK_DICTS:
                hooks = getattr(module, name)
                if isinstance(hooks, _WatchedHooks):
                    hooks.owner = None

    # ---- hooks

    def watch_hooks(self) -> None:
        """Notice from now on when hooks are added to any module, or removed."""
        reference = weakref.ref(self)
        for modules in self.modules:
            for module in modules:
                for name in HOOK_DICTS:
                    hooks = getattr(module, name)
                    if not hooks and not isinstance(hooks, _WatchedHooks):
                        hooks = _WatchedHooks()
                        module.__dict__[name] = hooks
                    if isinstance(hooks, _WatchedHooks):
                        hooks.owner = reference

    def has_user_hooks(self) -> bool:
        """Whether any module of any model carries a hook that must see that model alone."""
        if self.hooks_changed:
            self._user_hooks = any(has_user_hooks(m) for modules in self.modules for m in modules)
            self.hooks_changed = False
        return self._user_hooks


def _set_size(tensor: Tensor, rows: Tensor, change: Change) -> None:
    """Let a stacked tensor be another one, with its gradient, and be the same object."""
    grad, tensor.grad = tensor.grad, None
    # Where a graph is still held, autograd would go on to expect gradients of the old shape. It
    # forgets that with another dtype.
    other = torch.float64 if tensor.dtype == torch.float32 else torch.float32
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = rows
    if grad is not None:
        tensor.grad = change.rows(grad)


def stack_from_factory(
    build: Callable[[int], nn.Module], num_models: int
) -> tuple[list[nn.Module], dict[str, Tensor]]:
    """Build models one at a time into preallocated stacks.

    At no time does more than one model hold memory of its own.

    Raises:
        ModelBatchError: a result that is no module.
        StructureMismatchError: a model whose tensors differ from model 0's.
    """
    from .structure import analyse, find_slots

    models: list[nn.Module] = []
    stacked: dict[str, Tensor] = {}
    for i in range(num_models):
        model = build(i)
        if not isinstance(model, nn.Module):
            raise ModelBatchError(
                f"build for model {i} returned a {type(model).__name__}, expected a torch.nn.Module"
            )
        names, modules = walk(model)
        if not models:
            slots = analyse([model]).slots
            for slot in slots:
                tensor = tensor_at(modules, slot)
                stacked[slot.name] = tensor.detach().new_empty((num_models, *tensor.shape))
        own = {s.name: s for s in find_slots(names, modules)}
        if set(own) != set(stacked):
            raise StructureMismatchError(
                f"model {i} and model 0 do not have the same parameters and buffers: "
                f"{sorted(set(own) ^ set(stacked))}"
            )
        for slot in slots:
            _copy_row(i, slot, tensor_at(modules, own[slot.name]), stacked[slot.name])
        models.append(model)
    return models, stacked


def _copy_row(i: int, slot: Slot, tensor: Tensor, stacked: Tensor) -> None:
    row = stacked[i]
    for what, x, y in (
        ("shape", tuple(row.shape), tuple(tensor.shape)),
        ("dtype", row.dtype, tensor.dtype),
        ("device", row.device, tensor.device),
    ):
        if x != y:
            raise StructureMismatchError(
                f"'{slot.name}' has {what} {x} in model 0, {y} in model {i}"
            )
    row.copy_(tensor.detach())
    tensor.data = row
