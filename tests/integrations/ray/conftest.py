"""Ray writes where it is told, and sends nothing anywhere."""

import os
from pathlib import Path

import pytest

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AIR_NEW_OUTPUT"] = "0"


@pytest.fixture(autouse=True)
def _ray_writes_into_the_test_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.tune.trainable.trainable as module

    monkeypatch.setattr(module, "DEFAULT_STORAGE_PATH", str(tmp_path))
