"""The configurations of a bundle's models: one to look at, all to write to."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ...attributes import PerModelFloat
from ...errors import StructureMismatchError

__all__ = ["ConfigOfAll", "compare_configs", "standing_in"]

# What says where a model comes from, and what its outputs are called; no forward reads it.
_COSMETIC = frozenset(
    {
        *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version"),
        *("architectures", "id2label", "label2id", "task_specific_params"),
    }
)


class ConfigOfAll:
    """The first model's configuration to read from; what is written to it, all models get.

    Trainer and its callbacks write to `model.config` (`use_cache`, the tokenizer's special
    tokens), and read it for the loggers.

    Args:
        configs: the objects of all models.
    """

    _configs: list[Any]

    def __init__(self, configs: Sequence[Any]):
        object.__setattr__(self, "_configs", list(configs))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._configs[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        for config in self._configs:
            setattr(config, name, value)

    def __repr__(self) -> str:
        return repr(self._configs[0])

    def __reduce__(self) -> Any:
        return ConfigOfAll, (self._configs,)


Numbers = dict[tuple[int, str], PerModelFloat]
"""By module index and key of its configuration, a number that differs between the models."""


def compare_configs(walks: Sequence[Sequence[nn.Module]], names: Sequence[str]) -> Numbers:
    """Check that the configurations differ only in what a bundle can honour: real numbers.

    Most of these, dropout rates and the like, are read when a model is made, and its modules have
    them. A forward that reads one from the configuration gets the models' values, or is refused.

    Args:
        walks: for each model its modules in one common order.
        names: the modules' names in that order.

    Raises:
        StructureMismatchError: naming what differs, and in which model.
    """
    numbers: Numbers = {}
    seen: set[int] = set()
    for index, name in enumerate(names):
        first = walks[0][index].__dict__.get("config")
        if first is None or id(first) in seen or not hasattr(first, "__dict__"):
            continue
        seen.add(id(first))
        others = [walk[index].__dict__.get("config") for walk in walks]
        path = f"{name}.config" if name else "config"
        for key, value in first.__dict__.items():
            if key in _COSMETIC:
                continue
            values = [getattr(config, "__dict__", {}).get(key) for config in others]
            unlike = [i for i, v in enumerate(values) if v is not value and v != value]
            if not unlike:
                continue
            if not all(type(v) is float for v in values):
                i = unlike[0]
                raise StructureMismatchError(
                    f"'{path}.{key}' differs between models: {value!r} in model 0, {values[i]!r} "
                    f"in model {i}. Models of one bundle may differ in real numbers such as "
                    "dropout rates; put these in separate bundles"
                )
            numbers[index, key] = PerModelFloat(values)
    return numbers


@contextlib.contextmanager
def standing_in(modules: Sequence[nn.Module], numbers: Numbers) -> Iterator[None]:
    """Let the first model's configurations hold the numbers of all models."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for (index, key), number in numbers.items():
            state = modules[index].__dict__["config"].__dict__
            kept.append((state, key, state[key]))
            state[key] = number
        yield
    finally:
        for state, key, value in kept:
            state[key] = value
