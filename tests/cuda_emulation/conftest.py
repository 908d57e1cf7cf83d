"""The emulated kernels and operators, built once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulation import emulator as emulation

import modelbatch.ops  # noqa: F401  (registers the operators to compare with)


@pytest.fixture(scope="session")
def kernels() -> Path:
    if emulation.compiler() is None:
        pytest.skip("no C++ compiler (set CXX)")
    return emulation.build()


@pytest.fixture(scope="session")
def emulator(kernels: Path) -> emulation.Emulator:
    return emulation.Emulator(kernels)


@pytest.fixture(scope="session")
def emulated(kernels: Path) -> Any:
    """The operators: ``emulated.dropout`` is for CPU tensors what CUDA's is on a device."""
    torch_folder = Path(torch.__file__).parent
    torch.ops.load_library(emulation.build_operators(kernels, torch_folder))
    return torch.ops.modelbatch_emulated
