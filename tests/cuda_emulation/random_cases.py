"""Calls of the emulated random kernels, with numpy alone."""

import ctypes
from typing import Any

import numpy as np
from cuda_emulation.emulator import Emulator, exact

DTYPES = ["float32", "float64", "bfloat16", "float16"]  # in the order of csrc/random/random.h
SHAPES = [(1, 1), (3, 5), (2, 1001), (3, 4, 300), (2, 0), (0, 4)]
P = [0.5, 0.0, 1.0, 0.3]
OP_INDEX = 5


class Launch(ctypes.Structure):
    """``mb_random_launch`` of csrc/random/random_cuda.h."""

    _fields_ = (
        ("dtype", ctypes.c_int),
        ("seed", ctypes.c_void_p),
        ("step", ctypes.c_void_p),
        ("op_index", ctypes.c_int64),
        ("num_models", ctypes.c_int64),
        ("slice_numel", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
    )


def storage(dtype: str) -> np.dtype:
    """The type that numpy keeps the bits in: it has no bfloat16."""
    return np.dtype({"float32": "f4", "float64": "f8"}.get(dtype, "u2"))


def streams(num_models: int) -> tuple[np.ndarray, np.ndarray]:
    seed = exact(np.arange(num_models, dtype=np.int64) * 7919 - 3)
    step = exact(np.arange(num_models, dtype=np.int64) % 1000 * (1 << 33) + 1)
    return seed, step


def launch(dtype: str, seed: np.ndarray, step: np.ndarray, slice_numel: int) -> Launch:
    pointers = (seed.ctypes.data, step.ctypes.data)
    return Launch(DTYPES.index(dtype), *pointers, OP_INDEX, len(seed), slice_numel, None)


def draw(emulator: Emulator, kind: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """``kind`` is uniform or normal; the result has the shape [M, ...]."""
    y = exact(np.zeros(shape, storage(dtype)))
    seed, step = streams(shape[0])
    if y.size:
        slice_numel = y.size // shape[0]
        emulator(f"mb_{kind}_cuda", launch(dtype, seed, step, slice_numel), y)
    return y


def dropout(
    emulator: Emulator, dtype: str, x: np.ndarray, num_models: int, group: int
) -> np.ndarray:
    """Of x [M, ...], or [1, ...] shared by all models; bits as :func:`storage` keeps them."""
    x = exact(x)
    y = exact(np.zeros((num_models, *x.shape[1:]), x.dtype))
    seed, step = streams(num_models)
    p = exact(np.resize(P, num_models))
    if y.size:
        slice_numel = y.size // num_models
        stride = slice_numel if x.shape[0] == num_models else 0
        arguments = launch(dtype, seed, step, slice_numel), x, stride, y, p, group
        emulator("mb_dropout_cuda", *arguments)
    return y


def all_cases(emulator: Emulator) -> dict[str, Any]:
    """Every kernel once, for the sanitizers."""
    results = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            for kind in ("uniform", "normal"):
                results[f"{kind} {dtype} {shape}"] = draw(emulator, kind, dtype, shape)
            bits = np.arange(np.prod(shape, dtype=int)) % 15360  # finite in every type
            x = bits.astype(storage(dtype)).reshape(shape)
            for group in (1, 3):
                name = f"dropout {dtype} {shape} {group}"
                results[name] = dropout(emulator, dtype, x, shape[0], group)
    return results
