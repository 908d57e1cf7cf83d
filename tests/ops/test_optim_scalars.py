"""The rules that keep further numbers per model, NAdam and ASGD, against torch.optim."""

import pytest
import torch
from optim_case import STATE_DTYPE, M, Rule, assert_same_bits, make_tensors, run_torch

from modelbatch.ops import optim

NADAM = Rule(
    "nadam",
    torch.optim.NAdam,
    ("exp_avg", "exp_avg_sq"),
    (
        {"lr": 1e-2},
        {"lr": 3e-2, "betas": (0.5, 0.9), "weight_decay": 0.1},
        {"lr": 1e-1, "betas": (0.1, 0.99), "momentum_decay": 0.3, "maximize": True},
        {"lr": 2e-2, "eps": 1e-2, "weight_decay": 0.2, "decoupled_weight_decay": True},
        {"lr": 5e-2, "betas": (0.7, 0.5), "weight_decay": 0.3, "momentum_decay": 0.0},
    ),
)
ASGD = Rule(
    "asgd",
    torch.optim.ASGD,
    ("ax",),
    (
        {"lr": 1e-2},
        {"lr": 3e-2, "lambd": 0.1, "weight_decay": 0.1},
        {"lr": 1e-1, "alpha": 0.3, "t0": 3.0, "maximize": True},
        {"lr": 2e-2, "lambd": 0.5, "alpha": 2.0, "t0": 0.0},
        {"lr": 5e-2, "t0": 1.0, "weight_decay": 0.3},
    ),
)
SCALARS = {"nadam": ("mu_product",), "asgd": ("eta", "mu")}
both_rules = pytest.mark.parametrize("rule", [NADAM, ASGD], ids=SCALARS)


def make_scalars(rule, dtype=torch.float32):
    """No number that the first step could use: torch.optim's own beginnings are to be used."""
    return [torch.full((M,), torch.nan, dtype=dtype) for _ in SCALARS[rule.name]]


def run(rule, params, grads, scalar_dtype=torch.float32, **common):
    params = [p.clone() for p in params]
    states = [
        [torch.zeros_like(p, dtype=STATE_DTYPE[p.dtype]) for p in params] for _ in rule.states
    ]
    scalars, step = make_scalars(rule, scalar_dtype), torch.zeros(M)
    for now in grads:
        rule.step_(params, now, *states, *scalars, step, rule.hyper(), **common)
    return params, states, scalars, step


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


@both_rules
@pytest.mark.parametrize("scalar_dtype", [torch.float32, torch.float64])
def test_float64_equals_torch(rule, scalar_dtype):
    # torch has them in the default dtype.
    torch.set_default_dtype(scalar_dtype)
    params, grads = make_tensors()
    expected, expected_states = run_torch(rule, params, grads)
    torch.set_default_dtype(torch.float32)
    result, states, scalars, step = run(rule, params, grads, scalar_dtype)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(states, expected_states, rtol=1e-12, atol=1e-13)
    assert step.tolist() == [10.0] * M
    for model, options in enumerate(rule.models):
        p = params[0][model].clone()
        torch.set_default_dtype(scalar_dtype)
        optimizer = rule.torch_class([p], **options)
        for now in grads:
            p.grad = now[0][model]
            optimizer.step()
        torch.set_default_dtype(torch.float32)
        rtol = 1e-6 if scalar_dtype == torch.float32 else 1e-12
        for name, scalar in zip(SCALARS[rule.name], scalars, strict=True):
            # pow may differ by a unit of the last place in double, before it is rounded.
            torch.testing.assert_close(scalar[model], optimizer.state[p][name], rtol=rtol, atol=0)


@both_rules
def test_float32_rounds_no_worse_than_torch(rule):
    params, grads = make_tensors(dtype=torch.float32)
    wide = [p.double() for p in params], [[g.double() for g in now] for now in grads]
    truth, _ = run_torch(rule, *wide)
    theirs, _ = run_torch(rule, params, grads)
    ours, _, _, _ = run(rule, params, grads)
    for model in range(M):
        exact = flat([p[model] for p in truth])
        error = (flat([p[model] for p in ours]).double() - exact).abs().max()
        bound = (flat([p[model] for p in theirs]).double() - exact).abs().max()
        assert error <= 2 * bound + torch.finfo(torch.float32).eps * exact.abs().max() / 2


@both_rules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_have_float32_arithmetic(rule, dtype):
    params, grads = make_tensors(dtype=dtype)
    wide = [p.float() for p in params], [[g.float() for g in now] for now in grads]
    expected, _ = run_torch(rule, *wide, halve=dtype)
    result, _, _, _ = run(rule, params, grads)
    eps = torch.finfo(dtype).eps
    ours, theirs = flat(result).float(), flat(expected)
    assert (ours == theirs).float().mean() > 0.98
    torch.testing.assert_close(ours, theirs, rtol=2 * eps, atol=eps**2)


@both_rules
def test_a_skipped_model_is_left_alone(rule):
    params, grads = make_tensors([(9000,), ()], steps=3)
    expected = run(rule, params, grads)
    active = torch.tensor([True, False, True, True, False])
    for tensor in [*params, *(g for now in grads for g in now)]:
        tensor[~active] = torch.nan
    result = run(rule, params, grads, active=active)
    for ours, theirs in zip([result[0], result[2]], [expected[0], expected[2]], strict=True):
        assert_same_bits([t[active] for t in ours], [t[active] for t in theirs])
    assert_same_bits([t[~active] for t in result[0]], [t[~active] for t in params])
    assert all(scalar[~active].isnan().all() for scalar in result[2])
    assert torch.equal(result[3], 3.0 * active)


def test_scalars_of_different_dtypes_are_refused():
    params, grads = make_tensors(steps=1)
    averages = [torch.zeros_like(p) for p in params]
    for dtypes in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        eta, mu = (torch.ones(M, dtype=dtype) for dtype in dtypes)
        with pytest.raises(RuntimeError, match="mu must be float(32|64 as the first)"):
            optim.asgd_step_(params, grads[0], averages, eta, mu, torch.zeros(M), ASGD.hyper())


@both_rules
def test_opcheck(rule):
    params, grads = make_tensors([(3, 4), ()], dtype=torch.float32, steps=1)
    states = [[torch.zeros_like(p) for p in params] for _ in rule.states]
    # opcheck compares with a second call, to which NaN would not be equal.
    scalars = [torch.ones(M) for _ in SCALARS[rule.name]]
    args = (params, grads[0], *states, *scalars, torch.zeros(M), rule.hyper())
    torch.library.opcheck(getattr(torch.ops.modelbatch, f"{rule.name}_step_").default, args)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.ones(M).half(), "mu_product must be float32"),
        (torch.ones(M - 1).double(), r"mu_product must have shape \[5\]"),
        (torch.ones(M - 1), r"mu_product must have shape \[5\]"),
        (torch.ones(1).expand(M), "mu_product must be contiguous"),
    ],
)
def test_refusals(bad, message):
    params, grads = make_tensors(steps=1)
    states = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    before = [p.clone() for p in params]
    with pytest.raises(RuntimeError, match=message):
        optim.nadam_step_(params, grads[0], *states, bad, torch.zeros(M), NADAM.hyper())
    assert_same_bits(params, before)
