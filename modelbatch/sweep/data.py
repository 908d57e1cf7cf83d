"""The data of a sweep: the same order of samples for all trials of a batch size."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from ..errors import ModelBatchError
from ..random import derive_seed

__all__ = ["Data", "epoch_order"]

# A validation needs no gradients, so its batches may be larger than those of the training.
_VALIDATION_BATCH = 256


def epoch_order(num_samples: int, seed: int, epoch: int) -> Tensor:
    """The order of the samples in an epoch: a permutation that depends on these three alone."""
    generator = torch.Generator().manual_seed(derive_seed(epoch, seed))
    return torch.randperm(num_samples, generator=generator)


class _Order(Sampler[Any]):
    """Yields the samples of an epoch one by one, or in lists of `batch_size`."""

    def __init__(self, num_samples: int, seed: int, batch_size: int | None) -> None:
        self.num_samples, self.seed, self.batch_size = num_samples, seed, batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_samples // (self.batch_size or 1))

    def __iter__(self) -> Iterator[Any]:
        order = epoch_order(self.num_samples, self.seed, self.epoch)
        if self.batch_size is None:
            return iter(order.tolist())
        return iter(order.split(self.batch_size))


class _Rows(Dataset[Any]):
    """Tensors that are indexed by whole batches."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor[rows.to(tensor.device)] for tensor in self.tensors)


class Data:
    """Training or validation data in one of the forms that `run_sweep` takes.

    Args:
        name: of the argument, for messages.
        data: `(x, y)` tensors, a `Dataset` with a length, or an iterable of batches.
        seed: of the order.
        device: where tensors are put, once for all.

    Raises:
        ModelBatchError: something else, no samples, or tensors of different lengths.
    """

    def __init__(self, name: str, data: Any, seed: int, device: torch.device | None) -> None:
        self.seed = seed
        self.tensors: tuple[Tensor, ...] | None = None
        self.dataset: Any = None
        self.loader: Iterable[Any] | None = None
        if isinstance(data, TensorDataset):
            data = data.tensors
        if isinstance(data, tuple) and data and all(isinstance(t, Tensor) for t in data):
            shapes = ", ".join(str(tuple(t.shape)) for t in data)
            if len(data) not in (2, 3) or len({t.shape[:1] for t in data}) != 1:
                raise ModelBatchError(
                    f"{name} must be tensors (x, y) or (x, y, sample_weight) of equal length, got "
                    f"the shapes {shapes}"
                )
            self.tensors = data if device is None else tuple(t.to(device) for t in data)
            length: int | None = len(data[0]) if data[0].dim() else 0
        elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            self.dataset = data
            if not hasattr(data, "__len__"):
                raise ModelBatchError(
                    f"{name}: a {type(data).__name__} without length has no order"
                )
            length = len(data)
        elif isinstance(data, Iterable) and not isinstance(data, str | dict | Iterator):
            self.loader, length = data, None
        else:
            raise ModelBatchError(
                f"{name} must be tensors (x, y), a Dataset, or an iterable of batches that can be "
                f"gone through once per epoch, got {type(data).__name__}"
            )
        if length == 0:
            raise ModelBatchError(f"{name} has no samples")
        self.length = length

    def training(self, batch_size: int | None) -> Iterable[Any]:
        """A loader for training with this batch size."""
        if self.loader is not None:
            return self.loader
        assert self.length is not None
        if self.tensors is not None:
            # batch_size=None: the sampler's items are batches, which nothing has to collate
            order = _Order(self.length, self.seed, batch_size)
            return DataLoader(_Rows(self.tensors), batch_size=None, sampler=order)
        order = _Order(self.length, self.seed, None)
        return DataLoader(self.dataset, batch_size=batch_size, sampler=order)

    def validation(self, batch_size: int | None) -> Iterable[Any]:
        """A loader for validation."""
        if self.loader is not None:
            return self.loader
        size = max(batch_size or 1, _VALIDATION_BATCH)
        if self.tensors is not None:
            return list(zip(*(tensor.split(size) for tensor in self.tensors)))
        return DataLoader(self.dataset, batch_size=size)
