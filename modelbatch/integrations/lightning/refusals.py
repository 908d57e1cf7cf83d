"""What Lightning offers and a bundle cannot have."""

from typing import Any

import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelPruning
from lightning.pytorch.strategies import SingleDeviceStrategy

from ...optim.base import PerModelOptimizer
from .errors import BundleConfigurationError

__all__ = ["check_module", "check_optimizers", "check_trainer"]


def check_trainer(trainer: Any) -> None:
    """Refuse a Trainer that would train something else than M independent models.

    Raises:
        BundleConfigurationError: the strategy splits a model or its batch, or a callback makes no
            sense for many models; the message says what to do instead.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy):
        raise BundleConfigurationError(
            f"{type(strategy).__name__} cannot train a bundle: its models are independent, so there"
            " is nothing to exchange between devices. Use Trainer(devices=1), and for several"
            " devices give each a bundle of its own: a process for every device with its part of"
            " the models, or modelbatch.integrations.ray on a cluster"
        )
    for callback in trainer.callbacks:
        if isinstance(callback, LearningRateFinder):
            raise BundleConfigurationError(
                "Tuner.lr_find and LearningRateFinder look for the one learning rate of one model"
                " by its loss curve; in a bundle every model has its own. Train one model for each"
                " learning rate instead: lr_list=[c['lr'] for c in"
                " create_lr_sweep_configs(1e-5, 1.0, num_models)]"
            )
        if isinstance(callback, ModelPruning):
            raise BundleConfigurationError(
                "ModelPruning replaces the parameters of modules, which in a bundle are views into"
                " the stack of all models. Prune module.export_model(i) after training"
            )


def check_module(module: Any) -> None:
    """Refuse a module that went through `torch.compile`.

    Raises:
        BundleConfigurationError: it did.
    """
    if getattr(module, "_compiler_ctx", None) is not None:
        raise BundleConfigurationError(
            "torch.compile cannot see through the steps of a bundle; give the Trainer the module"
            " itself, and compile the bundle: module.bundle.enable_compile()"
        )


def check_optimizers(bundle: Any, optimizers: list[torch.optim.Optimizer]) -> None:
    """Refuse optimizers that do not know of the models.

    Raises:
        BundleConfigurationError: one of torch on the stacked parameters, or of another bundle.
    """
    own = {id(parameter) for parameter in bundle.parameters()}
    for optimizer in optimizers:
        if not isinstance(optimizer, PerModelOptimizer):
            raise BundleConfigurationError(
                f"configure_optimizers returned a {type(optimizer).__name__} of torch, which has"
                " one set of options for all models and knows of no frozen ones; return"
                " OptimizerFactory(torch.optim."
                f"{type(optimizer).__name__}).create_optimizer(self.bundle, configs), or leave it"
                " to BundleModule(lr_list=..., optimizer_cls=...)"
            )
        if not all(id(parameter) in own for parameter in optimizer._views.stacked):
            raise BundleConfigurationError(
                "configure_optimizers returned the optimizer of another bundle"
            )
