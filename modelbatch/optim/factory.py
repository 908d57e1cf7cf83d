"""`OptimizerFactory`: one optimizer for a bundle, with options of its own for every model."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from ..errors import ModelBatchError
from .configs import merge_configs
from .scheduler import create_lr_scheduler

if TYPE_CHECKING:
    from ..batch import ModelBatch

__all__ = [
    "OptimizerFactory",
    "create_adam_configs",
    "create_lr_sweep_configs",
    "create_sgd_configs",
]


class OptimizerFactory:
    """Makes the optimizer of a bundle: a real torch optimizer with one parameter group per model.

    ```python
    factory = OptimizerFactory(torch.optim.AdamW, {"weight_decay": 0.01}, clip_grad_norm=1.0)
    optimizer = factory.create_optimizer(mb, [{"lr": 1e-3}, {"lr": 1e-2, "betas": (0.8, 0.99)}])
    ```

    Args:
        optimizer_cls: any class derived from `torch.optim.Optimizer`.
        base_config: options that all models share; those of a model's own config come first.
        clip_grad_norm: the largest 2-norm of each model's gradient, one number or M; applied in
            `step`. A model's norm is over its own parameters alone.
        clip_grad_value: the largest absolute value of a gradient's element, one number or M.
        grad_scaler: the `BundleGradScaler` (or torch's `GradScaler`) that `mb.train_step` uses.
        parameter_options: options that single parameters have in all models, by the parameter's
            name, such as `{"bias": {"weight_decay": 0.0}}`. They come before those of the groups.

    Raises:
        ModelBatchError: a bad class or limit, or both kinds of clipping at once.
    """

    create_lr_scheduler = staticmethod(create_lr_scheduler)

    def __init__(
        self,
        optimizer_cls: type[Optimizer],
        base_config: Mapping[str, Any] | None = None,
        *,
        clip_grad_norm: float | Sequence[float] | Tensor | None = None,
        clip_grad_value: float | Sequence[float] | Tensor | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        parameter_options: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
            raise ModelBatchError(
                f"optimizer_cls must be a class derived from torch.optim.Optimizer, got "
                f"{optimizer_cls!r}"
            )
        if base_config is not None and not isinstance(base_config, Mapping):
            raise ModelBatchError(
                f"base_config must be a dict of options, got {type(base_config).__name__}"
            )
        if clip_grad_norm is not None and clip_grad_value is not None:
            raise ModelBatchError("choose one of clip_grad_norm and clip_grad_value")
        if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
            raise ModelBatchError(
                f"grad_scaler must be a BundleGradScaler or a torch.amp.GradScaler, got "
                f"{type(grad_scaler).__name__}"
            )
        clips = clip_grad_norm is not None or clip_grad_value is not None
        if issubclass(optimizer_cls, LBFGS) and (clips or grad_scaler is not None):
            raise ModelBatchError(
                "LBFGS evaluates its closure many times in a step, so it can neither clip nor "
                "scale gradients; do so inside the closure"
            )
        self.optimizer_cls = optimizer_cls
        self.base_config = dict(base_config or {})
        self.clip_grad_norm = clip_grad_norm
        self.clip_grad_value = clip_grad_value
        self.grad_scaler = grad_scaler
        self.parameter_options = parameter_options

    def create_optimizer(
        self, mb: "ModelBatch", configs: Sequence[Mapping[str, Any] | None] | None = None
    ) -> Optimizer:
        """Builds the optimizer; it becomes `mb.optimizer`.

        Args:
            mb: the bundle.
            configs: M dicts of options, one per model; by default `base_config` for all.

        Returns:
            A torch optimizer whose `param_groups[i]` belongs to model i.

        Raises:
            ModelBatchError: a wrong number of configs, or an option that the class does not know
                or refuses; the message names model and option, and the bundle is as before.
        """
        if configs is not None and (
            isinstance(configs, (Mapping, str)) or not isinstance(configs, Sequence)
        ):
            raise ModelBatchError(
                f"configs must be {mb.num_models} dicts, one per model, got "
                f"{type(configs).__name__}; options for all models are base_config"
            )
        if configs is not None and len(configs) != mb.num_models:
            raise ModelBatchError(f"got {len(configs)} configs for {mb.num_models} models")
        for i, config in enumerate(configs or ()):
            if config is not None and not isinstance(config, Mapping):
                raise ModelBatchError(
                    f"model {i}: a config must be a dict, got {type(config).__name__}"
                )
        own = [config or {} for config in configs] if configs else [{}] * mb.num_models
        merged = merge_configs(
            self.optimizer_cls, mb.num_models, None, [{**self.base_config, **c} for c in own]
        )
        clips = {
            name: limits
            for name in ("clip_grad_norm", "clip_grad_value")
            if (limits := per_model_limits(name, getattr(self, name), mb.num_models)) is not None
        }
        return mb._build_optimizer(
            self.optimizer_cls,
            merged,
            clips,
            self.grad_scaler,
            self.base_config,
            self.parameter_options,
        )


def per_model_limits(name: str, value: Any, num_models: int) -> list[float] | None:
    """One limit of a clip per model.

    Raises:
        ModelBatchError: a wrong count, or a limit that is no number above 0.
    """
    if value is None:
        return None
    if isinstance(value, Tensor):
        value = value.tolist()
    values = [value] * num_models if isinstance(value, Real) else list(value)
    if len(values) != num_models:
        raise ModelBatchError(f"{name} has {len(values)} values for {num_models} models")
    for i, limit in enumerate(values):
        if isinstance(limit, bool) or not isinstance(limit, Real):
            raise ModelBatchError(f"model {i}: {name} must be a number, got {limit!r}")
        if math.isnan(limit) or limit <= 0:
            raise ModelBatchError(f"model {i}: {name} must be above 0, got {limit}")
    return [float(limit) for limit in values]


def create_sgd_configs(
    learning_rates: Sequence[float], momentum: float = 0.9, weight_decay: float = 1e-4
) -> list[dict[str, Any]]:
    """One SGD config per learning rate.

    Args:
        learning_rates: M learning rates.
        momentum: for all models.
        weight_decay: for all models.

    Returns:
        M dicts for `OptimizerFactory.create_optimizer`.
    """
    return [
        {"lr": float(lr), "momentum": momentum, "weight_decay": weight_decay}
        for lr in learning_rates
    ]


def create_adam_configs(
    learning_rates: Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """One Adam config per learning rate.

    Args:
        learning_rates: M learning rates.
        betas: for all models.
        eps: for all models.
        weight_decay: for all models.

    Returns:
        M dicts for `OptimizerFactory.create_optimizer`.
    """
    return [
        {"lr": float(lr), "betas": betas, "eps": eps, "weight_decay": weight_decay}
        for lr in learning_rates
    ]


def create_lr_sweep_configs(
    min_lr: float, max_lr: float, num_models: int, scale: str = "log"
) -> list[dict[str, float]]:
    """Configs with evenly spaced learning rates, both ends included.

    Args:
        min_lr: the first learning rate.
        max_lr: the last one.
        num_models: M; with 1 it is `min_lr`.
        scale: `"log"` (equal ratios) or `"linear"` (equal differences).

    Returns:
        M dicts with the key `"lr"`.

    Raises:
        ModelBatchError: an unknown scale, a count below 1, or an end that is not finite, is
            negative, or is 0 on a logarithmic scale.
    """
    if scale not in ("log", "linear"):
        raise ModelBatchError(f'scale must be "log" or "linear", got {scale!r}')
    if isinstance(num_models, bool) or not isinstance(num_models, int) or num_models < 1:
        raise ModelBatchError(f"num_models must be a positive integer, got {num_models!r}")
    for name, lr in (("min_lr", min_lr), ("max_lr", max_lr)):
        if not math.isfinite(lr) or lr < 0 or (scale == "log" and lr == 0):
            raise ModelBatchError(f"{name} must be positive and finite, got {lr}")
    last = max(num_models - 1, 1)

    def rate(i: int) -> float:
        share = i / last
        if scale == "log":
            return math.exp((1 - share) * math.log(min_lr) + share * math.log(max_lr))
        return (1 - share) * min_lr + share * max_lr

    rates = [rate(i) for i in range(num_models)]
    # The ends as they were given, not to rounding.
    rates[-1], rates[0] = float(max_lr), float(min_lr)
    return [{"lr": lr} for lr in rates]
