"""The CPU kernels of LSTM, GRU and RNN, called directly, against torch's for each model alone."""

import math
import os
import subprocess
import sys

import pytest
import torch
from rnn_kernel_case import CELLS, OPS, Case, assert_near, backward, by_torch, check, forward
from torch import Tensor

from modelbatch._extension import built_isas, isa

PACKED = [5, 5, 3, 2, 2, 1]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("batch_sizes", [[1], [3], [1] * 5, [4] * 3, PACKED], ids=str)
@pytest.mark.parametrize("hidden", [1, 7, 64, 65])
@pytest.mark.parametrize("cell", CELLS)
def test_equals_torch(cell, hidden, batch_sizes, reverse):
    check(Case(cell, hidden=hidden, batch_sizes=batch_sizes, reverse=reverse))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("models", [1, 2, 3, 9])
@pytest.mark.parametrize("inputs", [1, 16, 33])
@pytest.mark.parametrize("cell", CELLS)
def test_inputs_biases_and_models(cell, inputs, models, bias):
    check(Case(cell, inputs=inputs, models=models, bias=bias, batch_sizes=[17] * 3))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
def test_blocks_of_steps(cell, reverse):
    """More rows than one block of the backward holds, with constant and with falling sizes."""
    sizes = [40] * 9 + [33] * 4 + [8] * 3 + [1]
    check(Case(cell, hidden=33, batch_sizes=sizes, reverse=reverse))
    check(Case(cell, hidden=64, models=1, batch_sizes=[600] * 2, reverse=reverse))
    check(Case(cell, hidden=130, inputs=140, batch_sizes=[35] * 5, reverse=reverse))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("batch_sizes", [[4] * 3, PACKED], ids=str)
@pytest.mark.parametrize(("hidden", "proj"), [(2, 1), (7, 3), (65, 33), (40, 32)])
def test_projection(hidden, proj, batch_sizes, reverse):
    check(Case("lstm", hidden=hidden, proj=proj, batch_sizes=batch_sizes, reverse=reverse))
    check(Case("lstm", hidden=hidden, proj=proj, bias=False, batch_sizes=batch_sizes))


@pytest.mark.parametrize("cell", CELLS)
def test_no_inputs(cell):
    """x without columns: the same as a column that no weight looks at."""
    case = Case(cell, inputs=0)
    tensors, grads = case.make(), case.cotangents()
    wider = {name: t.clone() for name, t in tensors.items()}
    wider["x"] = torch.ones(*tensors["x"].shape[:2], 1, dtype=case.dtype)
    wider["w_ih"] = torch.zeros(*tensors["w_ih"].shape[:2], 1, dtype=case.dtype)
    results, expected = forward(case, tensors), forward(case, wider)
    gradients = backward(case, tensors, results, grads)
    expected_gradients = backward(case, wider, expected, grads)
    for actual, want in zip(results, expected, strict=True):
        assert torch.equal(actual, want)
    for name in tensors:
        if name in ("x", "w_ih"):
            assert gradients[name].shape == tensors[name].shape
        else:
            assert torch.equal(gradients[name], expected_gradients[name])


@pytest.mark.parametrize("cell", CELLS)
def test_shared_arguments(cell):
    """A shared argument counts as the same for every model; its gradient is per model."""
    names = Case(cell).names
    for shared in [*((name,) for name in names), ("x", "h0", "c0"), tuple(names[1:])]:
        check(Case(cell, models=3, shared=shared))
    case = Case(cell, models=3)
    tensors, grads = Case(cell, models=3, shared=tuple(names)).make(), case.cotangents()
    results = forward(case, tensors)
    assert results[0].shape[0] == 1
    expected, expected_grads = by_torch(case, tensors, grads)
    assert_near(results[0], expected[0][:1], 1e-10)
    gradients = backward(case, tensors, results, grads)  # only the cotangents differ
    for name in tensors:
        assert_near(gradients[name], expected_grads[name], 1e-10, name)


