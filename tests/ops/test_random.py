"""modelbatch::dropout, uniform and normal: the words, the numbers, and what they depend on."""

import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, strategies as st

from modelbatch._extension import built_isas, isa
from modelbatch.ops import random, reference

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


# ---- the generator ------------------------------------------------------------------------------

# Published with the generator (Random123, kat_vectors): counter, key, words.
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_reference_gives_the_published_words(counter, key, words):
    result = reference.philox([torch.tensor([c]) for c in counter], key)
    assert result.tolist() == [list(words)]


def test_kernel_gives_the_published_words_of_counter_zero():
    drawn = random.uniform(torch.tensor([0]), torch.tensor([0]), 0, [4])
    assert [int(v * 2**24) for v in drawn[0].tolist()] == [w >> 8 for w in KNOWN_ANSWERS[0][2]]


def test_fields_of_the_counter_do_not_overlap():
    """Streams that differ in one field only, at the edge of its neighbour, differ."""
    keys = [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (-(2**63), 0, 0), (0, 1, 0), (0, 2**32, 0)]
    keys += [(0, 2**43, 0), (0, 2**44 - 1, 0), (0, 0, 1), (0, 0, 2**20 - 1)]
    firsts = [
        tuple(random.uniform(torch.tensor([s]), torch.tensor([t]), i, [4])[0].tolist())
        for s, t, i in keys
    ]
    assert len(set(firsts)) == len(keys)


# ---- equality with the reference ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [[], [1], [3], [64], [5, 13], [8192], [2, 8200]])
def test_dropout_equals_reference(dtype, size):
    x = torch.randn(M, *size).to(dtype)
    result = random.dropout(x, RATES, SEEDS, STEPS, 77)
    assert_same_bits(result, reference.dropout_reference(x, RATES, SEEDS, STEPS, 77))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [2, 3, 64, 100, 9000])
def test_grouped_dropout_equals_reference(dtype, group):
    x = torch.randn(M, 3, 6007).to(dtype)
    result = random.dropout(x, RATES, SEEDS, STEPS, 3, group)
    assert_same_bits(result, reference.dropout_reference(x, RATES, SEEDS, STEPS, 3, group))


