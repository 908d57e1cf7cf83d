"""The operators of ``torch.ops.modelbatch``: one module per family of ``csrc/``.

Importing a family's module registers its fake, autograd and vmap rules. Every operator takes
stacked tensors with the model axis as dim 0.
"""

from modelbatch.ops import random as random

__all__ = ["random"]
