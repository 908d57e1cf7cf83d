"""What happens to a bundle whose models change, and who must be told of it."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Change", "Followers"]

_T = TypeVar("_T")


@dataclass(eq=False)
class Change:
    """For every slot of the bundle after the change, where its model comes from.

    Attributes:
        source: for each new slot the slot that its model had before, None for a fresh model.
        old_ids: the ids of the models before.
        ids: the ids of the models after.
        models: the fresh models, by slot.
        hyper: what the user said of each fresh model's optimizer options, by slot.
        optimizer: the bundle's optimizer, which `hyper` is about.
        template: the optimizer options of fresh models are those of the first model, not defaults:
            they are about to be loaded.
        notes: what those who check a change note for themselves until it happens, by `id` of the
            owner.
    """

    source: tuple[int | None, ...]
    old_ids: tuple[int, ...]
    ids: tuple[int, ...]
    models: Mapping[int, nn.Module] = field(default_factory=dict)
    hyper: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    optimizer: Any = None
    template: bool = False
    notes: dict[int, Any] = field(default_factory=dict)
    _told: list[Any] = field(default_factory=list)

    @property
    def old_num_models(self) -> int:
        """M before the change."""
        return len(self.old_ids)

    @property
    def num_models(self) -> int:
        """M after the change."""
        return len(self.source)

    @property
    def fresh(self) -> list[int]:
        """The slots with a fresh model."""
        return [slot for slot, old in enumerate(self.source) if old is None]

    @property
    def removed(self) -> list[int]:
        """The old slots whose models leave."""
        kept = set(self.source)
        return [old for old in range(self.old_num_models) if old not in kept]

    @property
    def in_place(self) -> bool:
        """Whether every model that stays keeps its slot, and none is without a successor."""
        if self.num_models != self.old_num_models:
            return False
        return all(old is None or old == slot for slot, old in enumerate(self.source))

    def replaced(self, slot: int) -> int | None:
        """The old slot whose model a fresh one takes the place of; None for an added one."""
        return slot if self.in_place else None

    # ---- carrying over

    def pick(self, values: Sequence[_T], fresh: Callable[[int], _T] | Sequence[_T]) -> list[_T]:
        """One value per model, those of fresh models being `fresh(slot)` or `fresh[slot]`."""
        value = fresh if callable(fresh) else fresh.__getitem__
        return [value(slot) if old is None else values[old] for slot, old in enumerate(self.source)]

    def renumber(self, slots: Iterable[int]) -> list[int]:
        """Where these old slots' models are now; those that left are left out."""
        now = {old: slot for slot, old in enumerate(self.source) if old is not None}
        return [now[old] for old in slots if old in now]

    @torch.no_grad()
    def rows(self, tensor: Tensor, fill: float | bool | Sequence[float] = 0) -> Tensor:
        """A tensor `[M, ...]` for the models after the change.

        Args:
            tensor: `[M, ...]` before it; is left as it is.
            fill: for the rows of fresh models, one number or one for each slot.
        """
        if tensor.is_sparse:
            return self._sparse_rows(tensor)
        new = tensor.detach().new_empty((self.num_models, *tensor.shape[1:]))
        kept = [(slot, old) for slot, old in enumerate(self.source) if old is not None]
        if kept:
            slots, olds = zip(*kept)
            device = tensor.device
            picked = tensor.detach().index_select(0, torch.tensor(olds, device=device))
            if len(kept) == self.num_models:
                return picked
            new.index_copy_(0, torch.tensor(slots, device=device), picked)
        for slot in self.fresh:
            new[slot] = fill[slot] if isinstance(fill, Sequence) else fill
        return new

    def _sparse_rows(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().coalesce()
        now = torch.full((self.old_num_models,), -1, device=tensor.device)
        for slot, old in enumerate(self.source):
            if old is not None:
                now[old] = slot
        indices = tensor.indices().clone()
        indices[0] = now[indices[0]]
        stays = indices[0] >= 0
        size = (self.num_models, *tensor.shape[1:])
        values = tensor.values()[stays]
        new = torch.sparse_coo_tensor(indices[:, stays], values, size, check_invariants=False)
        return new.coalesce()

    # ---- telling

    def check(self, follower: Any) -> None:
        """Ask an object whether it can follow, before anything changes."""
        check = getattr(follower, "check_models_change", None)
        if check is not None:
            check(self)

    def tell(self, follower: Any) -> None:
        """Tell an object what has changed; once, however often this is called for it."""
        if any(other is follower for other in self._told):
            return
        self._told.append(follower)
        changed = getattr(follower, "models_changed", None)
        if changed is not None:
            changed(self)


class Followers:
    """The objects beside a bundle that have something for each of its models.

    They are not kept alive. A copy of the bundle has none.
    """

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[Any]] = {}

    def add(self, follower: Any) -> None:
        """Tell this object of every change from now on."""
        known = self._references.get(id(follower))
        if known is None or known() is not follower:
            self._references[id(follower)] = weakref.ref(follower)

    def remove(self, follower: Any) -> None:
        """Tell this object no longer."""
        self._references.pop(id(follower), None)

    def __iter__(self) -> Any:
        alive = [(key, reference()) for key, reference in self._references.items()]
        for key, follower in alive:
            if follower is None:
                del self._references[key]
        return iter([follower for _, follower in alive if follower is not None])

    def __reduce__(self) -> Any:
        return Followers, ()
