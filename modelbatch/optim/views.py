"""The universal optimizer: any torch optimizer class, applied to per-model views of the stack."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ..change import Change
from ..errors import BatchingError, FallbackWarning, ModelBatchError
from ..fallback import users_stacklevel
from .adafactor import AdafactorStep
from .base import PerModelOptimizer, mixed_class, unhooked_step
from .clip import clip_factor, grad_stats, scale_slices_
from .configs import separate_tensors, stock_optimizer
from .gradients import GradientViews
from .joining import Joining
from .lockstep import LockstepLBFGS

__all__ = ["ViewOptimizer", "announce", "build_view_optimizer"]


def announce(optimizer_cls: type[Optimizer], fallback: str, stacked: Sequence[Tensor] = ()) -> None:
    """Says that a class is stepped model by model, where that is so.

    Args:
        optimizer_cls: a class that no operator computes for all models.
        fallback: `"warn"`, `"error"` or `"silent"`.
        stacked: the stacked parameters. Adafactor is computed for all models at once, but not in
            half precision.

    Raises:
        BatchingError: it is so, and `fallback` is `"error"`.
    """
    if fallback == "silent" or issubclass(optimizer_cls, LBFGS):
        return
    if AdafactorStep.suits(optimizer_cls, stacked):
        return
    message = (
        f"{optimizer_cls.__name__} cannot be batched (there is no rule that updates all models at "
        f"once); it steps model by model"
    )
    if fallback == "error":
        raise BatchingError(message)
    warnings.warn(message, FallbackWarning, stacklevel=users_stacklevel())


def build_view_optimizer(
    stacked: Mapping[str, nn.Parameter],
    models: Sequence[nn.Module],
    optimizer_cls: type[Optimizer],
    configs: Sequence[dict[str, Any]],
    *,
    active: Callable[[], Sequence[bool]],
) -> Optimizer:
    """Builds an optimizer of any torch class whose group i is model i.

    Args:
        stacked: the stacked parameters, contiguous `[M, *shape]` leaves under the models' own
            parameter names. The gradients arrive here.
        models: the M models; the parameters of models[i] are views `stacked[name].data[i]`.
        optimizer_cls: any class derived from `torch.optim.Optimizer`.
        configs: M dicts of its options, as `merge_configs` returns them.
        active: returns M flags: which models the optimizer may change. A model that is not active
            keeps every bit of its parameters and of its state.

    Returns:
        An instance of a subclass of `optimizer_cls` (of `LockstepLBFGS` for LBFGS, which permits
        one group only) that has the methods of `PerModelOptimizer` in addition.

    Raises:
        ModelBatchError: stack, models and configs do not belong together, or torch refuses the
            parameters or options of a model; the message names the model.
    """
    views = GradientViews(stacked, models, active)
    if len(configs) != len(models):
        raise ModelBatchError(f"got {len(configs)} configs for {len(models)} models")
    configs = separate_tensors(configs)
    if issubclass(optimizer_cls, LBFGS):
        return LockstepLBFGS(views, optimizer_cls, configs)
    own: type[ViewOptimizer] = mixed_class(
        ViewOptimizer,
        optimizer_cls,  # type: ignore[arg-type]
    )
    return own(views, optimizer_cls, configs)


class ViewOptimizer(PerModelOptimizer):
    """Mixin that makes a torch optimizer class step on M models at once.

    The class it is mixed into does the arithmetic, once per group, exactly as for one model. This
    one only hands it the gradients, unscales and clips them, and keeps models apart under a
    gradient scaler. For Adafactor, `AdafactorStep` does the same arithmetic on all models at once.

    Args:
        views: the models' parameters and gradients.
        optimizer_cls: any class derived from `torch.optim.Optimizer`.
        configs: M dicts of its options.

    Raises:
        ModelBatchError: torch refuses the parameters or options of a model.
    """

    # GradScaler then leaves unscaling and skipping to `step`, which does both per model.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        views: GradientViews,
        optimizer_cls: type[Optimizer],
        configs: list[dict[str, Any]],
    ) -> None:
        self._views = views
        self._optimizer_cls = optimizer_cls
        self._configs = configs
        self._at_once: AdafactorStep | None = None
        #: M limits of the gradients' norms or absolute values; `step` clips by one of the two.
        self.clip_grad_norm: Sequence[float] | None = None
        self.clip_grad_value: Sequence[float] | None = None
        #: Float64 `[M]`, what the last step clipped by norm; None if it did not.
        self.last_grad_norms = None
        # Each model's stock optimizer completes its options, refuses what torch refuses, and makes
        # whatever state the class creates at construction.
        alone = [
            stock_optimizer(optimizer_cls, params, config, i)
            for i, (params, config) in enumerate(zip(views.params, configs, strict=True))
        ]
        super().__init__([dict(stock.param_groups[0]) for stock in alone], **configs[0])
        self.state.clear()
        for stock in alone:
            self.state.update(stock.state)
        if AdafactorStep.suits(optimizer_cls, views.stacked):
            self._at_once = AdafactorStep(self, views)
        self._complete = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every active model with its own options.

        Args:
            closure: computes the gradients of all models anew and returns the loss; called as
                often as the optimizer class calls it, once as a rule.

        Returns:
            What the closure returned, or None without one.
        """
        views = self._views
        views.exclude(self._models_to_skip())
        # Out of sight of the update, which would do the same again for all models alike.
        scaling: dict[str, Any] = {
            name: self.__dict__.pop(name)
            for name in ("found_inf", "grad_scale")
            if name in self.__dict__
        }
        try:
            if scaling.get("grad_scale") is not None:
                self._unscale(scaling["grad_scale"])
            result = self._update(closure)
        finally:
            views.exclude(())
            self.__dict__.update(scaling)
        # The update went through views with version counters of their own. Autograd must learn
        # that the stacked parameters it saved have changed.
        torch.autograd.graph.increment_version(views.stacked)
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` of a bundle of as many models gave."""
        super().load_state_dict(state_dict)
        self._forget()

    def load_model_state_dict(  # noqa: D102 - inherited
        self, i: int, state_dict: Mapping[str, Any]
    ) -> None:
        super().load_model_state_dict(i, state_dict)
        self._forget()

    def _change_state(
        self, change: Change, joining: Joining, left: Sequence[Sequence[nn.Parameter]]
    ) -> None:
        super()._change_state(change, joining, left)
        self._forget()

    def _forget(self) -> None:
        if self._at_once is not None:
            self._at_once.forget()

    def _update(self, closure: Callable[[], Any] | None) -> Any:
        views, update = self._views, unhooked_step(self._optimizer_cls)
        result = None
        if closure is not None and self._at_once is None:

            def evaluate() -> Any:
                loss = closure()
                self._clip()
                views.refresh()
                return loss

            views.refresh()
            return update(self, evaluate)
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self._clip()
        if self._at_once is None or not self._at_once.step(self.__dict__["param_groups"]):
            views.refresh()
            update(self)
        elif views.shown:
            views.refresh()
        return result

    @torch.no_grad()
    def _unscale(self, scale: Tensor) -> None:
        """Divides the stacked gradients by one scale, or by one for each model."""
        gradients = self._views.gradients
        if any(grad.dtype == torch.float16 for grad in gradients):
            raise ValueError("Attempting to unscale FP16 gradients.")
        # The reciprocal in double precision, as GradScaler takes it.
        inverse = scale.double().reciprocal().float()
        if scale.dim() > 0:
            scale_slices_(gradients, inverse, [True] * self._views.num_models)
            return
        for grad in gradients:
            grad.mul_(inverse.to(grad.device))

    @torch.no_grad()
    def _clip(self) -> None:
        """Clips the stacked gradients of the models that are about to step, each by its own."""
        self.last_grad_norms = None
        limits = self.clip_grad_norm
        if limits is None:
            limits = self.clip_grad_value
        gradients = self._views.gradients
        if limits is None or not gradients:
            return
        active = self._views.active_flags()
        bounds = torch.tensor(limits, dtype=torch.float64, device=gradients[0].device)
        if self.clip_grad_norm is not None:
            squares, _ = grad_stats(gradients, self._views.num_models)
            wide = any(grad.dtype in (torch.float64, torch.complex128) for grad in gradients)
            dtype = torch.float64 if wide else torch.float32
            self.last_grad_norms, factor = clip_factor(squares, bounds, dtype=dtype)
            scale_slices_(gradients, factor, active)
            return
        flags = torch.tensor(active, device=bounds.device)
        bounds = torch.where(flags, bounds, torch.inf)
        for grad in gradients:
            if grad.is_sparse or grad.is_complex():
                kind = "sparse" if grad.is_sparse else "complex"
                raise ModelBatchError(f"{kind} gradients cannot be clipped by value")
            column = bounds.to(grad.device, grad.dtype).reshape(-1, *[1] * (grad.dim() - 1))
            grad.clamp_(-column, column)
