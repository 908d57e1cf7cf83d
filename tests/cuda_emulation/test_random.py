"""The emulated CUDA kernels of the random family equal the CPU's, bit by bit."""

import numpy as np
import pytest
import torch
from cuda_emulation import random_cases as cases
from cuda_emulation.emulator import ORDERS, Emulator

ops = torch.ops.modelbatch


def bits(tensor: torch.Tensor) -> np.ndarray:
    """As numpy keeps them: see ``cases.storage``."""
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


def streams(num_models: int) -> tuple[torch.Tensor, torch.Tensor]:
    seed, step = cases.streams(num_models)
    return torch.tensor(seed), torch.tensor(step)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", cases.SHAPES)
class TestEqualsTheCpu:
    @pytest.mark.parametrize("kind", ["uniform", "normal"])
    def test_draws(
        self,
        emulator: Emulator,
        kind: str,
        shape: tuple[int, ...],
        dtype: str,
        order: tuple[str, int],
    ) -> None:
        with emulator.order(*order):
            found = cases.draw(emulator, kind, dtype, shape)
        arguments = *streams(shape[0]), cases.OP_INDEX, shape[1:], getattr(torch, dtype)
        expected = bits(getattr(ops, kind)(*arguments))
        assert found.tobytes() == expected.tobytes()

    @pytest.mark.parametrize("group", [1, 3, 1000])
    @pytest.mark.parametrize("shared", [False, True])
    def test_dropout(
        self,
        emulator: Emulator,
        shape: tuple[int, ...],
        dtype: str,
        order: tuple[str, int],
        group: int,
        shared: bool,
    ) -> None:
        M = shape[0]
        generator = torch.Generator().manual_seed(M)
        x = torch.randn((1 if shared else M, *shape[1:]), generator=generator)
        x = x.to(getattr(torch, dtype))
        x.view(-1)[::7] = float("nan")
        with emulator.order(*order):
            found = cases.dropout(emulator, dtype, bits(x), M, group)
        p = torch.tensor(np.resize(cases.P, M))
        stacked = x.expand(M, *shape[1:])
        expected = ops.dropout(stacked, p, *streams(M), cases.OP_INDEX, group)
        assert found.tobytes() == bits(expected).tobytes()


def test_more_models_than_the_grid_has_rows(emulator: Emulator) -> None:
    shape = (65535 + 70, 2)
    found = cases.draw(emulator, "uniform", "float32", shape)
    expected = ops.uniform(*streams(shape[0]), cases.OP_INDEX, shape[1:], torch.float32)
    np.testing.assert_array_equal(found, expected.numpy())
