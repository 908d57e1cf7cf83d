"""Freed memory is kept unless the user says otherwise."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
import modelbatch.memory
from torch import nn
from modelbatch import ModelBatch
assert modelbatch.memory.keep_freed_memory.cache_info().currsize == 0
ModelBatch([nn.Linear(1, 1)])
print(modelbatch.memory.keep_freed_memory())
def resident():
    return int(open("/proc/self/statm").read().split()[1])
before = resident()
tensor = torch.ones(50_000_000)
del tensor
print((resident() - before) * 4096 > 100_000_000)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
@pytest.mark.parametrize("setting", ["0", "1"])
def test_large_blocks_stay_in_the_process(setting: str) -> None:
    environment = {**os.environ, "MODELBATCH_KEEP_MEMORY": setting}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    kept = str(setting == "1")
    assert result.stdout.split() == [kept, kept]
