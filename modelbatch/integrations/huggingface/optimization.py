"""Optimizer, learning rate schedule and gradient clipping of a bundle under Trainer."""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_optimizer import is_optimizer_factory

from ...errors import ModelBatchError
from ...optim import (
    BundleGradScaler,
    OptimizerFactory,
    PerModelLRScheduler,
    clip_grad_norm_,
)
from ...optim.base import PerModelOptimizer
from .bundle import PreTrainedBundle
from .per_model_args import OWN_SCHEDULE, check_count

_Base: Any = object  # Trainer comes after the mixin

__all__ = ["OptimizationMixin", "PlateauOfEach"]


class PlateauOfEach(ReduceLROnPlateau):
    """`ReduceLROnPlateau` for each model by its own metric, in the form that Trainer knows.

    Args:
        each: the schedulers of the models, see `OptimizerFactory.create_lr_scheduler`.
        values: returns the models' values of the metric that Trainer is about to step with.
    """

    def __init__(self, each: Any, values: Any):
        self.each, self._values = each, values

    def step(self, metrics: Any, epoch: Any = None) -> None:  # type: ignore[override]
        """Step every model's scheduler; `metrics`, which is one number for all, is not used."""
        self.each.step(self._values())

    def get_last_lr(self) -> list[Any]:
        """The learning rates of all models."""
        return list(self.each.get_last_lr())

    def state_dict(self) -> dict[str, Any]:
        """That of all models."""
        return dict(self.each.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.each.load_state_dict(state_dict)


class WaitingOfEach:
    """The schedules of all models under float16: that of a model which skips its step waits.

    As Trainer's own does for its model, unless the optimizer is a fused one.

    Args:
        each: the schedules, see `OptimizerFactory.create_lr_scheduler`.
        skipped: says of each model whether its last step was skipped.
    """

    def __init__(self, each: PerModelLRScheduler, skipped: Callable[[], Sequence[bool]]):
        self.each, self._skipped = each, skipped

    def __getattr__(self, name: str) -> Any:
        return getattr(self.each, name)

    def step(self) -> None:
        """Step the schedules of the models whose weights have moved."""
        moved = [i for i, skipped in enumerate(self._skipped()) if not skipped]
        with warnings.catch_warnings():
            # accelerate puts methods of its own around the step, and takes torch's mark off it
            warnings.filterwarnings("ignore", message="Seems like `optimizer.step")
            self.each.step(models=moved)


def bundle_optimizer(optimizer: Any) -> PerModelOptimizer:
    """The bundle's own optimizer behind those that wrap it.

    Raises:
        ModelBatchError: there is none.
    """
    while not isinstance(optimizer, PerModelOptimizer):
        if not hasattr(optimizer, "optimizer"):
            raise ModelBatchError(
                f"a {type(optimizer).__name__} on stacked parameters would mix the models; make "
                "the optimizer with OptimizerFactory(...).create_optimizer(bundle, configs), or "
                "let the trainer make it"
            )
        optimizer = optimizer.optimizer
    return optimizer


class OptimizationMixin(_Base):
    """The part of `HFTrainerMixin` that steps the models."""

    model: PreTrainedBundle
    args_of_each: list[TrainingArguments]
    _own_optimizer_kwargs: Sequence[Mapping[str, Any]] | None
    optimizer: Any
    lr_scheduler: Any
    grad_norms: Tensor | None = None
    """The models' gradient norms `[M]` before clipping, of the last step."""
    _scales: Sequence[float] = ()
    """The models' loss scales before the step at hand, under float16."""

    def create_accelerator_and_postprocess(self) -> None:
        """As in Trainer; a gradient scaler has one scale per model."""
        super().create_accelerator_and_postprocess()
        scaler = self.accelerator.scaler
        if scaler is not None and not isinstance(scaler, BundleGradScaler):
            self.accelerator.scaler = BundleGradScaler(
                scaler.get_scale(),
                scaler.get_growth_factor(),
                scaler.get_backoff_factor(),
                scaler.get_growth_interval(),
                enabled=scaler.is_enabled(),
            )

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The bundle's optimizer: each model with the options that it would have alone."""
        if self.optimizer is None and self.model.optimizer is not None:
            self.optimizer = self.model.optimizer
        if self.optimizer is None:
            self.optimizer = self._made_optimizer()
        bundle_optimizer(self.optimizer)
        return self.optimizer

    def _made_optimizer(self) -> Optimizer:
        found = [self._optimizer_of(args) for args in self.args_of_each]
        optimizer_cls = found[0][0]
        if any(own is not optimizer_cls for own, _ in found):
            raise ModelBatchError("all models of a bundle have an optimizer of the same class")
        options = [options for _, options in found]
        for own, more in zip(options, self._own_optimizer_kwargs or ()):
            own.update(more)
        if is_optimizer_factory(optimizer_cls):
            return optimizer_cls()(self.model, **options[0])
        special = {"params", "model", "optimizer_dict"}.intersection(options[0])
        if special:
            raise ModelBatchError(
                f"optim={str(self.args.optim)!r} picks parameters by itself, which does not work "
                "on the stacked parameters of a bundle; choose another optimizer"
            )
        decays = "weight_decay" in inspect.signature(optimizer_cls).parameters
        if decays:
            for own, args in zip(options, self.args_of_each):
                own.setdefault("weight_decay", args.weight_decay)
        exempt: dict[str, dict[str, float]] = {}
        if decays and any(own["weight_decay"] for own in options):
            # by the user's own names, which are those of the first model
            decaying = set(self.get_decay_parameter_names(self.model.models[0]))
            names = (name for name, _ in self.model.named_parameters())
            exempt = {name: {"weight_decay": 0.0} for name in names if name not in decaying}
        factory = OptimizerFactory(optimizer_cls, parameter_options=exempt)
        return factory.create_optimizer(self.model, options)

    def _optimizer_of(self, args: TrainingArguments) -> tuple[Any, dict[str, Any]]:
        if self.optimizer_cls_and_kwargs is None:
            optimizer_cls, options = self.get_optimizer_cls_and_kwargs(args, self.model.models[0])
            return optimizer_cls, dict(options)
        optimizer_cls, options = self.optimizer_cls_and_kwargs
        if args.learning_rate != self.args.learning_rate:
            options = {**options, "lr": args.learning_rate}
        return optimizer_cls, dict(options)

    # ---- schedule

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LRScheduler:
        """Trainer's own schedule for all models, or one for each where theirs differ."""
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        own_schedules = any(
            getattr(args, name, None) != getattr(self.args, name, None)
            for args in self.args_of_each
            for name in OWN_SCHEDULE
        )
        plateau = self.args.lr_scheduler_type == "reduce_lr_on_plateau"
        inner: Any = bundle_optimizer(optimizer or self.optimizer)
        scaler = self.accelerator.scaler
        # of a fused optimizer, which skips steps by itself, accelerate does not know that it did
        fused = bool(inner.param_groups[0].get("fused"))
        waits = scaler is not None and scaler.is_enabled() and not fused
        if not own_schedules and not plateau and not waits:
            return super().create_scheduler(num_training_steps, optimizer)
        plateaus = {a.lr_scheduler_type == "reduce_lr_on_plateau" for a in self.args_of_each}
        if len(plateaus) > 1:
            raise ModelBatchError(
                "reduce_lr_on_plateau steps after evaluations and the others after batches, so "
                "all models of a bundle have it or none"
            )

        def build(optimizer_i: Optimizer, i: int) -> Any:
            args: Any = self.args_of_each[i]
            return get_scheduler(
                args.lr_scheduler_type,
                optimizer_i,
                num_warmup_steps=args.get_warmup_steps(num_training_steps),
                num_training_steps=num_training_steps,
                scheduler_specific_kwargs=args.lr_scheduler_kwargs,
            )

        each: Any = OptimizerFactory.create_lr_scheduler(inner, build)
        if plateau:
            each = PlateauOfEach(each, self._values_to_watch)
        elif waits:
            each = WaitingOfEach(each, self._skipped)
        self.lr_scheduler = each
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _skipped(self) -> list[bool]:
        """Whose gradients overflowed in the last step, which lowers a scale."""
        before, now = self._scales, self.accelerator.scaler.get_scale()
        return [new < old for new, old in zip(now, before, strict=True)]

    def _values_to_watch(self) -> Tensor:
        raise NotImplementedError

    # ---- clipping

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip every model by its own norm; returns the mean of the norms before."""
        limits = [self._limit(args.max_grad_norm) for args in self.args_of_each]
        self.accelerator.unscale_gradients()
        norms = clip_grad_norm_(self.model, limits)
        self.grad_norms = norms
        counted = torch.isfinite(norms) & self.model.active
        return torch.where(counted, norms, torch.zeros_like(norms)).sum() / counted.sum()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if isinstance(self.lr_scheduler, WaitingOfEach):
            self._scales = self.accelerator.scaler.get_scale()
        return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    @staticmethod
    def _limit(max_grad_norm: float | None) -> float:
        return math.inf if max_grad_norm is None or max_grad_norm <= 0 else float(max_grad_norm)


def check_optimizer_kwargs(value: Any, num_models: int) -> list[Mapping[str, Any]] | None:
    """M dicts of options, or None.

    Raises:
        ModelBatchError: they are something else.
    """
    if value is None:
        return None
    found = check_count("optimizer_kwargs", value, num_models)
    for i, own in enumerate(found):
        if not isinstance(own, Mapping):
            raise ModelBatchError(f"optimizer_kwargs[{i}] must be a dict, got {own!r}")
    return found
