"""The CUDA operators, registered for CPU tensors and with emulated kernels, equal the CPU's."""

from typing import Any

import pytest
import torch
from cuda_emulation.optim_cases import HYPER
from cuda_emulation.optim_problems import DTYPES, STRIDES, M, make_problem, resized

ops = torch.ops.modelbatch


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_every_operator_with_a_cuda_kernel_is_emulated(emulated: Any) -> None:
    for rule in HYPER:
        assert hasattr(emulated, f"{rule}_step_")


class TestSteps:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rule", HYPER)
    def test_equal_the_cpu(self, emulated: Any, rule: str, dtype: torch.dtype) -> None:
        self.compare(emulated, rule=rule, dtype=dtype)

    @pytest.mark.parametrize("grads", STRIDES)
    @pytest.mark.parametrize("params", STRIDES)
    @pytest.mark.parametrize("states", [None, "dense", "reversed"])
    def test_any_strides(self, emulated: Any, params: str, states: str | None, grads: str) -> None:
        strides = {"params": params, "states": states, "grads": grads}
        self.compare(emulated, rule="adam", dtype=torch.float32, **strides)

    def compare(self, emulated: Any, **arguments: Any) -> None:
        expected, found = make_problem(**arguments), make_problem(**arguments)
        before = [tensor.clone() for tensor in found.written()]
        expected.run()
        found.run(emulated)
        for a, b in zip(found.written(), expected.written()):
            assert a.stride() == b.stride()
            assert_same_bits(a, b)
        assert any(not torch.equal(a, b) for a, b in zip(found.written(), before))

    def test_a_gradient_that_all_models_share(self, emulated: Any) -> None:
        expected, found = (make_problem("sgd", torch.float32) for _ in range(2))
        for problem in (expected, found):
            problem.grads = [grad[:1].expand_as(grad) for grad in problem.grads]
        expected.run()
        found.run(emulated)
        for a, b in zip(found.written(), expected.written()):
            assert_same_bits(a, b)

    def test_vectors_of_any_strides(self, emulated: Any) -> None:
        expected, found = (make_problem("adagrad", torch.float32) for _ in range(2))
        for problem in (expected, found):
            problem.step = torch.stack([problem.step, problem.step], -1)[:, 0]
            for name, vector in problem.options.items():
                problem.options[name] = torch.stack([vector, vector], -1)[:, 0]
        expected.run()
        found.run(emulated)
        for a, b in zip(found.written(), expected.written()):
            assert_same_bits(a, b)

    def test_without_options(self, emulated: Any) -> None:
        expected, found = (make_problem("rmsprop", torch.float32) for _ in range(2))
        for problem in (expected, found):
            problem.options = {}
        expected.run()
        found.run(emulated)
        for a, b in zip(found.written(), expected.written()):
            assert_same_bits(a, b)

    def test_no_parameters_still_count(self, emulated: Any) -> None:
        expected, found = (make_problem("adam", torch.float32) for _ in range(2))
        for problem in (expected, found):
            problem.params, problem.grads, problem.states = [], [], [[], [], []]
        expected.run()
        found.run(emulated)
        assert_same_bits(found.step, expected.step)

    def test_refusals_are_the_same(self, emulated: Any) -> None:
        def message(namespace: Any, change: str) -> str:
            problem = make_problem("adam", torch.float32)
            if change == "hyper":
                problem.hyper = problem.hyper[:-1].contiguous()
            elif change == "twice":
                problem.params[1] = problem.params[0]
                problem.grads[1] = problem.grads[0]
                problem.states = [[of[0], of[0], *of[2:]] for of in problem.states]
            else:
                problem.grads[2] = problem.grads[2].double()
            with pytest.raises(RuntimeError, match="modelbatch.*adam_step_") as refused:
                problem.run(namespace)
            return str(refused.value).splitlines()[0]

        for change in ("hyper", "twice", "grad"):
            assert message(emulated, change) == message(ops, change)


class TestGradStats:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("strides", STRIDES)
    def test_equal_the_cpu(self, emulated: Any, strides: str, dtype: torch.dtype) -> None:
        grads = make_problem("sgd", dtype, grads=strides).grads
        grads[3][2, 7] = float("inf")
        found, expected = emulated.grad_stats(grads), ops.grad_stats(grads)
        assert_same_bits(found[1], expected[1])
        assert_same_bits(emulated.nonfinite(grads), ops.nonfinite(grads))
        assert_same_bits(ops.nonfinite(grads), expected[1])
        # All terms are positive, so every order of additions is right to n roundings.
        n = sum(grad[0].numel() for grad in grads)
        torch.testing.assert_close(found[0], expected[0], rtol=n * 2.0**-53, atol=0)

    def test_no_models(self, emulated: Any) -> None:
        sq_norm, nonfinite = emulated.grad_stats([torch.zeros(0, 3)])
        assert sq_norm.shape == nonfinite.shape == (0,)


class TestRandom:
    seed = torch.arange(M) * 7919
    step = torch.arange(M) * (1 << 33)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["uniform", "normal"])
    @pytest.mark.parametrize("size", [[], [1001], [3, 0]])
    def test_draws(self, emulated: Any, kind: str, dtype: torch.dtype, size: list[int]) -> None:
        arguments = self.seed, self.step, 5, size, dtype
        assert_same_bits(getattr(emulated, kind)(*arguments), getattr(ops, kind)(*arguments))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("group", [1, 3])
    @pytest.mark.parametrize("shared", [False, True])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_dropout(
        self, emulated: Any, dtype: torch.dtype, group: int, shared: bool, transposed: bool
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1 if shared else M, 33, 20, generator=generator).to(dtype)
        x = (x.mT if transposed else x).expand(M, -1, -1)
        p = resized([0.5, 0.0, 1.0, 0.3], dtype=torch.float64)
        arguments = x, p, self.seed, self.step, 5, group
        assert_same_bits(emulated.dropout(*arguments), ops.dropout(*arguments))
