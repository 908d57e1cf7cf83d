"""Models that leave a bundle, take another's place in it, or join it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .change import Change, Followers
from .errors import ModelBatchError
from .forward import Forward
from .joining import attributes_changed, per_model_numbers
from .optim import PerModelOptimizer
from .optim.whole import WholeOptimizer
from .random import Streams, check_seeds, derive_seed
from .stack import Stack
from .structure import check_joining

if TYPE_CHECKING:
    import torch

__all__ = ["Membership"]


class Membership(nn.Module):
    """The part of `ModelBatch` that lets models come and go; see there."""

    _stack: Stack
    _streams: Streams
    _forward: Forward
    _ignored: frozenset[str]
    _active: list[bool]
    _optimizer: Optimizer | None
    _grad_scaler: "torch.amp.GradScaler | None"
    _ids: list[int]
    _next_id: int
    _followers: Followers

    @property
    def model_ids(self) -> list[int]:
        """The id of each model: 0 to M - 1 at first; a model keeps its own for ever."""
        return list(self._ids)

    def prune(self, indices: int | Iterable[int] | Tensor) -> None:
        """Remove models. The others move together, in their order, and keep every bit.

        The module of a removed model becomes independent: its parameters and buffers are copies of
        their last values.

        Args:
            indices: slots of the models; negative ones count from the end.

        Raises:
            ModelBatchError: no such model, one twice, all of them, or somebody who has something
                for each model cannot follow. Nothing has changed then.
        """
        gone = set(self._slots(indices))
        if not gone:
            return
        if len(gone) == len(self._ids):
            raise ModelBatchError("prune: a bundle needs at least one model, so not all can leave")
        self._change_models([i for i in range(len(self._ids)) if i not in gone])

    def replace(
        self,
        i: int,
        model: nn.Module,
        *,
        lr: float | Tensor | None = None,
        seed: int | None = None,
        **hyper: Any,
    ) -> int:
        """Put a fresh model in a slot; it begins at its first step.

        The module that was there becomes independent, see `prune`. The new one, whose parameters
        and buffers become views, has no optimizer state, the start of a learning rate schedule, a
        random stream at its beginning, and is active.

        Args:
            i: the slot; a negative one counts from the end.
            model: of the structure that all models have.
            lr: its learning rate.
            seed: of its random stream; by default derived from torch's seed and its id.
            **hyper: its other optimizer options, and `clip_grad_norm` or `clip_grad_value`. What is
                not given is what the bundle's optimizer was given for all models, or its default.

        Returns:
            The id of the new model.

        Raises:
            StructureMismatchError: the model differs in structure from the others.
            ModelBatchError: a bad argument, or somebody who has something for each model cannot
                follow. Nothing has changed then.
        """
        (slot,) = self._slots(i)
        source = [None if k == slot else k for k in range(len(self._ids))]
        if lr is not None:
            hyper["lr"] = lr
        seeds = None if seed is None else [seed]
        change = self._change_models(source, [model], seeds=seeds, hyper=[hyper])
        return change.ids[slot]

    def append(
        self,
        models: nn.Module | Iterable[nn.Module],
        *,
        lr: float | Sequence[float] | Tensor | None = None,
        seeds: Sequence[int] | None = None,
        **hyper: Any,
    ) -> list[int]:
        """Add fresh models at the end; they begin as `replace` says.

        Args:
            models: of the structure that all models have.
            lr: a learning rate for all of them, or one for each.
            seeds: of their random streams.
            **hyper: other optimizer options, for all of them.

        Returns:
            The ids of the new models.

        Raises:
            StructureMismatchError: a model differs in structure from the others.
            ModelBatchError: a bad argument, or somebody who has something for each model cannot
                follow. Nothing has changed then.
        """
        single = isinstance(models, nn.Module) and not isinstance(
            models, nn.ModuleList | nn.Sequential
        )
        if single:
            raise ModelBatchError("append: models must be a sequence of modules; got a single one")
        added = list(models)  # type: ignore[arg-type]
        if not added:
            return []
        rates: list[Any] = [lr] * len(added)
        if (isinstance(lr, Tensor) and lr.dim() == 1) or isinstance(lr, Sequence):
            rates = list(lr)
            if len(rates) != len(added):
                raise ModelBatchError(f"append: lr has {len(rates)} values for {len(added)} models")
        own = [hyper if rate is None else {**hyper, "lr": rate} for rate in rates]
        source = [*range(len(self._ids)), *[None] * len(added)]
        change = self._change_models(source, added, seeds=seeds, hyper=own)
        return list(change.ids[len(source) - len(added) :])

    def follow(self, follower: Any) -> None:
        """Tell an object from now on when models come and go.

        Optimizers, schedulers and scalers of the bundle, and what `fit` and `train_one_epoch` are
        given, follow by themselves. An object of one's own needs a method
        `models_changed(change)`; `change.source` says for each slot where its model was before, or
        None. It may have a `check_models_change(change)`, which raises where it cannot follow. The
        object is not kept alive by this.

        Args:
            follower: for example a `PerModelLoader` in a loop of one's own.

        Raises:
            ModelBatchError: it has no such method.
        """
        if not callable(getattr(follower, "models_changed", None)):
            raise ModelBatchError(
                f"a {type(follower).__name__} has no models_changed(change), so it cannot follow"
            )
        self._followers.add(follower)

    def unfollow(self, follower: Any) -> None:
        """Tell an object no longer; a loader of an earlier training, for example, that cannot.

        Args:
            follower: what was given to `follow`, `fit` or `train_one_epoch`.
        """
        self._followers.remove(follower)

    # ---- how

    def _slots(self, indices: Any) -> list[int]:
        if isinstance(indices, Tensor):
            indices = indices.tolist()
        numbers = [indices] if isinstance(indices, int) else list(indices)
        slots = []
        for number in numbers:
            count = len(self._ids)
            plain = isinstance(number, int) and not isinstance(number, bool)
            if not plain or not -count <= number < count:
                raise ModelBatchError(f"there is no model {number!r} in a bundle of {count}")
            if number % count in slots:
                raise ModelBatchError(f"model {number % count} is named twice in {numbers}")
            slots.append(number % count)
        return slots

    def _change_models(
        self,
        source: Sequence[int | None],
        models: Sequence[nn.Module] = (),
        *,
        seeds: Sequence[int] | None = None,
        hyper: Sequence[Mapping[str, Any]] | None = None,
        ids: Sequence[int] | None = None,
        template: bool = False,
    ) -> Change:
        """Let the bundle have other models.

        Args:
            source: for each new slot the one that its model has now, or None.
            models: the fresh models for those.
            seeds: of theirs.
            hyper: the optimizer options of theirs.
            ids: of all models; by default fresh ones get new ones.
            template: see `Change`.

        Raises:
            ModelBatchError: it cannot be; nothing has changed then.
        """
        if self._forward.weights is not None:
            raise ModelBatchError("the models of a bundle cannot change within sample_weights")
        slots = [slot for slot, old in enumerate(source) if old is None]
        next_id = self._next_id
        if ids is None:
            new = iter(range(next_id, next_id + len(slots)))
            ids = [next(new) if old is None else self._ids[old] for old in source]
        fresh = dict(zip(slots, models, strict=True))
        modules = {}
        if fresh:
            modules = check_joining(self._stack.structure, self._stack.modules, fresh)
        change = Change(
            tuple(source),
            tuple(self._ids),
            tuple(ids),
            fresh,
            dict(zip(slots, hyper or [{}] * len(slots))),
            self._optimizer,
            template,
        )
        own_seeds = check_seeds(seeds, len(slots)) or [derive_seed(ids[slot]) for slot in slots]
        if self._optimizer is None and any(change.hyper.values()):
            raise ModelBatchError(
                "this bundle has no optimizer, so a model of it has no lr or other options"
            )
        numbers = per_model_numbers(self._forward, change, modules, self._ignored)
        followers = self._everyone()
        for follower in followers:
            change.check(follower)
        # from here on nothing fails
        left = [self._stack.modules[old] for old in change.removed]
        self._stack.models_changed(change, modules, numbers)
        self._active = change.pick(self._active, lambda slot: True)
        self._ids, self._next_id = list(ids), max(next_id, *(number + 1 for number in ids))
        self._streams.models_changed(change, dict(zip(slots, own_seeds)))
        attributes_changed(self._forward, change, left, self._ignored)
        for follower in followers:
            change.tell(follower)
        self._structure_changed(change)
        return change

    def _everyone(self) -> list[Any]:
        """Who has something for each model: optimizers first, on which others depend."""
        own: list[Any] = []
        if self._optimizer is not None:
            bundles = isinstance(self._optimizer, PerModelOptimizer)
            own.append(self._optimizer if bundles else WholeOptimizer(self._optimizer))
        own.append(self._grad_scaler)
        others = sorted(self._followers, key=lambda f: not isinstance(f, PerModelOptimizer))
        distinct: dict[int, Any] = {}
        for follower in (*own[:-1], *others, own[-1]):
            if follower is not None:
                distinct.setdefault(id(follower), follower)
        return list(distinct.values())

    def _structure_changed(self, change: Change) -> None:
        """Forget or carry over whatever else depends on which models there are."""
        raise NotImplementedError
