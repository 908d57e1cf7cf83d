"""Training samples in an order of its own for each model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from transformers import TrainingArguments
from transformers.trainer_pt_utils import find_batch_size

from ...errors import ModelBatchError
from ...inputs import per_model
from .bundle import PreTrainedBundle

_Base: Any = object  # Trainer comes after the mixin

__all__ = ["OrderMixin"]


class _Order(Sampler[tuple[int, ...]]):
    """For each place of an epoch the samples of all models, one of each.

    Args:
        samplers: of the models; each draws as it would in a Trainer of its own.
    """

    def __init__(self, samplers: Sequence[SeedableRandomSampler]):
        self.samplers = list(samplers)

    def __len__(self) -> int:
        return len(self.samplers[0])

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return zip(*self.samplers, strict=True)

    def set_epoch(self, epoch: int) -> None:
        """What an order depends on, besides its seed."""
        for sampler in self.samplers:
            sampler.set_epoch(epoch)


class _Samples(Dataset[Any]):
    """Gives the samples of all models in one list, those of the first model first.

    So a collator sees them as one batch, and fills all up to the same length.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, rows: Sequence[tuple[int, ...]]) -> list[Any]:
        wanted = [number for column in zip(*rows) for number in column]
        together = getattr(self.dataset, "__getitems__", None)
        return together(wanted) if together else [self.dataset[number] for number in wanted]


class OrderMixin(_Base):
    """The part of `HFTrainerMixin` that says which samples a model sees."""

    model: PreTrainedBundle
    train_dataset: Any
    args_of_each: list[TrainingArguments]
    _order_seeds: list[int] | None = None
    """Of the training data at hand; None where all models see the same batches."""
    _splits = False

    def _seeds_of_orders(self) -> list[int] | None:
        args = self.args
        whole = args.seed if args.data_seed is None else args.data_seed
        seeds = [whole if own.data_seed is None else own.data_seed for own in self.args_of_each]
        return seeds if any(seed != whole for seed in seeds) else None

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Trainer's own; where `data_seed` differs, with the samples of all models in one batch.

        Raises:
            ModelBatchError: `data_seed` differs, and the order is one that no seed decides.
        """
        whole = self.train_dataset
        self._order_seeds = None if whole is None else self._seeds_of_orders()
        if self._order_seeds is None:
            return super().get_train_dataloader()
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        needed = None
        if isinstance(whole, IterableDataset) or not hasattr(whole, "__len__"):
            needed = f"a dataset with a length, got a {type(whole).__name__}"
        elif strategy != "random":
            needed = f"train_sampling_strategy='random', got {strategy!r}"
        elif not self.accelerator.use_seedable_sampler:
            needed = "accelerator_config={'use_seedable_sampler': True}"
        if needed is not None:
            raise ModelBatchError(f"models with a data_seed of their own need {needed}")
        self._set_signature_columns_if_needed()
        self.train_dataset = _Samples(whole)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = whole

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self._order_seeds is None:
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return _Order([SeedableRandomSampler(dataset, data_seed=own) for own in self._order_seeds])

    # ---- batches

    def _rows_of_each(self, value: Tensor) -> Tensor:
        """`[M * B, ...]` as `[M, B, ...]`."""
        return value.unflatten(0, (len(self.args_of_each), -1))

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """As in Trainer; where the models see samples of their own, a number for each: `[M]`."""
        count = super()._get_num_items_in_batch
        found = count(batch_samples, device)
        if found is None or self._order_seeds is None:
            return found
        names = ("labels", "shift_labels")
        own = [
            {name: self._rows_of_each(batch[name]) for name in names if name in batch}
            for batch in batch_samples
        ]
        return torch.vmap(lambda batches: count(batches, device))(own)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = super()._prepare_inputs(inputs)
        if not self._splits:
            return prepared
        size = find_batch_size(prepared)

        def split(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: split(own) for name, own in value.items()}
            if isinstance(value, tuple | list):
                return type(value)(split(own) for own in value)
            if isinstance(value, Tensor) and value.dim() and value.shape[0] == size:
                return per_model(self._rows_of_each(value))
            return value

        return split(prepared)
