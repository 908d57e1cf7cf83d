r"""Random operators with one counter-based stream per model.

Model ``m`` owns a Philox4x32-10 stream that is keyed by its 64-bit ``seed[m]``. ``step[m]`` counts
the forward calls of that model, ``op_index`` numbers the random operators inside one forward call,
and ``e`` is the row-major index of an element inside the model's own slice. With ``q = e // 4`` the
element takes word ``e % 4`` of the block with

```text
key     = (low 32 bits of seed, high 32 bits of seed)
counter = (low 32 bits of q, high 32 bits of q,
           op_index | (step >> 32) << 20, low 32 bits of step)
```

A model therefore draws the same numbers whatever the number of models, its slot in the bundle, the
chunking, the number of threads, the instruction set and (for dropout) the dtype. Requirements:
``0 <= op_index < 2**20`` and ``0 <= step < 2**44``. The values of ``p`` and ``step`` are checked on
the CPU only, because reading them from another device would wait for it.

The operators never change ``seed`` or ``step``. Autograd saves them for the backward of `dropout`,
so advance a step with ``step = step + 1``, not in place, between a forward call and its backward.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modelbatch import _extension as _extension  # Registers the operators.
from modelbatch.ops.autograd import register_autograd

_dropout = torch.ops.modelbatch.dropout.default
_uniform = torch.ops.modelbatch.uniform.default
_normal = torch.ops.modelbatch.normal.default


def dropout(
    input: Tensor, p: Tensor, seed: Tensor, step: Tensor, op_index: int, group: int = 1
) -> Tensor:
    """Drops elements of every model's slice with that model's probability and stream.

    An element is dropped iff its 32-bit word is below ``floor(p * 2**32)``. Dropped elements are
    exactly 0, even where the input is NaN or infinite; the others are multiplied by
    ``1 / (1 - p)``, rounded to the compute dtype (float64 for float64, float32 for all others).
    ``p = 0`` copies the input.

    Args:
        input: ``[M, ...]``, float32, float64, bfloat16 or float16, of any strides. An input that
            all models share may be expanded to ``[M, ...]``: it is not copied M times.
        p: float64 ``[M]``, the probabilities of dropping an element, in ``[0, 1]``.
        seed: int64 ``[M]``.
        step: int64 ``[M]``, the number of the forward call.
        op_index: the number of this operator inside the forward call.
        group: how many consecutive elements of a slice share one decision, which is then taken for
            element ``e`` by word ``e // group``. ``H * W`` gives `torch.nn.Dropout2d` on
            ``[M, B, C, H, W]``.

    Returns:
        A contiguous tensor of the shape and dtype of ``input``.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or ``p``, ``step``, ``op_index`` or ``group``
            out of range.
    """
    return _dropout(input, p, seed, step, op_index, group)


def uniform(
    seed: Tensor,
    step: Tensor,
    op_index: int,
    size: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draws numbers that are uniform in ``[0, 1)``.

    float32 uses the high 24 bits of the element's word; bfloat16 and float16 are the float32 number
    rounded toward zero, so 1 never occurs. float64 uses 53 bits of two words: element ``e`` takes
    words ``2 * (e % 2)`` and ``2 * (e % 2) + 1`` of block ``e // 2``.

    Args:
        seed: int64 ``[M]``.
        step: int64 ``[M]``, the number of the forward call.
        op_index: the number of this operator inside the forward call.
        size: the shape of one model's slice.
        dtype: float32, float64, bfloat16 or float16.

    Returns:
        A tensor ``[M, *size]`` on the device of ``seed``.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or ``step`` or ``op_index`` out of range.
    """
    return _uniform(seed, step, op_index, size, dtype)


def normal(
    seed: Tensor,
    step: Tensor,
    op_index: int,
    size: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draws standard normal numbers by the Box-Muller transform of pairs of words.

    The words of an element are those of `uniform`. Elements ``2 k`` and ``2 k + 1`` are the cosine
    and the sine of one pair. bfloat16 and float16 are the rounded float32 numbers.

    Args:
        seed: int64 ``[M]``.
        step: int64 ``[M]``, the number of the forward call.
        op_index: the number of this operator inside the forward call.
        size: the shape of one model's slice.
        dtype: float32, float64, bfloat16 or float16.

    Returns:
        A tensor ``[M, *size]`` on the device of ``seed``.

    Raises:
        RuntimeError: a wrong shape, dtype or device, or ``step`` or ``op_index`` out of range.
    """
    return _normal(seed, step, op_index, size, dtype)


# ---- fakes --------------------------------------------------------------------------------------


@torch.library.register_fake("modelbatch::dropout")
def _dropout_fake(
    input: Tensor, p: Tensor, seed: Tensor, step: Tensor, op_index: int, group: int
) -> Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


def _draw_fake(
    seed: Tensor, step: Tensor, op_index: int, size: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return seed.new_empty([seed.shape[0], *size], dtype=dtype)


torch.library.register_fake("modelbatch::uniform")(_draw_fake)
torch.library.register_fake("modelbatch::normal")(_draw_fake)


# ---- autograd -----------------------------------------------------------------------------------


def _dropout_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, p, seed, step, ctx.op_index, ctx.group = inputs
    ctx.save_for_backward(p, seed, step)
    ctx.save_for_forward(p, seed, step)


def _dropout_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # The mask is drawn again, so nothing of the size of the input is kept; and since the backward
    # is the operator itself, it can be differentiated any number of times.
    p, seed, step = ctx.saved_tensors
    return _dropout(grad, p, seed, step, ctx.op_index, ctx.group), None, None, None, None, None


def _dropout_jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    p, seed, step = ctx.saved_tensors
    return _dropout(tangent, p, seed, step, ctx.op_index, ctx.group)


register_autograd(
    "dropout", _dropout_backward, setup_context=_dropout_setup_context, jvp=_dropout_jvp
)


# ---- vmap: the outer axis is folded into the model axis -----------------------------------------


def _fold(tensor: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """Moves the axis of an outer vmap in front of the model axis and merges the two."""
    if dim is None:
        tensor = tensor.unsqueeze(0).expand(batch_size, *tensor.shape)
    else:
        tensor = tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def _dropout_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    input: Tensor,
    p: Tensor,
    seed: Tensor,
    step: Tensor,
    op_index: int,
    group: int,
) -> tuple[Tensor, int]:
    tensors = (input, p, seed, step)
    folded = [_fold(t, dim, info.batch_size) for t, dim in zip(tensors, in_dims, strict=False)]
    output = _dropout(*folded, op_index, group)
    return output.unflatten(0, (info.batch_size, -1)), 0


def _make_draw_vmap(op: Any) -> Any:
    def draw_vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        seed: Tensor,
        step: Tensor,
        op_index: int,
        size: Sequence[int],
        dtype: torch.dtype,
    ) -> tuple[Tensor, int]:
        seed, step = (
            _fold(t, dim, info.batch_size) for t, dim in zip((seed, step), in_dims, strict=False)
        )
        return op(seed, step, op_index, size, dtype).unflatten(0, (info.batch_size, -1)), 0

    return draw_vmap


torch.library.register_vmap("modelbatch::dropout", _dropout_vmap)
torch.library.register_vmap("modelbatch::uniform", _make_draw_vmap(_uniform))
torch.library.register_vmap("modelbatch::normal", _make_draw_vmap(_normal))
