"""Search spaces of Ray Tune, drawn from at random."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.search import Searcher
from ray.tune.search.sample import Domain
from ray.tune.search.variant_generator import generate_variants

from ...errors import ModelBatchError
from ...random import derive_seed

__all__ = ["SpaceSearcher", "constants_of", "merged", "unresolved"]


class SpaceSearcher(Searcher):
    """What Ray does without a searcher: random values, and all combinations of grids.

    A space with nothing random in it is gone through once.

    Args:
        space: None to take the `param_space` of the `Tuner`.
        seed: of the draws.
        metric: which number of the results counts, to others.
        mode: `"min"` or `"max"`.
    """

    def __init__(
        self,
        space: Mapping[str, Any] | None,
        *,
        seed: int = 0,
        metric: str | None = None,
        mode: str | None = None,
    ) -> None:
        super().__init__(metric=metric, mode=mode)
        self._space = None if space is None else dict(space)
        self._seed = seed
        self._pass, self._place = 0, 0  # of the next configuration
        self._variants: list[dict[str, Any]] | None = None  # of this pass

    @property
    def has_space(self) -> bool:
        """Whether it needs no other space."""
        return self._space is not None

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Take a space, if there is none."""
        self._metric, self._mode = metric or self._metric, mode or self._mode
        if self._space is not None:
            return False
        self._space = dict(config)
        return True

    def suggest(self, trial_id: str) -> Any:
        """The next configuration, or `FINISHED`."""
        if self._space is None:
            raise ModelBatchError(
                "there is no search space: give BundleSearcher one, or the Tuner a param_space"
            )
        if self._variants is None:
            self._variants = self._draw()
        if self._place == len(self._variants):
            if not _random(self._space):
                return Searcher.FINISHED
            self._pass, self._place = self._pass + 1, 0
            self._variants = self._draw()
        self._place += 1
        return self._variants[self._place - 1]

    def _draw(self) -> list[dict[str, Any]]:
        generator: Any = np.random.default_rng(derive_seed(self._pass, self._seed))
        spec = {"config": self._space}
        return [drawn["config"] for _, drawn in generate_variants(spec, random_state=generator)]

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Results mean nothing to random draws."""

    def get_state(self) -> dict[str, Any]:
        """How far it is."""
        return {"pass": self._pass, "place": self._place}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from there, with the same space and seed."""
        self._pass, self._place, self._variants = state["pass"], state["place"], None

    def save(self, checkpoint_path: str) -> None:
        """Write how far it is."""
        Path(checkpoint_path).write_bytes(pickle.dumps(self.get_state()))

    def restore(self, checkpoint_path: str) -> None:
        """Take over what `save` wrote."""
        self.set_state(pickle.loads(Path(checkpoint_path).read_bytes()))


def _is_grid(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"grid_search"}


def unresolved(value: Any) -> bool:
    """Whether there is something in a value that is drawn or gone through."""
    if isinstance(value, Mapping):
        return _is_grid(value) or set(value) == {"eval"} or any(map(unresolved, value.values()))
    if isinstance(value, list | tuple):
        return any(map(unresolved, value))
    return isinstance(value, Domain)


def _random(value: Any) -> bool:
    if isinstance(value, Mapping):
        return set(value) == {"eval"} or any(map(_random, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_random, value))
    return isinstance(value, Domain)


def constants_of(space: Mapping[str, Any]) -> dict[str, Any]:
    """What a space holds for every configuration."""
    constants = {}
    for key, value in space.items():
        if not unresolved(value):
            constants[key] = value
        elif isinstance(value, Mapping) and not _is_grid(value) and set(value) != {"eval"}:
            constants[key] = constants_of(value)
    return constants


def merged(constants: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the constants of its space, nested dicts included."""
    full = dict(constants)
    for key, value in config.items():
        known = full.get(key)
        both = isinstance(known, Mapping) and isinstance(value, Mapping)
        full[key] = merged(known, value) if both else value  # type: ignore[arg-type]
    return full
