"""The operators lstm, gru and rnn: fakes, derivatives, vmap and autocast.

The truth is `modelbatch.ops.reference_rnn` and torch's own differentiation of it.
"""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modelbatch.ops import rnn as ops
from modelbatch.ops.rnn_rules import _FAMILIES

FAMILIES = {family.name: family for family in _FAMILIES}
KINDS = ["lstm", "lstm_projected", "gru", "rnn_tanh", "rnn_relu"]
GATES = {"lstm": 4, "gru": 3, "rnn": 1}


def make(kind, models=3, sizes=(3, 3, 2, 1), inputs=2, hidden=3, shared=(), bias=True):
    """The family, its inputs and its options; `shared` are positions with dim 0 of size 1."""
    family = FAMILIES[kind.split("_")[0]]
    outputs = 2 if kind == "lstm_projected" else hidden
    gates = GATES[family.name] * hidden
    shapes = [(sum(sizes), inputs), (sizes[0], outputs)]
    shapes += [(sizes[0], hidden)] if family.name == "lstm" else []
    shapes += [(gates, inputs), (gates, outputs), *[(gates,) if bias else None] * 2]
    if family.name == "lstm":
        shapes.append((outputs, hidden) if kind == "lstm_projected" else None)
    torch.manual_seed(0)
    tensors = [
        None
        if shape is None
        else torch.randn(1 if k in shared else models, *shape, dtype=torch.float64)
        for k, shape in enumerate(shapes)
    ]
    return family, tensors, [list(sizes)] + [kind == "rnn_relu"] * (family.name == "rnn")


def options_of(options, reverse):
    return [options[0], reverse, *options[1:]]


def requires_grad(tensors):
    return [t if t is None else t.clone().requires_grad_() for t in tensors]


def present(tensors):
    return [t for t in tensors if t is not None]


def with_present(tensors, values):
    values = iter(values)
    return [None if t is None else next(values) for t in tensors]


def assert_close(actual, expected):
    """Relative 1e-11 of the largest expected value, for structures of tensors."""
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        scale = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11 * max(scale, 1.0))


@pytest.mark.parametrize("shared", [(), (0,), (3, 4, 5, 6), (0, 1, 2), tuple(range(1, 8))])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients_equal_the_reference(kind, reverse, shared):
    for bias in (True, False):
        family, tensors, options = make(kind, shared=shared, bias=bias)
        tensors, options = requires_grad(tensors), options_of(options, reverse)
        results = family.op()(*tensors, *options)
        expected = family.reference(*tensors, *options)
        count = family.results
        assert_close(results[:count], expected[:count])
        cotangents = [torch.randn_like(t) for t in expected[:count]]
        for chosen in itertools.product([False, True], repeat=count):
            if not any(chosen):
                continue
            some = [
                torch.autograd.grad(
                    [r for r, c in zip(outputs, chosen, strict=False) if c],
                    present(tensors),
                    [t for t, c in zip(cotangents, chosen, strict=True) if c],
                    retain_graph=True,
                    materialize_grads=True,
                )
                for outputs in (results, expected)
            ]
            assert_close(*some)


@pytest.mark.parametrize("kind", KINDS)
def test_only_needed_gradients_are_computed(kind):
    family, tensors, options = make(kind)
    options = options_of(options, False)
    for wanted in range(len(tensors)):
        if tensors[wanted] is None:
            continue
        inputs = list(tensors)
        inputs[wanted] = tensors[wanted].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(family.op()(*inputs, *options)[0].sum(), inputs[wanted])
        everything = requires_grad(tensors)
        (expected,) = torch.autograd.grad(
            family.reference(*everything, *options)[0].sum(), everything[wanted]
        )
        assert_close([gradient], [expected])


