"""Fixtures and settings that every test shares."""

import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# No deadline: nothing here asserts a time. Derandomised: a failure in CI is one here too.
hypothesis.settings.register_profile(
    "modelbatch",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("modelbatch")


# A shell gives the programs that it starts in the background a Ctrl-C that does nothing, and some
# tests are about Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("FAIL_WITHOUT_CUDA") == "1":
        return
    skip = pytest.mark.skip(reason="no CUDA device (FAIL_WITHOUT_CUDA=1 makes this a failure)")
    for item in items:
        if item.get_closest_marker("needs_cuda") is not None:
            item.add_marker(skip)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_cuda") is not None and not torch.cuda.is_available():
        pytest.fail("FAIL_WITHOUT_CUDA=1, and there is no CUDA device", pytrace=False)


@pytest.fixture(autouse=True)
def _restored_torch_state() -> Iterator[None]:
    """Leaves torch's random state, threads and default dtype as the test found them."""
    rng_state = torch.get_rng_state()
    num_threads = torch.get_num_threads()
    dtype = torch.get_default_dtype()
    yield
    torch.set_rng_state(rng_state)
    torch.set_num_threads(num_threads)
    torch.set_default_dtype(dtype)
