"""Bundles that cannot be trained are halved until the culprit is alone."""

import math
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["halves", "what_happened"]

T = TypeVar("T")


def halves(members: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
    """The members of a bundle in two parts, of which the first is never the smaller one."""
    middle = math.ceil(len(members) / 2)
    return members[:middle], members[middle:]


def what_happened(error: BaseException) -> str:
    """An error in one line of a table."""
    return f"{type(error).__name__}: {error}"
