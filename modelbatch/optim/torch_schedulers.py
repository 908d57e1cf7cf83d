"""Torch's own schedulers over all groups of a bundle's optimizer, when its models change."""

import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..change import Change
from ..errors import ModelBatchError

__all__ = ["TorchSchedulers"]

# What torch's schedulers keep for every parameter group, in their order.
_RATES = ("base_lrs", "_last_lr")
_COMMON = ("lr_lambdas", "min_lrs")
_WRITTEN = ("max_lrs", "base_momentums", "max_momentums")


class TorchSchedulers:
    """The schedulers that see a bundle's optimizer whole.

    They keep lists of one value per group, and an optimizer does not know its schedulers, so they
    are looked for among all objects. That is done only where the optimizer's `step` shows that
    there are any.

    Args:
        optimizer: the bundle's.
        groups: those of the models that are about to join, by slot.
        change: what is about to change.

    Raises:
        ModelBatchError: a scheduler that cannot follow.
    """

    def __init__(
        self, optimizer: Optimizer, groups: dict[int, dict[str, Any]], change: Change
    ) -> None:
        self._lists: list[tuple[LRScheduler, str, list[Any]]] = []
        for scheduler in _schedulers_of(optimizer):
            name = type(scheduler).__name__
            for key, values in list(vars(scheduler).items()):
                if not isinstance(values, list | tuple) or len(values) != change.old_num_models:
                    continue
                if key in (*_RATES, *_COMMON, *_WRITTEN):
                    new = change.pick(list(values), _fresh(name, key, list(values), groups))
                    self._lists.append((scheduler, key, new))
                elif not type(scheduler).__module__.startswith("torch."):
                    raise ModelBatchError(
                        f"{name}.{key} may have a value for each model of the bundle, which cannot "
                        "be told; schedulers of create_lr_scheduler follow a bundle that changes"
                    )
        if not self._lists:
            return
        known = {option for group in optimizer.__dict__["param_groups"] for option in group}
        for slot, group in groups.items():
            missing = sorted(known - group.keys() - {"initial_lr"})
            if missing:
                raise ModelBatchError(
                    f"model {slot} (new): a scheduler keeps '{missing[0]}' for each model; only "
                    "schedulers of create_lr_scheduler take in fresh models then"
                )
            rate = group["lr"]
            group["initial_lr"] = rate.clone() if isinstance(rate, torch.Tensor) else rate

    def models_changed(self) -> None:
        """Give the schedulers the lists of the models that there are now."""
        for scheduler, key, values in self._lists:
            setattr(scheduler, key, values)


def _fresh(name: str, key: str, values: list[Any], groups: dict[int, dict[str, Any]]) -> Any:
    def value(slot: int) -> Any:
        if key in _RATES:
            rate = groups[slot]["lr"]
            return rate.clone() if isinstance(rate, torch.Tensor) else rate
        if key in _WRITTEN or any(own is not values[0] and own != values[0] for own in values):
            raise ModelBatchError(
                f"model {slot} (new): the {name} of the bundle's optimizer keeps {key} of each "
                "model, and what the new one's is cannot be told; use create_lr_scheduler"
            )
        return values[0]

    return value


def _schedulers_of(optimizer: Optimizer) -> Iterator[LRScheduler]:
    if not hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return
    seen: set[int] = set()
    for holder in gc.get_referrers(optimizer):
        owners: list[Any] = [holder]
        if type(holder) is dict:
            owners = gc.get_referrers(holder) if holder.get("optimizer") is optimizer else []
        for owner in owners:
            if id(owner) in seen or not issubclass(type(owner), LRScheduler):
                continue
            seen.add(id(owner))
            follows = hasattr(owner, "models_changed")
            if vars(owner).get("optimizer") is optimizer and not follows:
                yield owner
