"""The emulated CUDA kernels and operators of the rnn family equal torch's own layers."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_emulation import emulator as emulation, rnn_cases as cases, rnn_problems as problems
from cuda_emulation.emulator import ORDERS, Emulator
from cuda_emulation.rnn_problems import (
    Problem,
    assert_equals_torch,
    assert_same_bits,
    make_problem,
    run_switched,
    tolerance,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES: list[dict[str, Any]] = [
    {"models": 1, "hidden": 1, "inputs": 1, "batch_sizes": [1]},
    {"models": 3, "hidden": 1, "inputs": 4, "batch_sizes": [2, 2, 2]},
    {"models": 3, "hidden": 7, "inputs": 5, "batch_sizes": [1, 1, 1, 1]},
    {"models": 2, "hidden": 32, "inputs": 3, "batch_sizes": [5]},
    {"models": 2, "hidden": 64, "inputs": 9, "batch_sizes": [3, 3]},
    {"models": 2, "hidden": 65, "inputs": 16, "batch_sizes": [3, 3]},
]
PACKED = [[3, 3, 3], [4, 4, 2, 1, 1], [5, 1]]


@pytest.mark.parametrize("cell", cases.CELLS)
class TestOperators:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("size", SIZES, ids=str)
    def test_sizes(self, emulated: Any, cell: str, size: Any, dtype: torch.dtype) -> None:
        problem = make_problem(cell, dtype=dtype, **size)
        assert_equals_torch(problem.run(emulated), problem)

    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("batch_sizes", PACKED, ids=str)
    def test_packed_and_reverse(
        self, emulated: Any, cell: str, batch_sizes: list[int], reverse: bool
    ) -> None:
        problem = make_problem(cell, batch_sizes=batch_sizes, reverse=reverse)
        assert_equals_torch(problem.run(emulated), problem)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_halves(self, emulated: Any, cell: str, dtype: torch.dtype) -> None:
        if cell == "relu":
            pytest.skip("rounding decides an activation's side, and that a whole gradient")
        problem = make_problem(cell, batch_sizes=[4, 4, 2, 1], hidden=9, dtype=dtype)
        found = problem.run(emulated)
        assert_equals_torch(found, problem)
        assert found["y"].dtype == dtype
        if "gates" in found:
            assert found["gates"].dtype == torch.float32

    def test_relu_of_halves_forward(self, emulated: Any, cell: str) -> None:
        problem = make_problem(cell, batch_sizes=[4, 4, 2, 1], dtype=torch.bfloat16)
        exact = problem.separate(torch.float64)
        allowed = tolerance(problem, exact)
        found = problems.errors(problem.run(emulated), {n: exact[n] for n in ("y", "h_n")})
        assert max(found.values()) <= allowed

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_without_biases(self, emulated: Any, cell: str, dtype: torch.dtype) -> None:
        problem = make_problem(cell, dtype=dtype).without("b_ih", "b_hh")
        assert_equals_torch(problem.run(emulated), problem)

    @pytest.mark.parametrize("missing", ["grad_y", "grad_h_n", "grad_c_n"])
    def test_without_a_gradient(self, emulated: Any, cell: str, missing: str) -> None:
        if missing == "grad_c_n" and cell != "lstm":
            pytest.skip("only an LSTM has it")
        problem = make_problem(cell, batch_sizes=[3, 3, 1]).without(missing)
        assert_equals_torch(problem.run(emulated), problem)

    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize(
        "shared",
        [
            ("x",),
            ("x", "w_ih"),
            ("w_ih", "w_hh", "b_ih", "b_hh"),
            ("h0", "c0"),
            ("grad_y", "grad_h_n", "grad_c_n"),
        ],
        ids=str,
    )
    def test_shared(self, emulated: Any, cell: str, shared: tuple[str, ...], reverse: bool) -> None:
        problem = make_problem(
            cell, models=3, batch_sizes=[3, 2, 2], shared=shared, reverse=reverse
        )
        found = problem.run(emulated)
        assert_equals_torch(found, problem)
        assert all(len(result) == 3 for result in found.values() if result.numel() > 0)
        expanded = problem.changed(lambda _, t: t.expand(3, *t.shape[1:]))
        assert_equals_torch(expanded.run(emulated), problem)

    def test_everything_shared(self, emulated: Any, cell: str) -> None:
        problem = make_problem(cell, models=1)
        assert_equals_torch(problem.run(emulated), problem)

    @pytest.mark.parametrize("without", range(3))
    def test_needs(self, emulated: Any, cell: str, without: int) -> None:
        problem = make_problem(cell, batch_sizes=[3, 2])
        everything = problem.run(emulated)
        needs = tuple(i != without for i in range(3))
        found = problem.run(emulated, needs)
        of = {"grad x": 0, "grad h0": 1, "grad c0": 1}
        for name, result in found.items():
            if name.startswith("grad") and of.get(name, 2) == without:
                assert result.shape == (0,)
            else:
                torch.testing.assert_close(result, everything[name], rtol=0, atol=0, msg=name)

    def test_any_strides(self, emulated: Any, cell: str) -> None:
        problem = make_problem(cell, models=3, batch_sizes=[3, 2])
        outermost = problem.changed(lambda _, t: t.mT.contiguous().mT if t.dim() == 3 else t)
        innermost = problem.changed(lambda _, t: t.movedim(0, -1).contiguous().movedim(-1, 0))
        gaps = problem.changed(lambda _, t: torch.stack([t, t], 1)[:, 0])
        expected = problem.run(emulated)
        for strided in (outermost, innermost, gaps):
            errors = problems.errors(strided.run(emulated), expected)
            assert max(errors.values()) <= 1e-12  # Strides may change the order of additions.

    @pytest.mark.parametrize("inputs", [0, 1])
    def test_few_inputs(self, emulated: Any, cell: str, inputs: int) -> None:
        problem = make_problem(cell, inputs=inputs)
        if inputs == 1:
            assert_equals_torch(problem.run(emulated), problem)
            return
        # torch has no such layer: the same with one input that is zero.
        padded = make_problem(cell, inputs=1)
        padded.tensors.update({n: t for n, t in problem.tensors.items() if n not in ("x", "w_ih")})
        padded.tensors["x"].zero_()
        expected = padded.run(emulated)
        found = problem.run(emulated)
        for name in found:
            if name in ("grad x", "grad w_ih"):
                assert found[name].shape == (*expected[name].shape[:2], 0)
            else:
                torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)

    @pytest.mark.parametrize("batch_sizes", [[0], [0, 0]])
    def test_an_empty_batch(self, emulated: Any, cell: str, batch_sizes: list[int]) -> None:
        problem = make_problem(cell, batch_sizes=batch_sizes)
        found = problem.run(emulated)
        assert found["y"].shape == (2, 0, 7)
        assert found["grad x"].shape == (2, 0, 5)
        for name in ("grad w_ih", "grad w_hh", "grad b_ih"):
            assert found[name].shape == problem.tensors[name.removeprefix("grad ")].shape
            assert not found[name].any()

    def test_steps_without_rows_at_the_end(self, emulated: Any, cell: str) -> None:
        problem = make_problem(cell, batch_sizes=[3, 2, 0, 0])
        expected = make_problem(cell, batch_sizes=[3, 2])
        assert_same_bits(problem.run(emulated), expected.run(emulated))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("order", ORDERS[1:])
    def test_every_order(
        self,
        emulated: Any,
        emulator: Emulator,
        cell: str,
        dtype: torch.dtype,
        order: tuple[str, int],
    ) -> None:
        problem = make_problem(cell, models=4, hidden=33, batch_sizes=[9, 4], dtype=dtype)
        expected = problem.run(emulated)
        with emulator.order(*order):
            assert_same_bits(problem.run(emulated), expected)

    def test_one_kernel_and_one_product_a_step(
        self, emulated: Any, emulator: Emulator, cell: str
    ) -> None:
        """However many models: the kernels are for all of them."""
        launches = []
        for models in (1, 3):
            before = emulator.launches
            make_problem(cell, models=models, batch_sizes=[2] * 5).forward(emulated)
            launches.append(emulator.launches - before)
        assert launches == [5, 5]


class TestProjection:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("batch_sizes", PACKED, ids=str)
    def test_equals_torch(
        self, emulated: Any, batch_sizes: list[int], reverse: bool, dtype: torch.dtype
    ) -> None:
        sizes: Any = {"batch_sizes": batch_sizes, "hidden": 9, "outputs": 4}
        problem = make_problem("lstm", reverse=reverse, dtype=dtype, **sizes)
        if dtype.itemsize > 2:
            assert_equals_torch(problem.run(emulated), problem)
            return
        # torch has no projections of halves on a CPU: a rounding of 9 numbers each step.
        exact = problem.separate(torch.float64)
        found = problems.errors(problem.run(emulated), exact)
        assert max(found.values()) <= 9 * torch.finfo(dtype).eps

    @pytest.mark.parametrize("missing", ["grad_y", "grad_h_n", "grad_c_n"])
    def test_without_a_gradient(self, emulated: Any, missing: str) -> None:
        problem = make_problem("lstm", hidden=9, outputs=4, batch_sizes=[3, 2]).without(missing)
        assert_equals_torch(problem.run(emulated), problem)

    def test_shared(self, emulated: Any) -> None:
        shared = ("w_hr", "h0", "grad_y", "x")
        problem = make_problem("lstm", models=3, hidden=9, outputs=4, shared=shared)
        assert_equals_torch(problem.run(emulated), problem)


def layer_as_problem(layer: cases.Layer) -> Problem:
    """An input weight of ones on the diagonal makes the given input's part."""
    tensors = {name: torch.tensor(values) for name, values in layer.arrays.items()}
    tensors["x"] = tensors.pop("projected")
    tensors["w_ih"] = torch.eye(tensors["x"].shape[2])[None]
    if layer.cell != "lstm":
        del tensors["c0"], tensors["grad_c_n"]
    return Problem(layer.cell, tensors, layer.batch_sizes, layer.reverse)


