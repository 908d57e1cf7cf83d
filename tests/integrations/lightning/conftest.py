"""Settings of the tests with Lightning."""

import os
from collections.abc import Iterator

import pytest

# What Lightning says about itself, about small loaders, and about modules without a validation.
WARNINGS = (
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated",
    "ignore:The '.*dataloader' does not have many workers",
    "ignore:You defined a .validation_step. but have no .val_dataloader.",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "integrations/lightning" in item.path.as_posix():
            for text in WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(text))


@pytest.fixture(autouse=True)
def _environment_as_before() -> Iterator[None]:
    """A Trainer of several processes tells other frameworks of itself by variables that stay."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)
