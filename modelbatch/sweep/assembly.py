"""A bundle of the models of trials."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from ..batch import ModelBatch
from ..optim import OptimizerFactory
from .gather import Settings
from .trials import Trial

__all__ = ["assemble", "seed_generators"]


def assemble(
    trials: Sequence[Trial], models: Sequence[nn.Module], settings: Settings
) -> tuple[ModelBatch, Optimizer]:
    """The bundle of these models and its optimizer, on the device of the sweep.

    Args:
        trials: of one `key`.
        models: theirs, of one structure.
        settings: of the sweep.
    """
    mb = ModelBatch(list(models), seeds=[trial.seed for trial in trials])
    if settings.device is not None:
        mb.to(settings.device)
    clips: dict[str, Any] = {
        name: [trial.clips[name] for trial in trials] for name in trials[0].clips
    }
    factory = OptimizerFactory(trials[0].optimizer_cls, **clips)
    return mb, factory.create_optimizer(mb, [dict(trial.options) for trial in trials])


def seed_generators(seed: int) -> None:
    """Let what loaders and transforms draw not depend on anything drawn before."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)
