"""LSTM, GRU and RNN layers of stacked models in torch's own operators.

The truth for tests, the kernels of devices that have none of their own, and what second derivatives
are taken of: `lstm_reference`, `gru_reference` and `rnn_reference` are differentiable. Shapes are
those of `modelbatch.ops.rnn`: dim 0 of every argument is M, or 1 where all models share it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, State], tuple[State, State]]


def lstm_reference(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    batch_sizes: Sequence[int],
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer and direction of an LSTM.

    Returns:
        y ``[M, N, P]``, h_n ``[M, B, P]``, c_n ``[M, B, H]``, the activated gates i, f, g and o
        ``[M, N, 4H]`` and the cells ``[M, N, H]``.
    """
    dtype = x.dtype
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr = _widened(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    from_state = w_hh.transpose(1, 2)

    def cell(from_input: Tensor, state: State) -> tuple[State, State]:
        h, c = state
        into, forget, new, out = (from_input + h @ from_state).chunk(4, -1)
        into, forget, out = torch.sigmoid(into), torch.sigmoid(forget), torch.sigmoid(out)
        new = torch.tanh(new)
        c = forget * c + into * new
        h = out * torch.tanh(c)
        if w_hr is not None:
            h = h @ w_hr.transpose(1, 2)
        return (h, c), (h, torch.cat([into, forget, new, out], -1), c)

    from_input = _from_input(x, w_ih, b_ih, b_hh)
    models = _largest(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr)
    (h_n, c_n), (y, gates, cells) = _scan(cell, from_input, (h0, c0), batch_sizes, reverse, models)
    return y.to(dtype), h_n.to(dtype), c_n.to(dtype), gates, cells


def gru_reference(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Sequence[int],
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer and direction of a GRU.

    Returns:
        y ``[M, N, H]``, h_n ``[M, B, H]`` and ``[M, N, 4H]``: the gates r, z, n and what the state
        gives to n before r scales it.
    """
    dtype = x.dtype
    x, h0, w_ih, w_hh, b_ih, b_hh = _widened(x, h0, w_ih, w_hh, b_ih, b_hh)
    from_state = w_hh.transpose(1, 2)

    def cell(from_input: Tensor, state: State) -> tuple[State, State]:
        (h,) = state
        hidden = h @ from_state
        if b_hh is not None:
            hidden = hidden + b_hh.unsqueeze(1)
        reset_x, update_x, new_x = from_input.chunk(3, -1)
        reset_h, update_h, new_h = hidden.chunk(3, -1)
        reset, update = torch.sigmoid(reset_x + reset_h), torch.sigmoid(update_x + update_h)
        new = torch.tanh(new_x + reset * new_h)
        h = (h - new) * update + new
        return (h,), (h, torch.cat([reset, update, new, new_h], -1))

    from_input = _from_input(x, w_ih, b_ih, None)
    models = _largest(x, h0, w_ih, w_hh, b_ih, b_hh)
    (h_n,), (y, gates) = _scan(cell, from_input, (h0,), batch_sizes, reverse, models)
    return y.to(dtype), h_n.to(dtype), gates


def rnn_reference(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    batch_sizes: Sequence[int],
    reverse: bool,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """One layer and direction of an RNN with tanh or ReLU.

    Returns:
        y ``[M, N, H]`` and h_n ``[M, B, H]``.
    """
    dtype = x.dtype
    x, h0, w_ih, w_hh, b_ih, b_hh = _widened(x, h0, w_ih, w_hh, b_ih, b_hh)
    from_state = w_hh.transpose(1, 2)
    activation = torch.relu if relu else torch.tanh

    def cell(from_input: Tensor, state: State) -> tuple[State, State]:
        h = activation(from_input + state[0] @ from_state)
        return (h,), (h,)

    from_input = _from_input(x, w_ih, b_ih, b_hh)
    models = _largest(x, h0, w_ih, w_hh, b_ih, b_hh)
    (h_n,), (y,) = _scan(cell, from_input, (h0,), batch_sizes, reverse, models)
    return y.to(dtype), h_n.to(dtype)


def _widened(*tensors: Tensor | None) -> list[Tensor]:
    """Half precision in float32, as the kernels compute; None stays None."""
    return [
        t if t is None or t.dtype in (torch.float32, torch.float64) else t.float()  # type: ignore[misc]
        for t in tensors
    ]


def _largest(*tensors: Tensor | None) -> int:
    return max((t.shape[0] for t in tensors if t is not None), default=1)


def _from_input(x: Tensor, w_ih: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    """What the inputs of all steps give to the gates, ``[M or 1, N, GH]``."""
    total = x @ w_ih.transpose(1, 2)
    for bias in (b_ih, b_hh):
        if bias is not None:
            total = total + bias.unsqueeze(1)
    return total


def _scan(
    cell: Cell,
    from_input: Tensor,
    initial: State,
    batch_sizes: Sequence[int],
    reverse: bool,
    models: int,
) -> tuple[State, State]:
    """Runs a cell over all steps of sequences that need not be equally long.

    Args:
        cell: ``cell(rows, state)`` returns the new state, and what to keep of this step.
        from_input: ``[M or 1, N, GH]``.
        initial: tensors ``[M or 1, B, *]``.
        batch_sizes: how many rows each step has.
        reverse: whether to begin with the last step.
        models: M.

    Returns:
        The state of each row after its last computed step, ``[M, B, *]``, and what was kept, its
        steps in the order of the rows, ``[M, N, *]``.
    """
    initial = tuple(s.expand(models, *s.shape[1:]) for s in initial)
    starts = [0]
    for count in batch_sizes:
        starts.append(starts[-1] + count)
    steps = range(len(batch_sizes))
    kept: list[State] = []
    ended: list[State] = []  # the states of sequences that are over, shortest first
    first = batch_sizes[-1] if reverse else batch_sizes[0]
    state = tuple(s[:, :first] for s in initial)
    running = first
    for t in reversed(steps) if reverse else steps:
        count = batch_sizes[t]
        if count > running:  # in reverse, these sequences begin here
            state = tuple(
                torch.cat([s, s0[:, running:count]], 1)
                for s, s0 in zip(state, initial, strict=True)
            )
        elif count < running:
            ended.append(tuple(s[:, count:] for s in state))
            state = tuple(s[:, :count] for s in state)
        running = count
        state, values = cell(from_input[:, starts[t] : starts[t + 1]], state)
        kept.append(values)
    if reverse:
        kept.reverse()
    pieces = [state, *reversed(ended)]
    final = tuple(torch.cat(column, 1) for column in zip(*pieces, strict=True))
    return final, tuple(torch.cat(column, 1) for column in zip(*kept, strict=True))


# ---- gradients from what the forward saved -------------------------------------------------------


def _previous(values: Tensor, initial: Tensor, batch_sizes: Sequence[int], reverse: bool) -> Tensor:
    """The state before each row's step: ``values`` ``[M, N, *]`` one step earlier."""
    initial = initial.expand(values.shape[0], *initial.shape[1:])
    pieces: list[Tensor] = []
    start = before = 0
    for t, count in enumerate(batch_sizes):
        if reverse:
            longer = batch_sizes[t + 1] if t + 1 < len(batch_sizes) else 0
            after = start + count
            pieces += [values[:, after : after + longer], initial[:, longer:count]]
        else:
            pieces.append(values[:, before : before + count] if t else initial[:, :count])
        before, start = start, start + count
    return torch.cat(pieces, 1)


def _given_or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if grad is None else grad.to(like.dtype).expand_as(like)


def _weight_gradients(d_gates: Tensor, x: Tensor, d_hidden: Tensor, h: Tensor) -> list[Tensor]:
    """The gradients of w_ih and w_hh, summed over the rows."""
    return [d_gates.transpose(1, 2) @ x, d_hidden.transpose(1, 2) @ h]


def lstm_backward_reference(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    batch_sizes: Sequence[int],
    reverse: bool,
) -> list[Tensor | None]:
    """The gradients of x, h0, c0, w_ih, w_hh, the biases and w_hr."""
    x, h0, c0, w_ih, w_hh, w_hr, y = _widened(x, h0, c0, w_ih, w_hh, w_hr, y)
    models, outputs = y.shape[0], y.shape[2]
    before = _previous(cells, c0, batch_sizes, reverse)
    rows = torch.cat([_given_or_zeros(grad_y, y), gates, cells, before], -1)
    hidden = cells.shape[2]

    def cell(row: Tensor, state: State) -> tuple[State, State]:
        grad, into, forget, new, out, c, earlier = row.split([outputs, *[hidden] * 6], -1)
        dh, dc = state[0] + grad, state[1]
        d_raw = dh if w_hr is None else dh @ w_hr
        squashed = torch.tanh(c)
        dc = dc + d_raw * out * (1 - squashed * squashed)
        d_gates = torch.cat(
            [
                dc * new * into * (1 - into),
                dc * earlier * forget * (1 - forget),
                dc * into * (1 - new * new),
                d_raw * squashed * out * (1 - out),
            ],
            -1,
        )
        return (d_gates @ w_hh, dc * forget), (d_gates, dh)

    last = (
        _given_or_zeros(grad_h_n, h0.expand(models, *h0.shape[1:])),
        _given_or_zeros(grad_c_n, c0.expand(models, *c0.shape[1:])),
    )
    (dh0, dc0), (d_gates, dh) = _scan(cell, rows, last, batch_sizes, not reverse, models)
    h = _previous(y, h0, batch_sizes, reverse)
    dw_hr = None
    if w_hr is not None:
        dw_hr = dh.transpose(1, 2) @ (gates[..., 3 * hidden :] * torch.tanh(cells))
    weights = _weight_gradients(d_gates, x, d_gates, h)
    return [d_gates @ w_ih, dh0, dc0, *weights, d_gates.sum(1), dw_hr]


def gru_backward_reference(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    y: Tensor,
    gates: Tensor,
    batch_sizes: Sequence[int],
    reverse: bool,
) -> list[Tensor | None]:
    """The gradients of x, h0, w_ih, w_hh, b_ih and b_hh."""
    x, h0, w_ih, w_hh, y = _widened(x, h0, w_ih, w_hh, y)
    models = y.shape[0]
    h = _previous(y, h0, batch_sizes, reverse)
    rows = torch.cat([_given_or_zeros(grad_y, y), gates, h], -1)

    def cell(row: Tensor, state: State) -> tuple[State, State]:
        grad, reset, update, new, new_h, earlier = row.chunk(6, -1)
        dh = state[0] + grad
        d_new = dh * (1 - update) * (1 - new * new)
        d_reset = d_new * new_h * reset * (1 - reset)
        d_update = dh * (earlier - new) * update * (1 - update)
        d_hidden = torch.cat([d_reset, d_update, d_new * reset], -1)
        d_gates = torch.cat([d_reset, d_update, d_new], -1)
        return (dh * update + d_hidden @ w_hh,), (d_gates, d_hidden)

    last = (_given_or_zeros(grad_h_n, h0.expand(models, *h0.shape[1:])),)
    (dh0,), (d_gates, d_hidden) = _scan(cell, rows, last, batch_sizes, not reverse, models)
    weights = _weight_gradients(d_gates, x, d_hidden, h)
    return [d_gates @ w_ih, dh0, *weights, d_gates.sum(1), d_hidden.sum(1)]


def rnn_backward_reference(
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    y: Tensor,
    batch_sizes: Sequence[int],
    reverse: bool,
    relu: bool,
) -> list[Tensor | None]:
    """The gradients of x, h0, w_ih, w_hh and the biases."""
    x, h0, w_ih, w_hh, y = _widened(x, h0, w_ih, w_hh, y)
    models = y.shape[0]
    rows = torch.cat([_given_or_zeros(grad_y, y), y], -1)

    def cell(row: Tensor, state: State) -> tuple[State, State]:
        grad, out = row.chunk(2, -1)
        dh = state[0] + grad
        d_gates = torch.where(out > 0, dh, 0.0) if relu else dh * (1 - out * out)
        return (d_gates @ w_hh,), (d_gates,)

    last = (_given_or_zeros(grad_h_n, h0.expand(models, *h0.shape[1:])),)
    (dh0,), (d_gates,) = _scan(cell, rows, last, batch_sizes, not reverse, models)
    weights = _weight_gradients(d_gates, x, d_gates, _previous(y, h0, batch_sizes, reverse))
    return [d_gates @ w_ih, dh0, *weights, d_gates.sum(1)]
