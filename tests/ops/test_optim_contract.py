"""The optimizer operators: which models they touch, what results depend on, what they refuse."""

import functools
import hashlib
import os
import subprocess
import sys

import pytest
import torch
from optim_case import (
    RULES,
    SHAPES,
    STATE_DTYPE,
    M,
    assert_same_bits,
    make_states,
    make_tensors,
    run,
)

from modelbatch._extension import built_isas, isa
from modelbatch.ops import optim

DTYPES = list(STATE_DTYPE)
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
FALSE = torch.zeros(M, dtype=torch.bool)


def models_with_state(rule):
    """Options under which every rule uses every state it has."""
    extra = {"sgd": {"momentum": 0.9}, "rmsprop": {"momentum": 0.5, "centered": True}}
    extra["adam"] = extra["adamw"] = {"amsgrad": True}
    return tuple(o | extra.get(rule.name, {}) for o in rule.models)


# ---- models that sit out ------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by", ["active", "nonfinite", "both"])
def test_a_skipped_model_is_left_alone_bit_by_bit(rule, dtype, by):
    models = models_with_state(rule)
    params, grads = make_tensors([*SHAPES, (9000,)], dtype=dtype, steps=3)
    states = make_states(rule, params, models)
    expected, expected_states, _ = run(
        rule, params, grads, [[s.clone() for s in some] for some in states], models=models
    )
    skipped = torch.tensor([False, True, False, False, True])
    for tensor in [*params, *(g for now in grads for g in now), *(s for t in states for s in t)]:
        tensor[skipped] = torch.nan
    common = {
        "active": {"active": ~skipped},
        "nonfinite": {"nonfinite": skipped},
        "both": {
            "active": torch.tensor([True, False, True, True, True]),
            "nonfinite": torch.tensor([False, False, False, False, True]),
        },
    }[by]
    before = [t.clone() for t in [*params, *(s for some in states for s in some)]]
    start = torch.tensor([0.0, 7.0, 0.0, 0.0, 3.0])
    result, states, step = run(rule, params, grads, states, start, models, **common)
    after = [*result, *(s for some in states for s in some)]
    assert_same_bits([t[skipped] for t in after], [t[skipped] for t in before])
    kept = [*expected, *(s for some in expected_states for s in some)]
    assert_same_bits([t[~skipped] for t in after], [t[~skipped] for t in kept])
    assert step.tolist() == [3.0, 7.0, 3.0, 3.0, 3.0]


@every_rule
def test_no_model_to_update(rule):
    params, grads = make_tensors(steps=1)
    result, _, step = run(rule, params, grads, active=FALSE)
    assert_same_bits(result, params)
    assert not step.any()


def test_sgd_begins_where_its_step_is_zero():
    """The momentum buffer is not read then, whatever it holds, and is read ever after."""
    rule = RULES["sgd"]
    models = ({"lr": 0.1, "momentum": 0.5, "dampening": 0.5},) * 2
    params, grads = make_tensors([(20,)], m=2, steps=1)
    buffer = torch.full((2, 20), 3.0, dtype=torch.float64)
    buffer[0] = torch.nan
    start = torch.tensor([0.0, 1.0])
    _, ((buffer,),), step = run(rule, params, grads, [[buffer]], start, models)
    assert_same_bits([buffer[0]], [grads[0][0][0]])
    torch.testing.assert_close(buffer[1], 1.5 + 0.5 * grads[0][0][1])
    assert step.tolist() == [1.0, 2.0]


@every_rule
def test_steps_of_models_may_differ(rule):
    """A model that starts later does the same steps as one that started at once."""
    params, grads = make_tensors(steps=4)
    states = make_states(rule, params)
    step = torch.zeros(M)
    there = [p.clone() for p in params]
    late = torch.tensor([False, True, False, True, True])
    for i in range(6):
        now = [g.clone() for g in grads[min(i, 3)]]
        for g, old in zip(now, grads[max(i - 2, 0)], strict=True):
            g[late] = old[late]
        active = torch.where(late, torch.tensor(i >= 2), torch.tensor(i < 4))
        rule.step_(there, now, *states, step, rule.hyper(), active)
    expected, expected_states, expected_step = run(rule, params, grads)
    assert_same_bits(there, expected)
    for some, other in zip(states, expected_states, strict=True):
        assert_same_bits(some, other)
    assert torch.equal(step, expected_step)


