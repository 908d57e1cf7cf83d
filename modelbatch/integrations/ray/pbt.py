"""Population based training inside a bundle."""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.tune.search.sample import Domain, Function

from ...errors import ModelBatchError
from ...random import derive_seed
from ...sweep.pruners import whole_number

__all__ = ["BundlePBT", "Copy"]


@dataclass(frozen=True)
class Copy:
    """One exploitation: `target` goes on from `source` with `config`; `operations` tells how."""

    target: int
    source: int
    config: dict[str, Any]
    operations: dict[str, Any]


class BundlePBT:
    """Population based training among the models of a bundle.

    Every `perturbation_interval` epochs the worst part of the models takes over weights, optimizer
    state and configuration of models of the best part, chosen at random, and explores from there.
    A copy is one of rows on the device. The arguments are those of Ray's `PopulationBasedTraining`,
    with epochs as the time; all draws depend on the seed of the sweep, the epoch, and the number of
    the model, so that a run that is restarted from a checkpoint takes the same ones.

    What is mutated must leave the models in one bundle: learning rates and other options of the
    optimizer, dropout rates, and so on, but no widths, batch sizes or optimizer classes.

    Args:
        perturbation_interval: epochs between perturbations.
        hyperparam_mutations: for each key of the configurations a list of choices, a search space
            of Ray Tune (`tune.loguniform(1e-4, 1e-1)`), a function without arguments that draws a
            value by `random` or `numpy.random`, or a dict of these. Keys that a configuration lacks
            are drawn at the beginning.
        burn_in_period: no perturbation before this epoch.
        quantile_fraction: which part of the models is the worst, and which the best; up to 0.5.
        resample_probability: how likely a value is drawn anew; else it is multiplied by one of
            the factors, or moved to a neighbour in its list.
        perturbation_factors: two factors.
        custom_explore_fn: is given the new configuration and returns the one to take.

    Raises:
        ModelBatchError: a bad argument.
    """

    def __init__(
        self,
        perturbation_interval: int,
        hyperparam_mutations: Mapping[str, Any] | None = None,
        *,
        burn_in_period: int = 0,
        quantile_fraction: float = 0.25,
        resample_probability: float = 0.25,
        perturbation_factors: tuple[float, float] = (1.2, 0.8),
        custom_explore_fn: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self.interval = whole_number("perturbation_interval", perturbation_interval, 1)
        self.burn_in = whole_number("burn_in_period", burn_in_period, 0)
        for name, share, most in (
            ("quantile_fraction", quantile_fraction, 0.5),
            ("resample_probability", resample_probability, 1.0),
        ):
            if not 0 <= share <= most:
                raise ModelBatchError(f"{name} must be between 0 and {most}, got {share!r}")
        if not hyperparam_mutations and custom_explore_fn is None:
            raise ModelBatchError("give hyperparam_mutations or custom_explore_fn, or both")
        self.mutations = dict(hyperparam_mutations or {})
        _check("", self.mutations)
        self.quantile_fraction, self.resample_probability = quantile_fraction, resample_probability
        self.factors, self.custom = tuple(perturbation_factors), custom_explore_fn

    def due(self, epochs: int) -> bool:
        """Whether there is a perturbation after so many epochs."""
        first = max(self.interval, self.burn_in)
        return epochs >= first and (epochs - first) % self.interval == 0

    def quantiles(self, values: Mapping[int, float]) -> tuple[list[int], list[int]]:
        """The worst and the best models, by values of which small ones are good."""
        order = sorted(values, key=lambda number: (values[number], number))
        count = math.ceil(len(order) * self.quantile_fraction)
        if count > len(order) / 2:
            count = len(order) // 2
        return order[len(order) - count :], order[:count]

    def plan(
        self,
        epochs: int,
        values: Mapping[int, float],
        configs: Mapping[int, Mapping[str, Any]],
        seed: int,
    ) -> list[Copy]:
        """What is to be copied after so many epochs, by number of the model."""
        worst, best = self.quantiles(values)
        copies = []
        for target in worst:
            generator = _generator(seed, epochs, target)
            source = best[int(generator.integers(len(best)))]
            config, operations = self.explore(configs[source], generator)
            copies.append(Copy(target, source, config, operations))
        return copies

    def explore(
        self, config: Mapping[str, Any], generator: np.random.Generator
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A mutated configuration, and by key what was done."""
        new, operations = self._mutate(config, self.mutations, generator)
        if self.custom is not None:
            new = _seeded_call(lambda: self.custom(new), generator)  # type: ignore[misc]
            if not isinstance(new, Mapping):
                raise ModelBatchError(f"custom_explore_fn must return a dict, got {new!r}")
        return dict(new), operations

    def fill(self, config: Mapping[str, Any], number: int, seed: int) -> dict[str, Any]:
        """The configuration of a model at the beginning, with what it lacks drawn."""
        return _fill(config, self.mutations, _generator(seed, 0, number))

    def _mutate(
        self,
        config: Mapping[str, Any],
        mutations: Mapping[str, Any],
        generator: np.random.Generator,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        new, operations = dict(config), dict[str, Any]()
        for key, space in mutations.items():
            value = config[key]
            if isinstance(space, Mapping):
                new[key], operations[key] = self._mutate(value, space, generator)
                continue
            resample = generator.random() < self.resample_probability
            if isinstance(space, list | tuple):
                if resample or value not in space:
                    new[key], operations[key] = _draw(space, generator), "resample"
                    continue
                shift = 1 if generator.random() < 0.5 else -1
                place = min(max(space.index(value) + shift, 0), len(space) - 1)
                new[key] = space[place]
                operations[key] = "shift left" if shift < 0 else "shift right"
                continue
            if resample:
                drawn, operations[key] = _draw(space, generator), "resample"
            else:
                factor = self.factors[int(generator.integers(len(self.factors)))]
                drawn, operations[key] = value * factor, f"* {factor}"
            if isinstance(value, bool):
                drawn = bool(drawn)
            elif isinstance(value, int):
                drawn = round(drawn)
            new[key] = drawn
        return new, operations


def _generator(seed: int, epochs: int, number: int) -> np.random.Generator:
    return np.random.default_rng(derive_seed(number, derive_seed(epochs, seed)))


def _check(path: str, mutations: Mapping[str, Any]) -> None:
    for key, space in mutations.items():
        name = f"{path}{key}"
        if isinstance(space, Mapping):
            _check(f"{name}/", space)
        elif isinstance(space, Function):
            raise ModelBatchError(
                f"hyperparam_mutations: '{name}': tune.sample_from cannot be drawn by itself; give "
                "a function without arguments"
            )
        elif isinstance(space, list | tuple):
            if not space:
                raise ModelBatchError(f"hyperparam_mutations: '{name}' has no choices")
        elif not isinstance(space, Domain) and not callable(space):
            raise ModelBatchError(
                f"hyperparam_mutations: '{name}' must be a list, a search space of Ray Tune, a "
                f"function or a dict, got {type(space).__name__}"
            )


def _fill(
    config: Mapping[str, Any], mutations: Mapping[str, Any], generator: np.random.Generator
) -> dict[str, Any]:
    full = dict(config)
    for key, space in mutations.items():
        if isinstance(space, Mapping):
            full[key] = _fill(full.get(key, {}), space, generator)
        elif key not in full:
            full[key] = _draw(space, generator)
    return full


def _draw(space: Any, generator: np.random.Generator) -> Any:
    if isinstance(space, list | tuple):
        return space[int(generator.integers(len(space)))]
    if isinstance(space, Domain):
        value = space.sample(None, random_state=generator)
    else:
        value = _seeded_call(space, generator)
    return value.item() if isinstance(value, np.generic) else value


def _seeded_call(function: Callable[[], Any], generator: np.random.Generator) -> Any:
    """Call a function of the user that may draw from the global generators."""
    seed = int(generator.integers(1 << 32))
    before, numpy_before = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        return function()
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)
