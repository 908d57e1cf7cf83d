"""Linear layers with one weight matrix per model, and the memory of their gradients."""

from typing import Any

import torch
from torch import Tensor

from .mode import Call, register


class GradMemory:
    """Memory of stacked gradients, kept between steps.

    A large gradient in fresh memory costs page faults in every step, up to as much as computing
    it. `keep` takes a gradient that its parameter no longer needs; `take` hands the memory out
    again, unless somebody else still looks at it.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, int]] = {}

    def keep(self, parameter: Tensor, grad: Tensor, own_views: int = 0) -> None:
        """Keep a cleared gradient of `parameter`; `own_views` other tensors may share it."""
        if grad.grad_fn is None and grad.is_contiguous() and grad.shape == parameter.shape:
            self._kept[id(parameter)] = (grad, own_views)

    def take(self, parameter: Tensor) -> Tensor | None:
        """Memory for a new gradient of `parameter`, None if there is none to reuse."""
        kept = self._kept.pop(id(parameter), None)
        if kept is None:
            return None
        grad, own_views = kept
        same = grad.dtype == parameter.dtype and grad.device == parameter.device
        users = torch._C._storage_Use_Count(grad.untyped_storage()._cdata)
        # the kept tensor itself and the handle just made to look at its storage
        return grad if same and users <= 2 + own_views else None

    def clear(self) -> None:
        """Forget all kept memory."""
        self._kept.clear()


class StackedLinear(torch.autograd.Function):
    """`y[m] = x[m] @ weight[m].T + bias[m]` for all models by batched matrix products.

    The weight gradient is computed in the weight's own layout, so that autograd can keep it as it
    is, and into the memory of the previous step's gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [M, N, I]
        weight: Tensor,  # [M, O, I]
        bias: Tensor | None,  # [M, O]
        memory: GradMemory | None,
        owners: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:  # [M, N, O]
        """See `torch.autograd.Function`."""
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.memory, ctx.owners = bias is not None, memory, owners
        transposed = weight.transpose(1, 2)
        if bias is None:
            return torch.bmm(x, transposed)
        return torch.baddbmm(bias.unsqueeze(1), x, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """See `torch.autograd.Function`."""
        grad = grads[0]  # [M, N, O]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        grad_x = torch.bmm(grad, weight) if needs_x else None
        grad_weight = grad_bias = None
        if needs_weight:
            out = _memory_for(ctx, 0)
            transposed = grad.transpose(1, 2)
            grad_weight = (
                torch.bmm(transposed, x) if out is None else torch.bmm(transposed, x, out=out)
            )
        if ctx.has_bias and ctx.needs_input_grad[2]:
            out = _memory_for(ctx, 1)
            grad_bias = grad.sum(1) if out is None else torch.sum(grad, 1, out=out)
        return grad_x, grad_weight, grad_bias, None, None


def _memory_for(ctx: Any, which: int) -> Tensor | None:
    # a gradient that is itself differentiated must not share its memory with anything
    owner = ctx.owners[which]
    if ctx.memory is None or owner is None or torch.is_grad_enabled():
        return None
    memory: Tensor | None = ctx.memory.take(owner)
    return memory


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # The same tensors that autocast would cast: floating point, but never float64.
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


@register(torch.nn.functional.linear)
def linear(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.linear` with a weight per model as one batched product; other cases are left to vmap."""
    x, weight, bias = _arguments(*args, **kwargs)
    if not call.is_batched(weight) or (bias is not None and not call.is_batched(bias)):
        return NotImplemented
    w = call.unwrap(weight)[0]
    b = call.unwrap(bias)[0] if bias is not None else None
    xs, own_input = call.unwrap(x)
    if w.dim() != 3 or (b is not None and b.dim() != 2) or x.dim() == 0:
        return NotImplemented
    if x.shape[-1] != w.shape[2] or xs.is_sparse or xs.layout is torch.sparse_csr:
        return NotImplemented
    owners = (
        w if w.is_leaf and w.requires_grad else None,
        b if b is not None and b.is_leaf and b.requires_grad else None,
    )
    dtype = _autocast_dtype(xs.device)
    if dtype is not None:
        xs, w = _cast(xs, dtype), _cast(w, dtype)
        b = None if b is None else _cast(b, dtype)
        owners = (None, None)
    if xs.dtype != w.dtype or (b is not None and b.dtype != w.dtype):
        return NotImplemented
    is_matrix = x.dim() == 2  # then nothing has to be reshaped, which would cost graph nodes
    rows = 0 if is_matrix else x.shape[:-1].numel()
    if not own_input:
        flat = xs if is_matrix else xs.reshape(rows, w.shape[2])
        flat = flat.expand(call.num_models, -1, -1)
    else:
        flat = xs if is_matrix else xs.reshape(call.num_models, rows, w.shape[2])
    memory = call.grad_memory
    with call.lowered():
        if dtype is None:
            out = StackedLinear.apply(flat, w, b, memory, owners)
        else:
            with torch.autocast(xs.device.type, enabled=False):
                out = StackedLinear.apply(flat, w, b, memory, owners)
    return call.wrap(out if is_matrix else out.view(call.num_models, *x.shape[:-1], w.shape[1]))


def _arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias
