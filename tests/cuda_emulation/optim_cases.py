"""Problems for the emulated optimizer kernels, with numpy alone."""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cuda_emulation.emulator import Emulator, exact
from cuda_emulation.random_cases import storage

# As in csrc/optim/optim.h.
DTYPES = ["float32", "float64", "bfloat16", "float16"]
NUM_STATES = {"sgd": 1, "adam": 3, "adamw": 3, "rmsprop": 3, "adagrad": 1}
NUM_STATES |= {"adadelta": 2, "adamax": 2, "radam": 2, "rprop": 2, "nadam": 2, "asgd": 1}
# Further numbers per model: at a model's first step, and later.
SCALARS = {"nadam": [([1.0], [0.3, 0.01])], "asgd": [([0.01], [0.1]), ([1.0], [1.0, 0.2])]}
MAX_SCALARS = 2
RULES = list(NUM_STATES)
MAX_STATES = 3
MAX_DIMS = 4

# One row per option and one column per model; fewer columns are repeated.
_ADAM = [
    [1e-3, 0.1, 1e-2],  # lr
    [0.9, 0.3],  # beta1, below and above one half
    [0.999, 0.9, 0.5],
    [1e-8, 1e-3],
    [0.0, 0.1],
    [0, 0, 1],  # amsgrad
    [0, 1],  # maximize
    [0, 0, 0, 1],  # decoupled
]
HYPER: dict[str, list[list[float]]] = {
    "sgd": [[0.1, 1e-3], [0.9, 0.0, 0.5], [0.0, 0.3], [0.0, 0.1], [1, 0, 0, 0], [0, 0, 1]],
    "adam": _ADAM,
    "adamw": _ADAM,
    "rmsprop": [
        [0.1, 1e-3],
        [0.99, 0.3],
        [1e-8, 1e-3],
        [0.0, 0.1],
        [0.0, 0.9, 0.5],  # momentum
        [0, 1],  # centered
        [0, 0, 1],
    ],
    "adagrad": [[0.1, 1e-2], [0.0, 0.1], [1e-10, 1e-3], [0.0, 0.1], [0, 0, 1]],
    "adadelta": [[1.0, 0.1], [0.9, 0.5], [1e-6, 1e-3], [0.0, 0.1], [0, 0, 1]],
    "adamax": [[2e-3, 0.1], [0.9, 0.3], [0.999, 0.9], [1e-8, 1e-3], [0.0, 0.1], [0, 0, 1]],
    "radam": [[1e-3, 0.1], [0.9, 0.3], [0.999, 0.9], [1e-8], [0.0, 0.1], [0, 1], [0, 0, 1]],
    "nadam": [
        *[[1e-3, 0.1], [0.9, 0.3], [0.999, 0.9], [1e-8], [0.0, 0.1]],
        [4e-3],
        [0, 1],
        [0, 0, 1],
    ],
    "asgd": [[1e-2, 0.1], [1e-4, 0.1], [0.75], [1e6, 3.0], [0.0, 0.1], [0, 0, 1]],
    "rprop": [[1e-2], [0.5, 0.3], [1.2, 2.0], [1e-6, 1e-3], [50.0, 0.2], [0, 0, 1]],
}

# Slice shapes: scalars, odd lengths, more than a block's slice, whole packs.
SHAPES: list[tuple[int, ...]] = [(16, 20), (16,), (), (10,), (3, 5, 7), (0, 4), (4500,)]
MANY_SHAPES: list[tuple[int, ...]] = [(4,), (3, 3)] * 40  # more than a table holds
GRADS = ["dense", "transposed", "models_last", "shared", "every_other"]
PLACES = ["dense", "unaligned"]
OPTIONS = ["active", "nonfinite", "inv_scale", "clip_factor", "clip_value"]


