"""What `train_steps_` refuses, with nothing changed."""

import pytest
import torch
from engine_networks import Drop, Loss, Network, Residual, Training
from torch import nn

HEADER = 15


def training(**kwargs):
    def build(i):
        torch.manual_seed(i)
        return nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.LeakyReLU(), Drop(0.5, 0),
            Residual(nn.LayerNorm(8)), nn.Linear(8, 3),
        )  # fmt: skip

    network = Network([build(i) for i in range(2)], Loss("cross_entropy"), (1, 5))
    x, y = torch.randn(2, 6, 5), torch.randint(3, (2, 6))
    return Training(network, x, y, torch.optim.Adam, {"lr": 0.1}, **kwargs)


def refused(message, **changes):
    case = training()
    values = {name: change(case) for name, change in changes.items()}
    before = [tensor.clone() for tensor in case.everything()]
    with pytest.raises(RuntimeError, match=message):
        case.run(**values)
    for old, new in zip(before, case.everything(), strict=True):
        assert torch.equal(old, new)


def edited(**edits):
    """A change of the program: positions as h<number>, v<value>_<which> or i<number>_<field>."""

    def edit(case):
        program = case.network.program.clone()
        first = HEADER + 2 * int(program[1])
        for name, value in edits.items():
            if name[0] == "h":
                at = int(name[1:])
            else:
                which, part = map(int, name[1:].split("_"))
                at = HEADER + 2 * which + part if name[0] == "v" else first + 10 * which + part
            program[at] = value
        return program

    return edit


def test_the_case_itself_is_accepted():
    case = training()
    case.run(program=edited()(case))


@pytest.mark.parametrize(
    ("message", "edits"),
    [
        ("version 1, got 2", {"h0": 2}),
        ("must have .* numbers", {"h1": 3}),
        ("1 to 65536 values", {"h1": 2**62}),
        ("1 to 65536 values", {"h2": -1}),
        ("output must be one of the values", {"h3": 0}),
        ("output must be one of the values", {"h3": 100}),
        ("there is no loss 8", {"h4": 8}),
        ("there is no loss -1", {"h4": -1}),
        ("numbers from row 50 on", {"h6": 50}),
        ("numbers from row -2 on", {"h7": -2}),
        ("the loss has no delta", {"h8": 0}),
        ("reduction 2", {"h9": 2}),
        ("no label smoothing", {"h4": 3, "h6": 0}),
        ("of 8 params are optimized", {"h13": 9}),
        ("of 8 params are optimized", {"h13": -1}),
        ("program says 2 buffers", {"h14": 2}),
        (r"value 1 has the size \(0, 8\)", {"v1_0": 0}),
        (r"value 1 has the size", {"v1_0": 2**40, "v1_1": 2**40}),
        ("instruction 0 .* opcode 16", {"i0_0": 16}),
        ("instruction 0 .* opcode -1", {"i0_0": -1}),
        (r"instruction 1 \(batch_norm\) reads value 90", {"i1_1": 90}),
        (r"instruction 0 \(linear\) reads value 1 before", {"i0_1": 1}),
        (r"instruction 1 \(batch_norm\) writes value 1, which exists", {"i1_3": 1}),
        (r"instruction 0 \(linear\) writes value 77", {"i0_3": 77}),
        (r"instruction 0 \(linear\) has weight 8 of 8", {"i0_4": 8}),
        (r"instruction 0 \(linear\) has weight -1", {"i0_4": -1}),
        (r"instruction 0 \(linear\) needs a weight of shape \[2, 8, 5\]", {"i0_4": 6}),
        (r"instruction 0 \(linear\) needs a bias of shape \[2, 8\]", {"i0_5": 7}),
        ("which another one has", {"i1_4": 1}),
        ("instruction 0 .* makes a value of size", {"v1_0": 2}),
        (r"instruction 1 \(batch_norm\) has only one of mean and var", {"i1_6": -1}),
        (r"instruction 1 \(batch_norm\) has mean 3 of 3", {"i1_6": 3}),
        (r"instruction 1 \(batch_norm\) has a mean of another dtype", {"i1_6": 2}),
        (r"instruction 1 \(batch_norm\) has numbers from row", {"i1_8": 100}),
        (r"instruction 1 \(batch_norm\) has numbers from row", {"i1_8": -1}),
        (r"instruction 3 \(dropout\) has op_index -1", {"i3_9": -1}),
        (r"instruction 0 \(embedding\)", {"i0_0": 14}),
        ("no instruction uses params", {"i0_5": -1}),
        ("no instruction uses buffers", {"i1_9": -1}),
        (r"instruction 5 \(add\) does not lead to the output", {"i6_1": 4}),
    ],
)
def test_bad_programs(message, edits):
    refused(message, program=edited(**edits))