@given(
    num_models=st.integers(1, 4),
    numel=st.integers(0, 300),
    group=st.integers(1, 70),
    rate=st.floats(0, 1),
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 2**44 - 1),
    op_index=st.integers(0, 2**20 - 1),
)
def test_dropout_equals_reference_for_any_arguments(
    num_models, numel, group, rate, seed, step, op_index
):
    x = torch.linspace(-2, 3, num_models * numel).view(num_models, numel)
    p = torch.full((num_models,), rate, dtype=torch.float64)
    args = (x, p, torch.full((num_models,), seed), torch.full((num_models,), step), op_index, group)
    assert_same_bits(random.dropout(*args), reference.dropout_reference(*args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [[], [1], [7], [64], [3, 5], [16500]])
def test_uniform_equals_reference(dtype, size):
    result = random.uniform(SEEDS, STEPS, 9, size, dtype)
    assert_same_bits(result, reference.uniform_reference(SEEDS, STEPS, 9, size, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [[], [1], [7], [64], [3, 5], [16500]])
def test_normal_is_as_near_to_the_reference_as_rounding_allows(dtype, size):
    double = dtype == torch.float64
    result = random.normal(SEEDS, STEPS, 9, size, dtype)
    expected = reference.normal_reference(SEEDS, STEPS, 9, size, double=double)
    # z = r cos(a). The largest radius is sqrt(-2 log of the smallest uniform number). The angle's
    # rounding (in the kernel |a| <= pi / 4; in the float64 reference a <= 2 pi, where it counts)
    # moves z by r a eps; square root, logarithm and products by a few eps of r.
    radius = math.sqrt(2 * math.log(2.0 ** (53 if double else 33)))
    angle = 2 * math.pi if double else math.pi / 4
    tolerance = (angle + 4) * radius * torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_normal_is_the_rounded_float32_normal(dtype):
    wide = random.normal(SEEDS, STEPS, 1, [999])
    assert_same_bits(random.normal(SEEDS, STEPS, 1, [999], dtype), wide.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_number_goes_through_dropout_as_through_torch(dtype):
    """All 65536 bit patterns, subnormal and special ones included."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).unsqueeze(0)
    p = torch.tensor([0.3], dtype=torch.float64)
    seed, step = torch.tensor([1]), torch.tensor([0])
    result = random.dropout(x, p, seed, step, 0)
    assert_same_bits(result, reference.dropout_reference(x, p, seed, step, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.77, 0.9])
def test_kept_elements_equal_those_of_torch_dropout(dtype, rate):
    x = torch.randn(1, 4096, dtype=dtype)
    p = torch.tensor([rate], dtype=torch.float64)
    ours = random.dropout(x, p, torch.tensor([3]), torch.tensor([0]), 0)
    theirs = torch.nn.functional.dropout(x, rate)
    kept = (ours != 0) & (theirs != 0)
    assert kept.any()
    assert_same_bits(ours[kept], theirs[kept])


# ---- NaN, infinity, edges -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("group", [1, 5])
def test_dropped_elements_are_zero_whatever_the_input(dtype, bad, group):
    clean = torch.ones(M, 1000, dtype=dtype)
    mask = random.dropout(clean, RATES, SEEDS, STEPS, 0, group) != 0
    result = random.dropout(torch.full_like(clean, bad), RATES, SEEDS, STEPS, 0, group)
    assert (result[~mask] == 0).all()
    torch.testing.assert_close(result[mask], torch.full_like(result[mask], bad), equal_nan=True)
    assert (~mask[1]).any()
    assert mask[1].any()


def test_nan_gradient_does_not_pass_a_dropped_element():
    x = torch.ones(1, 256, requires_grad=True)
    args = (torch.tensor([0.5], dtype=torch.float64), torch.tensor([1]), torch.tensor([0]), 0)
    y = random.dropout(x, *args)
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, math.nan))
    assert torch.equal(grad.isnan(), y != 0)
    assert (grad[y == 0] == 0).all()


def test_rate_zero_copies_bits_and_rate_one_drops_all():
    x = torch.randn(2, 100)
    x[0, 0], x[1, 0] = -0.0, math.nan
    p = torch.tensor([0.0, 1.0], dtype=torch.float64)
    y = random.dropout(x, p, SEEDS[:2], STEPS[:2], 0)
    assert torch.equal(y[0].view(torch.int32), x[0].view(torch.int32))
    assert torch.equal(y[1].view(torch.int32), torch.zeros(100, dtype=torch.int32))
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,), (2, 3, 0, 4)])
def test_empty_tensors(dtype, shape):
    m = shape[0]
    args = (SEEDS[:m], STEPS[:m], 0)
    x = torch.empty(shape, dtype=dtype)
    assert random.dropout(x, RATES[:m], *args).shape == shape
    assert random.uniform(*args, shape[1:], dtype).shape == shape
    assert random.normal(*args, shape[1:], dtype).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_uniform_never_reaches_one(dtype):
    drawn = random.uniform(torch.arange(64), torch.zeros(64, dtype=torch.int64), 0, [4096], dtype)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert drawn.max() > 0.99


# ---- strides ------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 6])
def test_strides_of_the_input_do_not_matter(group):
    args = (RATES, SEEDS, STEPS, 4, group)
    x = torch.randn(M, 7, 6, 5)
    layouts = {
        "transposed": x.transpose(1, 3).contiguous().transpose(1, 3),
        "model axis last": x.movedim(0, -1).contiguous().movedim(-1, 0),
        "sliced models": torch.cat([x, x], dim=1)[:, :7],
        "sliced elements": torch.stack([x, x], dim=-1)[..., 0],
        "expanded inside": x[:, :1].expand(-1, 7, -1, -1),
        "expanded models": x[:1].expand(M, -1, -1, -1),
        "expanded and transposed": x[:1].transpose(1, 3).expand(M, -1, -1, -1),
        "offset": torch.cat([x[:1], x])[1:],
    }
    for name, layout in layouts.items():
        result = random.dropout(layout, *args)
        assert result.is_contiguous(), name
        expected = random.dropout(layout.clone(memory_format=torch.contiguous_format), *args)
        assert torch.equal(result, expected), name


def test_vectors_of_any_strides():
    x = torch.randn(M, 50)
    p, seed, step = (torch.stack([t, t], dim=1)[:, 0] for t in (RATES, SEEDS, STEPS))
    assert not seed.is_contiguous()
    expected = random.dropout(x, RATES, SEEDS, STEPS, 0)
    assert torch.equal(random.dropout(x, p, seed, step, 0), expected)


# ---- independence -------------------------------------------------------------------------------


def draw_everything(seed, step, numel=20_000):
    m = len(seed)
    x = torch.linspace(-3, 3, numel).expand(m, numel)
    p = 0.1 + 0.8 * (seed.double() % 7) / 7
    out = [random.dropout(x.to(d), p, seed, step, 6, g) for d in DTYPES for g in (1, 7)]
    out += [random.uniform(seed, step, 6, [numel], d) for d in DTYPES]
    out += [random.normal(seed, step, 6, [numel], d) for d in DTYPES]
    return out


def test_a_model_draws_the_same_alone_and_in_any_slot():
    seed = torch.arange(11)
    step = torch.arange(11) * 3
    together = draw_everything(seed, step)
    order = torch.tensor([7, 2, 10, 0])
    for all_models, some in zip(together, draw_everything(seed[order], step[order]), strict=True):
        assert torch.equal(all_models[order], some)
    for all_models, alone in zip(together, draw_everything(seed[4:5], step[4:5]), strict=True):
        assert torch.equal(all_models[4:5], alone)


def test_a_longer_slice_begins_with_the_shorter_one():
    long = draw_everything(SEEDS.abs(), STEPS, 20_000)
    for draw in (random.uniform, random.normal):
        for dtype in DTYPES:
            short = draw(SEEDS, STEPS, 0, [777], dtype)
            assert torch.equal(draw(SEEDS, STEPS, 0, [8999], dtype)[:, :777], short)
    assert len(long) == 4 * len(DTYPES)


def test_number_of_threads_does_not_matter():
    seed, step = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(draw_everything(seed, step, 100_000))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def digest():
    """One line for the bits of everything that the family can draw, and the instruction set."""
    h = hashlib.sha256()
    seed = torch.arange(3)
    for tensor in draw_everything(seed, seed + 2**40):
        h.update(tensor.view(torch.uint8).numpy().tobytes())
    return f"{isa()} {h.hexdigest()}"


@pytest.mark.parametrize("name", built_isas())
def test_instruction_set_does_not_matter(name):
    order = built_isas()
    if order.index(name) > order.index(best_isa()):
        pytest.skip(f"this machine does not support {name}")
    line = run_with_isa(name, "print(digest())")
    assert line.split()[0] == name
    assert line.split()[1] == digest().split()[1]


def best_isa():
    """What the machine supports, whatever MODELBATCH_ISA says of this process."""
    return run_with_isa("", "print(isa())")


def run_with_isa(name, code):
    folder = os.path.dirname(os.path.abspath(__file__))
    root = os.path.dirname(os.path.dirname(folder))
    done = subprocess.run(
        [sys.executable, "-c", f"from test_random import *; {code}"],
        env={**os.environ, "MODELBATCH_ISA": name, "PYTHONPATH": f"{folder}{os.pathsep}{root}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- statistics: bounds at five standard deviations, seeds fixed --------------------------------


@pytest.mark.parametrize("group", [1, 10])
def test_share_of_dropped_elements(group):
    rates = torch.tensor([0.05, 0.3, 0.5, 0.9], dtype=torch.float64)
    decisions = 200_000
    x = torch.ones(4, decisions * group)
    y = random.dropout(x, rates, torch.arange(4), torch.arange(4), 0, group)
    dropped = (y == 0).double().mean(dim=1)
    sigma = torch.sqrt(rates * (1 - rates) / decisions)
    assert ((dropped - rates).abs() < 5 * sigma).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_and_distribution_of_uniform_numbers(dtype):
    n = 400_000
    u = random.uniform(torch.tensor([11]), torch.tensor([2]), 0, [n], dtype)[0].double()
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)  # Var((u - 1/2)^2) = 1/180
    assert kolmogorov_distance(u) < 2.2 / math.sqrt(n)  # probability 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_and_distribution_of_normal_numbers(dtype):
    n = 400_000
    z = random.normal(torch.tensor([11]), torch.tensor([2]), 0, [n], dtype)[0].double()
    # Standard deviations of the sample moments of n normal numbers.
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((z**power).mean() - moment) < 5 * math.sqrt(variance / n), power
    assert kolmogorov_distance(torch.special.ndtr(z)) < 2.2 / math.sqrt(n)
    assert abs((z[::2] * z[1::2]).mean()) < 5 / math.sqrt(n / 2)  # the two of a pair


def kolmogorov_distance(u):
    ranks = torch.arange(1, len(u) + 1, dtype=torch.float64) / len(u)
    return (u.sort().values - ranks).abs().max()


def test_streams_are_uncorrelated():
    """Neighbouring seeds, steps and op indices: sample correlations of independent streams."""
    n = 100_000
    seed = torch.tensor([5, 6, 5, 5])
    step = torch.tensor([1, 1, 2, 1])
    rows = [random.normal(seed[i : i + 1], step[i : i + 1], i == 3, [n])[0] for i in range(4)]
    correlation = torch.corrcoef(torch.stack(rows).double()) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 5 / math.sqrt(n)


# ---- CUDA ---------------------------------------------------------------------------------------


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_draws_the_same_words(dtype):
    seed, step, p = SEEDS.cuda(), STEPS.cuda(), RATES.cuda()
    for group in (1, 7):
        x = torch.randn(M, 9001).to(dtype)
        result = random.dropout(x.cuda(), p, seed, step, 3, group)
        assert_same_bits(result.cpu(), random.dropout(x, RATES, SEEDS, STEPS, 3, group))
    uniform = random.uniform(seed, step, 3, [9001], dtype)
    assert_same_bits(uniform.cpu(), random.uniform(SEEDS, STEPS, 3, [9001], dtype))
    normal = random.normal(seed, step, 3, [9001], dtype)
    assert_same_bits(normal.cpu(), random.normal(SEEDS, STEPS, 3, [9001], dtype))
