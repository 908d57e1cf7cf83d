"""Parameters and buffers of a checkpoint, on their way into a bundle."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..bundle import Bundle
from ..errors import CheckpointError
from ..structure import Slot
from .encoding import unstored
from .format import STACKED
from .save import names_of

__all__ = ["TensorChange", "check_cast"]

_KINDS = {
    "floating-point": torch.is_floating_point,
    "complex": torch.is_complex,
    "bool": lambda tensor: tensor.dtype == torch.bool,
}


def check_cast(saved: Tensor, own: Tensor, where: str) -> None:
    """Values may change their precision by loading, but not what kind of numbers they are.

    Raises:
        CheckpointError: they would.
    """
    kinds = [
        next((kind for kind, test in _KINDS.items() if test(tensor)), "integer")
        for tensor in (saved, own)
    ]
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            f"{where} has {kinds[0]} values ({saved.dtype}) in the checkpoint, {kinds[1]} ones "
            f"({own.dtype}) in the bundle"
        )


class TensorChange:
    """Saved parameters and buffers that fit the bundle, and are to be put into it.

    Args:
        bundle: where they go.
        saved: the tensors of `stacked.safetensors`.
        manifest: the content of `bundle.json`.
        order: the saved model for each of the bundle's.
        strict: whether names must be the same.

    Attributes:
        dtypes: of the saved parameters, by the bundle's names.

    Raises:
        CheckpointError: they do not fit.
    """

    def __init__(
        self,
        bundle: Bundle,
        saved: Mapping[str, Tensor],
        manifest: Mapping[str, Any],
        order: list[int],
        strict: bool,
    ) -> None:
        self._stack = bundle._stack
        self._bundle = bundle
        self._order = order
        self._num_saved: int = manifest["num_models"]
        self.dtypes: dict[str, torch.dtype] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._replaced: list[tuple[Slot, Tensor]] = []
        self._added: list[tuple[int, str, Tensor]] = []
        records: Mapping[str, Any] = manifest["tensors"]
        tensors = {}
        for name, record in records.items():
            where = f"{STACKED}: tensor '{name}'"
            if name not in saved:
                raise CheckpointError(f"{where} is missing")
            tensors[name] = unstored(saved[name], record, where)
        aliases = {alias: name for name, record in records.items() for alias in record["names"]}
        used = set()
        for slot in self._stack.slots:
            own_names = names_of(bundle, slot)
            found = [aliases[name] for name in own_names if name in aliases]
            if found:
                used.add(found[0])
                self._take(slot, found[0], tensors[found[0]], own_names)
            elif strict and not self._is_hidden(slot):
                raise CheckpointError(
                    f"{STACKED}: tensor '{slot.name}' is missing; the checkpoint is of another "
                    "kind of model"
                )
        for name in sorted(records.keys() - used):
            self._take_unknown(name, records[name], tensors[name], strict)

    def _is_hidden(self, slot: Slot) -> bool:
        index, attribute = slot.places[0]
        return attribute in self._stack.modules[0][index]._non_persistent_buffers_set

    def _take(self, slot: Slot, name: str, tensor: Tensor, own_names: list[str]) -> None:
        own = self._stack.tensor(slot)
        where = f"{STACKED}: tensor '{name}'"
        check_cast(tensor, own, where)
        if tensor.shape[:1] != (self._num_saved,):
            raise CheckpointError(f"{where} has no axis of {self._num_saved} models")
        if tensor.shape[1:] != own.shape[1:]:
            if not self._is_hidden(slot):
                raise CheckpointError(
                    f"{where} has the shape {tuple(tensor.shape[1:])} for each model, that of the "
                    f"bundle {tuple(own.shape[1:])}"
                )
            self._replaced.append((slot, self._picked(tensor).to(own.device, own.dtype)))
            return
        if slot.is_parameter:
            self.dtypes.update(dict.fromkeys(own_names, tensor.dtype))
        self._copies.append((own, self._picked(tensor).to(own.device, own.dtype)))

    def _take_unknown(
        self, name: str, record: Mapping[str, Any], tensor: Tensor, strict: bool
    ) -> None:
        """A tensor that is none of the bundle's: maybe a buffer that is None until a forward."""
        prefix, _, attribute = name.rpartition(".")
        names = self._stack.structure.module_names
        if prefix in names and record["kind"] != "parameter":
            index = names.index(prefix)
            buffers = self._stack.modules[0][index]._buffers
            if attribute in buffers and buffers[attribute] is None:
                self._added.append((index, attribute, self._picked(tensor)))
                return
        if strict and record["kind"] != "hidden buffer":
            raise CheckpointError(
                f"{STACKED}: tensor '{name}' is none of the bundle's; the checkpoint is of another "
                "kind of model"
            )

    def _picked(self, tensor: Tensor) -> Tensor:
        if self._order == list(range(self._num_saved)):
            return tensor
        return tensor[torch.tensor(self._order)]

    @torch.no_grad()
    def apply(self) -> None:
        """Puts them in place; the models' own tensors stay views of the stacked ones."""
        for own, tensor in self._copies:
            own.copy_(tensor)
        for slot, tensor in self._replaced:
            self._stack.register(slot, tensor.clone())
            self._stack.repoint_buffer_objects(slot)
        for index, attribute, tensor in self._added:
            device = self._bundle._streams.device
            self._stack.add_buffer(index, attribute, tensor.to(device))
