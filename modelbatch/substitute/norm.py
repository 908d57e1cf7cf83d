"""Normalisation layers with weights and statistics per model."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..attributes import PerModelFloat
from .mode import Call, handles_per_model_numbers, register


def cumulative_batch_norm(module: _BatchNorm, input: Tensor) -> Tensor:
    """`BatchNorm.forward` with a cumulative average, whose factor differs between models.

    The original turns the count of batches into a Python float, which only works for one model.
    """
    module._check_input_dim(input)
    tracks = module.running_mean is not None
    use_batch = module.training or not tracks
    factor: Any = 0.0
    if module.training and module.track_running_stats and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        factor = module.num_batches_tracked.to(torch.float64).reciprocal()
        if isinstance(module.momentum, PerModelFloat):
            factor = (factor, module.momentum)
    updates = module.training and module.track_running_stats
    return F.batch_norm(
        input,
        module.running_mean if not module.training or updates else None,
        module.running_var if not module.training or updates else None,
        module.weight,
        module.bias,
        use_batch,
        factor,
        module.eps,
    )
