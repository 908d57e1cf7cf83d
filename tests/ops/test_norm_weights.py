"""Batch normalisation with sample weights: repeated samples, absent samples, any weights."""

import pytest
import torch
import torch.nn.functional as F

from modelbatch.ops.norm import _backward_composite, _forward_composite, batch_norm_train

M = 3
# As in test_norm.py: with and without positions, whole and partial vectors and channel blocks.
SLICES = [(6, 5), (33, 16), (4, 5, 7), (5, 16, 32), (3, 37, 4, 4), (5, 20, 3, 3), (6, 6, 9, 5)]
EPS = torch.logspace(-5, -2, M, dtype=torch.float64)
LAYOUTS = ["contiguous", "channels_last"]


def channels_last(tensor):
    return tensor.movedim(2, -1).contiguous().movedim(-1, 2)


def make_tensors(sizes, dtype=torch.float64, layout="contiguous"):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(M, *sizes, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "channels_last":
        input = channels_last(input)
    rest = [
        torch.randn(M, sizes[1], generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2)
    ]
    return [tensor.requires_grad_() for tensor in (input, *rest)]


def make_counts(batch):
    """Whole weights, every model with some samples absent and some repeated."""
    counts = torch.randint(0, 4, (M, batch), generator=torch.Generator().manual_seed(1))
    counts[:, 0], counts[:, 1], counts[:, 2] = 2, 0, 1
    return counts


def assert_near(actual, expected, rtol):
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * max(scale, 1e-30))


def gradients_of(output, tensors, counts):
    """Of a sum that a repeated sample enters as often as it is there, an absent one never."""
    generator = torch.Generator().manual_seed(2)
    seed = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    factor = counts.reshape(M, -1, *[1] * (output.dim() - 2)).to(output.dtype)
    return torch.autograd.grad(output, tensors, seed * factor)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SLICES)
def test_whole_weights_equal_repeated_samples(sizes, layout):
    tensors, counts = make_tensors(sizes, layout=layout), make_counts(sizes[0])
    output, mean, var = batch_norm_train(*tensors, EPS, counts)
    gradients = gradients_of(output, tensors, counts)
    own = [t.detach().requires_grad_() for t in tensors]
    expected = []
    for i in range(M):
        rows = torch.arange(sizes[0]).repeat_interleave(counts[i])
        x = own[0][i][rows]
        whole = F.batch_norm(x, None, None, own[1][i], own[2][i], training=True, eps=EPS[i].item())
        dims = [0, *range(2, x.dim())]
        true_var, true_mean = torch.var_mean(x.detach(), dims, correction=0)
        assert_near(mean[i], true_mean, 1e-11)
        assert_near(var[i], true_var, 1e-11)
        assert_near(output[i][rows], whole, 1e-10)
        first = torch.searchsorted(rows, torch.arange(sizes[0])).clamp(max=len(rows) - 1)
        expected.append(whole[first])
    for actual, want in zip(
        gradients, gradients_of(torch.stack(expected), own, counts), strict=True
    ):
        assert_near(actual, want, 1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SLICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ones_are_no_weights_to_the_bit(dtype, sizes, layout):
    tensors = make_tensors(sizes, dtype, layout)
    ones = torch.ones(M, sizes[0])
    plain, weighted = batch_norm_train(*tensors, EPS), batch_norm_train(*tensors, EPS, ones)
    for a, b in zip(plain, weighted, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(
        gradients_of(plain[0], tensors, ones), gradients_of(weighted[0], tensors, ones), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SLICES)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e300])
