"""The operators of ``torch.ops.modelbatch``: one module per family of ``csrc/``.

Importing a family's module registers its fake, autograd and vmap rules. Every operator takes
stacked tensors with the model axis as dim 0.
"""

from modelbatch.ops import (
    conv as conv,
    finite as finite,
    loss as loss,
    norm as norm,
    optim as optim,
    pointwise as pointwise,
    random as random,
    rnn as rnn,
    rnn_batching as rnn_batching,
)

__all__ = ["conv", "finite", "loss", "norm", "optim", "pointwise", "random", "rnn", "rnn_batching"]