@pytest.mark.parametrize("cell", CELLS)
def test_any_strides(cell):
    case = Case(cell, models=3, batch_sizes=PACKED, proj=3 if cell == "lstm" else 0)
    tensors, grads = case.make(), case.cotangents()
    expected = forward(case, tensors)
    expected_grads = backward(case, tensors, expected, grads)

    def strided(t):
        return torch.stack([t, t], -1)[..., 0]

    def transposed(t):
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    def model_last(t):
        return t.movedim(0, -1).contiguous().movedim(-1, 0)

    for change in (strided, transposed, model_last, lambda t: t[[0, 0, 1, 1, 2, 2]][::2]):
        changed = {name: change(t) for name, t in tensors.items()}
        results = forward(case, changed)
        gradients = backward(
            case, changed, [change(r) for r in results], [change(g) for g in grads]
        )
        for actual, want in zip(results, expected, strict=True):
            assert torch.equal(actual, want)
        for name in tensors:
            assert torch.equal(gradients[name], expected_grads[name])
    one = Case(cell, models=3, shared=("x", "w_hh"), batch_sizes=PACKED).make()
    case = Case(cell, models=3, batch_sizes=PACKED)
    results = forward(case, one)
    for name in ("x", "w_hh"):
        one[name] = transposed(one[name]).expand(3, -1, -1)
    for actual, want in zip(forward(case, one), results, strict=True):
        assert torch.equal(actual, want)


@pytest.mark.parametrize("cell", CELLS)
def test_what_is_not_needed(cell):
    case = Case(cell, batch_sizes=PACKED, proj=3 if cell == "lstm" else 0)
    tensors, grads = case.make(), case.cotangents()
    results = forward(case, tensors)
    expected = backward(case, tensors, results, grads)
    groups = {"x": 0, "h0": 1, "c0": 1}
    for bits in range(8):
        needs = (bool(bits & 1), bool(bits & 2), bool(bits & 4))
        for name, actual in backward(case, tensors, results, grads, needs).items():
            if name not in tensors:
                continue
            if needs[groups.get(name, 2)]:
                assert torch.equal(actual, expected[name])
            else:
                assert actual.shape == (0,)
    for missing in range(len(grads)):
        some = [None if i == missing else g for i, g in enumerate(grads)]
        zeros = [torch.zeros_like(g) if i == missing else g for i, g in enumerate(grads)]
        want = backward(case, tensors, results, zeros)
        for name, actual in backward(case, tensors, results, some).items():
            assert torch.equal(actual, want[name])


@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch(cell):
    """Nothing comes out, and gradients of weights are zero, as in torch."""
    case = Case(cell, batch_sizes=[0, 0])
    tensors = case.make()
    results = forward(case, tensors)
    assert results[0].shape == (2, 0, 7)
    assert results[1].shape == (2, 0, 7)
    gradients = backward(case, tensors, results, case.cotangents())
    for name, t in tensors.items():
        assert gradients[name].shape == t.shape
        assert not gradients[name].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", CELLS)
def test_precision(cell, dtype):
    """Against float64, our error is at most twice that of torch's own, plus one rounding."""
    case = Case(cell, hidden=33, inputs=16, batch_sizes=[9] * 8, dtype=dtype)
    tensors, grads = case.make(), case.cotangents()
    exact = by_torch(case, {n: t.double() for n, t in tensors.items()}, [g.double() for g in grads])
    torchs = by_torch(case, tensors, grads)
    results = forward(case, tensors)
    for saved in results[3 if cell == "lstm" else 2 :]:
        assert saved.dtype == torch.float32
    gradients = backward(case, tensors, results, grads)
    triples = list(zip(results, torchs[0], exact[0], strict=False))
    triples += [(gradients[name], torchs[1][name], exact[1][name]) for name in tensors]
    for ours, theirs, truth in triples:
        assert ours.dtype == dtype
        rounding = torch.finfo(dtype).eps * float(truth.abs().max())
        allowed = 2 * float((theirs.double() - truth).abs().max()) + rounding
        assert float((ours.double() - truth).abs().max()) <= allowed