class Tensor(ctypes.Structure):
    """``mb_optim_cuda_tensor`` of csrc/optim/optim_cuda.h."""

    _fields_ = (
        ("param", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("states", ctypes.c_void_p * MAX_STATES),
        ("numel", ctypes.c_int64),
        ("param_stride", ctypes.c_int64),
        ("grad_stride", ctypes.c_int64),
        ("state_strides", ctypes.c_int64 * MAX_STATES),
        ("grad_dims", ctypes.c_int64),
        ("grad_sizes", ctypes.c_int64 * MAX_DIMS),
        ("grad_strides", ctypes.c_int64 * MAX_DIMS),
    )


class Models(ctypes.Structure):
    """``mb_optim_cuda_models``."""

    _fields_ = (
        ("num_models", ctypes.c_int64),
        ("step", ctypes.c_void_p),
        ("step_stride", ctypes.c_int64),
        ("hyper", ctypes.c_void_p),
        ("scalars", ctypes.c_void_p * MAX_SCALARS),
        *((name, ctypes.c_void_p) for name in OPTIONS),
    )


@dataclass
class Problem:
    """What one step reads and writes; ``copy`` and run it as often as needed."""

    rule: str
    dtype: str
    params: list[np.ndarray]  # [M, ...], bits as storage() keeps them
    grads: list[np.ndarray]  # of any strides
    states: list[list[np.ndarray]]  # by state, then by parameter
    step: np.ndarray
    hyper: np.ndarray
    scalars: list[np.ndarray]
    options: dict[str, np.ndarray] = field(default_factory=dict)

    def written(self) -> list[np.ndarray]:
        return [
            *self.params,
            *(s for states in self.states for s in states),
            self.step,
            *self.scalars,
        ]


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype).view(storage(dtype))


def placed(array: np.ndarray, place: str) -> np.ndarray:
    """A copy whose slices follow each other, or are odd distances from each other."""
    if place == "dense":
        return exact(array)
    M = array.shape[0]
    numel = int(np.prod(array.shape[1:]))
    wide = exact(np.full((M, numel + 3), 7, array.dtype))
    wide[:, 1 : 1 + numel] = array.reshape(M, numel)
    view = wide[:, 1 : 1 + numel].reshape(array.shape)
    return view if np.shares_memory(view, wide) else exact(array)


def strided(array: np.ndarray, kind: str) -> np.ndarray:
    """The same values (of model 0 where they are shared) with other strides."""
    if kind == "transposed" and array.ndim > 2:
        return exact(array.swapaxes(1, -1)).swapaxes(1, -1)
    if kind == "models_last":
        return np.moveaxis(exact(np.moveaxis(array, 0, -1)), -1, 0)
    if kind == "shared":
        return np.broadcast_to(exact(array[:1]), array.shape)
    if kind == "every_other":
        return exact(np.repeat(array[..., None], 2, axis=-1))[..., 0]
    return exact(array)


