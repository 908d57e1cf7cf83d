"""Optimizers for bundles: any torch optimizer class, with one parameter group per model."""

from .base import PerModelOptimizer as PerModelOptimizer
from .build import build_optimizer as build_optimizer
from .clip import clip_grad_norm_ as clip_grad_norm_, clip_grad_value_ as clip_grad_value_
from .configs import merge_configs as merge_configs
from .factory import (
    OptimizerFactory as OptimizerFactory,
    create_adam_configs as create_adam_configs,
    create_lr_sweep_configs as create_lr_sweep_configs,
    create_sgd_configs as create_sgd_configs,
)
from .fused import FusedOptimizer as FusedOptimizer
from .lockstep import LockstepLBFGS as LockstepLBFGS
from .scaler import BundleGradScaler as BundleGradScaler
from .scheduler import PerModelLRScheduler as PerModelLRScheduler
from .views import ViewOptimizer as ViewOptimizer, build_view_optimizer as build_view_optimizer