@pytest.mark.parametrize(
    "needs", [(False, False, False), (True, False, False), (False, True, True)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_nobody_needs_are_empty(kind, needs):
    family, tensors, options = make(kind, shared=(0, 4))
    options = options_of(options, True)
    outputs = family.op()(*tensors, *options)
    grads = [torch.randn_like(t) for t in outputs[: family.results]]
    saved = [outputs[0], *outputs[family.results :]]
    inputs = family.without_biases(tensors)
    found = family.op("_backward")(*grads, *inputs, *saved, *options, *needs)
    each = [needs[0], *[needs[1]] * family.states, *[needs[2]] * (len(found) - 1 - family.states)]
    for t, need in zip(found, each, strict=True):
        projected = kind != "lstm" or t is not found[-1]
        assert (t.shape == (0,)) != (need and projected)
        assert not need or not projected or t.shape[0] == 3


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_first_and_second_derivatives(kind, reverse):
    family, tensors, options = make(
        kind,
        models=2,
        sizes=(2, 1),
        inputs=1,
        hidden=3 if "projected" in kind else 2,
        shared=(1, 4),
    )
    tensors, options = requires_grad(tensors), options_of(options, reverse)

    def function(*values):
        outputs = family.op()(*with_present(tensors, values), *options)
        return outputs[: family.results]

    values = present(tensors)
    fast = {"fast_mode": True}
    assert torch.autograd.gradcheck(
        function, values, check_forward_ad=True, check_batched_grad=True, **fast
    )
    assert torch.autograd.gradgradcheck(function, values, **fast)


@pytest.mark.parametrize("kind", KINDS)
def test_hessian_equals_the_reference(kind):
    family, tensors, options = make(kind, models=2, sizes=(2, 1), shared=(0,))
    options = options_of(options, False)
    position = family.bias - 1  # w_hh

    def loss(function):
        def of_weight(weight):
            inputs = list(tensors)
            inputs[position] = weight
            return function(*inputs, *options)[0].pow(2).sum()

        return of_weight

    weight = tensors[position]
    ours = torch.func.hessian(loss(family.op()))(weight)
    assert_close([ours], [torch.func.hessian(loss(family.reference))(weight)])
    third = torch.func.grad(lambda w: torch.func.hessian(loss(family.op()))(w).pow(2).sum())
    expected = torch.func.grad(lambda w: torch.func.hessian(loss(family.reference))(w).pow(2).sum())
    assert_close([third(weight)], [expected(weight)])


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_of_the_gradients_by_what_comes_in(kind):
    """Only the cotangent has a tangent: what the forward saved is the kernel's own."""
    family, tensors, options = make(kind)
    options = options_of(options, True)

    def gradients(function, cotangent):
        x = tensors[0]
        _, vjp = torch.func.vjp(lambda x: function(x, *tensors[1:], *options)[0], x)
        return vjp(cotangent)[0]

    y = family.op()(*tensors, *options)[0]
    cotangent, tangent = torch.randn_like(y), torch.randn_like(y)
    found, expected = (
        torch.func.jvp(lambda c, f=f: gradients(f, c), (cotangent,), (tangent,))
        for f in (family.op(), family.reference)
    )
    assert_close(found, expected)


# opcheck itself looks at the gradient of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind, dtype):
    family, tensors, options = make(kind, models=2, sizes=(2, 1), shared=(1, 3))
    tensors = requires_grad([t if t is None else t.to(dtype) for t in tensors])
    options = options_of(options, False)
    torch.library.opcheck(family.op(), (*tensors, *options))
    detached = [t if t is None else t.detach() for t in tensors]
    outputs = family.op()(*detached, *options)
    grads = [torch.randn_like(t) for t in outputs[: family.results]]
    saved = [outputs[0], *outputs[family.results :]]
    for needs in [(True, True, True), (False, True, False)]:
        without = family.without_biases(detached)
        torch.library.opcheck(family.op("_backward"), (*grads, *without, *saved, *options, *needs))
    torch.library.opcheck(family.op("_vjp"), (*grads, *tensors, *saved, *options, True, True, True))


@pytest.mark.parametrize("kind", KINDS)
def test_fakes_have_the_shapes_and_dtypes_of_the_kernels(kind):
    family, tensors, options = make(kind, shared=(1, 4), bias=False)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        real = [t if t is None else t.to(dtype) for t in tensors]
        arguments = (*real, *options_of(options, True))
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            made = family.op()(*fakes)
        for fake, t in zip(made, family.op()(*arguments), strict=True):
            assert (fake.shape, fake.dtype, fake.stride()) == (t.shape, t.dtype, t.stride())


# ---- vmap ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_equals_a_loop(kind):
    family, tensors, options = make(kind, shared=(1, 4))
    options = options_of(options, True)
    given = present(tensors)
    for batched in [(0,), (1, 3), (4,), tuple(range(len(given)))]:
        values = [torch.stack([t, t * 0.5]) if k in batched else t for k, t in enumerate(given)]
        values = [t.movedim(0, -1) if k == 3 and k in batched else t for k, t in enumerate(values)]
        dims = tuple((-1 if k == 3 else 0) if k in batched else None for k in range(len(given)))

        def function(*values):
            return family.op()(*with_present(tensors, values), *options)[: family.results]

        found = torch.vmap(function, dims)(*values)
        loop = [
            function(
                *(t if d is None else t.select(d, i) for t, d in zip(values, dims, strict=True))
            )
            for i in range(2)
        ]
        assert_close(found, [torch.stack(column) for column in zip(*loop, strict=True)])


@pytest.mark.parametrize("kind", KINDS)
def test_nested_vmap_and_gradients_inside_and_outside(kind):
    family, tensors, options = make(kind, models=1)
    options = options_of(options, False)
    x, w_hh = tensors[0], tensors[family.bias - 1]
    xs = torch.stack([x, x * 0.5, x - 1])
    ws = torch.stack([w_hh, w_hh * 0.3])

    def loss(function, w, x):
        inputs = list(tensors)
        inputs[0], inputs[family.bias - 1] = x, w
        return function(*inputs, *options)[0].pow(2).sum()

    def both(function):
        def one(w, x):
            return torch.func.grad(lambda w, x: loss(function, w, x), (0, 1))(w, x)

        inside = torch.vmap(torch.vmap(one, (None, 0)), (0, None))(ws, xs)

        def total(ws, xs):
            inner = torch.vmap(lambda w, x: loss(function, w, x), (None, 0))
            return torch.vmap(inner, (0, None))(ws, xs).sum()

        return (*inside, *torch.func.grad(total, (0, 1))(ws, xs))

    assert_close(both(family.op()), both(family.reference))


def test_shared_tensors_are_not_copied_under_vmap():
    """The operator below vmap gets a weight that all share with dim 0 of size 1."""
    family, tensors, options = make("lstm", models=1)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is family.op():
                seen.append([a.shape[0] for a in args if isinstance(a, torch.Tensor)])
            return func(*args, **(kwargs or {}))

    xs = torch.stack([tensors[0]] * 5)
    with Watch():
        torch.vmap(lambda x: family.op()(x, *tensors[1:], options[0], False)[0])(xs)
    assert seen == [[5, *[1] * 6]]


# ---- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_lowers_all_but_float64(kind):
    family, tensors, options = make(kind)
    options = options_of(options, False)
    single = requires_grad([t if t is None else t.float() for t in tensors])
    with torch.autocast("cpu", torch.bfloat16):
        results = family.op()(*single, *options)
        assert family.op()(*tensors, *options)[0].dtype == torch.float64
    assert {t.dtype for t in results[: family.results]} == {torch.bfloat16}
    results[0].float().sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in present(single))
    lowered = [t if t is None else t.detach().bfloat16() for t in single]
    assert torch.equal(results[0], family.op()(*lowered, *options)[0])


def test_public_functions():
    _, tensors, options = make("lstm_projected")
    y, h_n, c_n = ops.lstm(*tensors, batch_sizes=tuple(options[0]), reverse=True)
    assert (y.shape, h_n.shape, c_n.shape) == ((3, 9, 2), (3, 3, 2), (3, 3, 3))
    _, tensors, options = make("gru")
    y, h_n = ops.gru(*tensors, batch_sizes=options[0])
    assert (y.shape, h_n.shape) == ((3, 9, 3), (3, 3, 3))
    _, tensors, options = make("rnn_relu")
    y, h_n = ops.rnn(*tensors, batch_sizes=options[0], relu=True)
    assert y.min() == 0 and (y.shape, h_n.shape) == ((3, 9, 3), (3, 3, 3))
    with pytest.raises(RuntimeError, match="larger than 0"):
        ops.gru(*[t[:, :0] if k == 0 else t for k, t in enumerate(make("gru")[1])], batch_sizes=[])


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_of_other_devices(kind):
    """The kernels for devices without their own equal those of the CPU, in all dtypes."""
    family, tensors, options = make(kind, shared=(0, 4))
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        inputs = [t if t is None else t.to(dtype) for t in tensors]
        arguments = (*inputs, *options_of(options, True))
        outputs = family.op()._op_dk(key, *arguments)
        grads = [torch.ones_like(t) for t in outputs[: family.results]]
        saved = [outputs[0], *outputs[family.results :]]
        found = family.op("_backward")._op_dk(
            key,
            *grads,
            *family.without_biases(inputs),
            *saved,
            *arguments[len(inputs) :],
            True,
            False,
            True,
        )
        kernel = family.op()(*arguments)
        own = family.op("_backward")(
            *grads,
            *family.without_biases(inputs),
            kernel[0],
            *kernel[family.results :],
            *arguments[len(inputs) :],
            True,
            False,
            True,
        )
        pairs = [*zip(outputs, kernel, strict=True), *zip(found, own, strict=True)]
        for a, b in pairs[: family.results] + pairs[len(outputs) :]:
            assert a.shape == b.shape and a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 10)
