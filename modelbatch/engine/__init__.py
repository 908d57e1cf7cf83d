"""Whole training steps of small networks in one call.

The forward of model 0 becomes a program, which `modelbatch::train_steps_` runs for every model:
forward, loss, backward, clipping and update, without a tensor in between. What is not in its
vocabulary takes the general path, and `mb.explain()` says why.
"""

from .run import Engine as Engine