def make_problem(
    rule: str,
    dtype: str,
    num_models: int = 7,
    shapes: list[tuple[int, ...]] = SHAPES,
    grads: str = "dense",
    place: str = "dense",
    with_options: bool = True,
    first: bool = False,
) -> Problem:
    """``first`` is a problem whose models have done no step yet."""
    rng = np.random.default_rng(0)
    M = num_models
    state_dtype = "float64" if dtype == "float64" else "float32"

    def normal(shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal((M, *shape))

    def state(shape: tuple[int, ...], number: int) -> np.ndarray:
        # The first one exceeds the others' squares, so that RMSprop's variance is positive.
        values = normal(shape) ** 2 + 1 if number == 0 else np.abs(np.tanh(normal(shape))) / 2
        return placed((values * (not first)).astype(state_dtype), place)

    step = np.zeros(M) if first else np.arange(M) * 3.0
    problem = Problem(
        rule,
        dtype,
        params=[placed(encode(normal(shape), dtype), place) for shape in shapes],
        grads=[strided(encode(normal(shape), dtype), grads) for shape in shapes],
        states=[[state(shape, i) for shape in shapes] for i in range(NUM_STATES[rule])],
        step=exact(step.astype(np.float32)),
        hyper=exact(np.stack([np.resize(np.array(row, float), M) for row in HYPER[rule]])),
        scalars=[
            exact(np.resize(values[not first], M).astype(np.float32))
            for values in SCALARS.get(rule, [])
        ],
    )
    if with_options:
        problem.options = {
            "active": exact(np.resize([True, True, True, False], M)),
            "nonfinite": exact(np.resize([False, False, True, False, False], M)),
            "inv_scale": exact(np.resize([1.0, 0.5, 1 / 1024], M).astype(np.float32)),
            "clip_factor": exact(np.resize([1.0, 0.7], M).astype(np.float64)),
            "clip_value": exact(np.resize([np.inf, 0.4], M)),
        }
        # Where a model is skipped, what it holds must survive, whatever it is.
        for array in problem.grads:
            if grads != "shared":
                array[2:3] = encode(np.array([np.nan]), dtype)
    return problem


def element_stride(array: np.ndarray, axis: int) -> int:
    return array.strides[axis] // array.itemsize


def layout_of(grad: np.ndarray) -> tuple[list[int], list[int]]:
    """Sizes and strides of a slice in row-major order, merged; empty for one run of memory."""
    sizes: list[int] = []
    strides: list[int] = []
    for axis in range(1, grad.ndim):
        size, stride = grad.shape[axis], element_stride(grad, axis)
        if size == 1:
            continue
        if sizes and strides[-1] == stride * size:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    if not sizes or strides == [1]:
        return [], []
    return sizes, strides


def describe(param: np.ndarray | None, grad: np.ndarray, states: list[np.ndarray | None]) -> Tensor:
    tensor = Tensor(grad=grad.ctypes.data, grad_stride=element_stride(grad, 0))
    tensor.numel = int(np.prod(grad.shape[1:]))
    sizes, strides = layout_of(grad)
    tensor.grad_dims = len(sizes)
    tensor.grad_sizes[: len(sizes)] = sizes
    tensor.grad_strides[: len(sizes)] = strides
    if param is not None:
        tensor.param = param.ctypes.data
        tensor.param_stride = element_stride(param, 0)
    for i, state in enumerate(states):
        if state is not None:
            tensor.states[i] = state.ctypes.data
            tensor.state_strides[i] = element_stride(state, 0)
    return tensor


def run_step(emulator: Emulator, problem: Problem) -> None:
    """Updates the problem's arrays in place."""
    states = [list(of_param) for of_param in zip(*problem.states)]
    described = [
        describe(param, grad, list(of_param))
        for param, grad, of_param in zip(problem.params, problem.grads, states)
    ]
    tensors = (Tensor * len(described))(*described)
    models = Models(len(problem.step), problem.step.ctypes.data, 1, problem.hyper.ctypes.data)
    for i, array in enumerate(problem.scalars):
        models.scalars[i] = array.ctypes.data
    for name, array in problem.options.items():
        setattr(models, name, array.ctypes.data)
    numbers = RULES.index(problem.rule), DTYPES.index(problem.dtype)
    arguments = ctypes.byref(models), tensors, len(described), None
    emulator("mb_optim_step_cuda", *numbers, *arguments)


def run_grad_stats(
    emulator: Emulator, dtype: str, grads: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The squared norms and the flags, [M] each."""
    M = grads[0].shape[0]
    tensors = (Tensor * len(grads))(*(describe(None, grad, []) for grad in grads))
    number = DTYPES.index(dtype)
    partials = emulator.library.mb_grad_stats_partials(number, tensors, len(grads))
    sums, flags = exact(np.full((M, partials), np.nan)), exact(np.full((M, partials), 7, np.uint8))
    sq_norm, nonfinite = exact(np.full(M, np.nan)), exact(np.full(M, 7, np.uint8))
    outputs = sums, flags, sq_norm, nonfinite
    emulator("mb_grad_stats_cuda", number, M, tensors, len(grads), *outputs, None)
    return sq_norm, nonfinite


def problems() -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and arguments of :func:`make_problem`."""
    for rule in RULES:
        for dtype in DTYPES:
            yield f"{rule} {dtype}", {"rule": rule, "dtype": dtype}
            yield f"{rule} {dtype} first", {"rule": rule, "dtype": dtype, "first": True}
        for grads in GRADS[1:]:
            yield f"{rule} {grads}", {"rule": rule, "dtype": "float32", "grads": grads}
        plain = {"rule": rule, "dtype": "float32", "with_options": False}
        yield f"{rule} no options", plain
        for dtype in DTYPES:
            unaligned = {"rule": rule, "dtype": dtype, "place": "unaligned"}
            yield f"{rule} {dtype} unaligned", unaligned
    yield "many tensors", {"rule": "adam", "dtype": "float32", "shapes": MANY_SHAPES}
    many = {"shapes": MANY_SHAPES, "grads": "transposed"}
    yield "many layouts", {"rule": "adagrad", "dtype": "bfloat16", **many}


def all_cases(emulator: Emulator) -> dict[str, np.ndarray]:
    """Every kernel, for the sanitizers."""
    results = {}
    for name, arguments in problems():
        problem = make_problem(**arguments)
        run_step(emulator, problem)
        for i, array in enumerate(problem.written()):
            results[f"{name} {i}"] = array
        stats = run_grad_stats(emulator, problem.dtype, problem.grads)
        results[f"{name} sq_norm"], results[f"{name} nonfinite"] = stats
    return results
