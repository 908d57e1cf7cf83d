"""The emulated CUDA kernel of the cross entropy equals the CPU's to rounding."""

from typing import Any

import numpy as np
import pytest
import torch
from cuda_emulation import loss_cases as cases
from cuda_emulation.emulator import ORDERS, Emulator

ops = torch.ops.modelbatch


def tolerance(dtype: str, classes: int) -> float:
    """Of values near one: a sum of so many positive terms, and a few functions of it."""
    return (classes + 64) * float(np.finfo(dtype).eps)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", cases.SHAPES)
class TestCrossEntropy:
    @pytest.mark.parametrize("order", ORDERS)
    def test_kernel_equals_the_cpu(
        self,
        emulator: Emulator,
        shape: tuple[int, ...],
        dtype: str,
        shared: bool,
        order: tuple[str, int],
    ) -> None:
        logits, target = cases.make(shape, dtype, shared)
        with emulator.order(*order):
            found = cases.cross_entropy(emulator, logits, target)
        arguments = torch.tensor(logits), torch.tensor(target), cases.IGNORE, True
        expected = ops.cross_entropy(*arguments)
        for a, b in zip(found, expected):
            np.testing.assert_allclose(a, b.numpy(), rtol=0, atol=tolerance(dtype, shape[2]))

    def test_operator_equals_the_cpu(
        self, emulated: Any, shape: tuple[int, ...], dtype: str, shared: bool
    ) -> None:
        logits, target = map(torch.tensor, cases.make(shape, dtype, shared))
        strided = logits.mT.contiguous().mT
        for need_slope in (False, True):
            found = emulated.cross_entropy(strided, target, cases.IGNORE, need_slope)
            expected = ops.cross_entropy(strided, target, cases.IGNORE, need_slope)
            for a, b in zip(found, expected):
                torch.testing.assert_close(a, b, rtol=0, atol=tolerance(dtype, shape[2]))
