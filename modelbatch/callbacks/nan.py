"""What to do about models whose numbers are no longer finite."""

import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..change import Change
from ..engine.encoding import STATUS_GRAD, STATUS_LOSS, STATUS_WEIGHTS
from ..errors import ModelBatchError
from ..optim.clip import nonfinite
from .base import Callback, Event
from .pack import freeze, prune
from .report import check_interval
from .weights import StackedCopy, forget_optimizer_state, load_model, rows_of_saved

if TYPE_CHECKING:
    from ..batch import ModelBatch

__all__ = ["NaNCallback"]

_ACTIONS = ("freeze", "reset", "prune", "warn", "raise")


class NaNCallback(Callback):
    """Watches for infinite and NaN losses, gradients and weights, and acts on those models alone.

    All tensors of all models are looked at in one pass, and one flag is read from the device.
    Where a gradient scaler is in use, overflowing gradients are the scaler's to deal with, until a
    model's scale has come down to 1 and they still overflow.

    Args:
        action: `"freeze"`: freeze the model (`mb.freeze`), and end the training when no model is
            left. `"reset"`: put back its last good weights, or fresh ones, and clear its optimizer
            state. `"prune"`: remove it from the bundle, and end the training when no model is left
            that trains (the last of all models is frozen). `"warn"`: warn, once per model.
            `"raise"`: raise an error.
        check_gradients: look at the gradients.
        check_weights: look at the parameters.
        interval: look every so many steps.
        reset_to: for `"reset"`: None for the last good weights, or `build(i)` (or `build()`), which
            returns a fresh model.
        keep_every: for `"reset"`: copy the good weights every so many steps (a multiple of
            `interval` is best). The copies take the memory of one more bundle.
        max_resets: for `"reset"`: a model that was reset so often is frozen the next time.
        lr_factor: for `"reset"`: the model's learning rate is multiplied by this.

    Raises:
        ModelBatchError: a bad argument; with `"raise"`, in training, when a model is not finite,
            naming the models, the step and what is not finite.
    """

    def __init__(
        self,
        action: str = "freeze",
        check_gradients: bool = True,
        check_weights: bool = True,
        interval: int = 1,
        *,
        reset_to: Callable[..., nn.Module] | None = None,
        keep_every: int = 100,
        max_resets: int = 10,
        lr_factor: float = 1.0,
    ):
        if action not in _ACTIONS:
            names = ", ".join(f'"{name}"' for name in _ACTIONS)
            raise ModelBatchError(f"action must be one of {names}, got {action!r}")
        if reset_to is not None and (action != "reset" or not callable(reset_to)):
            raise ModelBatchError('reset_to= is a function that builds a model, for "reset" only')
        if not lr_factor > 0:
            raise ModelBatchError(f"lr_factor must be positive, got {lr_factor}")
        self.action = action
        self.check_gradients = check_gradients
        self.check_weights = check_weights
        self.interval = check_interval("interval", interval)
        self.keep_every = check_interval("keep_every", keep_every)
        self.max_resets = check_interval("max_resets", max_resets, least=0)
        self.lr_factor = lr_factor
        self._build = None if reset_to is None else _numbered(reset_to)
        self._good: StackedCopy | None = None
        self._mb: ModelBatch | None = None
        self._saved: dict[str, Any] | None = None
        self._ignored: Tensor | None = None  # bool [M]: models that were warned of
        self.resets: dict[int, int] = {}
        self.warned: set[int] = set()

    @property
    def reads_models(self) -> bool:  # type: ignore[override]
        """False where the engine, which stops a model by itself, does what this callback does."""
        if self.action == "warn":
            return False
        watches_all = self.interval == 1 and self.check_gradients and self.check_weights
        return self.action != "freeze" or not watches_all

    def on_train_start(self, event: Event) -> None:
        """Keep a first copy of the weights."""
        self._mb = event.mb
        if self.action == "reset" and self._build is None:
            self._good = StackedCopy(event.mb)
            if self._saved is not None:
                self._good.load_state_dict(self._saved)
        self._saved = None

    def on_train_step(self, event: Event) -> None:
        """Look at the models and act."""
        if event.step % self.interval == 0:
            status = event.mb._engine.status
            if status is None or self.action == "reset" or status.any():
                self._look(event)

    @torch.no_grad()
    def _look(self, event: Event) -> None:
        mb = event.mb
        bad = self._nonfinite(event)
        if bad is None:
            return
        if self.action == "reset" and self._build is None and event.step % self.keep_every == 0:
            self._copy_good(mb, bad)
        if mb._active_tensor is not None:
            bad = bad & mb._active_tensor
        if self.warned:
            bad = bad & self._not_warned(len(mb), bad.device)
        if not bad.any():  # the one read of the device
            return
        flags: list[bool] = bad.tolist()
        self._act(event, [i for i, flag in enumerate(flags) if flag])

    # ---- looking

    def _nonfinite(self, event: Event) -> Tensor | None:
        """Which models are not finite, bool `[M]`; None if there is nothing to look at."""
        status = event.mb._engine.status
        if status is not None:  # the engine has looked, and keeps no gradients to look at
            wanted = STATUS_LOSS
            wanted |= STATUS_GRAD * self.check_gradients | STATUS_WEIGHTS * self.check_weights
            return (status & wanted) != 0
        parameters = event.mb._stack.parameters()
        tensors = list(parameters) if self.check_weights else []
        if event.losses is not None:
            tensors.append(event.losses.unsqueeze(1))
        scale = _scale(event) if self.check_gradients else None
        overflow: Tensor | None = None
        if self.check_gradients:
            grads = [p.grad for p in parameters if p.grad is not None]
            if scale is None:
                tensors += grads
            elif grads:
                overflow = nonfinite(grads, len(event.mb)) & (scale <= 1)
        if not tensors:
            return overflow
        bad = nonfinite(tensors, len(event.mb))
        return bad if overflow is None else bad | overflow

    def _causes(self, event: Event, models: list[int]) -> dict[int, str]:
        """What of each of these models is not finite, in words."""
        mb = event.mb
        parameters = mb._stack.parameters()
        looked: dict[str, Tensor] = {}
        status = mb._engine.status
        if status is not None:
            bits = {"loss": STATUS_LOSS}
            if self.check_gradients:
                bits["gradient"] = STATUS_GRAD
            if self.check_weights:
                bits["weights"] = STATUS_WEIGHTS
            found = status.tolist()
            return {i: ", ".join(n for n, bit in bits.items() if found[i] & bit) for i in models}
        if event.losses is not None:
            looked["loss"] = torch.isfinite(event.losses).logical_not()
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.check_gradients and grads:
            looked["gradient"] = nonfinite(grads, len(mb))
        if self.check_weights and parameters:
            looked["weights"] = nonfinite(parameters, len(mb))
        flags = dict(zip(looked, torch.stack(list(looked.values())).tolist(), strict=True))
        return {i: ", ".join(name for name in flags if flags[name][i]) for i in models}

    def _not_warned(self, num_models: int, device: torch.device) -> Tensor:
        if self._ignored is None or self._ignored.device != device:
            flags = [i not in self.warned for i in range(num_models)]
            self._ignored = torch.tensor(flags, dtype=torch.bool, device=device)
        return self._ignored

    def _copy_good(self, mb: "ModelBatch", bad: Tensor) -> None:
        if self._good is None:  # a loop that never called on_train_start
            self._good, self._mb = StackedCopy(mb), mb
        self._good.update(mb, bad.logical_not())

    # ---- acting

    def _act(self, event: Event, models: list[int]) -> None:
        if self.action == "reset":
            self._reset(event, models)
            return
        causes = self._causes(event, models)
        text = "; ".join(f"model {i}: {cause}" for i, cause in causes.items())
        message = f"not finite at step {event.step}: {text}"
        if self.action == "raise":
            raise ModelBatchError(message)
        if self.action == "warn":
            self.warned.update(models)
            self._ignored = None
            warnings.warn(message, stacklevel=2)
        elif self.action == "prune":
            prune(event, models, message)
            if not any(event.mb._active):
                event.stop = True
        else:
            self._freeze(event, models, message)

    def _freeze(self, event: Event, models: list[int], reason: str) -> None:
        freeze(event, models, reason)
        if not any(event.mb._active):
            event.stop = True

    def _reset(self, event: Event, models: list[int]) -> None:
        mb = event.mb
        hopeless = [i for i in models if self.resets.get(i, 0) >= self.max_resets]
        models = [i for i in models if i not in hopeless]
        if self._build is not None:
            for i in models:
                load_model(mb, i, self._build)
        elif models:
            if self._good is None:
                raise ModelBatchError(
                    'NaNCallback(action="reset") has no good weights yet: on_train_start was not '
                    "called before the first step"
                )
            self._good.restore(mb, models)
        optimizer = event.optimizer if event.optimizer is not None else mb.optimizer
        for i in models:
            self.resets[i] = self.resets.get(i, 0) + 1
            forget_optimizer_state(mb, optimizer, i)
            if self.lr_factor != 1.0 and optimizer is not None:
                optimizer.param_groups[i]["lr"] *= self.lr_factor
        if hopeless:
            reason = f"not finite at step {event.step} after {self.max_resets} resets"
            self._freeze(event, hopeless, reason)

    # ---- models that come and go

    def models_changed(self, change: Change) -> None:
        """Go on with the models that there are now."""
        for i in change.removed:
            self.resets.pop(i, None)
        moved = {old: slot for slot, old in enumerate(change.source) if old is not None}
        self.resets = {moved[i]: count for i, count in self.resets.items()}
        self.warned, self._ignored = set(change.renumber(self.warned)), None
        if self._good is not None and self._mb is not None:
            self._good.models_changed(self._mb, change)
        self._saved = rows_of_saved(self._saved, change)

    # ---- resume

    def state_dict(self) -> dict[str, Any]:
        """The good weights, and what was done so far."""
        state: dict[str, Any] = {
            "resets": [[i, count] for i, count in self.resets.items()],
            "warned": sorted(self.warned),
        }
        if self._good is not None:
            state["good"] = self._good.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.resets = {int(i): int(count) for i, count in state_dict["resets"]}
        self.warned, self._ignored = set(state_dict["warned"]), None
        self._saved = state_dict.get("good")
        if self._saved is not None and self._good is not None:
            self._good.load_state_dict(self._saved)


def _scale(event: Event) -> Tensor | None:
    """The scale of the losses, `[M]` or one number; None where nothing scales them."""
    scaler = event.grad_scaler if event.grad_scaler is not None else event.mb.grad_scaler
    if scaler is None or not scaler.is_enabled():
        return None
    scale: Tensor | None = getattr(scaler, "_scale", None)
    return scale


def _numbered(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`build` as a function of the model's number, which it may not want."""
    try:
        inspect.signature(build).bind(0)
    except TypeError:
        return lambda i: build()
    except ValueError:  # a builtin without a signature
        pass
    return build
