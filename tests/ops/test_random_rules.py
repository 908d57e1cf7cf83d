"""modelbatch::dropout, uniform and normal under autograd, torch.func, torch.compile, and misuse."""

import itertools
import math

import pytest
import torch

from modelbatch.ops import random

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SEEDS = torch.tensor([0, -1, 123456789012345, 2**62 + 17, 5])
STEPS = torch.tensor([0, 5, 2**43 + 7, 2**33, 1])
RATES = torch.tensor([0.0, 0.3, 1.0, 0.5, 1e-3], dtype=torch.float64)
M = len(SEEDS)


def assert_same_bits(a, b):
    """Equal, NaN in the same places: no tolerance."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# ---- autograd, fake tensors, vmap, compile ------------------------------------------------------


def example(dtype=torch.float64, requires_grad=False):
    x = torch.randn(M, 3, 4, dtype=dtype, requires_grad=requires_grad)
    return x, RATES, SEEDS, STEPS, 2, 4


# opcheck itself looks at the gradient of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.modelbatch.dropout.default, example(dtype))
    torch.library.opcheck(torch.ops.modelbatch.dropout.default, example(dtype, requires_grad=True))
    for op in (torch.ops.modelbatch.uniform.default, torch.ops.modelbatch.normal.default):
        torch.library.opcheck(op, (SEEDS, STEPS, 1, [3, 4], dtype))


def test_gradcheck_and_double_backward():
    x, *args = example(requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: random.dropout(v, *args), (x,))
    assert torch.autograd.gradgradcheck(lambda v: random.dropout(v, *args) ** 2, (x,))


def test_gradient_uses_the_mask_of_the_forward():
    x, *args = example(torch.float32, requires_grad=True)
    y = random.dropout(x, *args)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert_same_bits(grad, random.dropout(torch.ones_like(x), *args))


def test_forward_mode_and_every_transform_of_torch_func():
    """Dropout is linear: each derivative is dropout itself, or zero."""
    x, *args = example(torch.float32)

    def f(v):
        return random.dropout(v, *args)

    mask = f(torch.ones_like(x))
    value, tangent = torch.func.jvp(f, (x,), (torch.ones_like(x),))
    assert_same_bits(value, f(x))
    assert_same_bits(tangent, mask)
    diagonal = torch.diag(mask.flatten())
    for jacobian in (torch.func.jacrev(f)(x), torch.func.jacfwd(f)(x)):
        assert torch.equal(jacobian.reshape(x.numel(), x.numel()), diagonal)
    _, pull = torch.func.vjp(f, x)
    assert_same_bits(pull(torch.ones_like(x))[0], mask)

    def loss(v):
        return f(v).square().sum() / 2

    jacobians = (torch.func.jacfwd, torch.func.jacrev)
    for outer, inner in itertools.product(jacobians, jacobians):
        second = outer(inner(loss))(x)
        assert torch.equal(second.reshape(x.numel(), x.numel()), diagonal**2)
    third = torch.func.grad(lambda v: torch.func.grad(lambda w: f(w).pow(3).sum())(v).sum())(x)
    torch.testing.assert_close(third, 6 * mask**3 * x)


def test_gradient_of_vmap_and_vmap_of_gradient():
    x = torch.randn(3, M, 4)
    args = (RATES, SEEDS, STEPS, 0)

    def loss(v):
        return random.dropout(v, *args).square().sum()

    outside = torch.func.grad(lambda v: torch.vmap(loss)(v).sum())(x)
    inside = torch.vmap(torch.func.grad(loss))(x)
    assert torch.equal(outside, inside)
    for i in range(3):
        (plain,) = torch.autograd.grad(loss(v := x[i].clone().requires_grad_()), v)
        assert torch.equal(inside[i], plain)


def test_expanded_gradient():
    x = torch.randn(M, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(random.dropout(x, RATES, SEEDS, STEPS, 0).sum(), x)
    assert torch.equal(grad != 0, random.dropout(torch.ones(M, 6), RATES, SEEDS, STEPS, 0) != 0)


# For each of input, p, seed and step: the axis of the outer vmap, or None.
@pytest.mark.parametrize(
    "in_dims",
    [
        (0, 0, 0, 0),
        (2, 1, 1, 1),
        (0, None, None, None),
        (None, 0, None, None),
        (None, None, 0, 0),
        (None, None, None, 0),
    ],
)
def test_vmap_of_dropout_equals_a_loop(in_dims):
    tensors = [
        torch.randn(3, M, 4, 5),
        torch.rand(3, M, dtype=torch.float64),
        torch.arange(3 * M).view(3, M),
        torch.arange(3 * M).flip(0).view(3, M),
    ]
    args = [
        t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(tensors, in_dims, strict=True)
    ]
    result = torch.vmap(lambda *a: random.dropout(*a, 1, 5), in_dims=in_dims)(*args)
    for i in range(3):
        one = [t[0] if dim is None else t[i] for t, dim in zip(tensors, in_dims, strict=True)]
        assert torch.equal(result[i], random.dropout(*one, 1, 5))


@pytest.mark.parametrize("draw", [random.uniform, random.normal])
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 1)])
def test_vmap_of_draws_equals_a_loop(draw, in_dims):
    tensors = [torch.arange(3 * M).view(3, M), torch.arange(3 * M).flip(0).view(3, M)]
    args = [
        t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(tensors, in_dims, strict=True)
    ]
    result = torch.vmap(lambda *a: draw(*a, 1, [2, 3]), in_dims=in_dims)(*args)
    for i in range(3):
        one = [t[0] if dim is None else t[i] for t, dim in zip(tensors, in_dims, strict=True)]
        assert torch.equal(result[i], draw(*one, 1, [2, 3]))


def test_vmap_over_no_models():
    result = torch.vmap(lambda x, s: random.dropout(x, RATES[:0], s, s, 0))(
        torch.empty(3, 0, 2), torch.empty(3, 0, dtype=torch.int64)
    )
    assert result.shape == (3, 0, 2)


def test_nested_vmap_and_gradient():
    x = torch.randn(2, 3, M, 4)
    args = (RATES, SEEDS, STEPS, 0)

    def loss(v):
        return random.dropout(v, *args).square().sum()

    result = torch.vmap(torch.vmap(torch.func.grad(loss)))(x)
    for i in range(2):
        for j in range(3):
            assert torch.equal(result[i, j], torch.func.grad(loss)(x[i, j]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_in_one_graph(dynamic):
    def step(x, p, seed, count):
        y = random.dropout(x, p, seed, count, 0) + random.normal(seed, count, 1, x.shape[1:])
        return y * random.uniform(seed, count, 2, [1])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for width in (4, 6):
        x = torch.randn(M, width, requires_grad=True)
        args = (x, RATES, SEEDS, STEPS)
        expected, result = step(*args), compiled(*args)
        assert torch.equal(result, expected)
        (want,) = torch.autograd.grad(expected.sum(), x)
        (got,) = torch.autograd.grad(result.sum(), x)
        assert torch.equal(got, want)


def test_autocast_leaves_the_dtype_alone():
    x = torch.randn(M, 8)
    with torch.autocast("cpu", torch.bfloat16):
        result = random.dropout(x, RATES, SEEDS, STEPS, 0)
    assert_same_bits(result, random.dropout(x, RATES, SEEDS, STEPS, 0))


# ---- errors -------------------------------------------------------------------------------------

X = torch.zeros(M, 3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X[:2], RATES, SEEDS, STEPS, 0), r"input must have shape \[M, ...\] .* got \[2, 3\]"),
        ((X[0, 0], RATES[:1], SEEDS[:1], STEPS[:1], 0), r"input must have shape .* got \[\]"),
        ((X.int(), RATES, SEEDS, STEPS, 0), "dtype must be float32"),
        ((X, RATES.float(), SEEDS, STEPS, 0), "p must be float64"),
        ((X, RATES[:3], SEEDS, STEPS, 0), r"p must have shape \[5\].*got \[3\]"),
        ((X, RATES - 0.1, SEEDS, STEPS, 0), r"p must be in \[0, 1\], got -0.1 for model 0"),
        ((X, RATES + 0.1, SEEDS, STEPS, 0), r"p must be in \[0, 1\], got 1.1 for model 2"),
        ((X, RATES * math.nan, SEEDS, STEPS, 0), r"p must be in \[0, 1\], got -?nan for model 0"),
        ((X, RATES, SEEDS.int(), STEPS, 0), "seed must be int64"),
        ((X, RATES, SEEDS[None], STEPS, 0), r"seed must have shape \[M\].*got \[1, 5\]"),
        ((X, RATES, SEEDS, STEPS.double(), 0), "step must be int64"),
        ((X, RATES, SEEDS, STEPS[:1], 0), r"step must have shape \[5\].*got \[1\]"),
        ((X, RATES, SEEDS, STEPS - 1, 0), r"step must be in \[0, 2\^44\), got -1 for model 0"),
        ((X, RATES, SEEDS, STEPS + 2**44, 0), "step must be in"),
        ((X, RATES, SEEDS, STEPS, -1), "op_index must be in"),
        ((X, RATES, SEEDS, STEPS, 2**20), "op_index must be in"),
        ((X, RATES, SEEDS, STEPS, 0, 0), "group must be at least 1, got 0"),
    ],
)
def test_dropout_refuses(args, message):
    with pytest.raises(RuntimeError, match=f"modelbatch::dropout: {message}"):
        random.dropout(*args)


@pytest.mark.parametrize("draw", [random.uniform, random.normal])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((SEEDS.int(), STEPS, 0, [2]), "seed must be int64"),
        ((SEEDS, STEPS[:2], 0, [2]), r"step must have shape \[5\]"),
        ((SEEDS, STEPS - 1, 0, [2]), "step must be in"),
        ((SEEDS, STEPS, 2**20, [2]), "op_index must be in"),
        ((SEEDS, STEPS, 0, [-1]), "size must not be negative"),
        ((SEEDS, STEPS, 0, [2], torch.int64), "dtype must be float32"),
    ],
)
def test_draws_refuse(draw, args, message):
    with pytest.raises(RuntimeError, match=f"modelbatch::{draw.__name__}: {message}"):
        draw(*args)
