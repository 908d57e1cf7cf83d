"""A loader that gives every model of a bundle its own order and its own batch size."""

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import TensorDataset, default_collate

from ..change import Change
from ..errors import ModelBatchError
from ..random import check_seeds, derive_seed, derive_seeds
from .router import RoutedBatch, batch_size_of, take


class PerModelLoader:
    """Goes through one data set with an order, a batch size and a subset for each model.

    The data are held once, on `device`; a batch is gathered there by index for all models together.
    Batches of different length become sample weights: the missing samples of a shorter one are
    repeats of one of its own, with weight 0.

    An epoch lasts until every model has seen all of its samples. A model that is through with its
    own gets weight 0 for the rest, so that it rests in `train_step`: every model takes as many
    steps in an epoch as it would alone.

    Args:
        data: `(inputs, targets)`, each a tensor `[N, ...]` or a tuple or dict of such; or a data
            set: a `TensorDataset` (its last tensor the targets), or any other that has a length
            and items `(x, y)`, which is then read once.
        batch_sizes: an int for all models or M ints.
        seeds: M ints, or one from which they are derived; by default from torch's seed. The order
            of model i in epoch e depends on its seed and e alone.
        num_models: M; only needed where nothing else says it.
        shuffle: a new order in every epoch; otherwise that of the data set or the subset.
        drop_last: leave out a model's last batch if it is incomplete.
        device: where the data are to be; by default where they are.
        subsets: for each model the numbers of its samples; a number may occur more than once.

    Raises:
        ModelBatchError: bad sizes, seeds or numbers, naming the model; or a model that would have
            no batch at all.
    """

    def __init__(
        self,
        data: Any,
        batch_sizes: int | Sequence[int],
        seeds: int | Sequence[int] | None = None,
        *,
        num_models: int | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        device: torch.device | str | None = None,
        subsets: Sequence[Sequence[int] | Tensor] | None = None,
    ):
        self.num_models = _count_models(batch_sizes, seeds, subsets, num_models)
        self.inputs, self.targets = _as_tensors(data, device)
        self.dataset_size, self._device = batch_size_of(self.inputs, self.targets)
        self.batch_sizes = self._check_batch_sizes(batch_sizes)
        if seeds is None or isinstance(seeds, int):
            self.seeds = derive_seeds(self.num_models, seeds)
        else:
            self.seeds = check_seeds(seeds, self.num_models) or []
        self.shuffle, self.drop_last = shuffle, drop_last
        self._parts = None if subsets is None else self._check_subsets(subsets)
        self._numbers = list(range(self.num_models))
        self._changed = False
        self._lay_out()
        self._order: Tensor | None = None
        self._order_of: int | None = None
        self.epoch = 0
        """The epoch that the next batch belongs to, or the last one did."""
        self._next = 0
        self._begun = self._resumed = False

    def _lay_out(self) -> None:
        """What follows from batch sizes and subsets.

        Raises:
            ModelBatchError: a model has not one batch.
        """
        parts, drop_last = self._parts, self.drop_last
        #: For each model the numbers of its samples; None for all.
        self._subsets = None if parts is None else [parts[number] for number in self._numbers]
        lengths = [self.dataset_size] * self.num_models
        if self._subsets is not None:
            lengths = [len(subset) for subset in self._subsets]
        #: How many samples each model sees in an epoch.
        self.samples_per_model = [
            length - length % size if drop_last else length
            for length, size in zip(lengths, self.batch_sizes)
        ]
        #: How many batches each model sees in an epoch.
        self.batches_per_model = [
            -(-count // size) for count, size in zip(self.samples_per_model, self.batch_sizes)
        ]
        for i, batches in enumerate(self.batches_per_model):
            if batches == 0:
                raise ModelBatchError(
                    f"model {i} has {lengths[i]} samples, not one batch of {self.batch_sizes[i]}"
                )
        self._sizes = torch.tensor(self.batch_sizes)
        self._ends = torch.tensor(self.samples_per_model)
        self._sizes_there = self._sizes.to(self._device).unsqueeze(1)
        self._ends_there = self._ends.to(self._device).unsqueeze(1)
        self._same_for_all = (
            not self.shuffle and self._subsets is None and len(set(self.batch_sizes)) == 1
        )

    # ---- models that come and go

    def check_models_change(self, change: Change) -> None:
        """Refuse a model of which it is not known what it sees.

        Raises:
            ModelBatchError: a model is added where each has its own subset or batch size.
        """
        if self.num_models != change.old_num_models:
            raise ModelBatchError(
                f"this loader is for {self.num_models} models, the bundle has "
                f"{change.old_num_models}"
            )
        added = [slot for slot in change.fresh if change.replaced(slot) is None]
        if added and not change.template:
            for what, own in (
                ("subset", self._parts is not None),
                ("batch size", len(set(self.batch_sizes)) > 1),
            ):
                if own:
                    raise ModelBatchError(
                        f"model {added[0]} (new): each model of the loader has a {what} of its "
                        "own, and what this one's is cannot be told; a model that replaces another "
                        "takes over what that one had"
                    )

    def models_changed(self, change: Change) -> None:
        """Give batches to the models that there are now.

        A fresh model begins with the next batch, in an order of its own; one that replaces another
        takes over its subset and batch size.
        """
        self.num_models, self._changed = change.num_models, True
        places = [change.replaced(slot) or 0 for slot in range(change.num_models)]
        self._numbers = change.pick(self._numbers, [self._numbers[place] for place in places])
        sizes = [self.batch_sizes[place] for place in places]
        self.batch_sizes = change.pick(self.batch_sizes, sizes)
        self.seeds = change.pick(self.seeds, lambda slot: derive_seed(change.ids[slot]))
        self._lay_out()
        self._order = None

    def __len__(self) -> int:
        """The batches of an epoch: those of the model that has most."""
        return max(self.batches_per_model)

    def order(self, i: int, epoch: int | None = None) -> Tensor:
        """Which samples model i sees in an epoch, int64 `[N]`.

        Args:
            i: the model.
            epoch: by default the present one.
        """
        own = None if self._subsets is None else self._subsets[i]
        count = self.dataset_size if own is None else len(own)
        if not self.shuffle:
            return torch.arange(count) if own is None else own
        generator = torch.Generator()
        number = self.epoch if epoch is None else epoch
        # neighbouring seeds must not share orders between neighbouring epochs
        generator.manual_seed(derive_seeds(number + 1, self.seeds[i])[number])
        order = torch.randperm(count, generator=generator)
        return order if own is None else own[order]

    def __iter__(self) -> Iterator[RoutedBatch]:
        if self._resumed:
            self._resumed = False
        elif self._begun:
            self.epoch, self._next = self.epoch + 1, 0
        if self._next >= len(self):
            self.epoch, self._next = self.epoch + 1, 0
        self._begun = True
        return self._batches(self.epoch)

    def _batches(self, epoch: int) -> Iterator[RoutedBatch]:
        while self._next < len(self):
            if self.epoch != epoch:
                raise ModelBatchError("a later epoch of this loader has been started meanwhile")
            batch = self._batch(self._next)
            self._next += 1
            yield batch

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration begin this epoch (the first one is 0)."""
        self.epoch, self._next, self._resumed = epoch, 0, True

    def _batch(self, number: int) -> RoutedBatch:
        if self._same_for_all:
            size = self.batch_sizes[0]
            rows = slice(number * size, min((number + 1) * size, self.samples_per_model[0]))
            inputs, targets = tree_map(
                lambda leaf: leaf[rows] if isinstance(leaf, Tensor) else leaf,
                (self.inputs, self.targets),
            )
            return RoutedBatch(inputs, targets)
        # how long the batch is, is known here; what is in it, there
        present = (self._ends - number * self._sizes).clamp(min=0).minimum(self._sizes)
        longest = int(present.max())
        order = self._orders()
        begin = self._sizes_there * number
        places = begin + torch.arange(longest, device=self._device)
        valid = places < (begin + self._sizes_there).minimum(self._ends_there)
        places = torch.where(valid, places, begin.minimum(self._ends_there - 1))
        positions = order.gather(1, places).long()
        weight = None
        if bool((present < longest).any()):
            weight = valid.to(torch.get_default_dtype())
        return RoutedBatch(
            take(self.inputs, positions), take(self.targets, positions), weight, True
        )

    def _orders(self) -> Tensor:
        """The orders of all models in this epoch, `[M, N]`, made once per epoch."""
        if self._order is None or (self.shuffle and self._order_of != self.epoch):
            dtype = torch.int32 if self.dataset_size < 1 << 31 else torch.int64
            table = torch.zeros(self.num_models, max(self.samples_per_model), dtype=dtype)
            for i, count in enumerate(self.samples_per_model):
                table[i, :count] = self.order(i)[:count]
            self._order, self._order_of = table.to(self._device), self.epoch
        return self._order

    # ---- position

    def state_dict(self) -> dict[str, Any]:
        """Where in which epoch the loader is; plain numbers."""
        return {"epoch": self.epoch, "batch": self._next, "begun": self._begun, **self._identity()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next iteration go on behind the last batch that the saved loader gave.

        If that was the last one of its epoch, the next epoch begins.

        Raises:
            ModelBatchError: it is the state of another loader.
        """
        own_changes = (
            ("batch_sizes", "samples_per_model", "seeds") if "numbers" in state_dict else ()
        )
        for name, own in self._identity().items():
            if name == "numbers" or (name in own_changes and len(state_dict[name]) == len(own)):
                continue
            if state_dict.get(name) != own:
                raise ModelBatchError(
                    f"this is the state of another loader: its {name} is "
                    f"{state_dict.get(name)!r}, not {own!r}"
                )
        if own_changes:
            self._numbers, self._changed = list(state_dict["numbers"]), True
            self.batch_sizes, self.seeds = (
                list(state_dict["batch_sizes"]),
                list(state_dict["seeds"]),
            )
            self._lay_out()
            self._order = None
        self.epoch, self._next = int(state_dict["epoch"]), int(state_dict["batch"])
        self._begun = self._resumed = bool(state_dict["begun"])

    def _identity(self) -> dict[str, Any]:
        return {
            "dataset_size": self.dataset_size,
            "batch_sizes": list(self.batch_sizes),
            "samples_per_model": list(self.samples_per_model),
            "seeds": list(self.seeds),
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            **({"numbers": list(self._numbers)} if self._changed else {}),
        }

    # ---- checks

    def _check_batch_sizes(self, batch_sizes: int | Sequence[int]) -> list[int]:
        each = [batch_sizes] * self.num_models if isinstance(batch_sizes, int) else batch_sizes
        for i, size in enumerate(each):
            if isinstance(size, bool) or int(size) != size or size < 1:
                raise ModelBatchError(f"model {i}: its batch size must be at least 1, got {size!r}")
        return [int(size) for size in each]

    def _check_subsets(self, subsets: Sequence[Any]) -> list[Tensor]:
        checked = []
        for i, subset in enumerate(subsets):
            own = torch.as_tensor(subset, device="cpu")
            own = own.long() if own.numel() == 0 else own
            if own.dim() != 1 or own.is_floating_point() or own.dtype == torch.bool:
                raise ModelBatchError(f"model {i}: its subset must be a list of sample numbers")
            if len(own) and not 0 <= int(own.min()) <= int(own.max()) < self.dataset_size:
                raise ModelBatchError(
                    f"model {i}: its subset goes from {int(own.min())} to {int(own.max())}, but "
                    f"the data set has {self.dataset_size} samples"
                )
            checked.append(own.long())
        return checked


def _count_models(batch_sizes: Any, seeds: Any, subsets: Any, num_models: int | None) -> int:
    """M, from all arguments that say it.

    Raises:
        ModelBatchError: none does, or they do not agree.
    """
    said = {
        name: len(value)
        for name, value in (("batch_sizes", batch_sizes), ("seeds", seeds), ("subsets", subsets))
        if isinstance(value, Sized)
    }
    if num_models is not None:
        said["num_models"] = num_models
    if not said:
        raise ModelBatchError(
            "say how many models there are: num_models=, or batch_sizes or seeds for each of them"
        )
    if len(set(said.values())) > 1 or min(said.values()) < 1:
        raise ModelBatchError(f"the numbers of models do not agree: {said}")
    return next(iter(said.values()))


def _as_tensors(data: Any, device: Any) -> tuple[Any, Any]:
    """Inputs and targets `[N, ...]`."""
    if isinstance(data, TensorDataset):
        *inputs, targets = data.tensors
        parts = (inputs[0] if len(inputs) == 1 else tuple(inputs), targets)
    elif isinstance(data, tuple | list) and len(data) == 2:
        parts = (data[0], data[1])
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, Tensor):
        items = default_collate([data[k] for k in range(len(data))])
        if not isinstance(items, tuple | list) or len(items) != 2:
            raise ModelBatchError("the items of the data set must be pairs (x, y)")
        parts = (_tuples(items[0]), _tuples(items[1]))
    else:
        raise ModelBatchError(
            f"data must be (inputs, targets) or a data set, got {type(data).__name__}"
        )
    if device is None:
        return parts
    moved: tuple[Any, Any] = tree_map(
        lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, parts
    )
    return moved


def _tuples(tree: Any) -> Any:
    """Several inputs as the tuple of arguments that a bundle takes; they are collated as a list."""
    return tuple(tree) if isinstance(tree, list) else tree
