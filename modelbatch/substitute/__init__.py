"""Rules for torch functions inside a bundle's forward; importing this package registers them."""

from . import (
    attention,
    autograd_state,
    conv,
    dense,
    embedding,
    folds,
    indexing,
    layer_norm,
    losses,
    norm,
    pointwise,
    random_ops,
    rewrites,
    rnn,
    values,
)
from .autocast import install
from .dense import GradMemory
from .mode import RULES, Call, NeedsBatchedFactories

install()

__all__ = [
    "RULES",
    "Call",
    "GradMemory",
    "NeedsBatchedFactories",
    "attention",
    "autograd_state",
    "conv",
    "dense",
    "embedding",
    "folds",
    "indexing",
    "layer_norm",
    "losses",
    "norm",
    "pointwise",
    "random_ops",
    "rewrites",
    "rnn",
    "values",
]
