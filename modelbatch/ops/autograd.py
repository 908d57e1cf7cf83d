"""Derivatives of the package's operators that also work under `torch.func`.

`torch.library.register_autograd` makes an operator differentiable for `Tensor.backward`, but
`torch.func.grad` refuses it, and forward mode silently returns a tangent of zero. This module
registers the same kind of rule one step lower: below the level of `torch.func`'s transforms, where
torch's built-in operators have theirs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

_LIBRARY = torch.library.Library("modelbatch", "IMPL")


def _needs_autograd(args: tuple[Any, ...]) -> bool:
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(
        isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args
    )


def has_tangent(*args: Any) -> bool:
    """Whether a tensor carries a forward-mode derivative.

    Args:
        args: of an operator's kernel, where a transform's own wrappers are on the outside.
    """
    if forward_ad._current_level < 0:
        return False
    return any(
        forward_ad.unpack_dual(arg).tangent is not None
        for arg in args
        if isinstance(arg, torch.Tensor)
    )


def register_autograd(
    name: str,
    backward: Callable[..., Any],
    *,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    jvp: Callable[..., Any] | None = None,
    forward_mode: Callable[..., Any] | None = None,
) -> None:
    """Registers the derivatives of an operator.

    Args:
        name: the operator without its namespace, such as ``"dropout"``. Its tensor arguments must
            be plain or optional tensors, not lists.
        backward: ``backward(ctx, *grads)`` returns one gradient or None for every argument of the
            operator. It should call differentiable operators, so that it can be differentiated
            itself. ``ctx.needs_input_grad`` counts the arguments of the operator.
        setup_context: ``setup_context(ctx, inputs, output)`` saves what the rules need; tensors by
            ``ctx.save_for_backward`` and, for ``jvp``, also by ``ctx.save_for_forward``.
        jvp: ``jvp(ctx, *tangents)`` returns the tangent of the output. Without it forward mode
            raises an error.
        forward_mode: ``forward_mode(*args)`` computes the operator itself in operators that have
            forward derivatives; it is called in place of the kernel where an argument carries one.
            It may return NotImplemented to leave a case to ``jvp``.
    """
    op = getattr(torch.ops.modelbatch, name).default

    def run(keyset: Any, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    # The key set is the last argument, so that the indices of all others stay the operator's own.
    def function_forward(*args: Any) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return run(args[-1], args[:-1])
        # A function's forward runs with both modes off; the transforms around this one need them.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return run(args[-1], args[:-1])

    def function_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(ctx, inputs[:-1], output)

    def function_backward(ctx: Any, *grads: Any) -> Any:
        return (*backward(ctx, *grads), None)

    def function_jvp(ctx: Any, *tangents: Any) -> Any:
        assert jvp is not None
        return jvp(ctx, *tangents[:-1])

    members = {
        "forward": staticmethod(function_forward),
        "setup_context": staticmethod(function_setup_context),
        "backward": staticmethod(function_backward),
    }
    if jvp is not None:
        members["jvp"] = staticmethod(function_jvp)
    function: Any = type(f"{name}_function", (_SingleLevelFunction,), members)

    def kernel(keyset: Any, *args: Any) -> Any:
        if not _needs_autograd(args):
            return run(keyset, args)
        if forward_mode is not None and has_tangent(*args):
            output = forward_mode(*args)
            if output is not NotImplemented:
                return output
        if not torch._C._are_functorch_transforms_active():
            return function.apply(*args, keyset)
        with enable_single_level_autograd_function():
            return function.apply(*args, keyset)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
