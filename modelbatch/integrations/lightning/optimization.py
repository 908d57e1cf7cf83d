"""Optimizer and schedules: what Lightning does to one model, done to each of M."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ...optim import LockstepLBFGS, OptimizerFactory, PerModelLRScheduler
from .clipping import Clipping
from .errors import BundleConfigurationError

if TYPE_CHECKING:
    from ...batch import ModelBatch

__all__ = ["Optimization"]


class Optimization(Clipping):
    """The part of `BundleModule` that optimizes; see there."""

    bundle: "ModelBatch"
    per_model_metrics: dict[str, Tensor]
    lr_scheduler: Any
    lr_scheduler_kwargs: Any
    lr_scheduler_interval: str
    lr_scheduler_monitor: str
    _optimizer_cls: type[Optimizer] | None
    _configs: list[dict[str, Any]]
    _base_config: Mapping[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self._used_now: list[bool] | None = None  # who had a sample in the batch of this step
        self._used: list[bool] | None = None  # ... in those whose gradients are accumulated
        self._resting = contextlib.ExitStack()
        self._repeated = False  # the same batch is computed again, by a line search

    # ---- what the Trainer asks for

    def configure_optimizers(self) -> Any:
        """The optimizer with a parameter group per model, and the schedules if there are any.

        A subclass that overrides this returns what `OptimizerFactory` made, in any of the forms
        that Lightning takes.

        Raises:
            BundleConfigurationError: the module was given no `optimizer_cls`.
        """
        if self._optimizer_cls is None:
            raise BundleConfigurationError(
                f"{type(self).__name__} has no optimizer: give it lr_list= and optimizer_cls=, or"
                " override configure_optimizers"
            )
        factory = OptimizerFactory(self._optimizer_cls, self._base_config)
        optimizer = factory.create_optimizer(self.bundle, self._configs)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = OptimizerFactory.create_lr_scheduler(
            optimizer, self.lr_scheduler, self.lr_scheduler_kwargs
        )
        config: dict[str, Any] = {"scheduler": scheduler, "interval": self.lr_scheduler_interval}
        if any(scheduler._takes_metrics):
            config |= {"reduce_on_plateau": True, "monitor": self.lr_scheduler_monitor}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def lr_scheduler_step(self, scheduler: Any, metric: Any | None) -> None:
        """Steps the schedule of every model; one that watches a metric watches its own model's."""
        if not isinstance(scheduler, PerModelLRScheduler):
            super().lr_scheduler_step(scheduler, metric)
        elif any(scheduler._takes_metrics):
            scheduler.step(self._watched(scheduler))
        else:
            scheduler.step()

    def _watched(self, scheduler: PerModelLRScheduler) -> Tensor:
        """The numbers `[M]` that a scheduler's monitor names."""
        configs = self.trainer.lr_scheduler_configs
        monitor = next((own.monitor for own in configs if own.scheduler is scheduler), None)
        known = self.per_model_metrics
        for name in (monitor, (monitor or "").rpartition("/")[0]):
            if name in known:
                return known[name]
        raise BundleConfigurationError(
            f"the schedules watch {monitor!r}, of which there is no number for each model; there is"
            f" {', '.join(map(repr, known)) or 'none'}. log_per_model makes one"
        )

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clears the gradients; the bundle keeps their memory for the next backward."""
        self._used = None
        if optimizer is self.bundle.optimizer:
            self.bundle.zero_grad()
        else:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward of the loss of all models."""
        super().backward(loss, *args, **kwargs)
        now, self._used_now = self._used_now, None
        if now is not None:
            before = self._used or [False] * len(now)
            self._used = [a or b for a, b in zip(before, now, strict=True)]

    # ---- around a step, see `BundleLightningOptimizer`

    @contextlib.contextmanager
    def _stepping(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._resting.close()
            self._repeated = False
            self._forget_limits()

    def _closure(
        self, optimizer: Optimizer, closure: Callable[[], Any] | None
    ) -> Callable[[], Any] | None:
        """What computes the gradients, in the way that this optimizer wants it.

        Raises:
            BundleConfigurationError: LBFGS is to accumulate gradients.
        """
        if closure is None:
            return None
        if not isinstance(optimizer, LockstepLBFGS):

            def run() -> Any:
                result = closure()
                self._rest()
                return result

            return run
        if self.automatic_optimization and self.trainer.accumulate_grad_batches > 1:
            raise BundleConfigurationError(
                "LBFGS computes the same batch several times in a step, so it cannot accumulate"
                " the gradients of several batches"
            )

        def losses() -> Any:
            closure()
            self._repeated = True
            return self.bundle.latest_losses

        return self.bundle._closure_of_the_searching(losses)

    def _rest(self) -> None:
        """Lets the models rest that had no sample in any batch of the step."""
        used, self._used = self._used, None
        if used is not None and not all(used):
            weights = torch.tensor(used).unsqueeze(1)
            self._resting.enter_context(self.bundle.sample_weights(weights))
