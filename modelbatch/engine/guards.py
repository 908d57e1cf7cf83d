"""What must hold for a step by the engine to be what the general path would do.

Two kinds: what a plan was made from (`Watch`), after whose change a new plan is made; and what
stands against the engine at the moment (`obstacle`). Both are asked at every step, so they cost
microseconds: namespaces are compared as a whole, tensors by identity.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module
from torch.optim.optimizer import (
    _global_optimizer_post_hooks as _GLOBAL_POST_HOOKS,
    _global_optimizer_pre_hooks as _GLOBAL_PRE_HOOKS,
)

from ..stack import Stack
from .purity import Watched

if TYPE_CHECKING:
    from ..steps import Steps

__all__ = ["Watch", "obstacle"]

_AUTOGRAD = torch._C._autograd


class Watch:
    """What a plan was made from.

    Args:
        stack: the bundle's.
        params: slots of the parameters of the program.
        num_learning: how many of them, from the first on, learn.
        buffers: slots of its buffers.
        names: what `purity.check_code` found.
        loss_fn: the loss.
    """

    def __init__(
        self,
        stack: Stack,
        params: Sequence[int],
        num_learning: int,
        buffers: Sequence[int],
        names: Watched,
        loss_fn: Any,
    ):
        self.stack, self.model = stack, stack.models[0]
        self.per_model = stack.structure.per_model
        self.names = names
        spaces: list[Mapping[str, Any]] = []
        for module in stack.modules[0]:
            spaces.append(module.__dict__)
            if module._modules:
                spaces.append(module._modules)
        self.versions: list[tuple[Tensor, int]] = []
        if isinstance(loss_fn, nn.Module):
            spaces += [loss_fn.__dict__, loss_fn._buffers, loss_fn._parameters]
            self._watch_versions(loss_fn._buffers)
        keywords = getattr(loss_fn, "keywords", None)  # of a functools.partial
        if isinstance(keywords, dict):
            spaces.append(keywords)
            self._watch_versions(keywords)
        self.spaces = [(space, (*space.values(),)) for space in spaces]
        self.learning = self._places(params[:num_learning])
        self.fixed = self._places([*params[num_learning:], *buffers])
        self.frozen: list[Any] = [stack.tensor(stack.slots[slot]) for slot in params[num_learning:]]

    def _watch_versions(self, tensors: Mapping[str, Any]) -> None:
        found = [t for t in tensors.values() if isinstance(t, Tensor)]
        self.versions += [(tensor, tensor._version) for tensor in found]

    def _places(self, slots: Sequence[int]) -> list[tuple[Mapping[str, Any], str, Any]]:
        places: list[tuple[Mapping[str, Any], str, Any]] = []
        for number in slots:
            slot = self.stack.slots[number]
            index, attribute = slot.places[0]
            node = self.stack.nodes[index]
            space: Mapping[str, Any] = node._parameters if slot.is_parameter else node._buffers
            places.append((space, attribute, space[attribute]))
        return places

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        stack = self.stack
        if stack.structure.per_model is not self.per_model or stack.models[0] is not self.model:
            return False
        try:
            for space, values in self.spaces:
                if (*space.values(),) != values:
                    return False
        except Exception:  # values that have no yes-or-no comparison, such as tensors
            return False
        for name_space, name, value in self.names:
            if name_space.get(name, _MISSING) is not value:
                return False
        for tensor, version in self.versions:
            if tensor._version != version:
                return False
        for place, name, parameter in self.learning:
            if not parameter.requires_grad or place.get(name) is not parameter:
                return False
        for place, name, tensor in self.fixed:
            if place.get(name) is not tensor:
                return False
        return not any(parameter.requires_grad for parameter in self.frozen)

    def hooked(self) -> bool:
        """Whether a parameter has a hook."""
        for _, _, parameter in self.learning:
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                return True
        return False


def obstacle(mb: "Steps") -> str | None:
    """What stands against the engine in this step, in words; None if nothing does."""
    if mb._grad_scaler is not None:
        return "a gradient scaler"
    if mb._forward.weights is not None:
        return "within sample_weights"
    if mb._stack.has_user_hooks() or mb._forward_hooks or mb._forward_pre_hooks:
        return "forward hooks"
    if mb._backward_hooks or mb._backward_pre_hooks:
        return "backward hooks"
    if (
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    ):
        return "hooks on all modules"
    if _GLOBAL_PRE_HOOKS or _GLOBAL_POST_HOOKS:
        return "hooks on all optimizers"
    optimizer: Any = mb._optimizer
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "hooks on the optimizer"
    own = optimizer.__dict__
    if "step" in own and not hasattr(own["step"], "_wrapped_by_lr_sched"):
        return "the optimizer has a step of its own"
    if own.get("found_inf") is not None or own.get("grad_scale") is not None:
        return "a gradient scaler"
    views = optimizer._views
    if views._lost or views._excluded:
        return "models that a gradient scaler has given up"
    if not torch.is_grad_enabled():
        return "gradients are disabled"
    return _mode()


def _mode() -> str | None:
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return "a mode that sees every operation"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "a transform of torch.func"
    if torch.is_autocast_enabled("cpu"):
        return "autocast"
    if _AUTOGRAD._profiler_enabled() or torch.is_anomaly_enabled():
        return "a profiler or the detection of anomalies"
    if _AUTOGRAD._top_saved_tensors_default_hooks(True) is not None:
        return "hooks on saved tensors"
    if torch.compiler.is_compiling():
        return "torch.compile"
    return None


_MISSING: Any = object()
