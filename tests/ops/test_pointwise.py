"""Pointwise functions against torch's, in float64."""

import pytest
import torch
from torch import nn

from modelbatch import ModelBatch
from modelbatch.ops.pointwise import tanh

SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-30, -1e-38, 1e-45, 100.0]


def test_values():
    x = torch.cat([torch.linspace(-12, 12, 200001), torch.logspace(-30, 1, 10001)])
    y, exact = tanh(x), torch.tanh(x.double())
    unit = (torch.nextafter(y.abs(), torch.tensor(2.0)) - y.abs()).double()
    assert float(((y.double() - exact).abs() / unit).max()) <= 2.0
    assert y.abs().max() <= 1.0


def test_special_values():
    x = torch.tensor(SPECIAL)
    y, expected = tanh(x), torch.tanh(x)
    torch.testing.assert_close(y, expected, rtol=2.4e-7, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(y), torch.signbit(expected))


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 7, 2), (2, 40000)])
def test_shapes_and_strides(shape):
    x = torch.randn(shape)
    assert tanh(x).shape == x.shape
    torch.testing.assert_close(tanh(x), torch.tanh(x))
    turned = torch.randn(*shape, 3).movedim(-1, 0)
    torch.testing.assert_close(tanh(turned), torch.tanh(turned))


def test_place_and_threads_do_not_matter():
    x = torch.randn(50001)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = tanh(x)
        torch.set_num_threads(3)
        assert torch.equal(tanh(x), one)
    finally:
        torch.set_num_threads(before)
    for start in range(1, 20):
        assert torch.equal(tanh(x[start : start + 37].clone()), one[start : start + 37])


def test_derivatives():
    x = torch.randn(40, requires_grad=True)
    double = x.detach().double().requires_grad_()
    first, exact_first = (
        torch.autograd.grad(f(v).square().sum(), v, create_graph=True)[0]
        for f, v in ((tanh, x), (torch.tanh, double))
    )
    second, exact_second = (
        torch.autograd.grad(g.square().sum(), v)[0] for g, v in ((first, x), (exact_first, double))
    )
    torch.testing.assert_close(first.double(), exact_first, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second.double(), exact_second, rtol=1e-5, atol=1e-5)


def test_opcheck_and_refusal():
    torch.library.opcheck(torch.ops.modelbatch.tanh.default, (torch.randn(5, 3),))
    with pytest.raises(RuntimeError, match="float32"):
        tanh(torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("function", [torch.tanh, nn.functional.tanh, torch.Tensor.tanh, nn.Tanh()])
def test_bundles_use_it(function):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return function(self.linear(x))

    torch.manual_seed(0)
    mb = ModelBatch([Model() for _ in range(3)])
    x = torch.randn(4, 3)
    assert "modelbatch rule" in str(mb.explain(x))
    out = mb(x)
    assert type(out.grad_fn).__name__ == "_TanhBackward"
    torch.testing.assert_close(out, torch.stack([model(x) for model in mb.models]))
    assert mb.double()(x.double()).dtype == torch.float64