def run(case: Case) -> list[Tensor]:
    tensors = case.make()
    results = forward(case, tensors)
    gradients = backward(case, tensors, results, case.cotangents())
    return [*results, *(gradients[name] for name in tensors)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_bits_do_not_depend_on_threads_or_other_models(cell, dtype):
    case = Case(cell, models=5, hidden=40, inputs=9, batch_sizes=[33] * 6 + [17, 2], dtype=dtype)
    torch.set_num_threads(2)
    tensors, grads = case.make(), case.cotangents()
    both = run(case)
    torch.set_num_threads(1)
    for actual, want in zip(run(case), both, strict=True):
        assert torch.equal(actual, want)
    torch.set_num_threads(2)
    for chosen in ([3], [4, 1], [2, 0, 3]):
        some = {name: t[chosen] for name, t in tensors.items()}
        results = forward(case, some)
        gradients = backward(case, some, results, [g[chosen] for g in grads])
        ours = [*results, *(gradients[name] for name in some)]
        for actual, want in zip(ours, both, strict=True):
            assert torch.equal(actual, want[chosen])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_bits_of_a_row_do_not_depend_on_the_batch(cell, dtype):
    case = Case(cell, hidden=40, inputs=9, batch_sizes=[33] * 5, dtype=dtype)
    tensors = case.make()
    whole = forward(case, tensors)[0].reshape(2, 5, 33, 40)
    for rows in (slice(0, 1), slice(30, 33), slice(5, 25)):
        count = rows.stop - rows.start
        own = {**tensors, "x": tensors["x"].reshape(2, 5, 33, 9)[:, :, rows].reshape(2, -1, 9)}
        for name in ("h0", "c0"):
            if name in own:
                own[name] = tensors[name][:, rows]
        few = Case(cell, hidden=40, inputs=9, batch_sizes=[count] * 5, dtype=dtype)
        part = forward(few, own)[0].reshape(2, 5, count, 40)
        assert torch.equal(part, whole[:, :, rows])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_infinity(cell, dtype, value):
    """They reach what they reach in torch, and stay in their model and row."""
    case = Case(cell, hidden=5, batch_sizes=[3] * 4, dtype=dtype)
    tensors, grads = case.make(), case.cotangents()
    tensors["x"][1, 4, 2] = value
    results = forward(case, tensors)
    expected, expected_grads = by_torch(case, tensors, grads)
    rtol = 1e-10 if dtype == torch.float64 else 1e-4
    for actual, want in zip(results, expected, strict=False):
        torch.testing.assert_close(actual, want, rtol=rtol, atol=rtol, equal_nan=True)
    gradients = backward(case, tensors, results, grads)
    for name in tensors:
        ours, theirs = gradients[name], expected_grads[name]
        assert torch.equal(ours.isfinite(), theirs.isfinite()), name
        finite = theirs.isfinite()
        torch.testing.assert_close(ours[finite], theirs[finite], rtol=rtol, atol=10 * rtol)


def unit_in_last_place(values: Tensor) -> Tensor:
    """Of float32 at the size of float64 values. Below the smallest normal number, that number."""
    smallest = torch.finfo(torch.float32).tiny
    unit = torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent - 24)
    return torch.where(values.abs() < smallest, smallest, unit)


def activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """The kernels' sigmoid and tanh of float32 values [N], through a GRU and an RNN."""
    one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    rows = x.reshape(1, -1, 1)
    state = torch.zeros(1, x.numel(), 1)
    w_ih, w_hh = torch.ones(1, 3, 1), torch.zeros(1, 3, 1)
    gates = OPS.gru(rows, state, w_ih, w_hh, None, None, [x.numel()], False)[2]
    tanh = OPS.rnn(rows, state, one, zero, None, None, [x.numel()], False, False)[0]
    return gates[0, :, 1], tanh[0, :, 0]


