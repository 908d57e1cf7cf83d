"""What is to be trained, one configuration after the other, and what came of each."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from ..errors import ModelBatchError
from ..optim.configs import _option_names, merge_configs, stock_optimizer
from ..optim.factory import per_model_limits
from ..random import check_seeds, derive_seed

__all__ = [
    "ENDED",
    "Trial",
    "TrialResult",
    "best_of",
    "describe",
    "expand",
    "is_better",
    "make_trial",
    "make_trials",
    "oriented",
]

#: The states of a trial that does not go on.
ENDED = ("finished", "stopped", "pruned", "diverged", "failed")
_CLIPS = ("clip_grad_norm", "clip_grad_value")


@dataclass(frozen=True)
class Trial:
    """One configuration, taken apart.

    Attributes:
        id: its place in the list of configurations.
        config: as given, for `build`.
        seed: of its weights and its random stream.
        epochs: how long it trains at most.
        batch_size: None where the caller's own loader decides.
        optimizer_cls: class of its optimizer.
        options: of its optimizer.
        clips: limits of its gradients.
        loss_fn: its loss.
        key: what all trials of a bundle must have in common besides the structure of their models.
    """

    id: int
    config: dict[str, Any]
    seed: int
    epochs: int
    batch_size: int | None
    optimizer_cls: type[Optimizer]
    options: dict[str, Any]
    clips: dict[str, float]
    loss_fn: Callable[..., Tensor]
    key: tuple[Any, ...]


@dataclass
class TrialResult:
    """What came of one trial.

    Attributes:
        id: its place in the list of configurations.
        config: its configuration.
        seed: of its weights and its random stream.
        status: `"finished"`; `"stopped"` (frozen by a callback, as by `EarlyStopping`); `"pruned"`;
            `"diverged"` (a loss, gradient or weight was not finite); `"failed"`, see `error`;
            `"running"` or `"pending"` where the sweep was interrupted.
        value: the best value of the sweep's metric over its epochs; None if there is no finite one.
        epoch: the one of `value`, from 0.
        curves: a number per epoch, by name: `"loss"`, `"val_loss"`, ...
        seconds: its share of the time that its bundle took.
        error: what went wrong, for a failed trial.
    """

    id: int
    config: dict[str, Any]
    seed: int
    status: str = "pending"
    value: float | None = None
    epoch: int | None = None
    curves: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""

    @property
    def epochs(self) -> int:
        """How many epochs it was trained for."""
        return max((len(curve) for curve in self.curves.values()), default=0)

    def __repr__(self) -> str:
        value = "" if self.value is None else f", value={self.value:.6g}, epoch={self.epoch}"
        error = f", error={self.error!r}" if self.error else ""
        return f"TrialResult({self.id}, {self.status}{value}, config={self.config}{error})"


def is_better(value: float, other: float, mode: str) -> bool:
    """Whether a value of the metric is better than another one."""
    return value < other if mode == "min" else value > other


def oriented(value: float, mode: str) -> float:
    """A value of which small ones are good; infinity if it is not finite."""
    if not math.isfinite(value):
        return math.inf
    return value if mode == "min" else -value


def best_of(results: Iterable[TrialResult], mode: str) -> TrialResult | None:
    """The first result with the best value, those that diverged or failed left out."""
    best: TrialResult | None = None
    for result in results:
        if result.value is None or result.status in ("diverged", "failed"):
            continue
        if best is None or best.value is None or is_better(result.value, best.value, mode):
            best = result
    return best


def expand(configs: Any) -> list[dict[str, Any]]:
    """The configurations as a list.

    Args:
        configs: a sequence of dicts; or a dict, of which every value that is a list stands for the
            choices of that key, and any other value for itself: then all combinations, the last
            key changing fastest.

    Raises:
        ModelBatchError: neither, or none at all; naming the trial.
    """
    if isinstance(configs, Mapping):
        choices = [value if isinstance(value, list) else [value] for value in configs.values()]
        expanded = [dict(zip(configs, chosen)) for chosen in itertools.product(*choices)]
    elif isinstance(configs, Sequence) and not isinstance(configs, str | bytes):
        expanded = []
        for number, config in enumerate(configs):
            if not isinstance(config, Mapping):
                raise ModelBatchError(
                    f"trial {number}: a config must be a dict, got {type(config).__name__}"
                )
            expanded.append(dict(config))
    else:
        raise ModelBatchError(
            f"configs must be a list of dicts or a dict of lists, got {type(configs).__name__}"
        )
    if not expanded:
        raise ModelBatchError("a sweep needs at least one config")
    for number, config in enumerate(expanded):
        for key in config:
            if not isinstance(key, str):
                raise ModelBatchError(f"trial {number}: the key {key!r} is not a string")
    return expanded


def make_trials(
    configs: Sequence[dict[str, Any]],
    *,
    seed: int,
    seeds: Sequence[int] | None,
    epochs: int,
    batch_size: int | None,
    optimizer_cls: type[Optimizer],
    loss_fn: Callable[..., Tensor],
) -> list[Trial]:
    """Take all configurations apart; the arguments are what holds where they say nothing.

    Raises:
        ModelBatchError: naming the trial and the key.
    """
    given = check_seeds(seeds, len(configs))
    return [
        make_trial(
            number,
            config,
            seed=derive_seed(number, seed) if given is None else given[number],
            epochs=epochs,
            batch_size=batch_size,
            optimizer_cls=optimizer_cls,
            loss_fn=loss_fn,
        )
        for number, config in enumerate(configs)
    ]


def make_trial(
    number: int,
    config: dict[str, Any],
    *,
    seed: int,
    epochs: int,
    batch_size: int | None,
    optimizer_cls: type[Optimizer],
    loss_fn: Callable[..., Tensor],
) -> Trial:
    """Take one configuration apart; `seed` and the rest are what holds where it says nothing.

    Raises:
        ModelBatchError: naming the trial and the key.
    """
    try:
        return _make(number, config, seed, epochs, batch_size, optimizer_cls, loss_fn)
    except ModelBatchError as error:
        text = str(error).removeprefix("model 0: ")
        raise ModelBatchError(f"trial {number}: {text}") from error


def _make(
    number: int,
    config: dict[str, Any],
    seed: int,
    epochs: int,
    batch_size: int | None,
    optimizer_cls: type[Optimizer],
    loss_fn: Callable[..., Tensor],
) -> Trial:
    if "seed" in config:
        try:
            (seed,) = check_seeds([config["seed"]], 1) or [0]
        except ModelBatchError as error:
            raise ModelBatchError(f"'seed': {error}") from error
    if "batch_size" in config and batch_size is None:
        raise ModelBatchError("'batch_size' needs data as tensors or a Dataset, not as a loader")
    epochs = _count("epochs", config.get("epochs", epochs))
    size = config.get("batch_size", batch_size)
    optimizer_cls = _optimizer_class(config.get("optimizer_cls", optimizer_cls))
    loss_fn = config.get("loss_fn", loss_fn)
    if not callable(loss_fn):
        raise ModelBatchError(f"'loss_fn' must be callable, got {type(loss_fn).__name__}")
    names = set(_option_names(optimizer_cls) or ()) - {"params"}
    (options,) = merge_configs(
        optimizer_cls, 1, None, [{k: v for k, v in config.items() if k in names}]
    )
    clips: dict[str, float] = {}
    for name in _CLIPS:
        limits = per_model_limits(name, config.get(name), 1)
        if limits is not None:
            clips[name] = limits[0]
    if len(clips) > 1:
        raise ModelBatchError("choose one of 'clip_grad_norm' and 'clip_grad_value'")
    stock = stock_optimizer(optimizer_cls, [torch.nn.Parameter(torch.zeros(1, 1))], options, 0)
    group = stock.param_groups[0]
    shared = tuple((k, repr(v)) for k, v in sorted(options.items()) if k not in group)
    checked = None if size is None else _count("batch_size", size)
    key = (checked, optimizer_cls, loss_fn, tuple(clips), shared)
    return Trial(number, config, seed, epochs, checked, optimizer_cls, options, clips, loss_fn, key)


def _count(name: str, value: Any) -> int:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelBatchError(f"'{name}' must be a positive integer, got {value!r}")
    return value


def _optimizer_class(value: Any) -> type[Optimizer]:
    if isinstance(value, str):
        value = getattr(torch.optim, value, value)
    if not (isinstance(value, type) and issubclass(value, Optimizer)):
        raise ModelBatchError(
            f"'optimizer_cls' must be a class derived from torch.optim.Optimizer, or the name of "
            f"one of torch.optim, got {value!r}"
        )
    if issubclass(value, LBFGS):
        raise ModelBatchError("'optimizer_cls': a sweep does not bundle LBFGS")
    return value


def describe(value: Any) -> Any:
    """A value of a configuration in what JSON has, the same in every process."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): describe(item) for name, item in value.items()}
    named = value if hasattr(value, "__qualname__") else type(value)
    text = named.__qualname__  # without the module, which is __main__ in one process only
    return text if named is value else f"<{text}>"
