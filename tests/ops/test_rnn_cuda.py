"""The CUDA operators of the rnn family on a device.

``tests/cuda_emulation`` tests the same kernels without one.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulation import rnn_problems as problems
from cuda_emulation.rnn_cases import CELLS
from cuda_emulation.rnn_problems import Tensors, assert_equals_torch, assert_same_bits, make_problem

import modelbatch.ops  # noqa: F401  (registers the operators)

ops = torch.ops.modelbatch
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPERATORS = ["lstm", "gru", "rnn"]


def library_is_built() -> bool:
    return importlib.util.find_spec("modelbatch._C_cuda") is not None


@pytest.mark.skipif(not library_is_built(), reason="modelbatch._C_cuda was not built")
@pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA")
@pytest.mark.parametrize("name", [*OPERATORS, *(f"{name}_backward" for name in OPERATORS)])
def test_the_cuda_library_registers_its_kernels(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"modelbatch::{name}", "CUDA")


def clone(found: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in found.items()}


@pytest.mark.needs_cuda
@pytest.mark.parametrize("cell", CELLS)
class TestOnADevice:
    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equals_torch(self, cell: str, dtype: torch.dtype, reverse: bool) -> None:
        if cell == "relu" and dtype.itemsize == 2:
            pytest.skip("rounding decides an activation's side, and that a whole gradient")
        sizes: Any = {"batch_sizes": [9, 9, 4, 1], "hidden": 33, "models": 3}
        problem = make_problem(cell, dtype=dtype, reverse=reverse, **sizes)
        assert_equals_torch(problem.to("cuda").run(ops), problem)

    @pytest.mark.parametrize("hidden", [1, 7, 64, 65])
    def test_equals_the_cpu(self, cell: str, hidden: int) -> None:
        problem = make_problem(cell, hidden=hidden, batch_sizes=[5] * 4)
        expected = problem.run(ops)
        private = ("gates", "cells")  # may lie as a device likes
        expected = {name: t for name, t in expected.items() if name not in private}
        errors = problems.errors(problem.to("cuda").run(ops), expected)
        assert max(errors.values()) <= 1e-10

    @pytest.mark.parametrize(
        "shared", [("x",), ("x", "w_ih"), ("w_hh", "b_ih", "h0", "c0", "grad_y")], ids=str
    )
    def test_shared(self, cell: str, shared: tuple[str, ...]) -> None:
        problem = make_problem(cell, models=3, batch_sizes=[3, 2, 2], shared=shared)
        assert_equals_torch(problem.to("cuda").run(ops), problem)

    def test_a_graph_replays_a_layer(self, cell: str) -> None:
        """And nothing waits for the device, which capturing would refuse."""
        captured = make_problem(cell, batch_sizes=[4, 4, 2], dtype=torch.float32).to("cuda")
        captured.run(ops)  # loads the kernels
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = captured.run(ops)
        for _ in range(2):
            captured.tensors["x"].normal_()
            captured.tensors["w_hh"].mul_(0.5)
            graph.replay()
            assert_same_bits(clone(found), captured.run(ops))

    def test_nothing_waits_for_the_device(self, cell: str) -> None:
        problem = make_problem(cell, batch_sizes=[4, 4, 2], dtype=torch.float32).to("cuda")
        problem.run(ops)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            problem.run(ops)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_stream_of_its_own(self, cell: str) -> None:
        problem = make_problem(cell)
        moved = problem.to("cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = moved.run(ops)
        stream.synchronize()
        assert_equals_torch(found, problem)

    def test_runs_repeat_bit_by_bit(self, cell: str) -> None:
        problem = make_problem(cell, batch_sizes=[9, 4], dtype=torch.float32).to("cuda")
        assert_same_bits(problem.run(ops), problem.run(ops))


@pytest.mark.needs_cuda
class TestProjectionOnADevice:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equals_torch(self, dtype: torch.dtype) -> None:
        problem = make_problem(
            "lstm", hidden=9, outputs=4, batch_sizes=[4, 2, 1], dtype=dtype, models=3
        )
        found = problem.to("cuda").run(ops)
        if dtype.itemsize > 2:
            assert_equals_torch(found, problem)
            return
        # torch has no projections of halves on a CPU: a rounding of 9 numbers each step.
        errors = problems.errors(found, problem.separate(torch.float64))
        assert max(errors.values()) <= 9 * torch.finfo(dtype).eps


@pytest.mark.needs_cuda
@pytest.mark.parametrize("value", ["0", "1"])
def test_both_settings_of_the_switch(tmp_path: Path, value: str) -> None:
    results = problems.run_switched("cuda", tmp_path / "results", value)
    for problem, found in zip(problems.switch_problems(large=True), results):
        assert_equals_torch(found, problem)
