"""Batches for models of which each is at an epoch of its own."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate

from ..data import RoutedBatch
from ..random import derive_seed
from .assembly import seed_generators
from .data import Data, epoch_order

__all__ = ["OwnEpochs"]


class OwnEpochs:
    """A training loader in which every model goes through its own epoch.

    What a model is given in its epoch e is what `Data.training` yields in epoch e, wherever the
    others are. Models at the same epoch share their batches.

    A `Dataset` that draws random numbers, for augmentation say, does so from generators that are
    seeded for each batch by `seed=` of the sweep, the epoch and the place of the batch, so that
    these draws depend on the other models no more than the order does.

    Args:
        data: tensors or a `Dataset`.
        batch_size: B.
        epochs: gives the epoch of every model, in the order of the bundle.
    """

    reads_models = False  # so that several steps may be taken in one call

    def __init__(self, data: Data, batch_size: int, epochs: Callable[[], Sequence[int]]) -> None:
        assert data.loader is None and data.length is not None
        self.data, self.batch_size, self.epochs = data, batch_size, epochs
        self._length = data.length

    def __len__(self) -> int:
        return -(-self._length // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        epochs = list(self.epochs())
        distinct = sorted(set(epochs))
        orders = torch.stack([epoch_order(self._length, self.data.seed, own) for own in distinct])
        if len(distinct) == 1:
            for number, rows in enumerate(orders[0].split(self.batch_size)):
                yield self._batch(rows, distinct[0], number)
            return
        which = torch.tensor([distinct.index(own) for own in epochs])
        for number, rows in enumerate(orders.split(self.batch_size, dim=1)):
            yield self._own_batches(rows, distinct, which, number)

    def _batch(self, rows: Tensor, epoch: int, number: int) -> Any:
        """The samples `rows` `[B]`."""
        if self.data.tensors is not None:
            return tuple(tensor[rows.to(tensor.device)] for tensor in self.data.tensors)
        seed = derive_seed(number, derive_seed(epoch, self.data.seed))
        seed_generators(seed)
        return default_collate([self.data.dataset[row] for row in rows.tolist()])

    def _own_batches(
        self, rows: Tensor, epochs: list[int], which: Tensor, number: int
    ) -> RoutedBatch:
        """The samples `rows` `[E, B]` of E epochs; `which` `[M]` of them each model is at."""
        if self.data.tensors is not None:
            own = rows[which]  # [M, B]
            batch: Any = tuple(tensor[own.to(tensor.device)] for tensor in self.data.tensors)
        else:
            each = [self._batch(own, epoch, number) for own, epoch in zip(rows, epochs)]
            batch = tree_map(lambda *leaves: _picked(leaves, which), each[0], *each[1:])
        x, y, *weight = batch
        return RoutedBatch(x, y, weight[0] if weight else None, batched=True)


def _picked(leaves: Sequence[Any], which: Tensor) -> Any:
    if not isinstance(leaves[0], Tensor):
        return leaves[0]
    return torch.stack(list(leaves))[which.to(leaves[0].device)]
