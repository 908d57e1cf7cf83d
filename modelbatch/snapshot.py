"""Copies of a bundle's buffers, to undo a forward or to keep the rows of frozen models."""

from torch import Tensor

from .stack import Stack


class Snapshot:
    """Copies of buffers at one time.

    Args:
        stack: the stacked tensors.
        names: of the buffers to copy, None for all.
    """

    def __init__(self, stack: Stack, names: set[str] | None):
        self.stack = stack
        self.num_slots = len(stack.slots)
        self.copies = [
            (slot, tensor, tensor._version, tensor.detach().clone())
            for slot in stack.slots
            if not slot.is_parameter and (names is None or slot.name in names)
            for tensor in (stack.tensor(slot),)
        ]

    def written(self) -> set[str]:
        """Names of the copied buffers that have changed since."""
        return {
            slot.name
            for slot, tensor, version, copy in self.copies
            if self.stack.tensor(slot) is not tensor
            or tensor._version != version
            or not _same_bits(tensor, copy)
        }

    def restore_all(self) -> None:
        """Put everything back; buffers that were None become that again."""
        self.stack.drop_buffers(self.num_slots)
        for slot, tensor, version, copy in self.copies:
            if self.stack.tensor(slot) is not tensor:
                self.stack.register(slot, tensor)
                self.stack.repoint_buffer_objects(slot)
            if tensor._version != version or not _same_bits(tensor, copy):
                tensor.data.copy_(copy)

    def restore_rows(self, rows: Tensor) -> None:
        """Put the rows of some models back; `rows` is bool `[M]`."""
        for slot, _, _, copy in self.copies:
            now = self.stack.tensor(slot)
            if now.shape == copy.shape and now.dtype == copy.dtype:
                now.data[rows] = copy[rows]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.is_meta or not a.numel():
        return True
    return bool(((a == b) | ((a != a) & (b != b))).all())
