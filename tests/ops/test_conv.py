"""Convolutions of stacked models against torch's convolution of each model alone."""

import pytest
import torch
import torch.nn.functional as F

from modelbatch.errors import ModelBatchError
from modelbatch.ops.conv import (
    _convolution_backward_composite,
    _convolution_composite,
    _uses_grouped,
    convolution,
)

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
NUM_MODELS, BATCH = 3, 4


def reference(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    spatial_dims = weight.dim() - 3
    outputs = []
    for model in range(weight.shape[0]):
        x = input if input.dim() < weight.dim() else input[model]
        b = None if bias is None else bias[model]
        if transposed:
            outputs.append(
                CONV_TRANSPOSE[spatial_dims](
                    x, weight[model], b, stride, padding, output_padding, groups, dilation
                )
            )
        else:
            outputs.append(
                CONV[spatial_dims](x, weight[model], b, stride, padding, dilation, groups)
            )
    return torch.stack(outputs)


def make_tensors(
    spatial_dims,
    *,
    shared=False,
    transposed=False,
    groups=1,
    bias=True,
    dtype=torch.float64,
    num_models=NUM_MODELS,
    batch=BATCH,
    kernel=3,
    channels=4,
    out_channels=6,
):
    generator = torch.Generator().manual_seed(spatial_dims)

    def randn(*sizes):
        tensor = torch.randn(*sizes, generator=generator, dtype=torch.float64)
        return tensor.to(dtype).requires_grad_()

    lengths = (9, 8, 7)[:spatial_dims]
    input_sizes = (batch, channels, *lengths)
    sides = (channels, out_channels // groups) if transposed else (out_channels, channels // groups)
    return (
        randn(*input_sizes) if shared else randn(num_models, *input_sizes),
        randn(num_models, *sides, *(kernel,) * spatial_dims),
        randn(num_models, out_channels) if bias else None,
    )


def assert_equal_with_gradients(tensors, options, rtol=1e-10):
    output = convolution(*tensors, *options)
    expected = reference(*tensors, *options)
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(output, expected, rtol=rtol, atol=rtol * scale)
    variables = [t for t in tensors if t is not None]
    seed = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    actual = torch.autograd.grad(output, variables, seed)
    wanted = torch.autograd.grad(expected, variables, seed)
    for gradient, want in zip(actual, wanted, strict=True):
        assert gradient.dtype == want.dtype
        scale = float(want.abs().max())
        torch.testing.assert_close(gradient, want, rtol=rtol, atol=rtol * scale)


# stride, padding, dilation, transposed, output_padding, groups
OPTIONS = [
    pytest.param((1, 0, 1, False, 0, 1), id="plain"),
    pytest.param((2, 1, 1, False, 0, 1), id="stride"),
    pytest.param((1, 2, 2, False, 0, 1), id="dilation"),
    pytest.param((1, 1, 1, False, 0, 2), id="groups"),
    pytest.param((1, "valid", 1, False, 0, 1), id="valid"),
    pytest.param((1, "same", 2, False, 0, 1), id="same"),
    pytest.param((1, 0, 1, True, 0, 1), id="transposed"),
    pytest.param((2, 1, 1, True, 1, 1), id="transposed-output-padding"),
    pytest.param((1, 1, 2, True, 0, 2), id="transposed-dilation-groups"),
    pytest.param((2, 2, 3, True, 2, 2), id="transposed-all"),
]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_equals_separate_convolutions(spatial_dims, options, bias, shared):
    tensors = make_tensors(
        spatial_dims, shared=shared, transposed=options[3], groups=options[5], bias=bias
    )
    assert_equal_with_gradients(tensors, options)


# torch's own convolution says once in a process that it copies the input to pad it.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_same_padding_of_even_kernels(spatial_dims, kernel):
    tensors = make_tensors(spatial_dims, kernel=kernel)
    assert_equal_with_gradients(tensors, (1, "same", 1, False, 0, 1))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("num_models", "batch"), [(1, 1), (1, 5), (4, 1), (7, 2)])
def test_sizes(num_models, batch, shared):
    tensors = make_tensors(2, num_models=num_models, batch=batch, shared=shared)
    assert_equal_with_gradients(tensors, ((2, 1), (0, 1), (1, 2), False, 0, 1))


def test_depthwise():
    tensors = make_tensors(2, groups=4, out_channels=8)
    assert_equal_with_gradients(tensors, (1, 1, 1, False, 0, 4))


@pytest.mark.parametrize("shared", [False, True])
def test_empty_batch(shared):
    input, weight, bias = make_tensors(2, batch=0, shared=shared)
    output = convolution(input, weight, bias, padding=1)
    assert output.shape == (NUM_MODELS, 0, 6, 9, 8)
    gradients = torch.autograd.grad(output.sum(), (input, weight, bias))
    for gradient, tensor in zip(gradients, (input, weight, bias), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_channels_last_inputs_give_channels_last_outputs(spatial_dims, shared):
    memory_format = {2: torch.channels_last, 3: torch.channels_last_3d}[spatial_dims]
    input, weight, bias = make_tensors(spatial_dims, shared=shared, dtype=torch.float32)
    slices = [input] if shared else input
    slices = [s.detach().contiguous(memory_format=memory_format) for s in slices]
    last = slices[0] if shared else channels_last_stack(slices)
    options = (1, 1, 1, False, 0, 1)
    output = convolution(last, weight, bias, *options)
    assert all(o.is_contiguous(memory_format=memory_format) for o in output)
    assert not output[0].is_contiguous()
    assert convolution(input, weight, bias, *options).is_contiguous()
    assert_equal_with_gradients((last.requires_grad_(), weight, bias), options, rtol=1e-5)


def channels_last_stack(slices):
    last = torch.stack([s.movedim(1, -1) for s in slices])
    return last.movedim(-1, 2)


def test_strided_tensors():
    input, weight, bias = make_tensors(2)
    strided = torch.stack([input, input], -1).detach()[..., 0].requires_grad_()
    turned = weight.detach().permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    expanded = bias.detach()[:1].expand_as(bias)
    tensors = (strided, turned.requires_grad_(), expanded.requires_grad_())
    assert_equal_with_gradients(tensors, (1, 1, 1, False, 0, 1))
    output = convolution(*tensors)  # The gradient of a sum has strides of zero.
    expected = reference(*tensors, 1, 0, 1, False, 0, 1)
    torch.testing.assert_close(
        torch.autograd.grad(output.sum(), tensors), torch.autograd.grad(expected.sum(), tensors)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_other_dtypes(dtype, transposed):
    tensors = make_tensors(2, dtype=dtype, transposed=transposed)
    # Both round the same sums to the dtype; they may differ by the order of the additions.
    rtol = 8 * torch.finfo(dtype).eps
    assert_equal_with_gradients(tensors, (1, 1, 1, transposed, 0, 1), rtol=rtol)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
def test_subsets_of_gradients(needs):
    tensors = make_tensors(2)
    everything = torch.autograd.grad(convolution(*tensors).square().sum(), tensors)
    some = [t.detach().requires_grad_(bool(need)) for t, need in zip(tensors, needs, strict=True)]
    convolution(*some).square().sum().backward()
    for tensor, gradient, need in zip(some, everything, needs, strict=True):
        assert (tensor.grad is not None) == bool(need)
        if need:
            torch.testing.assert_close(tensor.grad, gradient, rtol=1e-12, atol=1e-12)


def test_stacked_gradients_are_contiguous():
    last = channels_last_stack(make_tensors(2)[0].detach())
    _, weight, bias = make_tensors(2)
    gradients = torch.autograd.grad(convolution(last, weight, bias).square().sum(), (weight, bias))
    assert all(gradient.is_contiguous() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_does_not_depend_on_the_others_or_on_threads(dtype):
    input, weight, bias = make_tensors(2, num_models=5, batch=8, channels=8, dtype=dtype)
    options = {"padding": 1}

    def run(models):
        tensors = [t.detach()[models].clone().requires_grad_() for t in (input, weight, bias)]
        output = convolution(*tensors, **options)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), tensors)]

    together = run([0, 1, 2, 3, 4])
    turned = run([4, 3, 2, 1, 0])
    alone = run([2])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = run([0, 1, 2, 3, 4])
    finally:
        torch.set_num_threads(threads)
    for a, b, c, d in zip(together, turned, alone, single, strict=True):
        assert torch.equal(a, b.flip(0))
        assert torch.equal(a[2], c[0])
        assert torch.equal(a, d)


def test_nan_stays_in_its_model():
    input, weight, bias = make_tensors(2)
    clean = convolution(input, weight, bias).detach()
    poisoned = weight.detach().clone()
    poisoned[1] = float("nan")
    output = convolution(input, poisoned.requires_grad_(), bias)
    gradient = torch.autograd.grad(output.sum(), poisoned)[0]
    assert output[1].isnan().all()
    for model in (0, 2):
        assert torch.equal(output[model], clean[model])
        assert gradient[model].isfinite().all()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(shared, transposed):
    torch.set_num_threads(1)  # Thousands of tiny calls, which threads only slow down.
    tensors = make_tensors(
        1, shared=shared, transposed=transposed, num_models=2, batch=2, channels=2, out_channels=2
    )

    def run(*args):
        return convolution(*args, stride=2, padding=1, transposed=transposed)

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


# opcheck itself looks at the gradient of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(shared, layout):
    input, weight, bias = make_tensors(2, shared=shared, dtype=torch.float32)
    if layout == "channels_last":
        input = input.detach().movedim(-3, -1).contiguous().movedim(-1, -3).requires_grad_()
    options = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    ops = torch.ops.modelbatch
    torch.library.opcheck(ops.convolution.default, (input, weight, bias, *options))
    torch.library.opcheck(ops.convolution.default, (input, weight, None, *options))
    grad = torch.randn(NUM_MODELS, BATCH, 6, 9, 8)
    for needs in [(True, True, True), (False, True, False), (True, False, True)]:
        arguments = (grad, input.detach(), weight.detach(), *options, *needs)
        torch.library.opcheck(ops.convolution_backward.default, arguments)


@pytest.mark.parametrize("in_dims", [(0, None, None), (None, 1, None), (1, 0, 0), (None, None, 1)])
def test_vmap_is_a_loop(in_dims):
    tensors = make_tensors(2)
    outer = 2
    batched = [
        t.detach() if d is None else torch.stack([t.detach(), 2 * t.detach()], d)
        for t, d in zip(tensors, in_dims, strict=True)
    ]
    output = torch.vmap(convolution, in_dims=in_dims)(*batched)
    for index in range(outer):
        own = [
            t if d is None else t.select(d, index) for t, d in zip(batched, in_dims, strict=True)
        ]
        assert torch.equal(output[index], convolution(*own))


def test_vmap_of_the_gradient():
    input, weight, bias = (t.detach() for t in make_tensors(2))
    stacked = torch.stack([input, input.flip(0)])

    def loss(w, x):
        return convolution(x, w, bias).square().sum()

    gradients = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, stacked)
    for index in range(2):
        own = weight.clone().requires_grad_()
        expected = torch.autograd.grad(loss(own, stacked[index]), own)[0]
        torch.testing.assert_close(gradients[index], expected, rtol=1e-12, atol=1e-10)


