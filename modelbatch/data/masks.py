"""Random numbers of samples and models that need no generator: the same wherever they are asked."""

import torch
from torch import Tensor

from ..errors import ModelBatchError

_INCREMENT = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shifted(bits: Tensor, by: int) -> Tensor:
    """A logical shift to the right; torch's own copies the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def mixed(bits: Tensor) -> Tensor:
    """SplitMix64 (Steele, Lea and Flood, 2014) of int64 bits, elementwise."""
    z = bits + _signed(_INCREMENT)
    z = (z ^ _shifted(z, 30)) * _signed(_FACTORS[0])
    z = (z ^ _shifted(z, 27)) * _signed(_FACTORS[1])
    return z ^ _shifted(z, 31)


def uniform(seeds: Tensor, ids: Tensor) -> Tensor:
    """Float64 `[M, B]` in [0, 1): one number for each model's seed and each sample's id.

    Args:
        seeds: int64 `[M]`.
        ids: int64 `[B]`.
    """
    bits = mixed(mixed(seeds).unsqueeze(1) ^ mixed(ids * 2 + 1).unsqueeze(0))
    return _shifted(bits, 11).double() * 2.0**-53


def create_random_masks(
    batch_size: int,
    num_models: int,
    subset_ratio: float = 0.8,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Masks that show every model a random part of a batch.

    Args:
        batch_size: B.
        num_models: M.
        subset_ratio: the part of the batch that each model sees, rounded to whole samples and at
            least one of them.
        generator: of `device`; torch's own by default.
        device: where the masks are made.

    Returns:
        Bool `[M, B]`, with equally many samples in each row, for `DataRouter("mask")` or
        `sample_weight`.

    Raises:
        ModelBatchError: sizes below 1, or a ratio that is not in (0, 1].
    """
    if batch_size < 1 or num_models < 1:
        raise ModelBatchError(
            f"batch_size and num_models must be at least 1, got {batch_size} and {num_models}"
        )
    if not 0 < subset_ratio <= 1:
        raise ModelBatchError(f"subset_ratio must be in (0, 1], got {subset_ratio}")
    count = max(1, round(batch_size * subset_ratio))
    keys = torch.rand(num_models, batch_size, generator=generator, device=device)
    chosen = keys.argsort(dim=1)[:, :count]
    masks = torch.zeros(num_models, batch_size, dtype=torch.bool, device=keys.device)
    return masks.scatter_(1, chosen, True)
