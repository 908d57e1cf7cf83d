"""The universal optimizer: any torch optimizer class, applied to per-model views of the stack."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer

from ..errors import ModelBatchError
from .adam_loop import AdamLoop
from .base import PerModelOptimizer, unhooked_step
from .configs import separate_tensors, stock_optimizer
from .gradients import GradientViews
from .lockstep import LockstepLBFGS

__all__ = ["ViewOptimizer", "build_view_optimizer"]


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
    return _view_class(optimizer_cls)(  # type: ignore[arg-type]
        views, optimizer_cls, configs
    )


class ViewOptimizer(PerModelOptimizer):
    """Mixin that makes a torch optimizer class step on M models at once.

    The class it is mixed into does the arithmetic, once per group, exactly as for one model. This
    one only hands it the gradients, keeps models apart under a `GradScaler`, and turns torch's
    fused CPU kernels on where they are the fastest and the user left the choice open.
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
        self._auto_fused = [False] * len(configs)
        self._fused_pattern: Any = None  # of gradients, that the fused kernels are known to take
        self._adam = AdamLoop(self) if AdamLoop.suits(optimizer_cls) else None
        # Each model's stock optimizer completes its options, refuses what torch refuses, and makes
        # whatever state the class creates at construction.
        alone = []
        for i, (params, config) in enumerate(zip(views.params, configs, strict=True)):
            stock = stock_optimizer(optimizer_cls, params, config, i)
            if _fused_is_fastest(optimizer_cls, stock.param_groups[0]):
                self._auto_fused[i] = True
                stock = stock_optimizer(optimizer_cls, params, {**config, "fused": True}, i)
            alone.append(stock)
        super().__init__([dict(stock.param_groups[0]) for stock in alone], **configs[0])
        self.state.clear()
        for stock in alone:
            self.state.update(stock.state)
        self._complete = True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every active model with its own options.

        Args:
            closure: computes the gradients of all models anew and returns the loss; called as
                often as the optimizer class calls it, once as a rule.

        Returns:
            What the closure returned, or None without one.
        """
        self._refresh()
        if closure is None:
            arguments: tuple[Callable[[], Any], ...] = ()
        else:

            def evaluate() -> Any:
                loss = closure()
                self._refresh()
                return loss

            arguments = (evaluate,)
        update = unhooked_step(self._optimizer_cls)
        if "found_inf" in self.__dict__ or "grad_scale" in self.__dict__:
            result = self._scaled_step(update, arguments)
        elif not (self._adam is not None and all(self._auto_fused) and closure is None) or (
            not self._adam.step(self.__dict__["param_groups"], self._views.pattern)
        ):
            result = update(self, *arguments)
        else:
            result = None
        # The update went through views with version counters of their own. Autograd must learn
        # that the stacked parameters it saved have changed.
        torch.autograd.graph.increment_version(self._views.stacked)
        return result

    def state_dict(self) -> dict[str, Any]:
        """The state of the whole bundle, in torch's form, with M parameter groups."""
        state_dict = super().state_dict()
        for group, automatic in zip(state_dict["param_groups"], self._auto_fused, strict=True):
            _forget_automatic(group, automatic)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` of a bundle of as many models gave."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        automatic = [
            _choose_fused(self._optimizer_cls, group, params)
            for group, params in zip(groups, self._views.params, strict=False)
        ]
        super().load_state_dict({**state_dict, "param_groups": groups})
        self._auto_fused = automatic
        self._forget()

    def model_state_dict(self, i: int) -> dict[str, Any]:  # noqa: D102 - inherited
        state_dict = super().model_state_dict(i)
        _forget_automatic(state_dict["param_groups"][0], self._auto_fused[i])
        return state_dict

    def load_model_state_dict(  # noqa: D102 - inherited
        self, i: int, state_dict: Mapping[str, Any]
    ) -> None:
        i = self._model_index(i)
        group = self._checked_group(i, state_dict)
        automatic = _choose_fused(self._optimizer_cls, group, self._views.params[i])
        super().load_model_state_dict(i, {**state_dict, "param_groups": [group]})
        self._auto_fused[i] = automatic
        self._forget()

    def _forget(self) -> None:
        self._fused_pattern = None
        if self._adam is not None:
            self._adam.forget()

    def _refresh(self) -> None:
        self._views.refresh()
        if any(self._auto_fused) and self._views.pattern != self._fused_pattern:
            self._leave_fused_where_impossible()
            self._fused_pattern = self._views.pattern

    def _leave_fused_where_impossible(self) -> None:
        """Returns to torch's default where the fused kernels cannot do what the others can.

        They take no sparse gradients, and the one of SGD needs that either all parameters with a
        gradient have a momentum buffer or none.
        """
        sparse = "sparse" in self._views.pattern[1]
        for i, group in enumerate(self.__dict__["param_groups"]):
            if not self._auto_fused[i]:
                continue
            impossible = sparse
            if self._optimizer_cls is SGD and not impossible:
                buffers = {
                    self.state.get(param, {}).get("momentum_buffer") is None
                    for param in group["params"]
                    if param.grad is not None
                }
                impossible = len(buffers) > 1
            if impossible:
                group["fused"] = None
                self._auto_fused[i] = False

    def _scaled_step(
        self, update: Callable[..., Any], arguments: tuple[Callable[[], Any], ...]
    ) -> Any:
        """A step under `torch.amp.GradScaler`, which skips the overflowing models alone.

        The scaler looks at all gradients at once, and its `found_inf` is one number. Where it says
        that something overflowed, this asks which models did, and hides their gradients from the
        update. Costs one copy to the host, as the scaler's own way does.
        """
        # Out of sight of the update, which would do the same again for all models alike.
        scaling: dict[str, Any] = {
            name: self.__dict__.pop(name)
            for name in ("found_inf", "grad_scale")
            if name in self.__dict__
        }
        scale = scaling.get("grad_scale")
        views = self._views
        try:
            if scale is not None:
                fused = bool(self.__dict__["param_groups"][0].get("fused"))
                _unscale(views.gradients, scale, fused)
            if scaling.get("found_inf"):
                # None of them: what overflowed was clipped to finite values after unscale_.
                views.exclude(views.nonfinite_models() or range(views.num_models))
                self._refresh()
            return update(self, *arguments)
        finally:
            views.exclude(())
            self.__dict__.update(scaling)


@cache
def _view_class(optimizer_cls: type[Optimizer]) -> type[ViewOptimizer]:
    """One subclass per optimizer class, which calls itself by that class's name."""
    own = {
        "__module__": optimizer_cls.__module__,
        "__qualname__": optimizer_cls.__qualname__,
        "__doc__": optimizer_cls.__doc__,
    }
    metaclass: Any = type(optimizer_cls)
    return metaclass(optimizer_cls.__name__, (ViewOptimizer, optimizer_cls), own)


def _fused_is_fastest(optimizer_cls: type[Optimizer], group: Mapping[str, Any]) -> bool:
    """Whether torch's fused CPU kernel suits a group, and the user left the choice open.

    Subclasses are left alone, for their step may differ. Plain SGD is faster without: its update
    is a single operation.
    """
    if optimizer_cls not in (Adam, AdamW, SGD, Adagrad):
        return False
    if group.get("foreach") is not None or group.get("fused") is not None:
        return False
    if group.get("capturable") or (optimizer_cls is SGD and not group.get("momentum")):
        return False
    options = (group.get("lr"), *group.get("betas", ()))
    return not any(isinstance(option, Tensor) for option in options) and all(
        param.device.type == "cpu" and param.dtype in (torch.float32, torch.float64)
        for param in group["params"]
    )


def _choose_fused(
    optimizer_cls: type[Optimizer], saved: dict[str, Any], params: list[nn.Parameter]
) -> bool:
    """Sets `fused` in a saved group where it is the fastest; says whether it did."""
    chosen = _fused_is_fastest(optimizer_cls, {**saved, "params": params})
    if chosen:
        saved["fused"] = True
    return chosen


def _forget_automatic(group: dict[str, Any], automatic: bool) -> None:
    # A saved state names what the user chose, not what suited this machine.
    if automatic and group["fused"]:
        group["fused"] = None


@torch.no_grad()
def _unscale(gradients: list[Tensor], scale: Tensor, fused: bool) -> None:
    inverses: dict[torch.device, Tensor] = {}
    for grad in gradients:
        if grad.dtype == torch.float16 and not fused:
            raise ValueError("Attempting to unscale FP16 gradients.")
        if grad.device not in inverses:
            # The reciprocal in double precision, as GradScaler takes it.
            inverses[grad.device] = scale.double().reciprocal().float().to(grad.device)
        grad.mul_(inverses[grad.device])
