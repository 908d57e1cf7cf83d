"""Routers that decide by themselves which samples belong to which model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..change import Change
from ..errors import ModelBatchError
from ..random import check_seeds, derive_seed, derive_seeds
from ..weights import moved
from .masks import uniform
from .router import DataRouter, RoutedBatch, batch_size_of, own_rows, take

STRATEGIES = ("round_robin", "random", "class_based", "kfold", "bootstrap")


class StratifiedDataRouter(DataRouter):
    """Gives every model its own part of a data set, the same in every epoch.

    A sample belongs to a model by its id, its number in the data set. `route_batch` may be given
    the ids. Otherwise it counts: the first sample after `start_epoch` is 0, the next one 1; that is
    right for loaders that go through the data set in order, and wrong for those that shuffle. With
    `dataset_size` an epoch that is complete starts the next one by itself.

    Args:
        num_models: M.
        strategy: `"round_robin"`: sample n goes to model n % M. `"random"`: each model sees a
            random `fraction` of the data set, without repeats. `"class_based"`: each model sees
            the samples of its `classes`. `"kfold"`: model i trains on all samples but those of fold
            i % k. `"bootstrap"`: each model sees a sample of the data set drawn with replacement;
            what was drawn more than once has a greater weight.
        fraction: `"random"`: of the data set, that each model sees on average.
        classes: `"class_based"`: for each model the classes that it sees.
        num_classes: `"class_based"` instead of `classes`: with no more classes than models, model i
            sees class i % num_classes; with more, all classes c with c % M = i.
        num_folds: `"kfold"`: k; M by default.
        split: `"kfold"`: `"train"`, or `"val"` for what `"train"` leaves out.
        dataset_size: how many samples there are. Then the parts of `"bootstrap"` are exactly what N
            draws with replacement give; without, each sample's count is a Poisson number of mean 1,
            which is the same in the limit of large N. `"kfold"` needs it, or ids.
        seeds: M ints, or one for all: `"random"` and `"bootstrap"`. By default derived from torch's
            seed.
        shuffle_seed: `"kfold"`: makes the folds random parts of equal size; needs `dataset_size`.
            Without, sample n is in fold n % k.
        compact: give each model a batch of its own samples alone, instead of the whole batch with
            weights. Costs a copy, and a wait for ids or labels on an accelerator. By default where
            ids and labels are on the CPU and no model has more than half of the batch.

    Raises:
        ModelBatchError: an unknown strategy, or an option that is missing, bad or not for it.
    """

    def __init__(
        self,
        num_models: int,
        strategy: str = "round_robin",
        *,
        fraction: float | None = None,
        classes: Sequence[Sequence[int]] | None = None,
        num_classes: int | None = None,
        num_folds: int | None = None,
        split: str | None = None,
        dataset_size: int | None = None,
        seeds: int | Sequence[int] | None = None,
        shuffle_seed: int | None = None,
        compact: bool | None = None,
    ):
        if strategy not in STRATEGIES:
            raise ModelBatchError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
        super().__init__("mask")
        if num_models < 1:
            raise ModelBatchError(f"num_models must be at least 1, got {num_models}")
        given = {
            "fraction": (fraction, ("random",)),
            "classes": (classes, ("class_based",)),
            "num_classes": (num_classes, ("class_based",)),
            "num_folds": (num_folds, ("kfold",)),
            "split": (split, ("kfold",)),
            "shuffle_seed": (shuffle_seed, ("kfold",)),
            "seeds": (seeds, ("random", "bootstrap")),
        }
        for name, (value, users) in given.items():
            if value is not None and strategy not in users:
                raise ModelBatchError(f'{name} is not an option of strategy "{strategy}"')
        if dataset_size is not None and dataset_size < 1:
            raise ModelBatchError(f"dataset_size must be at least 1, got {dataset_size}")
        self.num_models, self.strategy, self.compact = num_models, strategy, compact
        self.dataset_size = dataset_size
        self.fraction = 0.8 if fraction is None else fraction
        if not 0 < self.fraction <= 1:
            raise ModelBatchError(f"fraction must be in (0, 1], got {fraction}")
        self.num_folds = num_models if num_folds is None else num_folds
        if strategy == "kfold" and self.num_folds < 2:
            raise ModelBatchError(f"num_folds must be at least 2, got {self.num_folds}")
        self.split = split or "train"
        if self.split not in ("train", "val"):
            raise ModelBatchError(f'split must be "train" or "val", got {split!r}')
        self.shuffle_seed = shuffle_seed
        self.seeds: list[int] = []
        if strategy in ("random", "bootstrap"):
            if isinstance(seeds, int):
                self.seeds = derive_seeds(num_models, seeds)
            else:
                self.seeds = check_seeds(seeds, num_models) or derive_seeds(num_models)
        self.epoch = 0
        self._offset = 0
        self._first_models = num_models  # what the samples were divided among
        self._numbers = list(range(num_models))  # each model's number in that
        self._changed = False
        self._tables: dict[str, Tensor] = {}
        self._class_rows: Tensor | None = None
        if strategy == "class_based":
            self._class_rows = self._class_table(classes, num_classes)
        self._fill_tables()
        if shuffle_seed is not None:
            if dataset_size is None:
                raise ModelBatchError("shuffle_seed needs dataset_size")
            generator = torch.Generator().manual_seed(shuffle_seed)
            order = torch.randperm(dataset_size, generator=generator)
            self._tables["folds"] = order % self.num_folds

    def _fill_tables(self) -> None:
        self._tables["numbers"] = torch.tensor(self._numbers)
        if self._class_rows is not None:
            rows = [number % len(self._class_rows) for number in self._numbers]
            self._tables["classes"] = self._class_rows[rows]
        if self.seeds:
            signed = [s if s < 1 << 63 else s - (1 << 64) for s in self.seeds]
            self._tables["seeds"] = torch.tensor(signed, dtype=torch.int64)
        if self.strategy == "bootstrap" and self.dataset_size is not None:
            self._tables["draws"] = self._draws(self.dataset_size)

    # ---- models that come and go

    def check_models_change(self, change: Change) -> None:
        """Refuse a model of which it is not known what it sees.

        Raises:
            ModelBatchError: a model is added where all samples, or classes, have been given away.
        """
        if self.num_models != change.old_num_models:
            raise ModelBatchError(
                f"this router is for {self.num_models} models, the bundle has "
                f"{change.old_num_models}"
            )
        added = [slot for slot in change.fresh if change.replaced(slot) is None]
        if added and not change.template and self.strategy in ("round_robin", "class_based"):
            raise ModelBatchError(
                f'model {added[0]} (new): the strategy "{self.strategy}" has given all samples to '
                "the first models; a model that replaces another takes over what that one had"
            )

    def models_changed(self, change: Change) -> None:
        """Go on with the models that there are now: each keeps its own part of the data.

        A model that replaces another takes over its part; with `"random"` and `"bootstrap"` every
        fresh one draws a part of its own.
        """
        self.num_models, self._changed = change.num_models, True
        further = max(self._first_models, 1 + max(self._numbers))
        numbers = []
        for slot in range(change.num_models):
            old = change.replaced(slot)
            numbers.append(further if old is None else self._numbers[old])
            further += old is None and change.source[slot] is None
        self._numbers = change.pick(self._numbers, numbers)
        if self.seeds:
            self.seeds = change.pick(self.seeds, lambda slot: derive_seed(change.ids[slot]))
        self._fill_tables()

    # ---- what belongs to whom

    def sample_weights(self, sample_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """What samples count for in each model.

        Args:
            sample_ids: int `[B]`, numbers in the data set.
            labels: int `[B]`, for `"class_based"`.

        Returns:
            `[M, B]` of the default dtype: 1 for a sample of the model, 0 for any other, and with
            `"bootstrap"` how often the model drew it.

        Raises:
            ModelBatchError: an id that is not in the data set, or labels are missing.
        """
        if sample_ids.dim() != 1 or sample_ids.is_floating_point():
            raise ModelBatchError(
                f"sample_ids must be whole numbers [B], got {sample_ids.dtype} of shape "
                f"{tuple(sample_ids.shape)}"
            )
        ids = sample_ids.long()
        size = self.dataset_size
        if ids.device.type == "cpu" and len(ids):
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or (size is not None and high >= size):
                bad = low if low < 0 else high
                raise ModelBatchError(f"sample id {bad} is not in a data set of {size} samples")
        weights = getattr(self, f"_{self.strategy}")(ids, labels)
        return weights.to(torch.get_default_dtype())

    def subsets(self, labels: Tensor | None = None) -> list[Tensor]:
        """The samples of each model, for `PerModelLoader(..., subsets=...)`.

        Args:
            labels: int `[N]`, for `"class_based"`; also says how many samples there are.

        Returns:
            M tensors of sample ids; with `"bootstrap"` an id occurs as often as it was drawn.

        Raises:
            ModelBatchError: neither labels nor `dataset_size` is there.
        """
        size = self.dataset_size if labels is None else len(labels)
        if size is None:
            raise ModelBatchError("subsets needs dataset_size, or labels")
        ids = torch.arange(size)
        counts = self.sample_weights(ids, None if labels is None else labels.cpu()).long()
        return [ids.repeat_interleave(own) for own in counts]

    def validation(self) -> "StratifiedDataRouter":
        """For `"kfold"`, the router of the samples that each model does not train on.

        Raises:
            ModelBatchError: another strategy.
        """
        if self.strategy != "kfold":
            raise ModelBatchError(f'strategy "{self.strategy}" leaves no samples for validation')
        other = StratifiedDataRouter(
            self.num_models,
            "kfold",
            num_folds=self.num_folds,
            split="val" if self.split == "train" else "train",
            dataset_size=self.dataset_size,
            shuffle_seed=self.shuffle_seed,
            compact=self.compact,
        )
        other._numbers, other._changed = list(self._numbers), self._changed
        other._first_models = self._first_models
        other._fill_tables()
        return other

    def _round_robin(self, ids: Tensor, labels: Tensor | None) -> Tensor:
        return ids % self._first_models == self._models(ids).unsqueeze(1)

    def _random(self, ids: Tensor, labels: Tensor | None) -> Tensor:
        return uniform(self._table("seeds", ids), ids) < self.fraction

    def _class_based(self, ids: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None or labels.shape != ids.shape or labels.is_floating_point():
            raise ModelBatchError(
                'strategy "class_based" needs labels: whole numbers, one for each sample'
            )
        table = self._table("classes", labels)
        known = (labels >= 0) & (labels < table.shape[1])
        return table[:, torch.where(known, labels.long(), 0)] & known

    def _kfold(self, ids: Tensor, labels: Tensor | None) -> Tensor:
        folds = ids % self.num_folds
        if "folds" in self._tables:
            folds = self._table("folds", ids)[ids]
        held_out = folds == (self._models(ids) % self.num_folds).unsqueeze(1)
        return held_out if self.split == "val" else ~held_out

    def _bootstrap(self, ids: Tensor, labels: Tensor | None) -> Tensor:
        if "draws" in self._tables:
            return self._table("draws", ids)[:, ids]
        # the inverse of the distribution function: how many of its values lie below
        limits = _POISSON.to(ids.device)
        return torch.searchsorted(limits, uniform(self._table("seeds", ids), ids), right=True)

    def _models(self, like: Tensor) -> Tensor:
        return self._table("numbers", like)

    def _table(self, name: str, like: Tensor) -> Tensor:
        """A table on the device where it is needed; it stays there."""
        table = self._tables[name]
        if table.device != like.device:
            table = self._tables[name] = table.to(like.device)
        return table

    def _class_table(
        self, classes: Sequence[Sequence[int]] | None, num_classes: int | None
    ) -> Tensor:
        """Bool `[M, number of classes]`."""
        if (classes is None) == (num_classes is None):
            raise ModelBatchError('strategy "class_based" needs either classes or num_classes')
        M = self.num_models
        if classes is None:
            assert num_classes is not None
            if num_classes < 1:
                raise ModelBatchError(f"num_classes must be at least 1, got {num_classes}")
            few = num_classes <= M
            classes = [[i % num_classes] if few else [*range(i, num_classes, M)] for i in range(M)]
        if len(classes) != M:
            raise ModelBatchError(f"classes has {len(classes)} entries for {M} models")
        for i, own in enumerate(classes):
            if len(own) == 0 or any(c < 0 for c in own):
                raise ModelBatchError(f"model {i}: its classes must be numbers from 0, got {own}")
        table = torch.zeros(M, 1 + max(max(own) for own in classes), dtype=torch.bool)
        for i, own in enumerate(classes):
            table[i, list(own)] = True
        return table

    def _draws(self, size: int) -> Tensor:
        """How often each model draws each sample, uint8 `[M, N]`."""
        rows = []
        for seed in self.seeds:
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randint(size, (size,), generator=generator)
            rows.append(torch.bincount(drawn, minlength=size).to(torch.uint8))
        return torch.stack(rows)

    # ---- batches

    @property
    def needs_order(self) -> bool:
        """Whether batches without `sample_ids` must come in the order of the data set."""
        return self.strategy != "class_based"

    def start_epoch(self) -> None:
        """The next sample is the first one of the data set."""
        self.epoch += int(self._offset > 0)
        self._offset = 0

    def route_batch(  # type: ignore[override]
        self,
        inputs: Any,
        targets: Any,
        sample_ids: Tensor | None = None,
        *,
        labels: Tensor | None = None,
    ) -> RoutedBatch:
        """Give every model its own samples.

        Args:
            inputs: tensors `[B, ...]`, in a tuple or dict if the models take several.
            targets: likewise.
            sample_ids: int `[B]`, the samples' numbers in the data set. If they are not given,
                samples are counted.
            labels: int `[B]`, for `"class_based"`; the targets by default.

        Returns:
            The batch: shared by all models and with weights, or compact.

        Raises:
            ModelBatchError: see `sample_weights`; the samples that are counted are more than there
                are in the data set; or `"kfold"` has neither ids nor `dataset_size`.
        """
        size, device = batch_size_of(inputs, targets)
        if labels is None and self.strategy == "class_based":
            labels = targets if isinstance(targets, Tensor) else None
        ids = self._count(size) if sample_ids is None else sample_ids
        if len(ids) != size:
            raise ModelBatchError(f"there are {len(ids)} sample_ids for {size} samples")
        if labels is not None:
            ids = moved(ids, labels.device)
        weight = self.sample_weights(ids, labels)
        if sample_ids is None:
            self._advance(size)
        compacted = self._compacted(inputs, targets, weight, device)
        if compacted is not None:
            return compacted
        return RoutedBatch(inputs, targets, moved(weight, device))

    def state_dict(self) -> dict[str, Any]:  # noqa: D102 - inherited
        return {"epoch": self.epoch, "offset": self._offset, **self._identity()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # noqa: D102 - inherited
        changed = "numbers" in state_dict
        for name, own in self._identity().items():
            if name == "numbers" or (changed and name == "seeds"):
                continue
            if state_dict.get(name) != own:
                raise ModelBatchError(
                    f"this is the state of another router: its {name} is "
                    f"{state_dict.get(name)!r}, not {own!r}"
                )
        if changed:
            self._numbers, self._changed = list(state_dict["numbers"]), True
            self.seeds = list(state_dict["seeds"])
            self._fill_tables()
        self.epoch, self._offset = int(state_dict["epoch"]), int(state_dict["offset"])

    def _identity(self) -> dict[str, Any]:
        return {
            "strategy": self.strategy,
            "num_models": self.num_models,
            "dataset_size": self.dataset_size,
            "fraction": self.fraction,
            "num_folds": self.num_folds,
            "split": self.split,
            "shuffle_seed": self.shuffle_seed,
            "seeds": list(self.seeds),
            **({"numbers": list(self._numbers)} if self._changed else {}),
        }

    def _count(self, size: int) -> Tensor:
        if self.strategy == "kfold" and self.dataset_size is None:
            raise ModelBatchError(
                'strategy "kfold" needs dataset_size, or the sample_ids of each batch: which fold '
                "a sample is in must be the same in every epoch"
            )
        if self.dataset_size is not None and self._offset + size > self.dataset_size:
            raise ModelBatchError(
                f"{self._offset} samples have been routed in this epoch and {size} more are to be, "
                f"but the data set has {self.dataset_size}; call start_epoch() at the start of "
                "every epoch, and give sample_ids if the order is not that of the data set"
            )
        return torch.arange(self._offset, self._offset + size)

    def _advance(self, size: int) -> None:
        self._offset += size
        if self._offset == self.dataset_size:
            self.start_epoch()

    def _compacted(
        self, inputs: Any, targets: Any, weight: Tensor, device: torch.device
    ) -> RoutedBatch | None:
        if self.compact is False or (self.compact is None and weight.device.type != "cpu"):
            return None
        taking = weight != 0
        counts = taking.sum(1)
        longest = max(int(counts.max()), 1)
        if self.compact is None and 2 * longest > weight.shape[1]:
            return None
        # each model's own samples first, in their order
        positions = (~taking).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
        own = weight.gather(1, positions)
        positions, valid = own_rows(positions, counts, device)
        own = moved(own, device)
        if valid is None and self.strategy != "bootstrap":
            return RoutedBatch(take(inputs, positions), take(targets, positions), None, True)
        return RoutedBatch(take(inputs, positions), take(targets, positions), own, True)


def _poisson_limits() -> Tensor:
    """P(X <= k) for k = 0, 1, ... of a Poisson number of mean 1, up to rounding to 1."""
    probability, total, limits = torch.exp(torch.tensor(-1.0, dtype=torch.float64)).item(), 0.0, []
    for k in range(1, 20):
        total += probability
        limits.append(total)
        probability /= k
    return torch.tensor(limits, dtype=torch.float64)


_POISSON = _poisson_limits()
