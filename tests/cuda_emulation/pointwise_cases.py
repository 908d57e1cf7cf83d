"""Calls of the emulated pointwise kernels, with numpy alone."""

import numpy as np
from cuda_emulation.emulator import Emulator, exact

SIZES = [1, 255, 256, 1000]


def make(size: int) -> np.ndarray:
    """Values on both sides of where the formula changes, and special ones."""
    values = 2 * np.random.default_rng(0).standard_normal(size)
    values[::7] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40][size % 6]
    return exact(values.astype(np.float32))


def tanh(emulator: Emulator, x: np.ndarray) -> np.ndarray:
    y = exact(np.zeros_like(x))
    emulator("mb_tanh_cuda", x, y, x.size, None)
    return y


def all_cases(emulator: Emulator) -> dict[str, np.ndarray]:
    """Every kernel, for the sanitizers."""
    return {f"tanh {size}": tanh(emulator, make(size)) for size in SIZES}
