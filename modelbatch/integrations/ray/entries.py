"""The models of one Ray trial, as its config and its results have them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ModelBatchError

__all__ = ["TRIALS", "Entry", "Many", "read_entries"]

#: The key of a Ray trial's config under which its models are.
TRIALS = "trials"
_KEYS = {"id", "number", "config"}


class Many(tuple[Any, ...]):
    """A tuple that is shown by its length.

    Ray shows configs and results in tables, in the names of directories and in TensorBoard, where
    hundreds of dicts would be in the way. In JSON it is a list.
    """

    def __repr__(self) -> str:
        return f"<{len(self)} models>"


@dataclass(frozen=True)
class Entry:
    """One model of a Ray trial.

    Attributes:
        id: its name for the searcher.
        number: its place among all models of the experiment.
        config: its configuration.
    """

    id: str
    number: int
    config: dict[str, Any]


def read_entries(config: Mapping[str, Any]) -> tuple[list[Entry], bool]:
    """Take apart the config of a Ray trial.

    Args:
        config: with a sequence under `"trials"`, as `BundleSearcher` gives it: of dicts `{"id",
            "number", "config"}`, of which `"config"` alone is a must, or of configurations.
            Without that key it is the configuration of a single model.

    Returns:
        The models; and whether all came with a number.

    Raises:
        ModelBatchError: something else.
    """
    if TRIALS not in config:
        return [Entry("0", 0, dict(config))], False
    given = config[TRIALS]
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ModelBatchError(f"config['{TRIALS}'] must be a list of configurations, got {given!r}")
    entries, numbered = [], True
    for place, item in enumerate(given):
        if not isinstance(item, Mapping):
            raise ModelBatchError(
                f"config['{TRIALS}'][{place}] must be a dict, got {type(item).__name__}"
            )
        wrapped = isinstance(item.get("config"), Mapping) and not set(item) - _KEYS
        own = item["config"] if wrapped else item
        number = item.get("number") if wrapped else None
        numbered = numbered and number is not None
        number = place if number is None else int(number)
        entries.append(
            Entry(str(item["id"]) if "id" in item and wrapped else f"{number}", number, dict(own))
        )
    for what, known in (("number", [e.number for e in entries]), ("id", [e.id for e in entries])):
        if len(set(known)) != len(known):
            raise ModelBatchError(f"config['{TRIALS}']: two models have the same {what}")
    return entries, numbered