NAMES = {"grad_h0": "grad h0", "grad_c0": "grad c0", "grad_input": "grad x"}


@pytest.mark.parametrize("cell", cases.CELLS)
class TestPersistent:
    @pytest.mark.parametrize("size", cases.LAYERS, ids=str)
    def test_equals_torch_in_every_order(self, emulator: Emulator, cell: str, size: Any) -> None:
        layer = cases.make_layer(cell, **size)
        problem = layer_as_problem(layer)
        exact = problem.separate(torch.float64)
        exact = {n: t for n, t in exact.items() if not n.startswith(("grad w", "grad b"))}
        allowed = tolerance(problem, exact)
        first = None
        for order in ORDERS:
            with emulator.order(*order):
                found = cases.run_persistent(emulator, layer, size["models"])
            by_name = {NAMES.get(name, name): torch.tensor(t) for name, t in found.items()}
            wrong = {n: e for n, e in problems.errors(by_name, exact).items() if not e <= allowed}
            assert not wrong, f"more than {allowed}"
            first = by_name if first is None else first
            assert_same_bits(by_name, first)

    def test_saves_what_the_steps_save(self, emulator: Emulator, emulated: Any, cell: str) -> None:
        """To rounding: the products are added in another order."""
        layer = cases.make_layer(cell, 2, 7, [5, 3])
        expected = layer_as_problem(layer).run(emulated)
        found = cases.run_persistent(emulator, layer, 2)
        for name in {"y", "gates", "cells"} & found.keys():
            values = torch.tensor(found[name])
            torch.testing.assert_close(values, expected[name], rtol=0, atol=16 * 2.0**-23)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_tiles_and_other_models_change_nothing(
        self, emulator: Emulator, cell: str, reverse: bool
    ) -> None:
        """Many models make larger tiles."""
        layer = cases.make_layer(cell, 130, 3, [9, 9, 2], reverse=reverse)
        together = cases.run_persistent(emulator, layer, 130)
        for model in (0, 129):
            arrays = {n: emulation.exact(t[model : model + 1]) for n, t in layer.arrays.items()}
            alone = cases.Layer(cell, layer.batch_sizes, reverse, arrays)
            for name, found in cases.run_persistent(emulator, alone, 1).items():
                np.testing.assert_array_equal(found[0], together[name][model], name)

    def test_refuses_what_it_cannot(self, emulator: Emulator, cell: str) -> None:
        layer = cases.make_layer(cell, 1, 65, [1])
        with pytest.raises(emulation.EmulationError):
            cases.run_persistent(emulator, layer, 1)


