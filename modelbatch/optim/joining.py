"""What an optimizer must know of models that are about to join its bundle."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from ..change import Change
from ..errors import ModelBatchError
from .configs import merge_configs, separate_tensors, stock_optimizer
from .torch_schedulers import TorchSchedulers

if TYPE_CHECKING:
    from .base import PerModelOptimizer

__all__ = ["LIMITS", "Joining"]

#: The limits of gradient clipping, M numbers each.
LIMITS = ("clip_grad_norm", "clip_grad_value")


@dataclass
class Joining:
    """Options, groups and first states of fresh models, by slot."""

    configs: dict[int, dict[str, Any]]
    stocks: dict[int, Optimizer]
    groups: dict[int, dict[str, Any]]
    limits: dict[str, dict[int, float]]
    schedulers: TorchSchedulers

    @classmethod
    def of(cls, optimizer: "PerModelOptimizer", change: Change) -> "Joining":
        """Checks the options of the fresh models; nothing is changed.

        Raises:
            ModelBatchError: a bad option, naming model and option.
        """
        slots = change.fresh
        if not slots:
            return cls({}, {}, {}, {}, TorchSchedulers(optimizer, {}, change))
        own = [dict(change.hyper.get(slot, {})) for slot in slots]
        if change.optimizer is not optimizer:
            own = [{} for _ in slots]  # what the user said is about the bundle's optimizer
        limits = {name: _limits(optimizer, name, slots, own, change.template) for name in LIMITS}
        base = optimizer._configs[0] if change.template else optimizer._base_options
        options = [optimizer._configs[0], *({**base, **more} for more in own)]
        merged = _merged(optimizer._optimizer_cls, options, slots)
        configs = dict(zip(slots, separate_tensors(merged)))
        stocks = {
            slot: stock_optimizer(
                optimizer._optimizer_cls,
                list(dict(change.models[slot].named_parameters()).values()),
                config,
                slot,
            )
            for slot, config in configs.items()
        }
        groups = {slot: dict(stock.param_groups[0]) for slot, stock in stocks.items()}
        schedulers = TorchSchedulers(optimizer, groups, change)
        return cls(configs, stocks, groups, limits, schedulers)


def _merged(
    optimizer_cls: type[Optimizer], options: list[dict[str, Any]], slots: list[int]
) -> list[dict[str, Any]]:
    """`merge_configs` of what follows the first options, with the models' own numbers."""
    try:
        return merge_configs(optimizer_cls, len(options), None, options)[1:]
    except ModelBatchError as error:

        def renumber(match: re.Match[str]) -> str:
            number = int(match[1])
            return match[0] if number == 0 else f"model {slots[number - 1]} (new):"

        raise ModelBatchError(re.sub(r"^model (\d+):", renumber, str(error))) from error


def _limits(
    optimizer: "PerModelOptimizer",
    name: str,
    slots: list[int],
    own: list[dict[str, Any]],
    template: bool,
) -> dict[int, float]:
    """What the gradients of fresh models are clipped to; takes it out of their options."""
    from .factory import per_model_limits

    limits = getattr(optimizer, name, None)
    found = {}
    for slot, options in zip(slots, own):
        given = options.pop(name, None)
        if limits is None:
            if given is not None:
                raise ModelBatchError(
                    f"model {slot} (new): {name} is given, but the bundle's optimizer does not "
                    "clip by it; OptimizerFactory makes one that does"
                )
            continue
        if given is None:
            if not template and any(limit != limits[0] for limit in limits):
                raise ModelBatchError(
                    f"model {slot} (new): {name} differs between the models, so say what it is "
                    f"for this one: {name}=..."
                )
            given = limits[0]
        checked = per_model_limits(name, [given], 1)
        assert checked is not None
        found[slot] = checked[0]
    return found
