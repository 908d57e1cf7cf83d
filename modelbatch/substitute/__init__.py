"""Rules for torch functions inside a bundle's forward; importing this package registers them."""

from . import attention, conv, dense, embedding, losses, norm, random_ops
from .dense import GradMemory
from .mode import RULES, Call, NeedsBatchedFactories

__all__ = [
    "RULES",
    "Call",
    "GradMemory",
    "NeedsBatchedFactories",
    "attention",
    "conv",
    "dense",
    "embedding",
    "losses",
    "norm",
    "random_ops",
]
