"""Attention masks that differ between the models of a bundle.

transformers looks into a mask in order to leave out one that hides nothing, unless it is being
traced. Models of which one has such a mask and another has not cannot go both ways at once, so
theirs are treated as while tracing: kept, with the same result.
"""

from typing import Any

import torch._C._functorch as functorch
from torch import Tensor
from transformers import masking_utils

__all__ = ["keep_masks_that_differ"]


def keep_masks_that_differ() -> None:
    """Let `transformers.masking_utils` treat masks of several models so."""
    original = getattr(masking_utils, "is_tracing", None)
    if original is None or getattr(original, "knows_bundles", False):
        return

    def is_tracing(tensor: Any = None) -> bool:
        if isinstance(tensor, Tensor) and functorch.is_batchedtensor(tensor):
            masks = functorch.get_unwrapped(tensor)
            if not bool(masks.detach().all()):
                return True
        return bool(original(tensor))

    is_tracing.knows_bundles = True  # type: ignore[attr-defined]
    vars(masking_utils)["is_tracing"] = is_tracing