def zeros(*size, dtype=torch.float32):
    return lambda case: torch.zeros(size, dtype=dtype)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("program must be int64", {"program": zeros(3)}),
        ("at least 15 numbers", {"program": zeros(3, dtype=torch.int64)}),
        ("step must be float32", {"step": zeros(2, dtype=torch.float64)}),
        ("there is no rule 9", {"rule": lambda case: 9}),
        ("there is no rule -1", {"rule": lambda case: -1}),
        ("flags must be", {"flags": lambda case: 32}),
        ("params must hold", {"params": lambda case: []}),
        ("must be float32 or float64", {"params": lambda case: [p.half() for p in case.params]}),
        (r"params\[1\] must have the dtype", {
            "params": lambda case: [case.params[0], case.params[1].double(), *case.params[2:]]
        }),
        (r"params\[0\] must be contiguous", {
            "params": lambda case: [case.params[0].mT.contiguous().mT, *case.params[1:]]
        }),
        ("has weight 6 of 6 params|of 6 params are", {"params": lambda case: case.params[:6]}),
        ("share memory", {
            "params": lambda case: [*case.params[:3], case.params[2], *case.params[4:]]
        }),
        ("states lacks exp_avg_sqs", {"states": lambda case: case.states[:9]}),
        ("states must hold 16", {"states": lambda case: case.states * 2}),
        (r"states\[0\] must be contiguous", {"states": lambda case: case.states[::-1]}),
        ("hyper must be float64", {"hyper": zeros(5, 2, dtype=torch.float64)}),
        ("numbers must be float64", {"numbers": zeros(2, dtype=torch.float64)}),
        ("numbers must be float64", {"numbers": zeros(9, 2)}),
        ("lr must be float64", {"lr": zeros(3, 2, dtype=torch.float64)}),
        ("active must be bool", {"active": zeros(2)}),
        ("clip_norm must be float64", {"clip_norm": zeros(3, dtype=torch.float64)}),
        ("dropout needs seed", {"seed": lambda case: None}),
        ("x must be float32", {"x": zeros(2, 6, 5, dtype=torch.float64)}),
        ("x must have shape", {"x": zeros(2, 6, 4)}),
        ("x must have shape", {"x": zeros(2)}),
        ("at least one sample", {"x": zeros(2, 0, 5)}),
        ("more than one sample", {"x": zeros(2, 1, 5), "target": zeros(2, 1, dtype=torch.int64)}),
        ("target must be int64", {"target": zeros(2, 6)}),
        ("target must have shape", {"target": zeros(2, 5, dtype=torch.int64)}),
        ("target 3 of sample 4 of step 1", {
            "target": lambda case: torch.tensor([[0] * 6, [0, 1, 2, -100, 3, 0]])
        }),
        ("sample_weight must be finite", {"sample_weight": lambda case: -torch.ones(2, 6)}),
        ("sample_weight must be finite", {"sample_weight": lambda case: torch.ones(2, 6) / 0}),
        ("sample_weight must have shape", {"sample_weight": zeros(2, 2, 6)}),
        ("sample_weight must be float", {"sample_weight": zeros(2, 6, dtype=torch.int64)}),
        ("model 0 has one in step 0", {"sample_weight": lambda case: torch.eye(6)[:2]}),
        ("model 1 has the dropout probability", {
            "numbers": lambda case: torch.tensor([[0.1, 1.5]], dtype=torch.float64).expand(20, 2)
        }),
    ],
)  # fmt: skip
def test_bad_arguments(message, changes):
    refused(message, **changes)


def test_a_word_that_does_not_exist():
    model = nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Linear(6, 2))
    network = Network([model], Loss("cross_entropy"), (2, 1))
    x, y = torch.zeros(1, 3, 2, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64)
    x[0, 1, 1] = 4
    case = Training(network, x, y)
    with pytest.raises(RuntimeError, match="index 4 of sample 1 of step 0 of model 0"):
        case.run()
    case.weight = torch.tensor([[1.0, 0.0, 1.0]])
    case.run()


def test_nothing_to_do():
    case = training()
    losses, status, _ = case.run(0, 0)
    assert losses.shape == status.shape == (0, 2)
    empty = training()
    empty.done = torch.zeros(0, dtype=torch.int64)
    empty.params = [p[:0] for p in empty.params]
    empty.buffers = [b[:0] for b in empty.buffers]
    empty.states = [s[:0] for s in empty.states]
    numbers = empty.network.number_rows()[:, :0].contiguous()
    none = torch.zeros(0, dtype=torch.int64)
    losses, _, _ = empty.run(
        step=torch.zeros(0), hyper=empty.hyper[:, :0].contiguous(), numbers=numbers, seed=none,
        stream_step=none,
    )  # fmt: skip
    assert losses.shape == (2, 0)
