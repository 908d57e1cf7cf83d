"""Optimizers for bundles: any torch optimizer class, with one parameter group per model."""

from .base import PerModelOptimizer as PerModelOptimizer
from .configs import merge_configs as merge_configs
from .lockstep import LockstepLBFGS as LockstepLBFGS
from .views import ViewOptimizer as ViewOptimizer, build_view_optimizer as build_view_optimizer
