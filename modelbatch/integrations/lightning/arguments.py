"""The arguments of a BundleModule, and the bundle that they make."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...batch import ModelBatch
from ...errors import ModelBatchError
from ...optim import merge_configs

__all__ = ["bundle_of", "configs_of", "count_models", "optimizer_class", "plain_hparams"]


def count_models(num_models: int | None, **per_model: Any) -> int:
    """M, from whatever says it.

    Raises:
        ModelBatchError: nothing does, or the arguments do not agree.
    """
    said = {name: len(own) for name, own in per_model.items() if isinstance(own, Sequence | Tensor)}
    if num_models is not None:
        said = {"num_models": num_models, **said}
    if not said:
        raise ModelBatchError("say how many models there are: num_models=, or lr_list=")
    if len(set(said.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in said.items())
        raise ModelBatchError(f"the numbers of models do not agree: {counts}")
    return next(iter(said.values()))


def optimizer_class(given: type[Optimizer] | str | None) -> type[Optimizer] | None:
    """The class, or the one of `torch.optim` that has this name.

    Raises:
        ModelBatchError: there is none.
    """
    if not isinstance(given, str):
        return given
    found = getattr(torch.optim, given, None)
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ModelBatchError(f"torch.optim has no optimizer {given!r}; give optimizer_cls a class")
    return found


def bundle_of(
    models: Iterable[nn.Module] | None,
    build: Callable[[int], nn.Module],
    num_models: int,
    options: Mapping[str, Any],
) -> ModelBatch:
    """The bundle of given models, or of models that are built one after another.

    Raises:
        ModelBatchError: see `ModelBatch`.
    """
    if models is not None:
        return ModelBatch(models, **options)
    return ModelBatch.from_factory(build, num_models, **options)


def configs_of(
    num_models: int,
    optimizer_cls: type[Optimizer] | None,
    lr_list: Any,
    optimizer_kwargs: Any,
) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
    """The optimizer options of each model, and those that all share.

    Raises:
        ModelBatchError: a wrong count or a bad option; the message names the model.
    """
    if optimizer_cls is None:
        if lr_list is not None or optimizer_kwargs is not None:
            raise ModelBatchError("lr_list and optimizer_kwargs need optimizer_cls")
        return [{} for _ in range(num_models)], {}
    configs = merge_configs(optimizer_cls, num_models, lr_list, optimizer_kwargs)
    return configs, dict(optimizer_kwargs) if isinstance(optimizer_kwargs, Mapping) else {}


def plain_hparams(
    num_models: int,
    optimizer_cls: type[Optimizer] | None,
    lr_list: Any,
    optimizer_kwargs: Any,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What `load_from_checkpoint` needs again and a checkpoint can hold."""
    rates = None if lr_list is None else [float(rate) for rate in lr_list]
    hparams = {"num_models": num_models, "lr_list": rates, "optimizer_kwargs": optimizer_kwargs}
    if optimizer_cls is not None:
        name = optimizer_cls.__name__
        if getattr(torch.optim, name, None) is not optimizer_cls:
            hparams["lr_list"] = hparams["optimizer_kwargs"] = None
        else:
            hparams["optimizer_cls"] = name
    kept = ("shared_input", "seeds", "rng", "fallback")
    hparams |= {name: options[name] for name in kept if name in options}
    return {name: value for name, value in hparams.items() if value is not None}
