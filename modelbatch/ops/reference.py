"""The operators of `modelbatch.ops` in plain torch arithmetic: what the tests trust."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """The high and low 32 bits of the product of 32-bit words held in int64, without overflow."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b
    carried = (low >> 16) + high
    return carried >> 16, (carried << 16 | low & 0xFFFF) & _MASK


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> Tensor:
    """Philox4x32-10: the four words of every counter.

    Args:
        counter: four int64 tensors ``[...]`` of 32-bit words.
        key: two 32-bit words.

    Returns:
        int64 ``[..., 4]``.
    """
    x0, x1, x2, x3 = counter
    key0, key1 = key
    for _ in range(10):
        high0, low0 = _multiply(x0, 0xD2511F53)
        high1, low1 = _multiply(x2, 0xCD9E8D57)
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return torch.stack([x0, x1, x2, x3], dim=-1)


def philox_words(seed: int, step: int, op_index: int, count: int) -> Tensor:
    """The first words of one model's stream in one operator call.

    Args:
        seed: the model's seed.
        step: the number of the forward call.
        op_index: the number of the operator inside the forward call.
        count: how many words.

    Returns:
        int64 ``[count]``, each in ``[0, 2**32)``.
    """
    block = torch.arange((count + 3) // 4)
    fixed = torch.zeros_like(block)
    counter2 = (op_index | (step >> 32) << 20) & _MASK
    counter = (block & _MASK, block >> 32, fixed + counter2, fixed + (step & _MASK))
    return philox(counter, (seed & _MASK, (seed >> 32) & _MASK)).flatten()[:count]


def dropout_reference(
    input: Tensor, p: Tensor, seed: Tensor, step: Tensor, op_index: int, group: int = 1
) -> Tensor:
    """What `modelbatch.ops.random.dropout` computes, one model after another."""
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    outputs = []
    for x, rate, model_seed, model_step in zip(
        input, p.tolist(), seed.tolist(), step.tolist(), strict=True
    ):
        if rate == 0.0:
            outputs.append(x.clone())
            continue
        decisions = -(-x.numel() // group)
        words = philox_words(model_seed, model_step, op_index, decisions)
        dropped = (words < math.floor(rate * 2**32)).repeat_interleave(group)[: x.numel()]
        scale = torch.ones((), dtype=compute) / torch.tensor(1.0 - rate, dtype=compute)
        kept = (x.to(compute) * scale).to(x.dtype)
        outputs.append(torch.where(dropped.view(x.shape), torch.zeros_like(x), kept))
    return torch.stack(outputs) if outputs else torch.empty_like(input)


def _uniform_f64(words: Tensor) -> Tensor:
    """53-bit numbers from pairs of words: ``[2 n]`` to float64 ``[n]``."""
    pairs = words.view(-1, 2)
    return ((pairs[:, 0] >> 5 << 26) + (pairs[:, 1] >> 6)).double() * 2.0**-53


def _truncated(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers of ``[0, 1)`` rounded toward zero."""
    nearest = value.to(dtype)
    below = torch.nextafter(nearest, torch.zeros_like(nearest))
    return torch.where(nearest.to(value.dtype) > value, below, nearest)


def uniform_reference(
    seed: Tensor,
    step: Tensor,
    op_index: int,
    size: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What `modelbatch.ops.random.uniform` computes, one model after another."""
    count = math.prod(size)
    outputs = []
    for model_seed, model_step in zip(seed.tolist(), step.tolist(), strict=True):
        if dtype == torch.float64:
            value = _uniform_f64(philox_words(model_seed, model_step, op_index, 2 * count))
        else:
            words = philox_words(model_seed, model_step, op_index, count)
            value = _truncated((words >> 8).float() * 2.0**-24, dtype)
        outputs.append(value.view(tuple(size)))
    return torch.stack(outputs) if outputs else seed.new_empty([0, *size], dtype=dtype)


def normal_reference(
    seed: Tensor, step: Tensor, op_index: int, size: Sequence[int], *, double: bool = False
) -> Tensor:
    """The numbers of `modelbatch.ops.random.normal` in float64 arithmetic, before any rounding.

    Args:
        seed: int64 ``[M]``.
        step: int64 ``[M]``.
        op_index: the number of the operator inside the forward call.
        size: the shape of one model's slice.
        double: whether to use the words that float64 numbers are made of.

    Returns:
        float64 ``[M, *size]``.
    """
    count = math.prod(size)
    outputs = []
    for model_seed, model_step in zip(seed.tolist(), step.tolist(), strict=True):
        pairs = -(-count // 2)
        if double:
            u = _uniform_f64(philox_words(model_seed, model_step, op_index, 4 * pairs)).view(-1, 2)
            first, second = 1.0 - u[:, 0], u[:, 1]
        else:
            words = philox_words(model_seed, model_step, op_index, 2 * pairs).view(-1, 2)
            # One float32 sum after one float32 conversion, as the kernel rounds it.
            first = (words[:, 0].float() * 2.0**-32 + 2.0**-33).double()
            second = (words[:, 1] >> 8).double() * 2.0**-24
        radius = torch.sqrt(-2.0 * torch.log(first))
        angle = 2.0 * math.pi * second
        z = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
        outputs.append(z.flatten()[:count].view(tuple(size)))
    empty = torch.empty([0, *size], dtype=torch.float64)
    return torch.stack(outputs) if outputs else empty
