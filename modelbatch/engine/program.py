"""A network and its loss as a program: what `modelbatch::train_steps_` reads."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .encoding import (
    HEADER_LENGTH,
    INSTRUCTION_LENGTH,
    LOSS_PARAMETERS,
    VERSION,
    Loss,
    Op,
)

__all__ = ["Builder", "Instruction", "LossSpec", "Program", "Refusal", "Value"]


class Refusal(Exception):
    """The engine does not take this; the text says why."""


@dataclass(frozen=True)
class Value:
    """A tensor of the forward: a value of the program, and its shape in one model."""

    index: int
    shape: tuple[int, ...]
    """The batch first."""


@dataclass
class Instruction:
    """One step of the forward. Parameters and buffers are numbers of slots, or -1."""

    op: Op
    input: int
    output: int
    input2: int = -1
    weight: int = -1
    bias: int = -1
    mean: int = -1
    var: int = -1
    number: int = -1
    extra: int = -1
    counter: int = -1
    """Batch normalisation's number of batches; in `extra` once the program is encoded."""


@dataclass
class LossSpec:
    """A loss with its options, as `losses.py` understood it."""

    kind: Loss
    ignore_index: int = 0
    smoothing: float | None = None
    columns: list[float] | None = None
    """Class weights, or the weights of positive targets."""
    delta: float | None = None
    sums: bool = False


@dataclass
class Program:
    """What the operator needs to know of a network.

    Attributes:
        code: int64 `[n]`.
        numbers: float64 `[A, M]`.
        params: slots of the parameters: those that learn, then the others.
        buffers: slots of the buffers.
        draws: how many random operations one forward has.
        num_learning: how many of `params` learn.
        activations: numbers of all values of one sample.
        batch_norm: whether there is a batch normalisation.
    """

    code: Tensor
    numbers: Tensor
    params: list[int]
    buffers: list[int]
    draws: int
    num_learning: int
    activations: int
    batch_norm: bool