def test_compile():
    tensors = make_tensors(2, dtype=torch.float32)
    compiled = torch.compile(convolution, fullgraph=True, backend="aot_eager")
    output, expected = compiled(*tensors, padding=1), convolution(*tensors, padding=1)
    assert torch.equal(output, expected)
    gradients = torch.autograd.grad(output.square().sum(), tensors)
    for gradient, want in zip(
        gradients, torch.autograd.grad(expected.square().sum(), tensors), strict=True
    ):
        assert torch.equal(gradient, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_autocast_dtypes_are_those_of_a_single_model(dtype, input_dtype):
    input, weight, bias = make_tensors(2, dtype=torch.float32)
    input = input.detach().to(input_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        output = convolution(input, weight, bias)
        expected = reference(input, weight, bias, 1, 0, 1, False, 0, 1)
    assert output.dtype == expected.dtype == dtype
    tensors = (input, weight, bias)
    actual = torch.autograd.grad(output.float().sum(), tensors)
    wanted = torch.autograd.grad(expected.float().sum(), tensors)
    assert [g.dtype for g in actual] == [g.dtype for g in wanted]


def test_autocast_leaves_float64_alone():
    tensors = make_tensors(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert convolution(*tensors).dtype == torch.float64


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_formula_of_other_devices(monkeypatch, grouped, shared, transposed):
    monkeypatch.setattr("modelbatch.ops.conv._BUSY_MULTIPLY_ADDS", 2**60 if grouped else 0)
    tensors = [t.detach() for t in make_tensors(2, shared=shared, transposed=transposed, groups=2)]
    options = ([2, 1], [1, 0], [1, 1], transposed, [1 if transposed else 0, 0], 2)
    ops = torch.ops.modelbatch
    expected = ops.convolution.default(*tensors, *options)
    assert _uses_grouped(tensors[0], tensors[1], expected.shape, transposed) == grouped
    actual = _convolution_composite(*tensors, *options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for needs in [(True, True, True), (False, True, False), (True, False, True)]:
        arguments = (expected, *tensors[:2], *options, *needs)
        torch.testing.assert_close(
            _convolution_backward_composite(*arguments),
            ops.convolution_backward.default(*arguments),
            rtol=1e-12,
            atol=1e-10,
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input": (2, 5, 4, 9)}, r"input must have shape .* got \[2, 5, 4, 9\]"),
        ({"weight": (2, 6)}, r"weight must have shape .* got \[2, 6\]"),
        ({"stride": (1, 2, 3)}, r"stride must be one number or 2, got \(1, 2, 3\)"),
        ({"padding": "full"}, "padding must be numbers, 'valid' or 'same', got 'full'"),
        ({"padding": "same", "stride": 2}, "not supported for strided convolutions"),
        ({"padding": "same", "transposed": True}, "takes no padding by name"),
    ],
)
def test_errors_of_the_arguments(arguments, message):
    sizes = {"input": (2, 5, 4, 9, 8), "weight": (2, 6, 4, 3, 3)}
    tensors = {k: torch.randn(arguments.get(k, sizes[k])) for k in sizes}
    options = {k: v for k, v in arguments.items() if k not in sizes}
    if len(tensors["input"].shape) == 4:
        tensors["weight"] = torch.randn(2, 6, 4, 3, 3, 3)
        message = r"input must have shape"
    with pytest.raises(ModelBatchError, match=message):
        convolution(**tensors, **options)


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        (((3, 5, 4, 9), (2, 6, 4, 3), None), {}, r"2 models .* got \[3, 5, 4, 9\]"),
        (((2, 5, 3, 9), (2, 6, 4, 3), None), {}, r"4 channels.* got input \[2, 5, 3, 9\]"),
        (((2, 5, 4, 9), (2, 6, 4, 3), (2, 5)), {}, r"bias must have shape \[2, 6\].*\[2, 5\]"),
        (((2, 5, 4, 9), (2, 6, 4, 3), None), {"stride": 0}, "stride must be at least 1"),
        (((2, 5, 4, 9), (2, 6, 4, 3), None), {"padding": -1}, "padding must be at least 0"),
        (((2, 5, 4, 2), (2, 6, 4, 3), None), {}, "output would be empty"),
        (((2, 5, 4, 9), (2, 5, 2, 3), None), {"groups": 2}, "groups must divide 5"),
        (
            ((2, 5, 4, 9), (2, 4, 6, 3), None),
            {"transposed": True, "output_padding": 1},
            "output_padding must be smaller",
        ),
    ],
)
def test_errors_of_the_operator(sizes, options, message):
    tensors = [None if s is None else torch.randn(s) for s in sizes]
    with pytest.raises(RuntimeError, match=message):
        convolution(*tensors, **options)


def test_mixed_dtypes_are_refused():
    input, weight, _ = make_tensors(2)
    with pytest.raises(RuntimeError, match="same dtype"):
        convolution(input.float(), weight)
