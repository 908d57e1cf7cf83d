"""The emulated CUDA kernels of the pointwise family equal the CPU's, bit for bit."""

from typing import Any

import numpy as np
import pytest
import torch
from cuda_emulation import pointwise_cases as cases
from cuda_emulation.emulator import ORDERS, Emulator

ops = torch.ops.modelbatch


@pytest.mark.parametrize("size", cases.SIZES)
class TestTanh:
    @pytest.mark.parametrize("order", ORDERS)
    def test_kernel_equals_the_cpu(
        self, emulator: Emulator, size: int, order: tuple[str, int]
    ) -> None:
        x = cases.make(size)
        with emulator.order(*order):
            found = cases.tanh(emulator, x)
        np.testing.assert_array_equal(found, ops.tanh(torch.tensor(x)).numpy())

    def test_operator_equals_the_cpu(self, emulated: Any, size: int) -> None:
        x = torch.tensor(cases.make(size)).expand(2, size).t()
        assert torch.equal(emulated.tanh(x).nan_to_num(), ops.tanh(x).nan_to_num())
