"""The states of M schedulers, in plain containers."""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from ..errors import ModelBatchError

__all__ = ["alike", "checked_records", "kind", "parts", "plain"]


def kind(scheduler: LRScheduler) -> str:
    """The class of a scheduler, and those of the schedulers in it."""
    inner = getattr(scheduler, "_schedulers", None)
    name = type(scheduler).__name__
    return f"{name}({', '.join(map(kind, inner))})" if inner else name


def parts(scheduler: LRScheduler) -> Iterator[Any]:
    """Everything whose attributes `load_state_dict` of a scheduler writes."""
    yield scheduler
    for inner in getattr(scheduler, "_schedulers", ()):
        yield from parts(inner)
    functions = [
        *getattr(scheduler, "lr_lambdas", ()),
        getattr(scheduler, "_scale_fn_custom", None),
    ]
    yield from (function for function in functions if hasattr(function, "__dict__"))


def plain(value: Any) -> Any:
    """A copy without classes other than the plain containers (MultiStepLR has a Counter)."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(item) for item in value)
    return copy.deepcopy(value)


def alike(saved: Any, own: Any) -> Any:
    """A copy of a saved state with the classes that the scheduler's own state has."""
    if isinstance(own, Counter) and isinstance(saved, Mapping):
        return Counter({int(key): count for key, count in saved.items()})
    if isinstance(own, dict) and isinstance(saved, Mapping):
        return {key: alike(item, own.get(key)) for key, item in saved.items()}
    if isinstance(own, list) and isinstance(saved, list) and len(own) == len(saved):
        return [alike(*pair) for pair in zip(saved, own)]
    return plain(saved)


def checked_records(
    state_dict: Mapping[str, Any], schedulers: Sequence[LRScheduler]
) -> list[Mapping[str, Any]]:
    """The M records of a saved state, if they are of schedulers such as these.

    Raises:
        ModelBatchError: they are not; the message says which model's.
    """
    if not isinstance(state_dict, Mapping) or not state_dict.keys() >= {"last_epoch", "schedulers"}:
        raise ModelBatchError(
            "this is no state of a per-model scheduler, it lacks 'last_epoch' or 'schedulers'"
        )
    records = state_dict["schedulers"]
    if not isinstance(records, (list, tuple)) or not isinstance(state_dict["last_epoch"], int):
        raise ModelBatchError("this is no state of a per-model scheduler: 'schedulers' is no list")
    if len(records) != len(schedulers):
        raise ModelBatchError(
            f"the state is of {len(records)} schedulers, the bundle has {len(schedulers)}"
        )
    for i, (record, scheduler) in enumerate(zip(records, schedulers)):
        if not isinstance(record, Mapping) or not record.keys() >= {"class", "state"}:
            raise ModelBatchError(f"model {i}: its state lacks 'class' or 'state'")
        if record["class"] != kind(scheduler):
            raise ModelBatchError(
                f"model {i}: the state is of {record['class']}, the scheduler is {kind(scheduler)}"
            )
        if not isinstance(record["state"], Mapping):
            raise ModelBatchError(f"model {i}: its state is no dict")
    return list(records)
