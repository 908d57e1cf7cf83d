"""LSTM, GRU, RNN and their cells, each layer one operator for all models."""

from typing import Any

import torch
from torch import Tensor

from ..attributes import PerModelFloat
from ..errors import BatchingError
from ..ops import random as philox, rnn as ops
from ..ops.rnn_layers import Options, autocast_results, pad_rows, run_layers
from ..random import torch_rng
from .folds import any_batched
from .mode import Call, handles_per_model_numbers, register

_LAYERS = {
    torch.lstm: "lstm",
    torch.gru: "gru",
    torch.rnn_tanh: "rnn_tanh",
    torch.rnn_relu: "rnn_relu",
}
_CELLS = {
    torch.lstm_cell: "lstm",
    torch.gru_cell: "gru",
    torch.rnn_tanh_cell: "rnn_tanh",
    torch.rnn_relu_cell: "rnn_relu",
}


def _stacked(call: Call, value: Tensor) -> Tensor:
    """`[M, ...]`, or `[1, ...]` if all models share it."""
    physical, batched = call.unwrap(value)
    return physical if batched else physical.unsqueeze(0)


def _wrapped(call: Call, value: Tensor) -> Tensor:
    return call.wrap(value.expand(call.num_models, *value.shape[1:]))


def _states(hx: Any) -> list[Tensor]:
    return [hx] if isinstance(hx, Tensor) else list(hx)


class _Arguments:
    """The arguments of both overloads of `torch.lstm` and its like by name."""

    def __init__(self, *args: Any, **kwargs: Any):
        # the weights are the third argument of padded sequences and the fourth of packed ones
        packed = "data" in kwargs or (len(args) > 2 and isinstance(args[2], Tensor))
        packed = packed or (len(args) > 3 and not isinstance(args[3], bool))
        read = self._packed if packed else self._padded
        read(*args, **kwargs)

    def _padded(
        self,
        input: Tensor,
        hx: Any,
        params: Any,
        has_biases: bool,
        num_layers: int,
        dropout: Any,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> None:
        self.input, self.batch_sizes, self.hx, self.params = input, None, _states(hx), list(params)
        self.options = Options(has_biases, num_layers, dropout, train, bidirectional, batch_first)

    def _packed(
        self,
        data: Tensor,
        batch_sizes: Any,
        hx: Any,
        params: Any,
        has_biases: bool,
        num_layers: int,
        dropout: Any,
        train: bool,
        bidirectional: bool,
    ) -> None:
        self.input, self.batch_sizes = data, batch_sizes
        self.hx, self.params = _states(hx), list(params)
        self.options = Options(has_biases, num_layers, dropout, train, bidirectional)

    @property
    def drops(self) -> bool:
        """Whether any model drops anything between layers."""
        p = self.options.dropout
        values = p.values if isinstance(p, PerModelFloat) else (p,)
        return self.options.train and self.options.num_layers > 1 and any(values)


_ONEDNN_FROM = 65
"""Hidden units from which torch's LSTM of float32 is the faster one, as oneDNN computes it."""


def _pays_for_one(call: Call, kind: str, a: _Arguments) -> bool:
    """Whether this library's operators are faster than torch's for one model by itself.

    On a CPU they are, large LSTMs excepted (`benchmarks/results/one_model.json`).
    """
    dtype = a.input.dtype
    if call.level is not None or a.input.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    large = kind == "lstm" and dtype == torch.float32 and a.params[1].shape[1] >= _ONEDNN_FROM
    return not large and dtype in (torch.float32, torch.float64)


@handles_per_model_numbers
@register(*_LAYERS, random=True)
def layers(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.lstm`, `torch.gru`, `torch.rnn_tanh` and `torch.rnn_relu`, padded or packed."""
    kind, a = _LAYERS[func], _Arguments(*args, **kwargs)
    differs = any_batched(call, a.input, a.hx, a.params)
    if not a.drops and not differs and not _pays_for_one(call, kind, a):
        return NotImplemented
    if a.input.dim() != (3 if a.batch_sizes is None else 2):
        return NotImplemented
    if a.batch_sizes is not None and call.level is not None and call.is_batched(a.batch_sizes):
        raise BatchingError("the lengths of packed sequences differ between the models")
    with call.lowered():
        x = _stacked(call, a.input)
        if a.batch_sizes is None:
            x = x.transpose(1, 2) if a.options.batch_first else x  # [M, T, B, I]
            batch_sizes = [x.shape[2]] * x.shape[1]
            x = x.flatten(1, 2)
        else:
            batch_sizes = a.batch_sizes.tolist()
        if not batch_sizes:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        states = [_stacked(call, state) for state in a.hx]
        params = [_stacked(call, param) for param in a.params]

        def drop(rows: Tensor) -> Tensor:
            return _drop(call, rows, a.options.dropout)

        found = run_layers(
            kind, x, batch_sizes, states, params, a.options, drop if a.drops else None
        )
        if a.batch_sizes is None:
            found[0] = pad_rows(found[0], len(batch_sizes), a.options)
        found = autocast_results(kind, found, states, a.batch_sizes is not None)
        return tuple(_wrapped(call, t) for t in found)


def _drop(call: Call, rows: Tensor, p: Any) -> Tensor:
    """Dropout of physical rows `[M or 1, N, P]`, each model's from its own stream."""
    rows = rows.expand(call.num_models, *rows.shape[1:])
    values = p.values if isinstance(p, PerModelFloat) else (p,) * call.num_models
    if rows.numel() == 0:
        return rows
    streams = call.streams
    if streams.kind == "philox":
        rates = streams.constant(values)
        return philox.dropout(rows, rates, streams.seed, streams.step, streams.next_op(), 1)
    results = []
    with torch_rng(call.device):
        for i, own in enumerate(rows.unbind(0)):
            with streams.as_model(i):
                rate = float(values[i] or 0.0)
                results.append(torch.dropout(own, rate, True) if rate else own)
    return torch.stack(results)


@register(*_CELLS)
def cell(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.lstm_cell`, `torch.gru_cell`, `torch.rnn_tanh_cell` and `torch.rnn_relu_cell`."""

    def unpack(
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        return input, _states(hx), (w_ih, w_hh, b_ih, b_hh)

    kind = _CELLS[func]
    x, hx, weights = unpack(*args, **kwargs)
    if not any_batched(call, x, hx, weights) or x.dim() != 2:
        return NotImplemented
    with call.lowered():
        rows, states = _stacked(call, x), [_stacked(call, state) for state in hx]
        params = [None if w is None else _stacked(call, w) for w in weights]
        sizes = [rows.shape[1]]
        if kind == "lstm":
            _, *found = ops.lstm(rows, *states, *params, batch_sizes=sizes)
        elif kind == "gru":
            _, *found = ops.gru(rows, *states, *params, batch_sizes=sizes)
        else:
            relu = kind == "rnn_relu"
            _, *found = ops.rnn(rows, *states, *params, batch_sizes=sizes, relu=relu)
        found = autocast_results(kind, found, states, True)
        wrapped = tuple(_wrapped(call, t) for t in found)
    return wrapped if kind == "lstm" else wrapped[0]
