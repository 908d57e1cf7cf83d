"""What the callbacks that report have in common: numbers of all models, read at once."""

import importlib
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ModelBatchError
from ..optim import FusedOptimizer

if TYPE_CHECKING:
    from ..batch import ModelBatch

__all__ = [
    "MANY_RUNS",
    "Spread",
    "check_interval",
    "check_runs",
    "hyper_parameters",
    "learning_rates",
    "model_hparams",
    "read",
    "require",
    "scalars",
    "spread",
    "tell_of_many_runs",
]

MANY_RUNS = 50


def require(module: str, extra: str, user: str) -> Any:
    """Import an optional dependency.

    Args:
        module: what to import.
        extra: the extra of this package that installs it.
        user: who needs it.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{user} needs {extra}, which is not installed: pip install 'modelbatch[{extra}]'"
        ) from error


def check_interval(name: str, value: Any, least: int = 1) -> int:
    """A whole number of steps or epochs.

    Raises:
        ModelBatchError: it is none, or smaller than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ModelBatchError(f"{name} must be an integer of at least {least}, got {value!r}")
    return value


def read(vectors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """The numbers of several `[M]` vectors, with one transfer to the host for all of them."""
    if not vectors:
        return {}
    stacked = torch.stack([vector.detach().double() for vector in vectors.values()])
    return dict(zip(vectors, stacked.tolist(), strict=True))


class Spread(NamedTuple):
    """How a value is spread over the models that train."""

    low: float
    median: float
    high: float
    lowest: int
    """The id of the model with the lowest value, -1 if none is finite."""

    @property
    def known(self) -> bool:
        """Whether any value was finite."""
        return self.lowest >= 0


def spread(
    values: Sequence[float], active: Sequence[bool], ids: Sequence[int] | None = None
) -> Spread:
    """The spread over finite values of active models; of all models if none is active."""
    if not any(active):
        active = [True] * len(values)
    numbered = [(v, i) for i, v in enumerate(values) if active[i] and math.isfinite(v)]
    if not numbered:
        return Spread(math.nan, math.nan, math.nan, -1)
    low, lowest = min(numbered)
    finite = [value for value, _ in numbered]
    lowest = lowest if ids is None else ids[lowest]
    return Spread(low, statistics.median(finite), max(finite), lowest)


def scalars(name: str, values: Sequence[float], active: Sequence[bool]) -> dict[str, float]:
    """A few numbers about a vector: best, median and worst of a loss, else max, median and min."""
    own = spread(values, active)
    if not own.known:
        return {}
    is_loss = name.endswith("loss")
    names = ("best", "median", "worst") if is_loss else ("max", "median", "min")
    ends = (own.low, own.high) if is_loss else (own.high, own.low)
    numbers = (ends[0], own.median, ends[1])
    return {f"{name}/{key}": number for key, number in zip(names, numbers, strict=True)}


def check_runs(runs: str, hparams: Sequence[Mapping[str, Any]] | None) -> None:
    """Check `runs=` and `hparams=` of a callback that logs somewhere else.

    Raises:
        ModelBatchError: they are not what they should be.
    """
    if runs not in ("bundle", "per_model"):
        raise ModelBatchError(f'runs must be "bundle" or "per_model", got {runs!r}')
    if hparams is not None and not all(isinstance(own, Mapping) for own in hparams):
        raise ModelBatchError("hparams must be a sequence of one dict per model")


def tell_of_many_runs(user: str, count: int) -> None:
    """Warn where one run per model is more than the other side is made for."""
    if count > MANY_RUNS:
        warnings.warn(
            f'{user}(runs="per_model") opens {count} runs, each with files and threads of its own, '
            f'and looking at more than {MANY_RUNS} is slow; runs="bundle" shows all in one',
            stacklevel=3,
        )


def learning_rates(mb: "ModelBatch", optimizer: Optimizer | None) -> list[float] | None:
    """The learning rate of each model; None without an optimizer or where it has none."""
    if optimizer is None:
        optimizer = mb.optimizer
    if isinstance(optimizer, FusedOptimizer):
        return optimizer.learning_rates()
    groups = _groups(mb, optimizer)
    if not groups or "lr" not in groups[0]:
        return None
    # groups of a fused optimizer watch who looks at them, which takes time for M of them
    rates: list[Any] = [dict.get(group, "lr") for group in groups]
    if isinstance(rates[0], Tensor):
        rates = [float(rate) for rate in rates]
    return rates if len(rates) == len(mb) else rates * len(mb)


def hyper_parameters(
    mb: "ModelBatch", optimizer: Optimizer | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What the optimizer was told for each model.

    Returns:
        M dicts of `seed`, `lr` and the options in which the models differ, and one dict of the
        options that all models share. Pairs such as `betas` become `beta1`, `beta2`.
    """
    groups = _groups(mb, optimizer)
    options = [_plain_options(group) for group in groups]
    if len(options) != len(mb):
        options = [dict(options[0]) if options else {} for _ in range(len(mb))]
    shared = {
        name: value
        for name, value in options[0].items()
        if name != "lr" and all(own.get(name) == value for own in options)
    }
    differing: list[dict[str, Any]] = [
        # as text where a float64, which is all that they have over there, would round it
        {
            "seed": seed if seed < 2**53 else str(seed),
            **{name: v for name, v in own.items() if name not in shared},
        }
        for seed, own in zip(mb.seeds, options, strict=True)
    ]
    return differing, shared


def model_hparams(
    mb: "ModelBatch", optimizer: Optimizer | None, own: Sequence[Mapping[str, Any]] | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """`hyper_parameters`, with the user's own for each model.

    Raises:
        ModelBatchError: they are of another number of models.
    """
    differing, shared = hyper_parameters(mb, optimizer)
    if own is None:
        return differing, shared
    if len(own) != len(mb):
        raise ModelBatchError(f"hparams has {len(own)} dicts for a bundle of {len(mb)} models")
    for values, more in zip(differing, own, strict=True):
        for name, value in more.items():
            plain = isinstance(value, bool | int | float | str)
            values[name] = value if plain else str(value)
    return differing, shared


def _groups(mb: "ModelBatch", optimizer: Optimizer | None) -> list[dict[str, Any]]:
    """One group per model, one for all, or none where they are neither."""
    optimizer = optimizer if optimizer is not None else mb.optimizer
    if optimizer is None:
        return []
    # past the property, which for some optimizers brings the gradients of all models up to date
    groups = optimizer.__dict__.get("param_groups") or optimizer.param_groups
    return groups if len(groups) in (1, len(mb)) else []


def _plain_options(group: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, value in group.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool | int | float | str):
            plain[name] = value
        elif name != "params" and isinstance(value, tuple | list):
            single = name.removesuffix("s")
            plain.update(
                {
                    f"{single}{k}": part
                    for k, part in enumerate(value, 1)
                    if isinstance(part, bool | int | float | str)
                }
            )
    return plain
