"""What `torch.lstm`, `torch.gru` and `torch.rnn_*` do around their layers, on stacked tensors."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelbatch.ops.rnn import gru, lstm, rnn


@dataclass(frozen=True)
class Options:
    """The options of `torch.lstm` and its like, under torch's names."""

    has_biases: bool
    num_layers: int
    dropout: Any
    train: bool
    bidirectional: bool
    batch_first: bool = False


def run_layer(
    kind: str,
    rows: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    batch_sizes: Sequence[int],
    reverse: bool = False,
) -> tuple[Tensor, ...]:
    """One layer and direction.

    Args:
        kind: ``"lstm"``, ``"gru"``, ``"rnn_tanh"`` or ``"rnn_relu"``.
        rows: ``[M or 1, N, I]``.
        states: tensors ``[M or 1, B, *]``, one or, for an LSTM, two.
        weights: w_ih, w_hh, b_ih and b_hh if `has_biases`, and w_hr if there is one.
        has_biases: see `weights`.
        batch_sizes: how many rows each step has.
        reverse: whether to run from the last step to the first.

    Returns:
        ``[M, N, P]``, and the last states ``[M, B, *]``.
    """
    biases = weights[2:4] if has_biases else (None, None)
    projection = weights[4 if has_biases else 2 :]
    if kind == "lstm":
        return lstm(
            rows,
            *states,
            *weights[:2],
            *biases,
            *projection,
            batch_sizes=batch_sizes,
            reverse=reverse,
        )
    if kind == "gru":
        return gru(rows, *states, *weights[:2], *biases, batch_sizes=batch_sizes, reverse=reverse)
    relu = kind == "rnn_relu"
    return rnn(
        rows, *states, *weights[:2], *biases, batch_sizes=batch_sizes, reverse=reverse, relu=relu
    )


