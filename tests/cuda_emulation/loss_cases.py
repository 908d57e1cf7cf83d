"""Calls of the emulated cross entropy, with numpy alone."""

import ctypes

import numpy as np
from cuda_emulation.emulator import Emulator, exact

DTYPES = ["float32", "float64"]  # in the order of csrc/loss/loss.h
# [M, rows, classes]: fewer and more rows than a block has threads.
SHAPES = [(1, 1, 1), (3, 5, 4), (2, 128, 3), (2, 300, 7)]
IGNORE = -100


class Launch(ctypes.Structure):
    """``mb_cross_entropy_launch`` of csrc/loss/loss_cuda.h."""

    _fields_ = (
        ("dtype", ctypes.c_int),
        ("logits", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("target_stride", ctypes.c_int64),
        ("ignore_index", ctypes.c_int64),
        ("losses", ctypes.c_void_p),
        ("slope", ctypes.c_void_p),
        ("num_models", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
    )


def make(shape: tuple[int, ...], dtype: str, shared: bool) -> tuple[np.ndarray, np.ndarray]:
    """Logits [M, rows, classes] and targets [M, rows] or [rows]; some are to be ignored."""
    rng = np.random.default_rng(0)
    logits = exact(3 * rng.standard_normal(shape).astype(dtype))
    target = exact(rng.integers(shape[2], size=shape[1:2] if shared else shape[:2]))
    target[..., 1::3] = IGNORE
    return logits, target


def cross_entropy(
    emulator: Emulator, logits: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The losses [M] and their derivatives."""
    losses = exact(np.zeros(len(logits), logits.dtype))
    slope = exact(np.zeros(logits.shape, logits.dtype))
    stride = target.shape[-1] if target.ndim == 2 else 0
    pointers = logits.ctypes.data, target.ctypes.data, stride, IGNORE
    outputs = losses.ctypes.data, slope.ctypes.data
    launch = Launch(DTYPES.index(logits.dtype.name), *pointers, *outputs, *logits.shape, None)
    emulator("mb_cross_entropy_cuda", launch)
    return losses, slope


def all_cases(emulator: Emulator) -> dict[str, np.ndarray]:
    """Every kernel, for the sanitizers."""
    results = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            for shared in (False, True):
                name = f"cross entropy {dtype} {shape} {shared}"
                found = cross_entropy(emulator, *make(shape, dtype, shared))
                results[f"{name} losses"], results[f"{name} slope"] = found
    return results
