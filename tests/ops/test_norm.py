"""Batch normalisation of stacked models against torch's for each model alone."""

import pytest
import torch
import torch.nn.functional as F

from modelbatch.errors import ModelBatchError
from modelbatch.ops.norm import _backward_composite, _forward_composite, batch_norm_train

NUM_MODELS = 3
# Slices of one model: with and without positions, whole and partial vectors and blocks of channels.
SLICES = [
    (6, 5),
    (33, 16),
    (4, 5, 7),
    (2, 16, 32),
    (3, 37, 4, 4),
    (2, 6, 9, 5),
    (2, 3, 3, 4, 5),
    (1, 4, 6),
]


def eps_of_models(num_models=NUM_MODELS):
    return torch.logspace(-5, -2, num_models, dtype=torch.float64)


def channels_last(tensor):
    return tensor.movedim(2, -1).contiguous().movedim(-1, 2)


def make_tensors(slice_sizes, dtype=torch.float64, wide=None, layout="contiguous", affine="both"):
    generator = torch.Generator().manual_seed(0)

    def randn(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    channels = slice_sizes[1]
    shift = randn(NUM_MODELS, 1, channels, *[1] * (len(slice_sizes) - 2))
    input = (randn(NUM_MODELS, *slice_sizes) + shift).to(dtype)
    if layout == "channels_last":
        input = channels_last(input)
    elif layout == "strided":
        input = torch.stack([input, input], -1)[..., 0]
    weight = randn(NUM_MODELS, channels).to(wide or dtype).requires_grad_()
    bias = randn(NUM_MODELS, channels).to(wide or dtype).requires_grad_()
    input.requires_grad_()
    return (
        input,
        weight if affine in ("both", "weight") else None,
        bias if affine in ("both", "bias") else None,
    )


def reference(input, weight, bias, eps):
    return torch.stack(
        [
            F.batch_norm(
                input[model],
                None,
                None,
                None if weight is None else weight[model],
                None if bias is None else bias[model],
                training=True,
                eps=float(eps[model]),
            )
            for model in range(input.shape[0])
        ]
    )


def gradients_of(output, tensors):
    variables = [t for t in tensors if t is not None]
    seed = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return torch.autograd.grad(output, variables, seed)


def assert_near(actual, expected, rtol):
    torch.testing.assert_close(
        actual, expected, rtol=rtol, atol=rtol * float(expected.detach().abs().max())
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize("slice_sizes", SLICES)
def test_equals_separate_batch_norms(slice_sizes, affine, layout):
    tensors, eps = make_tensors(slice_sizes, layout=layout, affine=affine), eps_of_models()
    output, mean, var = batch_norm_train(*tensors, eps)
    expected = reference(*tensors, eps)
    assert_near(output, expected, 1e-10)
    for actual, want in zip(
        gradients_of(output, tensors), gradients_of(expected, tensors), strict=True
    ):
        assert_near(actual, want, 1e-10)
    dims = [1, *range(3, len(slice_sizes) + 1)]
    true_var, true_mean = torch.var_mean(tensors[0].detach(), dims, correction=0)
    assert_near(mean, true_mean, 1e-12)
    assert_near(var, true_var, 1e-12)
    assert not mean.requires_grad
    assert not var.requires_grad


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slice_sizes", [(6, 5), (4, 16, 33), (3, 37, 4, 4)])
def test_no_less_accurate_than_torch(slice_sizes, dtype, layout):
    """Against float64, our error is at most that of torch's own kernel, plus one rounding."""
    tensors = make_tensors(slice_sizes, dtype, layout=layout)
    eps = eps_of_models()
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = reference(*exact, eps)
    torchs = reference(*tensors, eps)
    output, mean, var = batch_norm_train(*tensors, eps)
    assert output.dtype == dtype
    assert mean.dtype == var.dtype == torch.float32
    ours = [output, *gradients_of(output, tensors)]
    theirs = [torchs, *gradients_of(torchs, tensors)]
    exacts = [truth, *gradients_of(truth, exact)]
    for our, their, true in zip(ours, theirs, exacts, strict=True):
        assert our.dtype == their.dtype
        rounding = 2 * torch.finfo(dtype).eps * float(true.detach().abs().max())
        bound = float((their.double() - true).detach().abs().max()) + rounding
        assert float((our.double() - true).detach().abs().max()) <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_with_float32_weights(dtype):
    """As under autocast: the output has the input's dtype, the gradients that of their tensors."""
    tensors = make_tensors((4, 8, 6), dtype, wide=torch.float32)
    eps = eps_of_models()
    output = batch_norm_train(*tensors, eps)[0]
    expected = reference(*tensors, eps)
    assert output.dtype == expected.dtype == dtype
    assert_near(output, expected, 4 * torch.finfo(dtype).eps)
    for actual, want in zip(
        gradients_of(output, tensors), gradients_of(expected, tensors), strict=True
    ):
        assert actual.dtype == want.dtype
        assert_near(actual, want, 4 * torch.finfo(dtype).eps)


def test_large_mean_does_not_cancel():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 64, 4, 8, 8, generator=generator)
    input = noise + 4096.0
    exact = reference(input.double(), None, None, eps_of_models(2))
    output = batch_norm_train(input, None, None, eps_of_models(2))[0]
    # x - mean is exact to one rounding of a number of the size of the noise.
    assert_near(output.double(), exact, 4 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("slice_sizes", [(40, 20), (8, 16, 16, 16), (8, 40, 6, 6)])
def test_a_model_does_not_depend_on_the_others_or_on_threads(slice_sizes, layout):
    eps = eps_of_models()
    input, weight, bias = make_tensors(slice_sizes, torch.float32, layout=layout)

    def run(models):
        own = input.detach()[models]
        own = channels_last(own) if layout == "channels_last" else own.contiguous()
        tensors = (
            own.requires_grad_(),
            *(t.detach()[models].requires_grad_() for t in (weight, bias)),
        )
        outputs = batch_norm_train(*tensors, eps[models])
        return [*(o.detach() for o in outputs), *gradients_of(outputs[0].square(), tensors[:2])]

    def with_threads(count):
        torch.set_num_threads(count)
        return run([0, 1, 2])

    together, single = with_threads(4), with_threads(1)
    for a, b in zip(together, single, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(together[:3], run([2])[:3], strict=True):
        assert torch.equal(a[2], b[0])


def test_nan_stays_in_its_model():
    input, weight, bias = make_tensors((4, 5, 6))
    eps = eps_of_models()
    clean = batch_norm_train(input, weight, bias, eps)[0]
    clean_gradient = gradients_of(clean, (input,))[0]
    poisoned = input.detach().clone()
    poisoned[1, 0, 2, 0] = float("nan")
    output = batch_norm_train(poisoned.requires_grad_(), weight, bias, eps)[0]
    gradient = gradients_of(output, (poisoned,))[0]
    assert output[1, :, 2].isnan().all()
    for model in (0, 2):
        assert torch.equal(output[model], clean[model])
        assert torch.equal(gradient[model], clean_gradient[model])
    assert torch.equal(output[1, :, 0], clean[1, :, 0])


def test_infinite_inputs_become_nan():
    input = torch.zeros(1, 3, 2)
    input[0, 0, 1] = float("inf")
    output, mean, _ = batch_norm_train(input, None, None, eps_of_models(1))
    assert output[0, :, 1].isnan().all()
    assert mean[0, 1] == float("inf")
    assert output[0, :, 0].eq(0).all()


@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
def test_gradcheck(affine):
    tensors = [t for t in make_tensors((4, 2, 3), affine=affine) if t is not None]
    eps = eps_of_models()

    def run(input, *rest):
        weight = rest[0] if affine in ("both", "weight") else None
        bias = rest[-1] if affine in ("both", "bias") else None
        return batch_norm_train(input, weight, bias, eps)[0]

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_subsets_of_gradients(needs):
    tensors = make_tensors((4, 5, 6))
    eps = eps_of_models()
    everything = gradients_of(batch_norm_train(*tensors, eps)[0].square(), tensors)
    some = [t.detach().requires_grad_(bool(need)) for t, need in zip(tensors, needs, strict=True)]
    output = batch_norm_train(*some, eps)[0].square()
    variables = [t for t in some if t.requires_grad]
    wanted = [g for g, need in zip(everything, needs, strict=True) if need]
    for actual, want in zip(gradients_of(output, variables), wanted, strict=True):
        assert torch.equal(actual, want)


# opcheck itself looks at the gradient of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("affine", ["both", "none"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, layout, affine):
    tensors = make_tensors((4, 5, 6, 3), dtype, torch.float32, layout, affine)
    eps = eps_of_models()
    ops = torch.ops.modelbatch
    torch.library.opcheck(ops.batch_norm_train.default, (*tensors, eps))
    _, mean, var = batch_norm_train(*tensors, eps)
    input, weight, _ = tensors
    grad = torch.randn_like(input)
    weight = None if weight is None else weight.detach()
    for needs in [(True, True, True), (False, True, True), (True, False, False)]:
        arguments = (grad, input.detach(), weight, mean, var, eps, *needs)
        torch.library.opcheck(ops.batch_norm_train_backward.default, arguments)


def test_compile():
    tensors = make_tensors((4, 5, 6), torch.float32)
    eps = eps_of_models()
    compiled = torch.compile(batch_norm_train, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*tensors, eps), batch_norm_train(*tensors, eps)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(
        gradients_of(actual[0], tensors), gradients_of(expected[0], tensors), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("in_dims", [(0, None, None), (1, 0, None), (None, 1, 1)])
def test_vmap(in_dims):
    tensors = [t.detach() for t in make_tensors((4, 5, 6))]
    eps = eps_of_models()
    batched = [
        t if d is None else torch.stack([t, 2 * t], d)
        for t, d in zip(tensors, in_dims, strict=True)
    ]
    outputs = torch.vmap(batch_norm_train, in_dims=(*in_dims, None))(*batched, eps)
    for index in range(2):
        own = [
            t if d is None else t.select(d, index) for t, d in zip(batched, in_dims, strict=True)
        ]
        for actual, want in zip(outputs, batch_norm_train(*own, eps), strict=True):
            assert torch.equal(actual[index], want)


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
def test_vmap_of_the_gradient(needs):
    input, weight, bias = (t.detach() for t in make_tensors((4, 5, 6)))
    eps = eps_of_models()
    seeds = torch.randn(2, *input.shape, dtype=input.dtype)
    _, mean, var = batch_norm_train(input, weight, bias, eps)
    op = torch.ops.modelbatch.batch_norm_train_backward.default

    def run(seed):
        return op(seed, input, weight, mean, var, eps, *needs)

    batched = torch.vmap(run)(seeds)
    for index in range(2):
        for actual, want, need in zip(batched, run(seeds[index]), needs, strict=True):
            assert not need or torch.equal(actual[index], want)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("affine", ["both", "none"])
def test_the_formula_of_other_devices(affine, layout):
    tensors = [
        None if t is None else t.detach()
        for t in make_tensors((4, 5, 6, 3), layout=layout, affine=affine)
    ]
    eps = eps_of_models()
    expected = batch_norm_train(*tensors, eps)
    actual = _forward_composite(*tensors, eps)
    for a, b in zip(actual, expected, strict=True):
        assert a.stride() == b.stride()
        assert_near(a, b, 1e-12)
    input, weight, _ = tensors
    for needs in [(True, True, True), (False, True, False)]:
        arguments = (torch.randn_like(input), input, weight, *expected[1:], eps, *needs)
        for a, b in zip(
            _backward_composite(*arguments),
            torch.ops.modelbatch.batch_norm_train_backward.default(*arguments),
            strict=True,
        ):
            assert a.shape == b.shape
            assert a.numel() == 0 or (a - b).abs().max() <= 1e-11 * b.abs().max()


@pytest.mark.parametrize("slice_sizes", [(1, 4), (1, 4, 1), (1, 4, 1, 1)])
def test_one_value_per_channel_is_refused_as_torch_refuses_it(slice_sizes):
    input = torch.randn(2, *slice_sizes)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as theirs:
        F.batch_norm(input[0], None, None, training=True)
    with pytest.raises(ModelBatchError) as ours:
        batch_norm_train(input, None, None, eps_of_models(2))
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (((3, 4), (3, 4), (3, 4), (3,)), r"input must have shape .* got \[3, 4\]"),
        (((3, 4, 5), (3, 4), (3, 5), (3,)), r"weight must have shape \[3, 5\], got \[3, 4\]"),
        (((3, 4, 5), (3, 5), (5,), (3,)), r"bias must have shape \[3, 5\], got \[5\]"),
        (((3, 4, 5), (3, 5), (3, 5), (2,)), r"eps must have shape \[3\], got \[2\]"),
    ],
)
def test_errors_name_the_shapes(sizes, message):
    with pytest.raises(RuntimeError, match=message):
        batch_norm_train(*(torch.randn(s) for s in sizes))
