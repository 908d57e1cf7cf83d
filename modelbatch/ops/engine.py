"""Whole training steps of small networks by one operator."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from modelbatch import _extension as _extension  # Registers the operators.

_train_steps_ = torch.ops.modelbatch.train_steps_.default


def train_steps_(
    params: Sequence[Tensor],
    buffers: Sequence[Tensor],
    states: Sequence[Tensor],
    step: Tensor,
    x: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    program: Tensor,
    numbers: Tensor,
    hyper: Tensor,
    lr: Tensor | None,
    active: Tensor | None,
    clip_norm: Tensor | None,
    clip_value: Tensor | None,
    seed: Tensor | None,
    stream_step: Tensor | None,
    rule: int,
    flags: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """K steps of every model: forward, loss, backward, clipping and update, model by model.

    A model's result depends neither on the others, its slot and the number of threads, nor on how
    its steps are grouped into calls. `csrc/engine/engine.h` describes programs, flags and results
    in full; `modelbatch.engine` makes them.

    Args:
        params: contiguous ``[M, ...]``, float32 or float64, changed in place; those that learn
            first.
        buffers: running statistics ``[M, C]`` and numbers of batches ``[M]``, changed in place.
        states: of the optimizer, kind by kind for all parameters that learn, changed in place;
            kinds that no model needs are left out.
        step: float32 ``[M]``, changed in place.
        x: ``[K, B, ...]`` for all models, or ``[K, M, B, ...]``, as ``flags`` say.
        target: likewise.
        sample_weight: float32 or float64, ``[K, B]`` or ``[K, M, B]``.
        program: int64, the network and its loss.
        numbers: float64 ``[A, M]``, its plain numbers.
        hyper: float64 ``[R, M]``, see `modelbatch.ops.optim`.
        lr: float64 ``[K, M]``, in the place of the first row of ``hyper``.
        active: bool ``[M]``; a model that is not gets its losses, and nothing of it changes.
        clip_norm: float64 ``[M]``, limits of the gradients' norms.
        clip_value: float64 ``[M]``, limits of their elements.
        seed: int64 ``[M]``, of the random streams; needed for dropout.
        stream_step: int64 ``[M]``, where these streams are; not changed.
        rule: number of the optimizer.
        flags: which tensors have a model axis, and what is wanted.

    Returns:
        Losses ``[K, M]``; status uint8 ``[K, M]``; norms of the gradients before clipping, float64
        ``[K, M]``, or ``[0]`` if they are not wanted.

    Raises:
        RuntimeError: arguments that do not fit; nothing has been changed then.
    """
    was_enabled = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)  # what torch.no_grad() does, in a tenth of its time
    try:
        result: tuple[Tensor, Tensor, Tensor] = _train_steps_(
            params, buffers, states, step, x, target, sample_weight, program, numbers, hyper, lr,
            active, clip_norm, clip_value, seed, stream_step, rule, flags,
        )  # fmt: skip
    finally:
        torch._C._set_grad_enabled(was_enabled)
    # The operator writes below autograd, which must learn that saved tensors changed.
    increment_version([*params, *buffers])
    return result


@torch.library.register_fake("modelbatch::train_steps_")
def _train_steps_fake(
    params: Sequence[Tensor],
    buffers: Sequence[Tensor],
    states: Sequence[Tensor],
    step: Tensor,
    x: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    program: Tensor,
    numbers: Tensor,
    hyper: Tensor,
    lr: Tensor | None,
    active: Tensor | None,
    clip_norm: Tensor | None,
    clip_value: Tensor | None,
    seed: Tensor | None,
    stream_step: Tensor | None,
    rule: int,
    flags: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (x.shape[0], step.shape[0])
    norms = shape if flags & 8 else (0,)
    return (
        params[0].new_empty(shape),
        params[0].new_empty(shape, dtype=torch.uint8),
        params[0].new_empty(norms, dtype=torch.float64),
    )
