"""The operators of ``torch.ops.modelbatch``: one module per family of ``csrc/``.

Importing a family's module registers its fake, autograd and vmap rules. Every operator takes
stacked tensors with the model axis as dim 0.
"""

from modelbatch.ops import conv as conv
from modelbatch.ops import norm as norm
from modelbatch.ops import random as random

__all__ = ["conv", "norm", "random"]
