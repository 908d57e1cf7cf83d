"""Frameworks leave Ctrl-C to others as they found it."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _ctrl_c_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    # Ray Tune has a handler of its own during an experiment, and keeps it when that raises.
    if signal.getsignal(signal.SIGINT) is not before:
        signal.signal(signal.SIGINT, before)
