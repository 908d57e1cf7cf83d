"""Sweeps: a list of configurations, trained in bundles that form by themselves."""

from .pruners import (
    MedianPruner as MedianPruner,
    Pruner as Pruner,
    SuccessiveHalving as SuccessiveHalving,
)
from .result import SweepResult as SweepResult
from .run import run_sweep as run_sweep
from .trials import TrialResult as TrialResult
