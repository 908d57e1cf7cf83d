"""Choosing how a bundle's optimizer is computed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer

from ..errors import ModelBatchError
from .configs import separate_tensors
from .fused import build_fused_optimizer, suits
from .gradients import GradientViews
from .views import announce, build_view_optimizer

__all__ = ["build_optimizer"]


def build_optimizer(
    stacked: Mapping[str, nn.Parameter],
    models: Sequence[nn.Module],
    optimizer_cls: type[Optimizer],
    configs: Sequence[dict[str, Any]],
    *,
    active: Callable[[], Sequence[bool]],
    fallback: str = "silent",
) -> Optimizer:
    """Builds an optimizer of any torch class whose group i is model i.

    The classes in `RULES` update all models by one operator. Adafactor computes on the stacked
    tensors, and LBFGS searches for all models at once. Every other class, also a subclass of these,
    steps model by model.

    Args:
        stacked: the stacked parameters, contiguous `[M, *shape]` leaves under the models' own
            parameter names. The gradients arrive here.
        models: the M models; the parameters of models[i] are views `stacked[name].data[i]`.
        optimizer_cls: any class derived from `torch.optim.Optimizer`.
        configs: M dicts of its options, as `merge_configs` returns them.
        active: returns M flags: which models the optimizer may change. A model that is not active
            keeps every bit of its parameters and of its state.
        fallback: `"warn"`, `"error"` or `"silent"`: what to do if it steps model by model.

    Returns:
        An instance of a subclass of `optimizer_cls` (of `LockstepLBFGS` for LBFGS, which permits
        one group only) that has the methods of `PerModelOptimizer` in addition.

    Raises:
        ModelBatchError: stack, models and configs do not belong together, or torch refuses the
            parameters or options of a model; the message names the model.
        BatchingError: the class steps model by model and `fallback` is `"error"`.
    """
    views = GradientViews(stacked, models, active)
    if len(configs) != len(models):
        raise ModelBatchError(f"got {len(configs)} configs for {len(models)} models")
    if suits(optimizer_cls, views):
        return build_fused_optimizer(views, optimizer_cls, separate_tensors(configs))
    if not issubclass(optimizer_cls, LBFGS):
        announce(optimizer_cls, fallback, views.stacked)
    return build_view_optimizer(stacked, models, optimizer_cls, configs, active=active)