# ---- what results depend on ---------------------------------------------------------------------


def step_everything(order, m=23, shapes=((3, 50), (7,), (), (8200,), (4, 9)), steps=2):
    """The bits of two steps of the models in `order`, out of `m`, by every rule and dtype."""
    results = []
    for rule in RULES.values():
        options = models_with_state(rule)
        models = [options[i % M] for i in range(m)]
        for dtype in DTYPES:
            params, grads = make_tensors(shapes, m, dtype, steps)
            grads[0][0] = grads[0][0].transpose(1, 2).contiguous().transpose(1, 2)
            chosen = [models[i] for i in order]
            limit = torch.linspace(0.5, 2.0, m, dtype=torch.float64)
            result, states, step = run(
                rule,
                [p[order] for p in params],
                [[g[order] for g in now] for now in grads],
                models=chosen,
                clip_value=limit[order],
            )
            results += [*result, *(s for some in states for s in some), step]
            results.append(optim.grad_stats([g[order] for g in grads[0]])[0])
    return results


def test_a_model_does_the_same_alone_and_in_any_slot():
    everything = step_everything(range(23))
    order = [7, 2, 22, 0, 11]
    assert_same_bits(step_everything(order), [t[order] for t in everything])
    assert_same_bits(step_everything([4]), [t[4:5] for t in everything])


def test_number_of_threads_does_not_matter():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(step_everything(range(5), 5, ((3, 50), (40000,), (), (4, 9))))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@functools.cache
def digest():
    """One line for the bits of every rule and dtype, and the instruction set."""
    h = hashlib.sha256()
    for tensor in step_everything(range(5), 5):
        h.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return f"{isa()} {h.hexdigest()}"


@pytest.mark.parametrize("name", built_isas())
def test_instruction_set_does_not_matter(name):
    order = built_isas()
    if order.index(name) > order.index(best_isa()):
        pytest.skip(f"this machine does not support {name}")
    line = run_with_isa(name, "print(digest())")
    assert line.split()[0] == name
    assert line.split()[1] == digest().split()[1]


@functools.cache
def best_isa():
    """What the machine supports, whatever MODELBATCH_ISA says of this process."""
    return run_with_isa("", "print(isa())")