def test_absent_samples_reach_nothing(garbage, sizes, layout):
    tensors, counts = make_tensors(sizes, layout=layout), make_counts(sizes[0])
    absent = (counts == 0).reshape(M, -1, *[1] * (len(sizes) - 1))
    bad = [torch.where(absent, garbage, tensors[0].detach()), *tensors[1:]]
    if layout == "channels_last":
        bad[0] = channels_last(bad[0])
    bad[0].requires_grad_()
    clean, dirty = batch_norm_train(*tensors, EPS, counts), batch_norm_train(*bad, EPS, counts)
    for a, b in zip(clean[1:], dirty[1:], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(
        torch.where(absent, 0.0, clean[0].detach()), torch.where(absent, 0.0, dirty[0].detach())
    )
    # garbage in the incoming gradient is as harmless
    seed = torch.where(absent, garbage, torch.ones_like(clean[0]))
    zeros = torch.where(absent, 0.0, torch.ones_like(clean[0]))
    for a, b in zip(
        torch.autograd.grad(clean[0], tensors, zeros),
        torch.autograd.grad(dirty[0], bad, seed),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SLICES)
def test_the_formula_of_other_devices(sizes, layout):
    tensors = [t.detach() for t in make_tensors(sizes, layout=layout)]
    weights = torch.rand(M, sizes[0], generator=torch.Generator().manual_seed(3)) + 0.1
    weights[:, 1], weights[2] = 0, 0
    expected = batch_norm_train(*tensors, EPS, weights)
    for a, b in zip(_forward_composite(*tensors, EPS, weights), expected, strict=True):
        assert a.stride() == b.stride()
        assert_near(a, b, 1e-11)
    input, weight, _ = tensors
    arguments = (torch.randn_like(input), input, weight, *expected[1:], EPS, True, True, True)
    op = torch.ops.modelbatch.batch_norm_train_backward.default
    for a, b in zip(_backward_composite(*arguments, weights), op(*arguments, weights), strict=True):
        assert_near(a, b, 1e-10)


def test_gradcheck():
    tensors = make_tensors((4, 2, 3))
    weights = torch.tensor([[1.0, 0.5, 0.0, 2.0], [1, 1, 1, 1], [0, 3, 1, 0]]).double()
    taking = (weights != 0).reshape(M, 4, 1, 1)

    def run(*own):
        # no gradient passes through absent samples, so they are left out
        output = batch_norm_train(*own, EPS, weights)[0]
        return torch.where(taking, output, 0.0)

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_a_model_without_samples_stays_finite():
    tensors = make_tensors((4, 5, 3))
    weights = torch.ones(M, 4)
    weights[1] = 0
    output, mean, var = batch_norm_train(*tensors, EPS, weights)
    assert not mean[1].any() and not var[1].any()
    assert output.isfinite().all()
    gradients = torch.autograd.grad(output.sum(), tensors)
    assert all(not gradient[1].any() for gradient in gradients)


# opcheck itself looks at the gradient of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_and_compile(layout):
    tensors = make_tensors((4, 5, 6, 3), torch.float32, layout)
    counts = make_counts(4).float()
    op = torch.ops.modelbatch.batch_norm_train
    torch.library.opcheck(op.default, (*tensors, EPS, counts))
    compiled = torch.compile(batch_norm_train, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        compiled(*tensors, EPS, counts), batch_norm_train(*tensors, EPS, counts), strict=True
    ):
        assert torch.equal(a, b)


def test_vmap():
    input, weight, bias = (t.detach() for t in make_tensors((4, 5, 6)))
    inputs, counts = torch.stack([input, 2 * input]), make_counts(4)
    outputs = torch.vmap(batch_norm_train, in_dims=(0, None, None, None, None))(
        inputs, weight, bias, EPS, counts
    )
    for index in range(2):
        expected = batch_norm_train(inputs[index], weight, bias, EPS, counts)
        for actual, want in zip(outputs, expected, strict=True):
            assert torch.equal(actual[index], want)


def test_a_wrong_shape_is_refused():
    tensors = make_tensors((4, 5))
    with pytest.raises(RuntimeError, match=r"sample_weight must have shape \[3, 4\], got \[3, 5\]"):
        batch_norm_train(*tensors, EPS, torch.ones(3, 5))
