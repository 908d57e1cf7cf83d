"""The loop over batches and epochs that `train_one_epoch` and `fit` share."""

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..callbacks import Callback, CallbackPack, Event
from ..change import Change
from ..errors import ModelBatchError
from ..optim import PerModelLRScheduler
from ..optim.base import PerModelOptimizer
from .batches import Batch, Reader, length_of
from .blocks import Blocks, Step
from .interrupts import Interrupts
from .position import Position
from .stepper import Stepper
from .validation import check_metrics, validate

if TYPE_CHECKING:
    from ..batch import ModelBatch

__all__ = ["Loop"]


class Loop:
    """Everything that stays the same during a training; see `fit` for the arguments.

    Raises:
        ModelBatchError: a bad argument.
    """

    def __init__(
        self,
        mb: "ModelBatch",
        loader: Iterable[Any],
        val_loader: Iterable[Any] | None,
        *,
        optim: Optimizer | None,
        loss_fn: Callable[..., Tensor],
        metric_fns: Mapping[str, Callable[..., Tensor]] | None,
        callbacks: CallbackPack | Callback | Iterable[Callback] | None,
        router: Any,
        scheduler: LRScheduler | None,
        scheduler_interval: str,
        accumulate: int,
        grad_scaler: torch.amp.GradScaler | None,
        amp_dtype: torch.dtype | None,
        device: torch.device | str | None,
        progress: bool,
    ) -> None:
        self.mb, self.loader, self.val_loader = mb, loader, val_loader
        for name, value in (("train_loader", loader), ("val_loader", val_loader)):
            if value is not None and not isinstance(value, Iterable):
                raise ModelBatchError(f"{name} must be iterable, got {type(value).__name__}")
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            raise ModelBatchError(f"accumulate must be a positive integer, got {accumulate!r}")
        if scheduler_interval not in ("epoch", "step"):
            raise ModelBatchError(
                f'scheduler_interval must be "epoch" or "step", got {scheduler_interval!r}'
            )
        if not callable(loss_fn):
            raise ModelBatchError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
        if amp_dtype not in (None, torch.bfloat16, torch.float16):
            raise ModelBatchError(
                f"amp_dtype must be torch.bfloat16, torch.float16 or None, got {amp_dtype}"
            )
        if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
            raise ModelBatchError(
                f"grad_scaler must be a BundleGradScaler or a torch.amp.GradScaler, got "
                f"{type(grad_scaler).__name__}"
            )
        metric_fns = check_metrics(metric_fns)
        self.optimizer = self._check_optimizer(optim)
        self._check_scheduler(scheduler)
        self.reader = Reader(mb, router)
        self.pack = _as_pack(callbacks, progress)
        # from here on the bundle changes
        if device is not None and torch.empty(0, device=device).device != mb._streams.device:
            mb.to(device)
        mb.optimizer = self.optimizer
        if grad_scaler is not None:
            mb.grad_scaler = grad_scaler
        with mb._autocast(amp_dtype):  # makes the scaler that float16 needs
            pass
        self.scheduler, self.per_step = scheduler, scheduler_interval == "step"
        self.accumulate, self.amp_dtype = accumulate, amp_dtype
        self.loss_fn, self.metric_fns = loss_fn, metric_fns
        train_metrics = metric_fns if val_loader is None else {}
        self.stepper = Stepper(mb, loss_fn, amp_dtype, train_metrics)
        self.blocks = Blocks(mb, self.stepper, self.pack, loader, router)
        if accumulate > 1 or (scheduler is not None and self.per_step):
            self.blocks.possible = False
        self.event = Event(mb, self.optimizer)
        self.position = Position(len(mb), mb._streams.device, [loader, val_loader], mb.model_ids)
        self.interrupts = Interrupts()
        nothing = torch.full((len(mb),), torch.nan, dtype=torch.float64, device=mb._streams.device)
        self.results = dict.fromkeys(("loss", *train_metrics), nothing)
        self._rows: dict[str, Tensor] = {}  # the results of the epoch that ends, on the host
        self._validating = False
        for follower in (self.pack, loader, val_loader, router):
            if hasattr(follower, "models_changed"):
                mb.follow(follower)
        mb.follow(self)

    # ---- checks

    def _check_optimizer(self, optim: Optimizer | None) -> Optimizer:
        optimizer = self.mb.optimizer if optim is None else optim
        if optimizer is None:
            raise ModelBatchError(
                "this bundle has no optimizer; give ModelBatch lr_list= and optimizer_cls=, or "
                "use OptimizerFactory"
            )
        if not isinstance(optimizer, PerModelOptimizer):
            raise ModelBatchError(
                f"optim must be an optimizer of a bundle (OptimizerFactory makes one), got "
                f"{type(optimizer).__name__}"
            )
        own = {id(parameter) for parameter in self.mb.parameters()}
        if not all(id(parameter) in own for parameter in optimizer._views.stacked):
            raise ModelBatchError("optim is the optimizer of another bundle")
        return optimizer

    def _check_scheduler(self, scheduler: Any) -> None:
        if scheduler is None:
            return
        if not callable(getattr(scheduler, "step", None)):
            raise ModelBatchError(
                f"scheduler must be a learning rate scheduler, got {type(scheduler).__name__}"
            )
        if getattr(scheduler, "optimizer", self.optimizer) is not self.optimizer:
            raise ModelBatchError("scheduler is that of another optimizer than the one that trains")

    # ---- models that come and go

    def check_models_change(self, change: Change) -> None:
        """Refuse a change that this training cannot follow.

        Raises:
            ModelBatchError: during a validation, or with a loader or router that cannot.
        """
        if self._validating:
            raise ModelBatchError("the models of a bundle cannot change during a validation")
        for part in (self.loader, self.val_loader, self.reader.router):
            own = getattr(part, "num_models", None)
            if own == change.old_num_models and not hasattr(part, "models_changed"):
                raise ModelBatchError(
                    f"the {type(part).__name__} of this training is for {own} models and has no "
                    "models_changed(change), so the models cannot change"
                )

    def models_changed(self, change: Change) -> None:
        """Follow a bundle whose models have changed."""
        self.position.models_changed(change, _rates(self.optimizer))
        self.results = {name: change.rows(own, torch.nan) for name, own in self.results.items()}
        self._rows = {name: change.rows(own, torch.nan) for name, own in self._rows.items()}
        change.tell(self.event)

    # ---- state

    def states(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the bundle: objects with a state, by name."""
        states: dict[str, Any] = {"training": self.position, "callbacks": self.pack}
        if hasattr(self.reader.router, "state_dict"):
            states["router"] = self.reader.router
        if self.scheduler is not None:
            states["scheduler"] = self.scheduler
        return states

    # ---- training

    def ended(self) -> bool:
        """Whether there is nothing to train any more: a callback said so, or all are frozen."""
        return self.event.stop or not any(self.mb._active)

    def tell(self, name: str, left: int = 0) -> None:
        """Pass an event on to the callbacks; `left` steps have been done since."""
        if len(self.pack):
            event, position = self.event, self.position
            event.step = position.step - left
            if name != "on_train_end":  # which belongs to the last epoch
                event.epoch = position.epoch
            getattr(self.pack, name)(event)

    def run_epoch(self) -> None:
        """Train for one epoch, or for what is left of it, validate, and record it.

        Raises:
            KeyboardInterrupt: Ctrl-C; `position` then says where to go on.
            ModelBatchError: the loader yields nothing.
        """
        position = self.position
        start = time.perf_counter() - position.seconds
        # A callback may have kept the event of the last epoch, which is to stay as it was.
        event = self.event = replace(self.event, losses=None, metrics={}, batch=0)
        try:
            if not position.begun:
                position.begun = True
                event.num_batches = length_of(self.loader)
                self.tell("on_epoch_start")
            if not event.stop:
                self._train()
                self._finish(start)
        except BaseException:
            position.seconds = time.perf_counter() - start
            raise

    def _train(self) -> None:
        mb, position, event = self.mb, self.position, self.event
        if not mb.training:
            mb.train()
        position.rates = position.rates or _rates(self.optimizer)
        event.num_batches = length_of(self.loader)
        for group in self._groups():
            if self.accumulate > 1:
                batches = [self.reader(item) for item in group]
                losses = self.stepper(batches, position.totals, accumulates=True)
                position.batch += len(group)
                position.step += 1
                self._stepped(losses, sum(batch.size for batch in batches))
            else:
                self._block(group)
            if self.ended():
                break
            self.interrupts.check()
        if not position.batch:
            raise ModelBatchError(
                f"the loader yielded no batch in epoch {position.epoch}: can it be iterated again?"
            )

    def _block(self, items: list[Any]) -> None:
        """A step on every batch, some of them perhaps in one call."""
        position, before = self.position, self.position.batch
        try:
            self._train_block(items)
        finally:
            if position.batch - before < len(items):
                # Some were fetched in vain, as when interrupted amid a batch: only a replay knows
                # what the generators were before.
                position.fetching = True

    def _train_block(self, items: list[Any]) -> None:
        mb, position = self.mb, self.position
        batches, failed = self._read(items)
        for step in self.blocks.steps(batches, position.totals):
            # at once for all steps of a call: whoever asks finds models and position in accord
            if step.shown in (None, 0):
                position.batch += 1 + step.left
                position.step += 1 + step.left
            if step.shown is not None:
                mb._engine.show(mb, step.shown)
            self._stepped(step.losses, step.batch.size, step)
            if self.ended() and not step.left:
                return
            if step.shown is None:
                self.interrupts.check()
        if failed is not None:
            raise failed

    def _read(self, items: list[Any]) -> tuple[list[Batch], Exception | None]:
        """The batches up to one that cannot be read, and why."""
        batches: list[Batch] = []
        for item in items:
            if isinstance(item, _Failure):
                return batches, item.error
            try:
                batches.append(self.reader(item))
            except Exception as error:
                if not batches:
                    raise
                return batches, error
        return batches, None

    def _stepped(self, losses: Tensor, size: int, step: Step | None = None) -> None:
        """After a step: the schedule, and the callbacks."""
        if self.per_step:
            self._schedule(losses)
        if len(self.pack):
            event, position, left = self.event, self.position, step.left if step else 0
            event.losses, event.batch = losses, position.batch - left - 1
            event.batch_size = size
            self.tell("on_train_step", left)

    def _groups(self) -> Iterator[list[Any]]:
        """The batches of the epoch that are left, those of one optimizer step together."""
        position = self.position
        passed = position.batch
        if not passed:
            parts: tuple[Any, ...] = (self.loader, getattr(self.loader, "sampler", None))
            for part in parts:
                if hasattr(part, "set_epoch"):
                    part.set_epoch(position.epoch)
            if hasattr(self.reader.router, "start_epoch"):
                self.reader.router.start_epoch()
            position.begin_batches()
        iterator = iter(self.loader)
        for number in range(passed):
            if next(iterator, self) is self:
                raise ModelBatchError(
                    f"this epoch is to go on after {passed} batches, but the loader yields only "
                    f"{number}: it is not the one that the checkpoint was made with"
                )
        position.replayed()
        while not position.trained:
            position.fetching = True
            group: list[Any] = []
            size = self.accumulate if self.accumulate > 1 else self.blocks.size
            try:
                while len(group) < size:
                    group.append(next(iterator))
            except StopIteration:
                pass
            except Exception as error:
                # The workers of a loader get the Ctrl-C as well, and end.
                if self.interrupts.count:
                    raise KeyboardInterrupt from error
                if self.accumulate > 1 or not group:
                    raise
                group.append(_Failure(error))  # after the batches that came before it
            position.fetching = False
            if not group:
                return
            yield group

    def _finish(self, start: float) -> None:
        """Validate, record and announce an epoch, and step the schedule."""
        mb, position, event = self.mb, self.position, self.event
        position.trained = True
        results = position.totals.means()
        if self.val_loader is not None:
            position.begin_validation()
            self._validating = True
            try:
                results |= validate(self, self.val_loader)
            finally:
                self._validating = False
        device_rows = torch.stack(list(results.values()))
        # the one transfer of an epoch
        self._rows = dict(zip(results, device_rows.to("cpu", copy=True)))
        history = dict(self._rows)
        history["lr"] = torch.tensor(position.rates, dtype=torch.float64)
        history["active"] = torch.tensor(mb._active)
        self.results = dict(zip(results, device_rows))
        event.losses, event.metrics = None, self.results
        event.batch = max(position.batch - 1, 0)
        interrupted = None
        position.history.append(history, time.perf_counter() - start)
        try:
            self.tell("on_epoch_end")
        except KeyboardInterrupt as error:  # the epoch is over, so it must not be resumed
            interrupted = error
        if not self.per_step:
            self._schedule(self._rows.get("val_loss", self._rows["loss"]))
        position.next_epoch()
        if interrupted is not None:
            raise interrupted

    def _schedule(self, losses: Tensor) -> None:
        """One step of the schedules; `losses` `[M]` are for those that watch a metric."""
        scheduler: Any = self.scheduler
        if scheduler is None:
            return
        if isinstance(scheduler, PerModelLRScheduler):
            scheduler.step(losses if any(scheduler._takes_metrics) else None)
        elif "metrics" in inspect.signature(scheduler.step).parameters:
            counted = losses.isfinite() & self.mb.active.to(losses.device)
            scheduler.step(losses[counted].mean().item())
        else:
            scheduler.step()


class _Failure:
    """In the place of a batch that a loader failed to yield."""

    def __init__(self, error: Exception):
        self.error = error


def _as_pack(callbacks: Any, progress: bool) -> CallbackPack:
    if isinstance(callbacks, str | Mapping) or not isinstance(
        callbacks, Callback | Iterable | None
    ):
        raise ModelBatchError(
            f"callbacks must be a list of callbacks, got {type(callbacks).__name__}"
        )
    pack = callbacks if isinstance(callbacks, CallbackPack) else CallbackPack(callbacks)
    if not progress:
        return pack
    from ..callbacks import ProgressBar

    given: Sequence[Callback] = list(pack)
    if any(isinstance(callback, ProgressBar) for callback in given):
        return pack
    # a new pack: the user's own is used again without it
    return CallbackPack([*given, ProgressBar()])


def _rates(optimizer: Optimizer) -> list[float]:
    return [float(group.get("lr", torch.nan)) for group in optimizer.param_groups]