def run_with_isa(name, code):
    folder = os.path.dirname(os.path.abspath(__file__))
    tests = os.path.dirname(folder)
    path = os.pathsep.join([folder, tests, os.path.dirname(tests)])
    done = subprocess.run(
        [sys.executable, "-c", f"from test_optim_contract import *; {code}"],
        env={**os.environ, "MODELBATCH_ISA": name, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- edges --------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("m", [0, 1])
@pytest.mark.parametrize("shapes", [[], [(), (0,), (3, 0, 2), (5,)], [(), ()]])
def test_few_models_and_empty_tensors(rule, m, shapes):
    params, grads = make_tensors(shapes, m, steps=1)
    models = rule.models[1 : 1 + m]
    result, _, step = run(rule, params, grads, models=models)
    assert [p.shape for p in result] == [p.shape for p in params]
    assert all((a != b).all() for a, b in zip(result, params, strict=True))
    assert step.tolist() == [1.0] * m


def test_states_that_no_model_asks_for_may_be_missing():
    plain = ({"lr": 0.1},) * M
    params, grads = make_tensors(steps=2)
    for name, missing in {"sgd": [0], "adam": [2], "adamw": [2], "rmsprop": [1, 2]}.items():
        rule = RULES[name]
        states = make_states(rule, params, plain)
        expected, _, _ = run(rule, params, grads, models=plain)
        for i in missing:
            states[i] = []
        assert_same_bits(run(rule, params, grads, states, models=plain)[0], expected)


def test_vectors_of_any_strides():
    rule = RULES["adam"]
    params, grads = make_tensors(steps=1)
    scale = torch.linspace(0.5, 1.5, M)
    active = torch.tensor([True, False, True, True, False])
    common = {"active": active, "inv_scale": scale, "clip_value": scale.double()}
    expected = run(rule, params, grads, **common)
    spread = {k: torch.stack([v, v], dim=1)[:, 1] for k, v in common.items()}
    step = torch.zeros(M, 2)[:, 0]
    states = make_states(rule, params)
    rule.step_(params, grads[0], *states, step, rule.hyper(), **spread)
    assert_same_bits(params, expected[0])
    assert torch.equal(step, expected[2])


@every_rule
def test_leaves_that_require_gradients_and_their_versions(rule):
    params, grads = make_tensors(steps=1)
    expected, _, _ = run(rule, params, grads)
    leaves = [p.clone().requires_grad_() for p in params]
    loss = sum((p * p).sum() for p in leaves)
    with torch.no_grad():
        rule.step_(leaves, grads[0], *make_states(rule, params), torch.zeros(M), rule.hyper())
    assert_same_bits([p.detach() for p in leaves], expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_rule
def test_opcheck(rule):
    op = getattr(torch.ops.modelbatch, f"{rule.name}_step_").default
    params, grads = make_tensors([(3, 4), ()], dtype=torch.float32, steps=1)
    args = (params, grads[0], *make_states(rule, params), torch.zeros(M), rule.hyper())
    torch.library.opcheck(op, args)
    torch.library.opcheck(op, (*args, ~FALSE, FALSE, torch.ones(M), torch.ones(M).double(), None))


def test_opcheck_of_grad_stats():
    params, _ = make_tensors([(3, 4), ()], dtype=torch.float32)
    torch.library.opcheck(torch.ops.modelbatch.grad_stats.default, (params,))


# ---- refusals -----------------------------------------------------------------------------------


def adam_arguments():
    params, grads = make_tensors([(2, 3), (4,)], steps=1, dtype=torch.float32)
    first, second, largest = make_states(RULES["adam"], params)
    return {
        "params": params,
        "grads": grads[0],
        "exp_avgs": first,
        "exp_avg_sqs": second,
        "max_exp_avg_sqs": largest,
        "step": torch.zeros(M),
        "hyper": RULES["adam"].hyper(),
    }


def second(**changed):
    """A change of the second tensor of a list."""
    ((name, change),) = changed.items()
    return lambda a: {name: [a[name][0], change(a[name][1])]}


REFUSALS = {
    "fewer gradients": (lambda a: {"grads": a["grads"][:1]}, "2 tensors, but grads has 1"),
    "fewer states": (lambda a: {"exp_avgs": []}, "2 tensors, but exp_avgs has 0"),
    "one state": (
        lambda a: {"max_exp_avg_sqs": a["max_exp_avg_sqs"][:1]},
        "2 tensors, but max_exp_avg_sqs has 1",
    ),
    "asked state": (
        lambda a: {"max_exp_avg_sqs": []},
        "model 2 has amsgrad = 1, but max_exp_avg_sqs is empty",
    ),
    "shape of a gradient": (
        second(grads=lambda g: g[:, :2]),
        r"grads\[1\] must have the shape \[5, 4\] of params\[1\], got \[5, 2\]",
    ),
    "shape of a state": (second(exp_avg_sqs=lambda s: s[:3]), r"exp_avg_sqs\[1\].*got \[3, 4\]"),
    "number of models": (
        second(params=lambda p: p[:3].clone()),
        r"params\[1\] must have shape \[M, ...\] with M = 5 models as step, got \[3, 4\]",
    ),
    "no model axis": (second(params=lambda p: p.sum()), r"params\[1\].*got \[\]"),
    "dtype of a parameter": (second(params=torch.Tensor.double), r"params\[1\].*dtype of params"),
    "dtype of a gradient": (second(grads=torch.Tensor.double), r"grads\[1\].*dtype of params"),
    "dtype of a state": (second(exp_avgs=torch.Tensor.double), r"exp_avgs\[1\].*float32"),
    "whole numbers": (
        lambda a: {"params": [p.int() for p in a["params"]]},
        "must be float32, float64, bfloat16 or float16",
    ),
    "an expanded parameter": (
        second(params=lambda p: p[:1].expand(M, -1)),
        r"params\[1\] of shape \[5, 4\] is expanded",
    ),
    "an expanded state": (
        second(exp_avgs=lambda s: s[:, :1].expand(-1, 4)),
        r"exp_avgs\[1\] of shape \[5, 4\] is expanded",
    ),
    "a parameter twice": (lambda a: {"params": [a["params"][0]] * 2}, r"must have the shape"),
    "a state twice": (lambda a: {"exp_avgs": a["exp_avg_sqs"]}, "share memory"),
    "a gradient that is the parameter": (lambda a: {"grads": a["params"]}, "share memory"),
    "dtype of step": (lambda a: {"step": a["step"].double()}, "step must be float32"),
    "shape of step": (lambda a: {"step": torch.zeros(M, 1)}, r"step must be .* got shape \[5, 1\]"),
    "expanded step": (lambda a: {"step": torch.zeros(1).expand(M)}, "step must not be expanded"),
    "rows of hyper": (lambda a: {"hyper": a["hyper"][:7]}, r"\[8, 5\], got shape \[7, 5\]"),
    "dtype of hyper": (lambda a: {"hyper": a["hyper"].float()}, "hyper must be float64"),
    "strides of hyper": (
        lambda a: {"hyper": a["hyper"].t().contiguous().t()},
        "hyper must be float64, contiguous",
    ),
    "dtype of active": (lambda a: {"active": torch.ones(M)}, "active must be bool"),
    "shape of nonfinite": (
        lambda a: {"nonfinite": FALSE[:2]},
        r"nonfinite must have shape \[5\], one per model, got \[2\]",
    ),
    "dtype of inv_scale": (
        lambda a: {"inv_scale": torch.ones(M).double()},
        "inv_scale must be float32",
    ),
    "dtype of clip_factor": (
        lambda a: {"clip_factor": torch.ones(M).half()},
        "clip_factor must be float64",
    ),
    "dtype of clip_value": (lambda a: {"clip_value": torch.ones(M)}, "clip_value must be float64"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_change_nothing(name):
    change, message = REFUSALS[name]
    arguments = adam_arguments()
    changed = arguments | change(arguments)
    tensors = [t for v in changed.values() for t in (v if isinstance(v, list) else [v])]
    before = [t.clone() for t in tensors]
    with pytest.raises(RuntimeError, match=message) as error:
        optim.adam_step_(**changed)
    assert "modelbatch::adam_step_: " in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize(
    ("name", "state", "option"),
    [
        ("sgd", 0, "momentum = 0.9"),
        ("rmsprop", 1, "centered = 1"),
        ("rmsprop", 2, "momentum = 0.9"),
    ],
)
def test_refusal_names_the_model_that_asks_for_a_missing_state(name, state, option):
    rule = RULES[name]
    params, grads = make_tensors(steps=1)
    states = make_states(rule, params)
    states[state] = []
    with pytest.raises(RuntimeError, match=rf"model [123] has {option}, but .* is empty"):
        run(rule, params, grads, states)


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([], "at least one tensor"),
        ([torch.zeros(())], r"grads\[0\] must have shape \[M, ...\]"),
        ([torch.zeros(2), torch.zeros(3, 2)], r"grads\[1\].*M = 2 models.*got \[3, 2\]"),
        ([torch.zeros(2), torch.zeros(2).double()], r"grads\[1\] must have the dtype"),
        ([torch.zeros(2).int()], "must be float32"),
    ],
)
def test_refusals_of_grad_stats(grads, message):
    # Without tensors the dispatcher finds no kernel: the error is torch's.
    error = (RuntimeError, NotImplementedError)
    with pytest.raises(error, match=message if grads else "grad_stats"):
        optim.grad_stats(grads)
