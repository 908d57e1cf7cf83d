"""The emulated CUDA kernels of the optimizer family equal the CPU's, bit by bit."""

from typing import Any

import numpy as np
import pytest
import torch
from cuda_emulation import optim_cases as cases
from cuda_emulation.emulator import ORDERS, Emulator

ops = torch.ops.modelbatch
PROBLEMS = dict(cases.problems())


def as_torch(array: np.ndarray, dtype: str | None = None) -> torch.Tensor:
    """A copy of the array, with its strides; ``dtype`` says what the bits are."""
    span = 1 + sum((n - 1) * s for n, s in zip(array.shape, array.strides)) // array.itemsize
    flat = np.lib.stride_tricks.as_strided(array, (max(span, 0),), (array.itemsize,))
    tensor = torch.tensor(flat.copy() if array.size else np.zeros(0, array.dtype))
    if dtype is not None:
        tensor = tensor.view(getattr(torch, dtype))
    return tensor.as_strided(array.shape, [s // array.itemsize for s in array.strides])


def bits(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.contiguous().view(torch.uint16)
    return tensor.numpy()


def run_on_cpu(problem: cases.Problem) -> list[np.ndarray]:
    """What the CPU's operator makes of ``problem.written()``."""
    params = [as_torch(array, problem.dtype) for array in problem.params]
    grads = [as_torch(array, problem.dtype) for array in problem.grads]
    states = [[as_torch(array) for array in of_state] for of_state in problem.states]
    step = as_torch(problem.step)
    scalars = [as_torch(array) for array in problem.scalars]
    options = [
        as_torch(problem.options[name]) if name in problem.options else None
        for name in cases.OPTIONS
    ]
    operator = getattr(ops, f"{problem.rule}_step_")
    operator(params, grads, *states, *scalars, step, as_torch(problem.hyper), *options)
    return [
        bits(t) for t in [*params, *(s for of_state in states for s in of_state), step, *scalars]
    ]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("order", ORDERS)
def test_steps_equal_the_cpu(emulator: Emulator, name: str, order: tuple[str, int]) -> None:
    problem = cases.make_problem(**PROBLEMS[name])
    before = [array.copy() for array in problem.written()]
    expected = run_on_cpu(problem)
    with emulator.order(*order):
        cases.run_step(emulator, problem)
    for found, wanted in zip(problem.written(), expected):
        np.testing.assert_array_equal(found, wanted)
    assert any(not np.array_equal(a, b) for a, b in zip(before, problem.written()))


@pytest.mark.parametrize("rule", cases.RULES)
def test_skipped_models_keep_every_bit(emulator: Emulator, rule: str) -> None:
    problem = cases.make_problem(rule, "float32")
    before = [array.copy() for array in problem.written()]
    cases.run_step(emulator, problem)
    live = problem.options["active"] & ~problem.options["nonfinite"]
    assert live.any() and not live.all()
    for old, new in zip(before, problem.written()):
        assert old[~live].tobytes() == new[~live].tobytes()


def test_gaps_between_slices_are_left_alone(emulator: Emulator) -> None:
    problem = cases.make_problem("adam", "float32", place="unaligned")
    param = problem.params[0]
    assert param.strides[0] != param.nbytes // param.shape[0]
    wide = np.lib.stride_tricks.as_strided(param, (7, param.strides[0] // 4), (param.strides[0], 4))
    gaps = wide[:6, param[0].size :].copy()
    cases.run_step(emulator, problem)
    assert (gaps == 7).all()
    np.testing.assert_array_equal(wide[:6, param[0].size :], gaps)


def test_a_state_that_was_not_given_is_not_written(emulator: Emulator) -> None:
    """A device cannot refuse the model; it must not fault either."""
    problem = cases.make_problem("rmsprop", "float32", shapes=[(5,)])
    problem.states = problem.states[:1]
    cases.run_step(emulator, problem)
    assert np.isfinite(problem.params[0][0]).all()


def test_launches(emulator: Emulator) -> None:
    """One for the table of all tensors, one that counts the step; more for long lists."""
    for shapes, expected in [(cases.SHAPES, 2), (cases.MANY_SHAPES, 4)]:
        before = emulator.launches
        cases.run_step(emulator, cases.make_problem("adam", "float32", shapes=shapes))
        assert emulator.launches - before == expected


class TestGradStats:
    def grads(self, dtype: str, kind: str = "dense", **kwargs: Any) -> list[np.ndarray]:
        problem = cases.make_problem("sgd", dtype, grads=kind, with_options=False, **kwargs)
        return problem.grads

    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("dtype", cases.DTYPES)
    @pytest.mark.parametrize("kind", cases.GRADS)
    def test_equals_the_cpu(
        self, emulator: Emulator, kind: str, dtype: str, order: tuple[str, int]
    ) -> None:
        grads = self.grads(dtype, kind)
        for model, value in ((1, np.nan), (2, np.inf), (4, -np.inf)):
            if kind != "shared":
                grads[0][model, 3, 5] = cases.encode(np.array(value), dtype)
        with emulator.order(*order):
            sq_norm, nonfinite = cases.run_grad_stats(emulator, dtype, grads)
        expected = ops.grad_stats([as_torch(array, dtype) for array in grads])
        np.testing.assert_array_equal(nonfinite.astype(bool), expected[1].numpy())
        # All terms are positive, so every order of additions is right to n roundings.
        n = sum(array[0].size for array in grads)
        np.testing.assert_allclose(sq_norm, expected[0].numpy(), rtol=n * 2.0**-53)

    def test_the_order_of_additions_is_fixed(self, emulator: Emulator) -> None:
        """It depends neither on threads, nor the number of models, strides or alignment."""
        grads = self.grads("float32", shapes=[(45, 100), (3,), (500, 20)])
        expected, _ = cases.run_grad_stats(emulator, "float32", grads)
        for order in ORDERS:
            for kind in ("dense", "transposed", "models_last", "every_other"):
                other = [cases.strided(array, kind) for array in grads]
                with emulator.order(*order):
                    found, _ = cases.run_grad_stats(emulator, "float32", other)
                np.testing.assert_array_equal(found, expected)
        alone = [cases.exact(array[3:4]) for array in grads]
        found, _ = cases.run_grad_stats(emulator, "float32", alone)
        np.testing.assert_array_equal(found, expected[3:4])

    @pytest.mark.parametrize("dtype", cases.DTYPES)
    def test_a_sum_that_overflows_is_not_a_nonfinite_gradient(
        self, emulator: Emulator, dtype: str
    ) -> None:
        largest = {"float16": 65504.0, "float64": 1e300}.get(dtype, 3e38)
        grads = [cases.encode(np.full((2, 9), largest), dtype)]
        sq_norm, nonfinite = cases.run_grad_stats(emulator, dtype, grads)
        assert not nonfinite.any()
        assert np.isinf(sq_norm).all() == (dtype == "float64")

    def test_nothing_but_empty_tensors(self, emulator: Emulator) -> None:
        sq_norm, nonfinite = cases.run_grad_stats(emulator, "float32", [np.zeros((3, 0), "f4")])
        assert (sq_norm == 0).all() and not nonfinite.any()
