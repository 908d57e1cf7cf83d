"""What a Trainer does beside, when it trains a bundle."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision

from ...optim import BundleGradScaler, PerModelLRScheduler
from .errors import BundleConfigurationError
from .loggers import log_models, log_summary
from .optimizer import wrap
from .refusals import check_optimizers

__all__ = ["BundleCallback"]


class BundleCallback(Callback):
    """Follows a bundle; `BundleModule.configure_callbacks` adds it to the Trainer.

    It gives every model a loss scale of its own in `precision="16-mixed"`, logs what is of interest
    about single models, and ends the training when all models are frozen.
    """

    def __init__(self) -> None:
        self._stock_scaler: Any = None
        self._logged_step = -1

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put a scaler with a scale per model in the place of torch's."""
        plugin = trainer.precision_plugin
        if not isinstance(plugin, MixedPrecision) or self._stock_scaler is not None:
            return
        stock = plugin.scaler
        if stock is None or type(stock) not in (torch.amp.GradScaler, torch.cuda.amp.GradScaler):
            return
        self._stock_scaler = stock
        plugin.scaler = BundleGradScaler(
            init_scale=stock._init_scale,
            growth_factor=stock.get_growth_factor(),
            backoff_factor=stock.get_backoff_factor(),
            growth_interval=stock.get_growth_interval(),
            enabled=stock.is_enabled(),
        )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the Trainer as it was: it may train something else next."""
        if self._stock_scaler is not None:
            trainer.precision_plugin.scaler = self._stock_scaler
            self._stock_scaler = None
        trainer.callbacks = [own for own in trainer.callbacks if own is not self]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check what `configure_optimizers` returned."""
        check_optimizers(pl_module.bundle, trainer.optimizers)
        pl_module._means.to(pl_module.device)
        wrappers = pl_module.optimizers()
        for wrapper in wrappers if isinstance(wrappers, list) else [wrappers]:
            if isinstance(wrapper, LightningOptimizer):
                wrap(wrapper)
        for config in trainer.lr_scheduler_configs:
            own = config.scheduler
            watches = isinstance(own, PerModelLRScheduler) and any(own._takes_metrics)
            if watches and pl_module.automatic_optimization:
                if config.monitor is None:
                    raise BundleConfigurationError(
                        "configure_optimizers must include a monitor when a model has a"
                        " ReduceLROnPlateau schedule, for example 'monitor': 'val_loss' beside"
                        " 'scheduler'"
                    )
                config.reduce_on_plateau = True

    # ---- training

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to sum up, and to route. Lightning leaves this out where an epoch goes on."""
        pl_module._means.clear("train")
        if hasattr(pl_module.router, "start_epoch"):
            pl_module.router.start_epoch()

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch, for its size."""
        pl_module._batch, pl_module._dataloader_idx = batch, None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log every model now and then; stop when none is left that trains."""
        pl_module._batch = None
        step = trainer.global_step
        if step != self._logged_step and pl_module._due():
            self._logged_step = step
            if pl_module.log_models != "none":
                log_models(trainer, pl_module, pl_module.per_model_metrics, "train", step - 1)
        _stop_if_nobody_trains(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the means of the epoch."""
        pl_module._log_epoch("train")
        _stop_if_nobody_trains(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Log what became of each model."""
        if pl_module.log_models != "none" and not trainer.fast_dev_run:
            log_summary(trainer, pl_module)

    # ---- validation and test

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to sum up."""
        pl_module._means.clear("val")

    def on_validation_batch_start(
        self,
        trainer: Any,
        pl_module: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch, for its size, and the number of its loader if there are several."""
        _keep(pl_module, batch, dataloader_idx, trainer.num_val_batches)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the results."""
        results = pl_module._log_epoch("val")
        if pl_module.log_models != "none" and not trainer.sanity_checking:
            log_models(trainer, pl_module, results, "val", max(trainer.global_step - 1, 0))

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to sum up."""
        pl_module._means.clear("test")

    def on_test_batch_start(
        self,
        trainer: Any,
        pl_module: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """As for a validation."""
        _keep(pl_module, batch, dataloader_idx, trainer.num_test_batches)

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the results."""
        results = pl_module._log_epoch("test")
        if pl_module.log_models != "none":
            log_models(trainer, pl_module, results, "test", max(trainer.global_step - 1, 0))


def _keep(pl_module: Any, batch: Any, dataloader_idx: int, num_batches: Sequence[Any]) -> None:
    pl_module._batch = batch
    pl_module._dataloader_idx = dataloader_idx if len(num_batches) > 1 else None


def _stop_if_nobody_trains(trainer: Any, pl_module: Any) -> None:
    if not any(pl_module.bundle._active):
        trainer.should_stop = True
