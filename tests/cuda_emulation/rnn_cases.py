"""Calls of the emulated kernels of the rnn family, with numpy alone."""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from cuda_emulation.emulator import Emulator, exact

DTYPES = ["float32", "float64", "bfloat16", "float16"]  # in the order of csrc/rnn/rnn_cuda.h
CELLS = ["lstm", "gru", "tanh", "relu"]
GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}
MAX_RUNS = 128

Arrays = dict[str, np.ndarray]


class Array(ctypes.Structure):
    """``mb_rnn_array``."""

    _fields_ = (("data", ctypes.c_void_p), ("model_stride", ctypes.c_int64))


class Runs(ctypes.Structure):
    """``mb_rnn_runs``."""

    _fields_ = (
        ("count", ctypes.c_int32),
        ("reverse", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("steps", ctypes.c_int32 * MAX_RUNS),
        ("batch", ctypes.c_int32 * MAX_RUNS),
    )


def fields(ints: str, int64s: str, arrays: str, *more: tuple[str, Any]) -> tuple[Any, ...]:
    """Of a launch: names in the order of the header; ``*`` is what ``more`` names."""
    of_kind = [(ints, ctypes.c_int), (int64s, ctypes.c_int64)]
    first = [(name, kind) for names, kind in of_kind for name in names.split()]
    rest = list(more)
    for name in arrays.split():
        first.append(rest.pop(0) if name == "*" else (name, Array))
    return (*first, ("stream", ctypes.c_void_p))


class ForwardStep(ctypes.Structure):
    """``mb_rnn_forward_step``."""

    _fields_ = fields(
        "cell dtype",
        "num_models hidden rows prev_rows",
        "projected * recurrent b_ih b_hh c0 prev_cells state y c_n gates cells",
        ("projected_stride", ctypes.c_int64),
    )


class BackwardStep(ctypes.Structure):
    """``mb_rnn_backward_step``."""

    _fields_ = fields(
        "cell dtype",
        "num_models hidden rows prev_rows",
        "grad_y grad_h grad_direct grad_c c0 prev_cells h0 prev_y y gates cells grad_input "
        "grad_hidden unprojected",
    )


class Previous(ctypes.Structure):
    """``mb_rnn_previous``."""

    _fields_ = fields(
        "element_size reverse",
        "num_models columns first_row steps batch neighbour",
        "y h0 to",
    )


class PersistentForward(ctypes.Structure):
    """``mb_rnn_persistent_forward``."""

    _fields_ = fields(
        "cell",
        "num_models hidden batch",
        "* projected * w_hh b_ih b_hh h0 c0 y h_n c_n gates cells",
        ("runs", Runs),
        ("projected_stride", ctypes.c_int64),
    )


class PersistentBackward(ctypes.Structure):
    """``mb_rnn_persistent_backward``."""

    _fields_ = fields(
        "cell",
        "num_models hidden batch",
        "* grad_y grad_h_n grad_c_n w_hh h0 c0 y gates cells grad_input grad_hidden grad_h0 "
        "grad_c0",
        ("runs", Runs),
    )


def array(values: np.ndarray | None) -> Array:
    """[M, ...], or [1, ...] where all models share it."""
    if values is None:
        return Array(None, 0)
    stride = 0 if len(values) == 1 else values[0].size
    return Array(values.ctypes.data, stride)


def to_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """bfloat16 and float16 as their bits, since the kernels take them so."""
    if dtype == "bfloat16":
        return exact((values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16))
    if dtype == "float16":
        return exact(values.astype(np.float16).view(np.uint16))
    return exact(values.astype(dtype))


def wide(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


# ---- all steps in one launch ---------------------------------------------------------------------


@dataclass
class Layer:
    """float32, the input's part given: ``arrays`` by their names in rnn_cuda.h."""

    cell: str
    batch_sizes: list[int]
    reverse: bool
    arrays: Arrays

    def runs(self) -> Runs:
        runs: list[list[int]] = []
        for batch in self.batch_sizes:
            if not runs or runs[-1][1] != batch:
                runs.append([0, batch])
            runs[-1][0] += 1
        padded = runs + [[0, 0]] * (MAX_RUNS - len(runs))
        steps, batches = ((ctypes.c_int32 * MAX_RUNS)(*column) for column in zip(*padded))
        return Runs(len(runs), self.reverse, sum(self.batch_sizes), steps, batches)


def make_layer(
    cell: str,
    models: int,
    hidden: int,
    batch_sizes: list[int],
    *,
    reverse: bool = False,
    shared: tuple[str, ...] = (),
    seed: int = 0,
) -> Layer:
    rng = np.random.default_rng(seed)
    rows, batch, gates = sum(batch_sizes), batch_sizes[0], GATES[cell] * hidden
    shapes = {
        "projected": (rows, gates),
        "w_hh": (gates, hidden),
        "b_ih": (gates,),
        "b_hh": (gates,),
        "h0": (batch, hidden),
        "c0": (batch, hidden),
        "grad_y": (rows, hidden),
        "grad_h_n": (batch, hidden),
        "grad_c_n": (batch, hidden),
    }
    arrays = {}
    for name, shape in shapes.items():
        values = rng.standard_normal((1 if name in shared else models, *shape))
        # Weights as torch draws them, so that states neither die out nor saturate.
        scale = hidden**-0.5 if name == "w_hh" else 1.0
        arrays[name] = exact((scale * values).astype(np.float32))
    return Layer(cell, batch_sizes, reverse, arrays)


def run_persistent(emulator: Emulator, layer: Layer, models: int) -> Arrays:
    """Forward and backward; results by their names in rnn_cuda.h."""
    given = layer.arrays
    hidden, batch = given["w_hh"].shape[-1], layer.batch_sizes[0]
    rows, gates = sum(layer.batch_sizes), GATES[layer.cell] * hidden
    is_lstm, has_gates = layer.cell == "lstm", layer.cell in ("lstm", "gru")

    def result(exists: bool, *shape: int) -> np.ndarray | None:
        return exact(np.zeros((models, *shape), np.float32)) if exists else None

    results = {
        "y": result(True, rows, hidden),
        "h_n": result(True, batch, hidden),
        "c_n": result(is_lstm, batch, hidden),
        "gates": result(has_gates, rows, 4 * hidden),
        "cells": result(is_lstm, rows, hidden),
        "grad_input": result(True, rows, gates),
        "grad_hidden": result(layer.cell == "gru", rows, gates),
        "grad_h0": result(True, batch, hidden),
        "grad_c0": result(is_lstm, batch, hidden),
    }
    sizes = CELLS.index(layer.cell), models, hidden, batch
    for launch, function in (
        (PersistentForward(*sizes), "mb_rnn_persistent_forward_cuda"),
        (PersistentBackward(*sizes), "mb_rnn_persistent_backward_cuda"),
    ):
        launch.runs = layer.runs()
        launch.projected_stride = gates
        for name, kind in launch._fields_:
            if kind is Array:
                setattr(launch, name, array({**given, **results}[name]))
        emulator(function, launch)
    return {name: values for name, values in results.items() if values is not None}


# ---- the kernels of one step ---------------------------------------------------------------------


def run_step(emulator: Emulator, cell: str, dtype: str, models: int = 4) -> Arrays:
    """A step forward and one backward; five rows of seven take part, three did before."""
    rng = np.random.default_rng(0)
    hidden, batch, rows, prev_rows = 33, 7, 5, 3
    gates = GATES[cell] * hidden

    def draw(*shape: int) -> np.ndarray:
        return to_dtype(rng.uniform(-0.9, 0.9, (models, *shape)), dtype)

    def draw_wide(*shape: int) -> np.ndarray:
        return to_dtype(rng.uniform(-0.9, 0.9, (models, *shape)), wide(dtype))

    forward = {
        "projected": draw_wide(rows, gates),
        "recurrent": draw_wide(rows, gates),
        "b_ih": exact(draw(gates)[:1]),
        "b_hh": draw(gates),
        "c0": exact(draw(batch, hidden)[:1]),
        "prev_cells": draw_wide(prev_rows, hidden),
        "state": draw(batch, hidden),
        "y": draw(rows, hidden),
        "c_n": draw(batch, hidden),
        "gates": draw_wide(rows, 4 * hidden),
        "cells": draw_wide(rows, hidden),
    }
    backward = {
        **{name: forward[name] for name in ("c0", "prev_cells", "y", "gates", "cells")},
        "grad_y": draw(rows, hidden),
        "grad_h": draw_wide(batch, hidden),
        "grad_direct": draw_wide(batch, hidden),
        "grad_c": draw_wide(batch, hidden),
        "h0": draw(batch, hidden),
        "prev_y": draw(prev_rows, hidden),
        "grad_input": draw(rows, gates),
        "grad_hidden": draw(rows, gates),
        "unprojected": draw(rows, hidden),
    }
    sizes = CELLS.index(cell), DTYPES.index(dtype), models, hidden, rows, prev_rows
    for launch, arrays, function in (
        (ForwardStep(*sizes), forward, "mb_rnn_forward_step_cuda"),
        (BackwardStep(*sizes), backward, "mb_rnn_backward_step_cuda"),
    ):
        launch.projected_stride = gates
        for name, values in arrays.items():
            setattr(launch, name, array(values))
        emulator(function, launch)
    return {**forward, **backward}


def previous_states(
    emulator: Emulator, y: np.ndarray, h0: np.ndarray, layer_of: Layer
) -> np.ndarray:
    """[M, N, columns] from y [M, N, columns] and h0 [M, B, columns]."""
    to = exact(np.zeros_like(y))
    runs = layer_of.runs()
    batches = [0, *runs.batch[: runs.count], 0]
    first_row = 0
    for i in range(runs.count):
        steps, batch = runs.steps[i], runs.batch[i]
        neighbour = batches[i + 2] if layer_of.reverse else batches[i]
        sizes = y.itemsize, layer_of.reverse, len(y), y.shape[2], first_row, steps, batch, neighbour
        emulator("mb_rnn_previous_cuda", Previous(*sizes, array(y), array(h0), array(to), None))
        first_row += steps * batch
    return to


def bias_gradient(emulator: Emulator, grads: np.ndarray, dtype: str) -> np.ndarray:
    """[M, columns], the sums over the rows of [M, rows, columns]."""
    models, rows, columns = grads.shape
    sums = exact(np.zeros((models, columns), grads.dtype))
    number = ctypes.c_int(DTYPES.index(dtype))
    emulator("mb_rnn_bias_gradient_cuda", number, models, rows, columns, grads, sums, None)
    return sums


def add(emulator: Emulator, a: np.ndarray, b: np.ndarray | None, dtype: str) -> np.ndarray:
    """a + b, where a is wide and b of the dtype."""
    to = exact(np.zeros(a.shape, to_dtype(np.zeros(1), dtype).dtype))
    number = ctypes.c_int(DTYPES.index(dtype))
    arrays = array(a), array(b), array(to)
    emulator("mb_rnn_add_cuda", number, len(a), a[0].size, *arrays, None)
    return to


LAYERS: list[dict[str, Any]] = [
    {"models": 1, "hidden": 1, "batch_sizes": [1]},
    {"models": 2, "hidden": 7, "batch_sizes": [5, 5, 3, 1]},
    {"models": 2, "hidden": 7, "batch_sizes": [5, 5, 3, 1], "reverse": True},
    {"models": 2, "hidden": 9, "batch_sizes": [2, 2], "shared": ("w_hh", "c0", "b_ih", "grad_y")},
    {"models": 1, "hidden": 33, "batch_sizes": [20, 18, 3]},
    {"models": 1, "hidden": 64, "batch_sizes": [18, 18, 2], "reverse": True},
]


def all_cases(emulator: Emulator) -> Arrays:
    """Every kernel, for the sanitizers."""
    results = {}
    for cell in CELLS:
        for dtype in DTYPES:
            for name, values in run_step(emulator, cell, dtype).items():
                results[f"step {cell} {dtype} {name}"] = values
        for layer in [*LAYERS, {"models": 128, "hidden": 3, "batch_sizes": [9, 2]}]:
            made = make_layer(cell, **layer)
            for name, values in run_persistent(emulator, made, layer["models"]).items():
                results[f"persistent {cell} {layer} {name}"] = values
    rng = np.random.default_rng(0)
    for dtype in DTYPES:
        grads = to_dtype(rng.standard_normal((4, 11, 40)), dtype)
        results[f"bias {dtype}"] = bias_gradient(emulator, grads, dtype)
        a = to_dtype(rng.standard_normal((4, 300)), wide(dtype))
        b = to_dtype(rng.standard_normal((4, 300)), dtype)
        results[f"add {dtype}"] = add(emulator, a, b, dtype)
        results[f"add nothing {dtype}"] = add(emulator, a, None, dtype)
        for reverse in (False, True):
            layer_of = make_layer("tanh", 4, 3, [5, 5, 3, 1], reverse=reverse)
            y = to_dtype(rng.standard_normal((4, 14, 3)), dtype)
            h0 = to_dtype(rng.standard_normal((4, 5, 3)), dtype)
            results[f"previous {dtype} {reverse}"] = previous_states(emulator, y, h0, layer_of)
    return results