def test_sigmoid_and_tanh_within_two_units():
    magnitudes = torch.logspace(-30, 2, 200_001, dtype=torch.float64)
    dense = torch.linspace(0, 20, 1_000_001, dtype=torch.float64)
    x = torch.cat([magnitudes, dense, -magnitudes, -dense]).float()
    exact = x.double()
    for ours, truth in zip(activations(x), (torch.sigmoid(exact), torch.tanh(exact)), strict=True):
        error = (ours.double() - truth).abs() / unit_in_last_place(truth)
        worst = int(error.argmax())
        assert float(error[worst]) <= 2, (float(x[worst]), float(error[worst]))
    special = torch.tensor([-math.inf, math.inf, math.nan, 0.0])
    sigmoid, tanh = activations(special)
    torch.testing.assert_close(sigmoid, torch.sigmoid(special), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(tanh, torch.tanh(special), rtol=0, atol=0, equal_nan=True)


LSTM_BAD = {
    "x": ("x must have shape", lambda t: t[0]),
    "h0": (
        r"h0 must have shape \[M, B, P\], here \[M, 3, 7\], got \[2, 3, 6\]",
        lambda t: t[..., 1:],
    ),
    "c0": (r"c0 must have shape \[M, B, H\]", lambda t: t[:, 1:]),
    "w_ih": (r"w_ih must have shape \[M, G H, I\]", lambda t: t[..., 1:]),
    "w_hh": (r"w_hh must have shape \[M, 4 H, H\]", lambda t: t[..., 1:]),
    "b_ih": ("b_ih and x must have the same dtype", lambda t: t.float()),
    "b_hh": (r"x must have shape \[3, 12, 5\], or 1 as first size", lambda t: t[[0, 0, 0]]),
}


@pytest.mark.parametrize("name", LSTM_BAD)
def test_wrong_arguments(name):
    case = Case("lstm", models=2)
    tensors = case.make()
    message, change = LSTM_BAD[name]
    tensors[name] = change(tensors[name])
    with pytest.raises(RuntimeError, match=message):
        forward(case, tensors)


@pytest.mark.parametrize(
    ("batch_sizes", "message"),
    [
        ([], "Expected sequence length to be larger than 0"),
        ([2, 4, 3, 3], "must not rise"),
        ([7, 6, -1], "must not be negative"),
        ([3, 3, 3], r"add up to the 12 rows of x \[2, 12, 5\], got 9"),
    ],
)
@pytest.mark.parametrize("cell", CELLS)
def test_wrong_batch_sizes(cell, batch_sizes, message):
    case = Case(cell)
    tensors = case.make()
    case.batch_sizes = batch_sizes
    with pytest.raises(RuntimeError, match=message):
        forward(case, tensors)


def test_wrong_gradients():
    case = Case("lstm")
    tensors, grads = case.make(), case.cotangents()
    results = forward(case, tensors)
    with pytest.raises(RuntimeError, match=r"lstm_backward: grad_y must have shape \[M, N, P\]"):
        backward(case, tensors, results, [grads[0][:, 1:], *grads[1:]])
    narrow = [*results[:3], results[3].float(), results[4]]
    with pytest.raises(RuntimeError, match="gates must be float64 where x is"):
        backward(case, tensors, narrow, grads)
    with pytest.raises(RuntimeError, match="x must be float32, float64, bfloat16 or float16"):
        forward(case, {**tensors, "x": tensors["x"].long()})


@pytest.mark.parametrize("name", built_isas())
def test_every_instruction_set(name):
    order = built_isas()
    if order.index(name) > order.index(isa()):
        pytest.skip(f"this machine does not support {name}")
    code = "import test_rnn_kernels as t; t.check_this_instruction_set()"
    here = os.path.dirname(__file__)
    folders = [here, os.path.dirname(here)]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MODELBATCH_ISA": name, "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == name


def check_this_instruction_set() -> None:
    """What `test_every_instruction_set` runs; panels are 4 to 32 columns wide."""
    for cell in CELLS:
        for hidden in (1, 3, 4, 5, 8, 9, 13, 16, 17, 31, 32, 33, 50):
            for batch_sizes in ([1], [7] * 3, [19, 19, 8, 8, 1]):
                check(Case(cell, hidden=hidden, inputs=hidden, batch_sizes=batch_sizes))
        check(Case(cell, hidden=33, batch_sizes=[40] * 9), 1e-10)
        check(Case(cell, hidden=33, batch_sizes=[40] * 9, dtype=torch.float32), 1e-4)
    check(Case("lstm", hidden=40, proj=9, batch_sizes=PACKED, reverse=True))
    test_sigmoid_and_tanh_within_two_units()
    print(isa())
