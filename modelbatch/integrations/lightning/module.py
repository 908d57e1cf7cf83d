"""`BundleModule`: a LightningModule of M models."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from ...batch import _takes_a_number
from ...change import Change
from ...errors import ModelBatchError
from ...training.batches import Reader
from ...training.validation import check_metrics
from .arguments import bundle_of, configs_of, count_models, optimizer_class, plain_hparams
from .callback import BundleCallback
from .checkpointing import Checkpointing
from .refusals import check_module, check_trainer
from .steps import Steps

__all__ = ["BundleModule"]


class BundleModule(Steps, Checkpointing):
    """M independent models as one LightningModule, each trained as it would be alone.

    Give it what builds the models, or subclass it and override `build` and the steps:

        module = BundleModule(
            lambda i: nn.Linear(64, 10),
            lr_list=[1e-3, 1e-2, 1e-1],
            optimizer_cls=torch.optim.AdamW,
            metric_fns={"acc": accuracy},
        )
        Trainer(max_epochs=5, callbacks=[ModelCheckpoint(monitor="val_loss/best")]).fit(
            module, train_loader, val_loader
        )
        best = module.export_model(module.best_model("val_acc"))

    It trains on one device. `train_loss` is the mean over the models that train; its gradient for
    each model is that of the model's own loss. Logged are, for `train_loss` (every
    `log_every_n_steps` steps, and for the epoch as `train_loss_epoch`), `val_loss` and each metric:
    the mean under the name itself, `/best`, `/median` and `/worst` of a loss, and `/max`,
    `/median`, `/min` of anything else.

    Args:
        build: `build()` or `build(i)` returns model i; called here, at once.
        num_models: M; may be left out where another argument has M entries.
        models: the models themselves, instead of `build`.
        lr_list: M learning rates.
        optimizer_cls: a class of `torch.optim`, or its name.
        optimizer_kwargs: its other options, one dict for all models or M dicts.
        lr_scheduler: a class of `torch.optim.lr_scheduler`, M classes, or a function
            `build(optimizer_i, i)`; see `OptimizerFactory.create_lr_scheduler`.
        lr_scheduler_kwargs: the arguments of the class, one dict or M.
        lr_scheduler_interval: `"epoch"` or `"step"`.
        lr_scheduler_monitor: what `ReduceLROnPlateau` watches, of each model its own.
        loss_fn: one model's (outputs, targets) to one number, a mean over the batch.
        metric_fns: further such functions by name, for validation and test.
        router: a `DataRouter`, which decides which samples of a batch each model sees.
        gradient_clip_val: a limit for all models or M of them, if the Trainer has none.
        gradient_clip_algorithm: `"norm"` or `"value"`.
        model_hparams: M dicts of hyper-parameters that you want to see beside those of the
            optimizer, in the loggers and in checkpoints.
        log_models: what loggers get of every single model, every `log_every_n_steps` steps and
            after a validation: `"auto"` (histograms for TensorBoard and W&B, columns such as
            `train_loss_model_0` for other loggers), `"scalars"` (such columns for all) or `"none"`.
        **bundle_options: `shared_input`, `seeds`, `rng`, `fallback`, ... of `ModelBatch`.

    Attributes:
        bundle: the `ModelBatch`.
        per_model_metrics: the latest numbers `[M]` by name: `train_loss`, `val_loss`, `val_acc`.

    Raises:
        ModelBatchError: a bad argument; the message names the model.
        StructureMismatchError: the models differ in structure.
    """

    def __init__(
        self,
        build: Callable[..., nn.Module] | None = None,
        num_models: int | None = None,
        *,
        models: Sequence[nn.Module] | None = None,
        lr_list: Sequence[float] | Tensor | None = None,
        optimizer_cls: type[Optimizer] | str | None = None,
        optimizer_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        lr_scheduler: Any = None,
        lr_scheduler_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
        lr_scheduler_interval: str = "epoch",
        lr_scheduler_monitor: str = "val_loss",
        loss_fn: Callable[..., Tensor] = F.cross_entropy,
        metric_fns: Mapping[str, Callable[..., Tensor]] | None = None,
        router: Any = None,
        gradient_clip_val: float | Sequence[float] | None = None,
        gradient_clip_algorithm: str | None = None,
        model_hparams: Sequence[Mapping[str, Any]] | None = None,
        log_models: str = "auto",
        **bundle_options: Any,
    ) -> None:
        super().__init__()
        if lr_scheduler_interval not in ("epoch", "step"):
            raise ModelBatchError(
                f'lr_scheduler_interval must be "epoch" or "step", got {lr_scheduler_interval!r}'
            )
        if log_models not in ("auto", "scalars", "none"):
            raise ModelBatchError(
                f'log_models must be "auto", "scalars" or "none", got {log_models!r}'
            )
        if not callable(loss_fn):
            raise ModelBatchError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
        if build is not None and models is not None:
            raise ModelBatchError("give build= or models=, not both")
        self._build_model = build
        metric_fns = check_metrics(metric_fns)
        models = None if models is None else list(models)
        count = count_models(
            num_models,
            models=models,
            lr_list=lr_list,
            model_hparams=model_hparams,
            seeds=bundle_options.get("seeds"),
        )
        self._optimizer_cls = optimizer_class(optimizer_cls)
        self._configs, self._base_config = configs_of(
            count, self._optimizer_cls, lr_list, optimizer_kwargs
        )
        self.bundle = bundle_of(models, self.build, count, bundle_options)
        self._reader = Reader(self.bundle, router)
        self.loss_fn, self.metric_fns, self.router = loss_fn, metric_fns, router
        self.lr_scheduler, self.lr_scheduler_kwargs = lr_scheduler, lr_scheduler_kwargs
        self.lr_scheduler_interval = lr_scheduler_interval
        self.lr_scheduler_monitor = lr_scheduler_monitor
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm = gradient_clip_algorithm
        self.model_hparams = None if model_hparams is None else [dict(m) for m in model_hparams]
        self.log_models = log_models
        self.bundle.follow(self)
        if type(self) is BundleModule:
            self.save_hyperparameters(
                plain_hparams(count, self._optimizer_cls, lr_list, optimizer_kwargs, bundle_options)
            )

    def build(self, i: int) -> nn.Module:
        """Model i; a subclass overrides this, or gives `build=` to the constructor.

        It is called by the constructor: what it reads from `self` must be there by then.

        Raises:
            ModelBatchError: neither was done.
        """
        build = self._build_model
        if build is None:
            raise ModelBatchError(
                f"{type(self).__name__} has no models: give build= or models=, or override build"
            )
        return build(i) if _takes_a_number(build) else build()

    @property
    def num_models(self) -> int:
        """M."""
        return len(self.bundle)

    # ---- the models

    def export_model(self, i: int) -> nn.Module:
        """An independent copy of model i, for plain PyTorch.

        Args:
            i: which model.
        """
        return self.bundle.export(i)

    def models_changed(self, change: Change) -> None:
        """Follow the bundle when models leave or join."""
        fresh = dict(self._base_config)
        self._configs = change.pick(
            self._configs, lambda slot: {**fresh, **change.hyper.get(slot, {})}
        )
        if self.model_hparams is not None:
            self.model_hparams = change.pick(self.model_hparams, lambda slot: {})
        if isinstance(self.gradient_clip_val, Sequence):
            limits = list(self.gradient_clip_val)
            self.gradient_clip_val = change.pick(limits, lambda slot: limits[0])
        self._means.models_changed(change)
        self.per_model_metrics = {
            name: change.rows(own, torch.nan) for name, own in self.per_model_metrics.items()
        }
        for name in ("_used", "_used_now"):
            used = getattr(self, name)
            if used is not None:
                setattr(self, name, change.pick(used, lambda slot: False))

    # ---- Lightning

    def configure_callbacks(self) -> list[Callback]:
        """What follows the bundle. A subclass adds its own to those of `super()`.

        Raises:
            BundleConfigurationError: the Trainer is one that a bundle cannot have.
        """
        trainer: Any = self.trainer
        check_module(self)
        check_trainer(trainer)
        known = any(type(own) is BundleCallback for own in trainer.callbacks)
        return [] if known else [BundleCallback()]
