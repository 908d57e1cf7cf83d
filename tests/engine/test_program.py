"""Programs, their encoding, and the operator's schema."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_case import NETWORKS, make_bundle, mlp
from torch import Tensor, nn

from modelbatch.engine import encoding, run
from modelbatch.engine.encoding import Loss, Op
from modelbatch.engine.program import Builder, LossSpec, Refusal
from modelbatch.optim.rules import RULES

ROOT = Path(__file__).parents[2]


def _constants(path: str) -> dict[str, int]:
    text = re.sub(r"/\*.*?\*/", "", (ROOT / path).read_text(), flags=re.DOTALL)
    found = {name: int(value) for name, value in re.findall(r"\b(MB_\w+) = (\d+)", text)}
    return found | {n: int(v) for n, v in re.findall(r"#define (MB_\w+) (\d+)", text)}


def test_the_numbers_are_those_of_the_header() -> None:
    header = _constants("csrc/engine/engine.h")
    ops = {name: v for name, v in header.items() if name.startswith("MB_OP_")}
    assert ops.pop("MB_OP_COUNT") == len(Op)
    assert ops == {f"MB_OP_{op.name}": op.value for op in Op}
    for loss in Loss:
        assert header[f"MB_ENGINE_{loss.name}"] == loss.value
    assert header["MB_ENGINE_LOSSES"] == len(Loss)
    for name in ("OWN_INPUT", "OWN_TARGET", "OWN_WEIGHT", "GRAD_NORM", "STOP_NONFINITE"):
        assert header[f"MB_ENGINE_{name}"] == getattr(encoding, name)
    for name in ("LOSS", "GRAD", "WEIGHTS", "RESTED"):
        assert header[f"MB_STATUS_{name}"] == getattr(encoding, f"STATUS_{name}")
    assert header["MB_PROGRAM_VERSION"] == encoding.VERSION
    assert header["MB_PROGRAM_HEADER"] == encoding.HEADER_LENGTH
    assert header["MB_LOSS_PARAMETERS"] == encoding.LOSS_PARAMETERS
    assert header["MB_INSTRUCTION_LENGTH"] == encoding.INSTRUCTION_LENGTH
    rules = _constants("csrc/optim/optim.h")
    for name, number in encoding.RULES.items():
        assert rules[f"MB_RULE_{name.upper()}"] == number
        assert any(rule.name == name for rule in RULES.values())


def test_what_leads_nowhere_is_left_out() -> None:
    b = Builder((9, 6), 2)
    h = b.emit(Op.LINEAR, b.input, (9, 4), weight=0)
    b.emit(Op.TANH, h, h.shape)
    out = b.emit(Op.LEAKY_RELU, h, h.shape, number=b.number((0.1, 0.2)))
    program = b.build(out, LossSpec(Loss.MSE), [0], ["weight"])
    code = program.code.tolist()
    assert code[:5] == [1, 3, 2, 2, Loss.MSE]
    assert code[15:21] == [1, 6, 1, 4, 1, 4]
    assert [code[21 + 10 * k] for k in range(2)] == [Op.LINEAR, Op.LEAKY_RELU]
    assert program.numbers.tolist() == [[0.1, 0.2]]
    assert program.activations == 14 and program.params == [0] and not program.batch_norm


def test_what_cannot_be_built() -> None:
    b = Builder((9, 6), 2)
    h = b.emit(Op.LINEAR, b.input, (9, 6), weight=0)
    again = b.emit(Op.LINEAR, h, (9, 6), weight=0)
    with pytest.raises(Refusal, match="'w' is used more than once"):
        b.build(again, LossSpec(Loss.MSE), [0], ["w"])
    with pytest.raises(Refusal, match="no parameter"):
        b.build(h, LossSpec(Loss.MSE), [], ["w"])
    with pytest.raises(Refusal, match="computes nothing"):
        b.build(b.input, LossSpec(Loss.MSE), [0], ["w"])
    b.emit(Op.BATCH_NORM, h, h.shape, mean=1, var=2)
    with pytest.raises(Refusal, match="is not used"):
        b.build(h, LossSpec(Loss.MSE), [0], ["w", "m", "v"])
    with pytest.raises(Refusal, match="mixes samples"):
        b.reshape(h, (18, 3))
    tokens = Builder((9, 6), 2, integers=True)
    with pytest.raises(Refusal, match="embedding"):
        tokens.emit(Op.TANH, tokens.input, (9, 6))


@pytest.mark.parametrize("network", ["residual", "bag", "rows"])
@pytest.mark.parametrize("steps", [1, 3])
def test_opcheck(network: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    build, make_x = NETWORKS[network]
    bundle = make_bundle(build)
    calls: list[tuple[Any, ...]] = []
    original = run.train_steps_

    def noted(*args: Any) -> Any:
        calls.append(tuple(_copy(arg) for arg in args))
        return original(*args)

    monkeypatch.setattr(run, "train_steps_", noted)
    x = torch.stack([make_x(9) for _ in range(steps)])
    bundle.train_steps(x, torch.randint(4, (steps, 9)))
    (args,) = calls
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.modelbatch.train_steps_.default, args, test_utils=checks)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [_copy(item) for item in value] if isinstance(value, list) else value


def test_sizes_that_are_left_to_torch() -> None:
    wide = make_bundle(lambda: nn.Sequential(nn.Linear(6, 1500), nn.Linear(1500, 1500)), "sgd", 1)
    assert "too large" in wide.explain(torch.randn(2, 6, dtype=torch.float64)).step_path
    long = make_bundle(lambda: mlp(nn.Tanh()), "sgd", 1)
    assert "too large" in long.explain(torch.randn(60000, 6, dtype=torch.float64)).step_path