class TestRows:
    @pytest.mark.parametrize("order", ORDERS)
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    @pytest.mark.parametrize("shape", [(1, 1, 1), (4, 7, 33), (2, 100, 5), (2, 0, 3)])
    def test_bias_gradient(
        self, emulator: Emulator, shape: tuple[int, ...], dtype: str, order: tuple[str, int]
    ) -> None:
        grads = emulation.exact(np.random.default_rng(0).standard_normal(shape).astype(dtype))
        with emulator.order(*order):
            found = cases.bias_gradient(emulator, grads, dtype)
        # A rounding for each addition of numbers below five.
        allowed = 5 * shape[1] ** 2 * np.finfo(dtype).eps
        np.testing.assert_allclose(found, grads.astype("float64").sum(1), rtol=0, atol=allowed)


@pytest.mark.skipif(
    os.environ.get("MODELBATCH_PERSISTENT_RNN") == "1", reason="this process has it on, too"
)
def test_the_switch(emulated: Any, kernels: Path, tmp_path: Path) -> None:
    library = emulation.build_operators(kernels, Path(torch.__file__).parent)
    differs = False
    persistent = run_switched(str(library), tmp_path / "on", "1")
    for problem, found in zip(problems.switch_problems(), persistent):
        assert_equals_torch(found, problem)
        steps = problem.run(emulated)
        same = all(torch.equal(steps[name], found[name]) for name in steps)
        takes_steps = problem.tensors["h0"].shape[2] > 64
        assert same or not takes_steps
        differs |= not same
    assert differs  # The products are added in another order.
