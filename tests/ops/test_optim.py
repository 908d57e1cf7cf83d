"""The optimizer operators: the numbers, against torch.optim for each model alone."""

import copy
import math

import pytest
import torch
from hypothesis import given, strategies as st
from optim_case import (
    RULES,
    SHAPES,
    M,
    assert_same_bits,
    make_states,
    make_tensors,
    run,
    run_torch,
)

from modelbatch.ops import optim

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


# ---- against torch.optim ------------------------------------------------------------------------


@every_rule
def test_float64_equals_torch(rule):
    params, grads = make_tensors()
    expected, expected_states = run_torch(rule, params, grads)
    result, states, step = run(rule, params, grads)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(states, expected_states, rtol=1e-12, atol=1e-13)
    counted = [10.0 if rule.name != "sgd" or "momentum" in o else 0.0 for o in rule.models]
    assert step.tolist() == counted


@every_rule
def test_float32_rounds_no_worse_than_torch(rule):
    params, grads = make_tensors(dtype=torch.float32)
    wide = [p.double() for p in params], [[g.double() for g in now] for now in grads]
    truth, _ = run_torch(rule, *wide)
    theirs, _ = run_torch(rule, params, grads)
    ours, _, _ = run(rule, params, grads)
    for model in range(M):
        exact = flat([p[model] for p in truth])
        error = (flat([p[model] for p in ours]).double() - exact).abs().max()
        bound = (flat([p[model] for p in theirs]).double() - exact).abs().max()
        # Twice torch's, or one rounding of the largest element where torch happens to be exact.
        assert error <= 2 * bound + torch.finfo(torch.float32).eps * exact.abs().max() / 2


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_have_float32_arithmetic(rule, dtype):
    params, grads = make_tensors(dtype=dtype)
    wide = [p.float() for p in params], [[g.float() for g in now] for now in grads]
    expected, expected_states = run_torch(rule, *wide, halve=dtype)
    result, states, _ = run(rule, params, grads)
    assert all(s.dtype == torch.float32 for some in states for s in some)
    eps = torch.finfo(dtype).eps
    # A float32 rounding may turn one rounding to the half type the other way, and later steps may
    # carry that on: rarely, and by a few units of the last place.
    ours, theirs = flat(result).float(), flat(expected)
    assert (ours == theirs).float().mean() > 0.98
    torch.testing.assert_close(ours, theirs, rtol=2 * eps, atol=eps**2)
    torch.testing.assert_close(states, expected_states, rtol=eps, atol=eps / 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_number_is_read_and_written(dtype):
    """All 65536 bit patterns through a step that subtracts nothing, as a parameter, and as a
    gradient that is taken whole."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).unsqueeze(0)
    rule = RULES["sgd"]
    models = ({"lr": -1.0},)
    zeros = torch.zeros_like(numbers)
    for params, grads in ((numbers, zeros), (zeros, numbers)):
        (result,), _, _ = run(rule, [params], [[grads]], models=models)
        torch.testing.assert_close(result, numbers, rtol=0, atol=0, equal_nan=True)


def test_adamw_decouples_whatever_the_row_says():
    params, grads = make_tensors()
    models = tuple({"weight_decay": 0.1} | o for o in RULES["adamw"].models)
    decoupled = tuple(o | {"decoupled_weight_decay": True} for o in models)
    expected, _, _ = run(RULES["adam"], params, grads, models=decoupled)
    result, _, _ = run(RULES["adamw"], params, grads, models=models)
    assert_same_bits(result, expected)


def test_the_step_sizes_of_rprop_begin_with_the_learning_rate():
    rule = RULES["rprop"]
    params, grads = make_tensors(steps=3)
    expected, expected_states = run_torch(rule, params, grads)
    states = make_states(rule, params)
    for sizes in states[1]:
        sizes.fill_(torch.nan)
    result, states, _ = run(rule, params, grads, states)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(states, expected_states, rtol=1e-12, atol=1e-13)
    # From then on the rate does not matter.
    half = [{**options, "lr": options["lr"] / 2} for options in rule.models]
    first, second = (
        run(rule, params, grads, copy.deepcopy(states), torch.ones(M), models)[0]
        for models in (rule.models, half)
    )
    assert_same_bits(first, second)


def test_weight_decay_zero_does_not_read_the_parameter_into_the_gradient():
    """0 * infinity would be NaN."""
    for rule in RULES.values():
        models = ({"lr": 0.1},)
        params = [torch.full((1, 20), math.inf)]
        grads = [[torch.ones(1, 20)]]
        result, states, _ = run(rule, params, grads, models=models)
        assert (result[0] == math.inf).all(), rule.name
        assert all(s.isfinite().all() for some in states for s in some), rule.name


# ---- what happens to the gradient ---------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_scaled_then_clipped(rule, dtype):
    params, grads = make_tensors(dtype=dtype, steps=3)
    inv_scale = torch.tensor([1.0, 0.5, 2.0, 3e-2, 7.0])
    factor = torch.tensor([1.0, 0.3, 0.9, 1.0, 0.25], dtype=torch.float64)
    limit = torch.tensor([math.inf, 0.4, 1.5, 0.01, 1.0], dtype=torch.float64)
    # The arithmetic's type, so the gradient that torch would see has to be given in that type.
    wide = torch.float32 if dtype == torch.bfloat16 else dtype

    def per_model(vector, like):
        return vector.to(wide).view(M, *[1] * (like.dim() - 1))

    prepared = []
    for now in grads:
        prepared.append([])
        for g in now:
            scaled = g.to(wide) * per_model(inv_scale, g) * per_model(factor, g)
            bound = per_model(limit, g)
            prepared[-1].append(torch.maximum(torch.minimum(scaled, bound), -bound))
    before = [g.clone() for g in grads[0]]
    common = {"inv_scale": inv_scale, "clip_factor": factor, "clip_value": limit}
    if dtype == torch.bfloat16:
        # No bfloat16 gradient holds the prepared value: one step of SGD shows it.
        rule = RULES["sgd"]
        models = tuple({"lr": 1.0} for _ in range(M))
        result, _, _ = run(rule, params, grads[:1], models=models, **common)
        expected = [(p.float() - g).to(dtype) for p, g in zip(params, prepared[0], strict=True)]
    else:
        result, _, _ = run(rule, params, grads, **common)
        expected, _, _ = run(rule, params, prepared)
    assert_same_bits(result, expected)
    assert_same_bits(grads[0], before)


def test_nan_is_not_clipped_and_a_nan_factor_is_used():
    rule = RULES["sgd"]
    models = ({"lr": 1.0},) * 2
    params = [torch.zeros(2, 3)]
    grads = [[torch.tensor([[math.nan, math.inf, 1.0]] * 2)]]
    limit = torch.tensor([2.0, 2.0], dtype=torch.float64)
    factor = torch.tensor([1.0, math.nan], dtype=torch.float64)
    (result,), _, _ = run(rule, params, grads, models=models, clip_value=limit, clip_factor=factor)
    assert result[0].isnan().tolist() == [True, False, False]
    assert result[0, 1:].tolist() == [-2.0, -1.0]
    assert result[1].isnan().all()


# ---- strides ------------------------------------------------------------------------------------


def layouts(x):
    """`x`, [M, A, B, C], in other places of memory."""
    doubled = torch.stack([x, x], dim=-1)
    return {
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "reversed": x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1),
        "rotated": x.movedim(1, -1).contiguous().movedim(-1, 1),
        "model axis last": x.movedim(0, -1).contiguous().movedim(-1, 0),
        "every second": doubled[..., 0],
        "a part": torch.cat([x, x], dim=2)[:, :, : x.shape[2]],
        "offset": torch.cat([x[:1], x])[1:],
    }


@every_rule
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 33, 130)])
def test_strides_of_gradients_and_parameters_do_not_matter(rule, dtype, shape):
    (param,), grads = make_tensors([shape], dtype=dtype, steps=2)
    expected = run(rule, [param], grads)
    for name, layout in layouts(grads[0][0]).items():
        result = run(rule, [param], [[layout], grads[1]])
        assert_same_bits(result[0], expected[0]), name
    if dtype not in (torch.float32, torch.float16):
        return
    for name, layout in layouts(param).items():
        step = torch.zeros(M)
        states = make_states(rule, [param])
        if name == "rotated":  # States may have the parameter's strides,
            states = [[layouts(s)[name] for s in some] for some in states]
        elif name == "transposed":  # or their own.
            states = [[layouts(s)["reversed"] for s in some] for some in states]
        for now in grads:
            rule.step_([layout], now, *states, step, rule.hyper())
        assert_same_bits([layout], expected[0])
        for some, other in zip(states, expected[1], strict=True):
            assert_same_bits(some, other)


@every_rule
def test_expanded_gradients(rule):
    (param,), grads = make_tensors([(6, 8)], steps=1)
    g = grads[0][0]
    for expanded in (
        g[:1].expand_as(g),
        g[:, :1].expand_as(g),
        g[:, :, :1].expand_as(g),
        g[:1, :1, :1].expand_as(g),
    ):
        expected = run(rule, [param], [[expanded.contiguous()]])
        assert_same_bits(run(rule, [param], [[expanded]])[0], expected[0])


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    order=st.permutations(range(5)),
    param_order=st.permutations(range(5)),
    skip=st.integers(1, 3),
    name=st.sampled_from(sorted(RULES)),
)
def test_any_order_of_dimensions(shape, order, param_order, skip, name):
    rule = RULES[name]
    (param,), grads = make_tensors([shape], steps=1)
    dims = param.dim()

    def placed(x, order, skip):
        order = [d for d in order if d < dims]
        room = x.new_zeros([x.shape[d] * (skip if d == order[0] else 1) for d in order])
        inverse = [order.index(d) for d in range(dims)]
        view = room.permute(inverse)
        view = view[(slice(None),) * order[0] + (slice(None, None, skip),)]
        return view.copy_(x)

    expected = run(rule, [param], grads)
    there = placed(param, param_order, 1)
    states = make_states(rule, [there])
    step = torch.zeros(M)
    rule.step_([there], [placed(grads[0][0], order, skip)], *states, step, rule.hyper())
    assert_same_bits([there], expected[0])
    for some, other in zip(states, expected[1], strict=True):
        assert_same_bits(some, other)


# ---- grad_stats ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [SHAPES, [(), (0, 3)], [(40, 500), (3,)]])
def test_squared_norm(dtype, shapes):
    params, _ = make_tensors(shapes, dtype=dtype)
    sq_norm, nonfinite = optim.grad_stats(params)
    assert sq_norm.dtype == torch.float64
    assert not nonfinite.any()
    for model in range(M):
        values = flat([p[model] for p in params]).double().tolist()
        exact = math.fsum(v * v for v in values)
        # Every square is rounded once, and no square takes part in more additions than there are.
        assert abs(sq_norm[model].item() - exact) <= (len(values) + 1) * 2.0**-53 * exact


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_of_the_sum_does_not_depend_on_strides_or_models(dtype):
    (x,), _ = make_tensors([(3, 50, 130)], dtype=dtype)
    sq_norm, _ = optim.grad_stats([x])
    for name, layout in layouts(x).items():
        assert torch.equal(optim.grad_stats([layout])[0], sq_norm), name
    assert torch.equal(optim.grad_stats([x[2:3]])[0], sq_norm[2:3])
    assert torch.equal(optim.grad_stats([x[:1].expand_as(x)])[0], sq_norm[:1].expand(M))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_is_about_the_model_that_has_the_element(dtype, bad):
    for numel in (1, 3, 16, 47):
        for place in range(0, numel, 5):
            grads = [torch.ones(M, 4, dtype=dtype), torch.ones(M, numel, dtype=dtype)]
            grads[1][3, place] = bad
            sq_norm, nonfinite = optim.grad_stats(grads)
            assert nonfinite.tolist() == [False, False, False, True, False]
            assert sq_norm.isfinite().tolist() == [True, True, True, False, True]


def test_an_overflow_of_the_sum_is_not_an_overflow_of_the_gradient():
    large = torch.full((2, 100), torch.finfo(torch.float32).max)
    sq_norm, nonfinite = optim.grad_stats([large])
    assert not nonfinite.any()
    assert sq_norm.isfinite().all()
    sq_norm, nonfinite = optim.grad_stats([torch.full((2, 100), 1e200, dtype=torch.float64)])
    assert not nonfinite.any()
    assert (sq_norm == math.inf).all()