def _all_or_one(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same number of models in all tensors, without copies."""
    models = max(t.shape[0] for t in tensors)
    return [t.expand(models, *t.shape[1:]) for t in tensors]


def run_layers(
    kind: str,
    rows: Tensor,
    batch_sizes: Sequence[int],
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    options: Options,
    drop: Callable[[Tensor], Tensor] | None,
) -> list[Tensor]:
    """All layers and directions.

    Args:
        kind: see `run_layer`.
        rows: ``[M or 1, N, I]``.
        batch_sizes: how many rows each step has.
        states: tensors ``[M or 1, L * D, B, *]``, one or, for an LSTM, two.
        params: torch's flat list of weights, each ``[M or 1, ...]``.
        options: the options.
        drop: dropout of the rows between layers, None for none.

    Returns:
        The rows of the last layer ``[M, N, D * P]``, and the last states ``[M, L * D, B, *]``.

    Raises:
        RuntimeError: the number of weights or the shape of a state does not fit.
    """
    directions = 2 if options.bidirectional else 1
    total = options.num_layers * directions
    projects = kind == "lstm" and states[0].shape[-1] != states[1].shape[-1]
    per_layer = (4 if options.has_biases else 2) + projects
    if len(params) != per_layer * total:
        raise RuntimeError(
            f"got an incorrect number of RNN parameters: {len(params)} instead of "
            f"{per_layer * total}"
        )
    for state in states:
        if state.dim() != 4 or state.shape[1] != total:
            raise RuntimeError(
                f"Expected hidden state of size [{total}, B, H], got {list(state.shape[1:])}"
            )
    last: list[list[Tensor]] = [[] for _ in states]
    for layer in range(options.num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            weights = params[index * per_layer : (index + 1) * per_layer]
            y, *ends = run_layer(
                kind,
                rows,
                [state.select(1, index) for state in states],
                weights,
                options.has_biases,
                batch_sizes,
                direction == 1,
            )
            outputs.append(y)
            for column, end in zip(last, ends, strict=True):
                column.append(end)
        rows = outputs[0] if directions == 1 else torch.cat(_all_or_one(outputs), -1)
        if drop is not None and layer + 1 < options.num_layers:
            rows = drop(rows)
    ends = [torch.stack(_all_or_one(column), 1) for column in last]
    return [rows, *ends]


def pad_rows(rows: Tensor, steps: int, options: Options) -> Tensor:
    """Rows ``[M, T * B, P]`` as torch lays out a padded batch, ``[M, T, B, P]`` or batch first."""
    y = rows.unflatten(1, (steps, rows.shape[1] // steps))
    return y.transpose(1, 2) if options.batch_first else y


def autocast_results(
    kind: str, results: Sequence[Tensor], given: Sequence[Tensor], packed: bool
) -> list[Tensor]:
    """Results in the dtypes that torch gives them under autocast on a CPU.

    Its fused kernel for padded LSTMs computes in the lower precision throughout. Elsewhere only the
    matrix products do, and what is added to a state takes the state's dtype.

    Args:
        kind: see `run_layer`.
        results: y and the last states.
        given: the initial states.
        packed: whether the sequences are packed, or this is a cell.
    """
    if all(r.dtype == given[-1].dtype for r in results) or results[0].device.type != "cpu":
        return list(results)
    fused = torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()
    if kind == "gru" or (kind == "lstm" and (packed or not fused)):
        lowered = 0
    elif kind == "lstm":
        lowered = len(results)
    else:
        return list(results)
    if kind == "lstm" and given[0].shape[-1] != given[1].shape[-1]:
        lowered = len(results) - 1  # the projection is a matrix product, the cell's state is not
    return [r if i < lowered else r.to(given[-1].dtype) for i, r in enumerate(results)]


# ---- packed sequences, for one model; torch's own write into tensors that are not batched --------


def _row_positions(batch_sizes: Sequence[int], width: int) -> list[int]:
    return [t * width + b for t, count in enumerate(batch_sizes) for b in range(count)]


def pack_padded_sequence(
    input: Tensor, lengths: Sequence[int], batch_first: bool
) -> tuple[Tensor, Tensor]:
    """`torch._pack_padded_sequence`: rows ``[N, *]`` and how many each step has, int64 ``[T]``.

    Raises:
        RuntimeError: the lengths do not fit the input, or are not sorted.
    """
    padded = input.transpose(0, 1) if batch_first else input
    if padded.numel() == 0:
        raise RuntimeError("Cannot pack empty tensors.")
    steps, batch = padded.shape[:2]
    if len(lengths) != batch:
        raise RuntimeError(
            f"Expected `len(lengths)` to be equal to batch_size, but got {len(lengths)} "
            f"(batch_size={batch})"
        )
    if min(lengths) <= 0:
        raise RuntimeError(
            "Length of all samples has to be greater than 0, but found an element in 'lengths' "
            "that is <= 0"
        )
    if any(a < b for a, b in itertools.pairwise(lengths)):
        raise RuntimeError(
            "`lengths` array must be sorted in decreasing order when `enforce_sorted` is True. You "
            "can pass `enforce_sorted=False` to pack_padded_sequence and/or pack_sequence to "
            "sidestep this requirement if you do not need ONNX exportability."
        )
    if lengths[0] > steps:
        raise RuntimeError(f"Expected lengths of at most {steps}, got {lengths[0]}")
    batch_sizes = [sum(length > t for length in lengths) for t in range(lengths[0])]
    index = torch.tensor(_row_positions(batch_sizes, batch), device=input.device)
    rows = padded.flatten(0, 1).index_select(0, index)
    return rows, torch.tensor(batch_sizes)


def pad_packed_sequence(
    data: Tensor,
    batch_sizes: Sequence[int],
    batch_first: bool,
    padding_value: float,
    total_length: int,
) -> tuple[Tensor, Tensor]:
    """`torch._pad_packed_sequence`: the padded batch, and the lengths, int64 ``[B]``.

    Raises:
        RuntimeError: `total_length` is shorter than a sequence.
    """
    steps, batch = len(batch_sizes), batch_sizes[0]
    if total_length > 0:
        if total_length < steps:
            raise RuntimeError(
                "Expected total_length to be at least the length of the longest sequence in input, "
                f"but got total_length={total_length} and max sequence length being {steps}"
            )
        steps = total_length
    count = sum(batch_sizes)
    source = [count] * (steps * batch)  # a row of padding behind the others
    for row, position in enumerate(_row_positions(batch_sizes, batch)):
        source[position] = row
    padding = torch.full_like(data[:1], padding_value)
    index = torch.tensor(source, device=data.device)
    padded = torch.cat([data, padding]).index_select(0, index).unflatten(0, (steps, batch))
    lengths = [sum(count > b for count in batch_sizes) for b in range(batch)]
    return padded.transpose(0, 1) if batch_first else padded, torch.tensor(lengths)