def grid(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and width of a value of this shape (the batch first)."""
    own = shape[1:]
    rows = 1
    for size in own[:-1]:
        rows *= size
    return rows, own[-1] if own else 1


@dataclass
class Builder:
    """Collects the instructions of a forward.

    Args:
        shape: of the input of one model, the batch first.
        num_models: M.
        integers: whether the input is int64.
    """

    shape: tuple[int, ...]
    num_models: int
    integers: bool = False
    values: list[tuple[int, int]] = field(init=False)
    instructions: list[Instruction] = field(default_factory=list)
    numbers: list[list[float]] = field(default_factory=list)
    draws: int = 0

    def __post_init__(self) -> None:
        self.values = [grid(self.shape)]

    @property
    def input(self) -> Value:
        """The input of the network."""
        return Value(0, self.shape)

    def number(self, value: float | Sequence[float | None] | None) -> int:
        """Keep one number for each model; returns its row. None becomes NaN."""
        if value is None or isinstance(value, int | float):
            value = [value] * self.num_models
        self.numbers.append([float("nan") if v is None else float(v) for v in value])
        return len(self.numbers) - 1

    def emit(self, op: Op, x: Value, shape: Sequence[int], **fields: int) -> Value:
        """Add an instruction on `x` whose result has this shape."""
        if self.integers and x.index == 0 and op is not Op.EMBEDDING:
            raise Refusal("an input of integers can only go into an embedding")
        index = len(self.values)
        self.values.append(grid(shape))
        self.instructions.append(Instruction(op, x.index, index, **fields))
        return Value(index, tuple(shape))

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        """The same numbers in another shape."""
        if shape[0] != x.shape[0]:
            raise Refusal("a reshape that mixes samples is not in the engine's vocabulary")
        if grid(shape) == self.values[x.index] or (self.integers and x.index == 0):
            return Value(x.index, tuple(shape))
        return self.emit(Op.RESHAPE, x, shape)

    # ---- the end

    def build(
        self, output: Value, loss: LossSpec, learning: Sequence[int], names: Sequence[str]
    ) -> Program:
        """The program of all instructions that lead to `output`.

        Args:
            output: what the loss reads.
            loss: the loss.
            learning: slots of the parameters that the optimizer has, in its order.
            names: of the slots, for messages.

        Raises:
            Refusal: a parameter is used twice, or nothing learns.
        """
        code = self._living(output)
        used = _slots(code, ("weight", "bias"), names)
        buffers = _slots(code, ("mean", "var", "counter"), names)
        first = [slot for slot in learning if slot in used]
        if not first:
            raise Refusal("no parameter that the forward uses is trained")
        params = first + [slot for slot in used if slot not in first]
        places = {slot: place for place, slot in enumerate(params)}
        buffer_places = {slot: place for place, slot in enumerate(buffers)}
        renumbered = {0: 0}
        for instruction in code:
            renumbered[instruction.output] = len(renumbered)
        header = self._header(len(renumbered), len(code), renumbered[output.index], loss)
        values = [self.values[old] for old in renumbered]
        rows = [_encoded(instruction, renumbered, places, buffer_places) for instruction in code]
        header[13:15] = len(first), len(buffers)
        flat = [*header, *(n for pair in values for n in pair), *(n for row in rows for n in row)]
        numbers = torch.tensor(self.numbers, dtype=torch.float64)
        return Program(
            torch.tensor(flat, dtype=torch.int64),
            numbers.reshape(len(self.numbers), self.num_models).contiguous(),
            params,
            buffers,
            self.draws,
            len(first),
            sum(rows * width for rows, width in values),
            any(instruction.op is Op.BATCH_NORM for instruction in code),
        )

    def _header(self, values: int, code: int, output: int, loss: LossSpec) -> list[int]:
        parameters = [0] * LOSS_PARAMETERS
        parameters[0] = loss.ignore_index
        parameters[1] = -1 if loss.smoothing is None else self.number(loss.smoothing)
        parameters[2] = -1
        if loss.columns is not None:
            first, *_ = (self.number(value) for value in loss.columns)
            parameters[2] = first
        parameters[3] = -1 if loss.delta is None else self.number(loss.delta)
        parameters[4] = int(loss.sums)
        header = [VERSION, values, code, output, int(loss.kind), *parameters, 0, 0]
        assert len(header) == HEADER_LENGTH
        return header

    def _living(self, output: Value) -> list[Instruction]:
        """The instructions that lead to the output, in order."""
        wanted, living = {output.index}, []
        for instruction in reversed(self.instructions):
            if instruction.output in wanted:
                wanted |= {instruction.input, instruction.input2}
                living.append(instruction)
            elif instruction.mean >= 0:
                raise Refusal("a batch normalisation whose result is not used")
        if not living:
            raise Refusal("the forward computes nothing that learns")
        return living[::-1]


def _slots(code: list[Instruction], fields: tuple[str, ...], names: Sequence[str]) -> list[int]:
    found: dict[int, None] = {}
    for instruction in code:
        for name in fields:
            slot = getattr(instruction, name)
            if slot < 0:
                continue
            if slot in found:
                raise Refusal(f"'{names[slot]}' is used more than once")
            found[slot] = None
    return list(found)


def _encoded(
    instruction: Instruction,
    values: dict[int, int],
    params: dict[int, int],
    buffers: dict[int, int],
) -> list[int]:
    counter = buffers.get(instruction.counter, -1)
    row = [
        int(instruction.op),
        values[instruction.input],
        values.get(instruction.input2, -1),
        values[instruction.output],
        params.get(instruction.weight, -1),
        params.get(instruction.bias, -1),
        buffers.get(instruction.mean, -1),
        buffers.get(instruction.var, -1),
        instruction.number,
        counter if instruction.op is Op.BATCH_NORM else instruction.extra,
    ]
    assert len(row) == INSTRUCTION_LENGTH
    return row
