"""Looking for infinite and NaN elements in all models at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from modelbatch import _extension as _extension  # Registers the operators.

_nonfinite = torch.ops.modelbatch.nonfinite.default


def nonfinite(tensors: Sequence[Tensor]) -> Tensor:
    """Which models have an infinite or NaN element, in one pass over memory.

    Args:
        tensors: at least one stacked tensor ``[M, ...]``, all of one device and dtype (float32,
            float64, bfloat16 or float16), of any strides.

    Returns:
        bool ``[M]``.

    Raises:
        RuntimeError: no tensors, or wrong shapes, dtypes or devices.
    """
    return _nonfinite(tensors)


@torch.library.register_fake("modelbatch::nonfinite")
def _nonfinite_fake(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_empty([tensors[0].shape[0]], dtype=torch.bool)
