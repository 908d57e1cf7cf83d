"""The optimizer of a bundle in a checkpoint.

What is saved is the state that every model's own torch optimizer would have, so a checkpoint does
not depend on how the bundle computes its steps. Tensors that all models have alike are stacked:
one `[M, ...]` tensor for each parameter and name of the state.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..bundle import Bundle
from ..errors import CheckpointError
from ..optim import FusedOptimizer, LockstepLBFGS, PerModelOptimizer
from .encoding import Encoder

__all__ = ["LIMITS", "class_name", "collect_optimizer", "kind_of", "optimizer_class"]

#: The limits of gradient clipping, M numbers each.
LIMITS = ("clip_grad_norm", "clip_grad_value")


def class_name(cls: type) -> str:
    """The name of a class; that of torch's optimizers as users write it."""
    if getattr(torch.optim, cls.__name__, None) is cls:
        return f"torch.optim.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def optimizer_class(optimizer: Optimizer) -> str:
    """The name of the class whose rule a bundle's optimizer follows."""
    if isinstance(optimizer, PerModelOptimizer):
        return class_name(optimizer._optimizer_cls)
    return class_name(type(optimizer))


def kind_of(optimizer: Optimizer) -> str:
    """How the steps are computed; `"whole"` is an optimizer without parts for single models."""
    if isinstance(optimizer, FusedOptimizer):
        return "fused"
    if isinstance(optimizer, LockstepLBFGS):
        return "lockstep"
    return "views" if isinstance(optimizer, PerModelOptimizer) else "whole"


def collect_optimizer(bundle: Bundle, encoder: Encoder) -> dict[str, Any] | None:
    """What `bundle.json` says about the optimizer; its tensors are left with the encoder.

    Raises:
        CheckpointError: its options or state hold something that cannot be saved.
    """
    optimizer = bundle.optimizer
    if optimizer is None:
        return None
    record: dict[str, Any] = {"class": optimizer_class(optimizer), "kind": kind_of(optimizer)}
    if not isinstance(optimizer, PerModelOptimizer):
        where = "the optimizer's state dict"
        record["state_dict"] = encoder.encode(optimizer.state_dict(), "state_dict", where)
        return record
    record["device"] = bundle._streams.device.type
    record["groups"] = [
        encoder.encode(
            {option: value for option, value in dict(group).items() if option != "params"},
            f"groups.{i}",
            f"the options of model {i}",
        )
        for i, group in enumerate(optimizer.__dict__["param_groups"])
    ]
    for name in LIMITS:
        limits = getattr(optimizer, name, None)
        numbers = None if limits is None else [float(limit) for limit in limits]
        record[name] = encoder.encode(numbers, name, name)
    record["lost"] = sorted(optimizer._views.lost)
    record["state"] = _collect_state(bundle, optimizer, encoder)
    return record


def _collect_state(
    bundle: Bundle, optimizer: PerModelOptimizer, encoder: Encoder
) -> dict[str, dict[str, Any]]:
    names = [name for name, _ in bundle.named_parameters()]
    rows = optimizer._views.rows
    known = {param for row in rows for param in row}
    if any(param not in known for param in optimizer.state):
        raise CheckpointError(
            "the optimizer keeps state under a key that is none of its parameters, which cannot be "
            "saved"
        )
    result: dict[str, dict[str, Any]] = {}
    for name, row in zip(names, rows, strict=True):
        states = [optimizer.state.get(param) or {} for param in row]
        keys = {key: None for state in states for key in state}  # in order
        result[name] = {
            key: _collect_key(
                name, key, {i: s[key] for i, s in enumerate(states) if key in s}, encoder
            )
            for key in keys
        }
    return result


def _collect_key(
    parameter: str, key: Any, values: dict[int, Any], encoder: Encoder
) -> dict[str, Any]:
    where = f"the optimizer's {key!r} of '{parameter}'"
    if not isinstance(key, str):
        raise CheckpointError(f"{where} has a name that is no string, so it cannot be saved")
    name = f"{parameter}.{key}"
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    kinds = {(tensor.dtype, tensor.shape, tensor.device, tensor.layout) for tensor in tensors}
    if len(tensors) == len(values) and len(kinds) == 1 and tensors[0].layout is torch.strided:
        device = tensors[0].device.type
        stacked = encoder.tensor(name, torch.stack(tensors).detach().cpu(), where)
        return {"stacked": {**stacked, "device": device}, "models": list(values)}
    return {
        "each": [
            [i, encoder.encode(value, f"{name}.{i}", f"{where} of model {i}")]
            for i, value in values.items()
        ]
    }
