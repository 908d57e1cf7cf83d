"""The operators of ``torch.ops.modelbatch``: one module per family of ``csrc/``.

Importing a family's module registers its fake, autograd and vmap rules. Every operator takes
stacked tensors with the model axis as dim 0.
"""

from modelbatch.ops import (
    conv as conv,
    loss as loss,
    norm as norm,
    optim as optim,
    random as random,
)

__all__ = ["conv", "loss", "norm", "optim", "pointwise", "random"]
