"""The CUDA kernels of the optimizer family equal the CPU's, on a device.

``tests/cuda_emulation`` compares the same kernels without one.
"""

import importlib.util

import pytest
import torch
from cuda_emulation.optim_cases import HYPER
from cuda_emulation.optim_problems import DTYPES, M, Problem, make_problem, resized

import modelbatch.ops  # noqa: F401  (registers the operators)

ops = torch.ops.modelbatch


def library_is_built() -> bool:
    return importlib.util.find_spec("modelbatch._C_cuda") is not None


@pytest.mark.skipif(not library_is_built(), reason="modelbatch._C_cuda was not built")
@pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA")
@pytest.mark.parametrize(
    "name",
    [
        *(f"{rule}_step_" for rule in HYPER),
        "grad_stats",
        "nonfinite",
        "cross_entropy",
        "tanh",
        "dropout",
        "uniform",
        "normal",
    ],
)
def test_the_cuda_library_registers_its_kernels(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"modelbatch::{name}", "CUDA")


def assert_equal_to_rounding(found: Problem, expected: Problem, dtype: torch.dtype) -> None:
    """The kernels round alike; only ``pow`` may differ, and by it the coefficients.

    1 - beta^step loses at most three digits of double precision, so a float64 coefficient is right
    to 1e-12, and one of float32 to a rounding. That moves an element by a few roundings.
    """
    for a, b in zip(found.written(), expected.written()):
        rtol = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(a.dtype).eps
        scale = b.double().abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a.cpu(), b, rtol=rtol, atol=rtol * scale)


@pytest.mark.needs_cuda
class TestOnADevice:
    @pytest.mark.parametrize("first", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rule", HYPER)
    def test_steps_equal_the_cpu(self, rule: str, dtype: torch.dtype, first: bool) -> None:
        expected = make_problem(rule, dtype, first=first)
        found = expected.to("cuda")
        expected.run()
        found.run()
        assert_equal_to_rounding(found, expected, dtype)

    @pytest.mark.parametrize("params", ["dense", "reversed"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_strides_equal_the_cpu(self, dtype: torch.dtype, params: str) -> None:
        expected = make_problem("adam", dtype, grads="reversed", params=params)
        found = expected.to("cuda")
        expected.run()
        found.run()
        assert_equal_to_rounding(found, expected, dtype)

    @pytest.mark.parametrize("rule", HYPER)
    def test_skipped_models_keep_every_bit(self, rule: str) -> None:
        problem = make_problem(rule, torch.float32).to("cuda")
        live = problem.options["active"] & ~problem.options["nonfinite"]
        before = [tensor.clone() for tensor in problem.written()]
        problem.run()
        for old, new in zip(before, problem.written()):
            torch.testing.assert_close(new[~live], old[~live], rtol=0, atol=0)

    @pytest.mark.parametrize("rule", HYPER)
    def test_a_graph_replays_steps(self, rule: str) -> None:
        """And nothing waits for the device, which capturing would refuse."""
        problem = make_problem(rule, torch.float32, grads="reversed")
        captured = problem.to("cuda")
        eager = problem.to("cuda")
        captured.to("cuda").run()  # loads the kernels
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.run()
        for _ in range(3):
            graph.replay()
            eager.run()
        for a, b in zip(captured.written(), eager.written()):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert captured.step.max() == problem.step.max() + 3

    def test_options_written_between_replays_take_effect(self) -> None:
        captured = make_problem("adamw", torch.float32).to("cuda")
        captured.to("cuda").run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.run()
        eager = captured.to("cuda")
        for lr in (0.1, 0.01):
            captured.hyper[0].fill_(lr)
            eager.hyper[0].fill_(lr)
            graph.replay()
            eager.run()
        for a, b in zip(captured.written(), eager.written()):
            torch.testing.assert_close(a, b, rtol=0, atol=0)

    def test_nothing_waits_for_the_device(self) -> None:
        problem = make_problem("adam", torch.float32).to("cuda")
        problem.run()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            problem.run()
            ops.grad_stats(problem.grads)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_stream_of_its_own(self) -> None:
        expected = make_problem("adam", torch.float32)
        found = expected.to("cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found.run()
        stream.synchronize()
        expected.run()
        assert_equal_to_rounding(found, expected, torch.float32)

    @pytest.mark.parametrize("grads", ["dense", "reversed"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_grad_stats_equal_the_cpu(self, dtype: torch.dtype, grads: str) -> None:
        problem = make_problem("sgd", dtype, grads=grads)
        problem.grads[0][1, 3, 5] = float("nan")
        problem.grads[3][2, 7] = float("inf")
        expected = ops.grad_stats(problem.grads)
        found = ops.grad_stats([grad.cuda() for grad in problem.grads])
        torch.testing.assert_close(found[1].cpu(), expected[1])
        # All terms are positive, so every order of additions is right to n roundings.
        n = sum(grad[0].numel() for grad in problem.grads)
        torch.testing.assert_close(
            found[0].cpu(), expected[0], rtol=n * 2.0**-53, atol=0, equal_nan=True
        )

    def test_grad_stats_do_not_depend_on_the_number_of_models(self) -> None:
        grads = [grad.cuda() for grad in make_problem("sgd", torch.float32).grads]
        together, _ = ops.grad_stats(grads)
        for model in range(M):
            alone, _ = ops.grad_stats([grad[model : model + 1] for grad in grads])
            torch.testing.assert_close(alone, together[model : model + 1], rtol=0, atol=0)


@pytest.mark.needs_cuda
class TestRandomOnADevice:
    """The same words and the same arithmetic: equal bits."""

    seed = torch.arange(M) * 7919
    step = torch.arange(M) * (1 << 33)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["uniform", "normal"])
    @pytest.mark.parametrize("size", [[1], [1001], [3, 5000]])
    def test_draws(self, kind: str, dtype: torch.dtype, size: list[int]) -> None:
        draw = getattr(ops, kind)
        found = draw(self.seed.cuda(), self.step.cuda(), 5, size, dtype)
        expected = draw(self.seed, self.step, 5, size, dtype)
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("group", [1, 3])
    def test_dropout(self, dtype: torch.dtype, group: int) -> None:
        x = torch.randn(M, 33, 65, generator=torch.Generator().manual_seed(0)).to(dtype)
        x[:, ::5, ::7] = float("nan")
        p = resized([0.5, 0.0, 1.0, 0.3], dtype=torch.float64)
        arguments = x, p, self.seed, self.step
        found = ops.dropout(*(t.cuda() for t in arguments), 5, group)
        expected = ops.dropout(*arguments, 5, group)
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0, equal_nan=True)

    def test_a_graph_draws_anew_when_the_step_is_counted(self) -> None:
        seed, step = self.seed.cuda(), self.step.cuda()
        ops.uniform(seed, step, 5, [100], torch.float32)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            drawn = ops.uniform(seed, step, 5, [100], torch.float32)
            step.add_(1)
        for count in range(2):
            graph.replay()
            expected = ops.uniform(self.seed, self.step + count, 5, [100], torch.float32)
            torch.testing.assert_close(drawn.cpu(), expected, rtol=0, atol=0)
