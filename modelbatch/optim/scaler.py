"""Gradient scaling with a scale for every model."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState, _refresh_per_optimizer_state
from torch.optim import Optimizer

from .. import loss
from ..change import Change
from ..errors import ModelBatchError
from .base import PerModelOptimizer
from .clip import nonfinite, scale_slices_
from .lockstep import LockstepLBFGS

__all__ = ["BundleGradScaler"]

_NO_CLOSURE = "Closure use is not currently supported if GradScaler is enabled."


class BundleGradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` with a scale, a growth tracker and an overflow flag for every model.

    It is used in the same way. A model whose gradients overflow skips its step and lowers its own
    scale; the others neither wait nor change by one bit. Every model's scale is, step by step, the
    one that a `torch.amp.GradScaler` of its own would have. A frozen model's scale rests.

    How many models there are is learnt from the first loss, or from a state dict. `scale`,
    `unscale_`, `step` and `update` do not wait for the device.

    Args:
        init_scale: the scale that every model starts with.
        growth_factor: what a model's scale is multiplied by after `growth_interval` steps in a row
            without overflow; greater than 1.
        backoff_factor: what it is multiplied by after an overflow; less than 1.
        growth_interval: see `growth_factor`.
        enabled: False makes `step` call `optimizer.step()` and all else do nothing.
        device: type of the device, as for `torch.amp.GradScaler`: "cuda" disables the scaler, with
            a warning, where there is no CUDA. None leaves that to the losses, on whose device the
            scales live in any case.

    Raises:
        ModelBatchError: a bad argument.
    """

    def __init__(
        self,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        device: str | None = None,
    ) -> None:
        if enabled:
            _check_positive("init_scale", init_scale)
            _check_positive("growth_factor", growth_factor)
            _check_positive("backoff_factor", backoff_factor)
            if growth_factor <= 1:
                raise ModelBatchError(f"growth_factor must be greater than 1, got {growth_factor}")
            if backoff_factor >= 1:
                raise ModelBatchError(f"backoff_factor must be less than 1, got {backoff_factor}")
            if isinstance(growth_interval, bool) or not isinstance(growth_interval, int):
                raise ModelBatchError(f"growth_interval must be an int, got {growth_interval!r}")
            if growth_interval < 1:
                raise ModelBatchError(f"growth_interval must be at least 1, got {growth_interval}")
        super().__init__(
            "cpu" if device is None else device,
            init_scale=init_scale,
            growth_factor=growth_factor,
            backoff_factor=backoff_factor,
            growth_interval=growth_interval,
            enabled=enabled,
        )
        self._fresh_scale = init_scale

    # ---- one iteration

    def scale(self, outputs: Any) -> Any:
        """Multiplies losses by the scale of their models.

        Args:
            outputs: what `compute_loss` returned, the losses `[M]` (`reduction="none"`) or their
                mean or sum; or anything computed from it, such as `loss / accumulation_steps`. A
                tensor `[M, ...]` is multiplied model by model. Lists and tuples of these, too.

        Returns:
            The same structure. For a mean or sum it is that of the scaled losses of active models
            whose scaled loss is finite, and its gradient for model i is model i's own, times its
            scale.

        Raises:
            ModelBatchError: a scalar that was computed from other things too, whose gradient
                cannot be told apart by model, or losses of another number of models.
        """
        if not self._enabled:
            return outputs
        if isinstance(outputs, Tensor):
            return self._scaled(outputs)
        if isinstance(outputs, list | tuple):
            return type(outputs)(map(self.scale, outputs))
        try:
            return map(self.scale, iter(outputs))
        except TypeError:
            raise ModelBatchError(
                f"expected a tensor or an iterable of tensors, got {type(outputs).__name__}"
            ) from None

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divides every model's gradients by its scale, in place, to be clipped or looked at.

        Args:
            optimizer: of a bundle.

        Raises:
            ModelBatchError: this is no optimizer of a bundle, or of another number of models.
            RuntimeError: called twice, or after `step`.
            ValueError: the gradients are float16; as in torch, so must parameters be wider.
        """
        if self._enabled:
            own = _check_optimizer(optimizer)
            if own._followers is not None:
                own._followers.add(self)
        super().unscale_(optimizer)

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Steps the models whose gradients are finite, with unscaled gradients.

        Args:
            optimizer: of a bundle.
            *args: handed to its `step`.
            **kwargs: likewise.

        Returns:
            What `optimizer.step` returned.

        Raises:
            ModelBatchError: this is no optimizer of a bundle, or of another number of models.
            RuntimeError: called twice without `update`, or with a closure.
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        if any(argument is not None for argument in (*args, *kwargs.values())):
            raise RuntimeError(_NO_CLOSURE)
        own_optimizer = _check_optimizer(optimizer)
        views = own_optimizer._views
        if own_optimizer._followers is not None:
            own_optimizer._followers.add(self)
        if isinstance(optimizer, LockstepLBFGS):
            raise RuntimeError(f"{_NO_CLOSURE} LBFGS needs one.")
        scale, _ = self._check_scale_growth_tracker("step")
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        if state["stage"] is OptState.READY:
            self._check_inf_per_device(optimizer)
        device = views.stacked[0].device
        found = state["found_inf_per_device"].get(device)
        if found is None:  # there is no gradient at all
            found = torch.zeros_like(scale, device=device)
        # The protocol of torch's optimizers that unscale by themselves: no scale, no unscaling.
        earlier = getattr(optimizer, "grad_scale", None)
        if state["stage"] is OptState.READY:
            own = scale.to(device, non_blocking=True)
            earlier = own if earlier is None else own * earlier
        optimizer.grad_scale = earlier  # type: ignore[attr-defined]
        optimizer.found_inf = found  # type: ignore[attr-defined]
        try:
            result = optimizer.step(*args, **kwargs)
        finally:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        state["stage"] = OptState.STEPPED
        return result

    def update(self, new_scale: float | Sequence[float] | Tensor | None = None) -> None:
        """Lowers the scales of models that overflowed, and raises those that are due.

        Args:
            new_scale: one scale for all models, or M of them, frozen models included, to be set
                instead.

        Raises:
            ModelBatchError: `new_scale` is not that.
            AssertionError: no step has been taken since the last call.
        """
        if not self._enabled:
            return
        scale, tracker = self._check_scale_growth_tracker("update")
        if new_scale is not None:
            scale.copy_(_as_scales(new_scale, len(scale)))
        else:
            self._grow_or_back_off(scale, tracker)
        self._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)

    def _scaled(self, outputs: Tensor) -> Tensor:
        if outputs.dim() > 0:
            scale = self._scales_for(outputs)
            return outputs * scale.reshape(-1, *(1,) * (outputs.dim() - 1))
        total = loss.scaled(outputs, self._scales_for)
        if total is None:
            raise ModelBatchError(
                "this scalar does not come from compute_loss alone, or has no gradient, so the "
                "models' parts in it cannot be told apart: pass what compute_loss returned, with "
                'further terms added to the losses [M] of compute_loss(..., reduction="none")'
            )
        return total

    def _scales_for(self, losses: Tensor) -> Tensor:
        if self._scale is None:
            self._start(losses.shape[0], losses.device)
        scale = cast(Tensor, self._scale)
        if losses.shape[0] != len(scale):
            raise ModelBatchError(
                f"this scaler has the scales of {len(scale)} models, but got losses of shape "
                f"{tuple(losses.shape)}"
            )
        return scale.to(losses.device, non_blocking=True)

    def _start(self, num_models: int, device: torch.device) -> None:
        """Makes scales and trackers once the number of models is known."""
        made = []
        for start, dtype in (
            (self._init_scale, torch.float32),
            (self._init_growth_tracker, torch.int32),
        ):
            start = cast(Any, start)
            if isinstance(start, list) and len(start) != num_models:
                raise ModelBatchError(
                    f"the state of this scaler is that of {len(start)} models, but the bundle has "
                    f"{num_models}"
                )
            each = start if isinstance(start, list) else [start] * num_models
            made.append(torch.tensor(each, dtype=dtype).to(device, non_blocking=True))
        self._scale, self._growth_tracker = made

    # GradScaler's unscale_ and check for overflows end here.
    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """Finds the models that overflow; divides if `inv_scale` is `[M]` and not the number 1."""
        views = _check_optimizer(optimizer)._views
        scale = cast(Tensor, self._scale)
        if views.num_models != len(scale):
            raise ModelBatchError(
                f"this scaler has the scales of {len(scale)} models, but the optimizer has "
                f"{views.num_models}"
            )
        grads = [param.grad for param in views.stacked if param.grad is not None]
        if not allow_fp16 and any(grad.dtype == torch.float16 for grad in grads):
            raise ValueError("Attempting to unscale FP16 gradients.")
        views.lose(())  # that is for scalers with one scale
        active = views.active_flags()
        state = self._per_optimizer_states[id(optimizer)]
        state["active"] = active
        if not grads:
            # As in torch, it is an error to update without gradients, unless nobody trains.
            return {} if any(active) else {scale.device: torch.zeros_like(scale)}
        with torch.no_grad():
            overflows = nonfinite(grads, views.num_models)
            if not all(active):
                overflows = overflows & self._flags(active, overflows.device)
            if inv_scale.dim():
                scale_slices_(grads, inv_scale, active)
        return {overflows.device: overflows.float()}

    def _flags(self, active: list[bool], device: torch.device) -> Tensor:
        return torch.tensor(active, device="cpu").to(device, non_blocking=True)

    @torch.no_grad()
    def _grow_or_back_off(self, scale: Tensor, tracker: Tensor) -> None:
        """What torch does to one scale, for every model that took part."""
        states = [s for s in self._per_optimizer_states.values() if s["found_inf_per_device"]]
        if not states:
            raise AssertionError("No inf checks were recorded prior to update.")
        founds = [f for state in states for f in state["found_inf_per_device"].values()]
        overflow = torch.stack([f.to(scale.device, non_blocking=True) for f in founds]).any(0)
        # In double precision and rounded once, as torch multiplies a float by a double.
        wide = scale.double()
        backed_off = (wide * self._backoff_factor).float()
        grown = (wide * self._growth_factor).float()
        steps = tracker.long() + 1
        due = steps == self._growth_interval
        new_scale = torch.where(due & torch.isfinite(grown), grown, scale)
        new_scale = torch.where(overflow, backed_off, new_scale)
        new_tracker = torch.where(overflow | due, 0, steps).to(tracker.dtype)
        flags = [state["active"] for state in states]
        taking_part = flags[0] if len(flags) == 1 else [any(own) for own in zip(*flags)]
        if not all(taking_part):
            mine = self._flags(taking_part, scale.device)
            new_scale = torch.where(mine, new_scale, scale)
            new_tracker = torch.where(mine, new_tracker, tracker)
        scale.copy_(new_scale)
        tracker.copy_(new_tracker)

    # ---- models that come and go

    def models_changed(self, change: Change) -> None:
        """Follows a bundle whose models have changed; a fresh one has the scale of the start."""
        starts = (("_init_scale", self._fresh_scale), ("_init_growth_tracker", 0))
        for name, fresh in starts:
            start = getattr(self, name)
            if isinstance(start, list):
                setattr(self, name, change.pick(start, [fresh] * change.num_models))
        if self._scale is not None and len(self._scale) == change.old_num_models:
            self._scale = change.rows(self._scale, self._fresh_scale)
            self._growth_tracker = change.rows(cast(Tensor, self._growth_tracker))
        for state in self._per_optimizer_states.values():
            found = state["found_inf_per_device"]
            for device, flags in found.items():
                found[device] = change.rows(flags)
            if "active" in state:  # a fresh model had no part in this step
                state["active"] = change.pick(state["active"], lambda slot: False)

    # ---- state

    def get_scale(self) -> Any:
        """The scales of the M models, a list of floats; waits for the device.

        Before the number of models is known, the one scale that all will start with; 1.0 if
        scaling is disabled.
        """
        if not self._enabled:
            return 1.0
        if self._scale is not None:
            return self._scale.tolist()
        start = cast(Any, self._init_scale)
        return list(start) if isinstance(start, list) else start

    def _get_growth_tracker(self) -> Any:
        if not self._enabled:
            return 0
        if self._growth_tracker is not None:
            return self._growth_tracker.tolist()
        start = cast(Any, self._init_growth_tracker)
        return list(start) if isinstance(start, list) else start

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of a scaler of as many models, or of a `torch.amp.GradScaler`.

        Args:
            state_dict: what `state_dict` returned: numbers and lists of M numbers. A scale that is
                one number is taken for all models.

        Raises:
            ModelBatchError: an entry is missing or of another number of models; nothing has been
                changed then.
            RuntimeError: the state dict is empty, that of a disabled scaler.
        """
        if not self._enabled:
            return
        if len(state_dict) == 0:
            raise RuntimeError(
                "The source state dict is empty, possibly because it was saved "
                "from a disabled instance of GradScaler."
            )
        names = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
        missing = [name for name in names if name not in state_dict]
        if missing:
            raise ModelBatchError(f"the state dict of the scaler lacks {', '.join(missing)}")
        expected = None if self._scale is None else len(self._scale)
        starts: list[Any] = []
        for name in ("scale", "_growth_tracker"):
            start = state_dict[name]
            if isinstance(start, list | tuple):
                start = list(start)
                expected = len(start) if expected is None else expected
                if len(start) != expected:
                    raise ModelBatchError(
                        f"the state dict of the scaler is that of {len(start)} models, expected "
                        f"{expected}"
                    )
            for number in start if isinstance(start, list) else [start]:
                if not isinstance(number, int | float):
                    raise ModelBatchError(
                        f"{name!r} in the state dict of the scaler must be numbers, got {number!r}"
                    )
            starts.append(start)
        self._init_scale, self._init_growth_tracker = starts
        if self._scale is not None:
            self._start(len(self._scale), self._scale.device)
        self._growth_factor = state_dict["growth_factor"]
        self._backoff_factor = state_dict["backoff_factor"]
        self._growth_interval = state_dict["growth_interval"]


def _check_positive(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):
        raise ModelBatchError(f"{name} must be a positive finite number, got {value!r}")


def _check_optimizer(optimizer: Any) -> PerModelOptimizer:
    if not isinstance(optimizer, PerModelOptimizer):
        raise ModelBatchError(
            f"a BundleGradScaler steps the optimizer of a bundle, got "
            f"{type(optimizer).__name__}; torch.amp.GradScaler is for any other"
        )
    return optimizer


def _as_scales(new_scale: Any, num_models: int) -> Tensor:
    """One scale or M of them as a tensor that broadcasts to `[M]`."""
    if isinstance(new_scale, Tensor):
        if new_scale.requires_grad:
            raise ModelBatchError("new_scale must not require a gradient")
        scales = new_scale
    else:
        try:
            scales = torch.tensor(new_scale, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ModelBatchError(
                f"new_scale must be a number or {num_models} numbers, got {new_scale!r}"
            ) from error
    if scales.dim() == 0 or tuple(scales.shape) == (num_models,):
        return scales
    if scales.numel() == 1:
        return scales.reshape(())
    raise ModelBatchError(
        f"new_scale must be a number or {num_models} numbers, got shape {tuple(scales.shape)}"
    )
