"""LSTM, GRU and RNN of stacked models: one layer and direction of all models in one operator.

Padded and packed sequences have one form. The rows of all steps lie one after another,
``batch_sizes[t]`` of them for step t, N together; a batch of B sequences of T steps has
``batch_sizes = [B] * T``. ``batch_sizes`` must not rise.

Dim 0 of every tensor is M, or 1 where all models share it; what is shared is never copied M times,
and its gradient is summed over the models. Weights, gates and equations are those of
`torch.nn.LSTM`, `torch.nn.GRU` and `torch.nn.RNN`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modelbatch.ops import rnn_rules as rnn_rules  # Registers the operators and their rules.

_lstm = torch.ops.modelbatch.lstm.default
_gru = torch.ops.modelbatch.gru.default
_rnn = torch.ops.modelbatch.rnn.default


def lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_hr: Tensor | None = None,
    *,
    batch_sizes: Sequence[int],
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer and direction of every model's LSTM.

    Every M may be 1 instead: shared by all models. Under autocast the tensors are cast to its
    lower precision, and so are the results.

    Args:
        x: ``[M, N, I]``; float32, float64, bfloat16 or float16, as all other tensors.
        h0: ``[M, B, P]``; P = H without ``w_hr``.
        c0: ``[M, B, H]``.
        w_ih: ``[M, 4H, I]``, the gates in the order i, f, g, o.
        w_hh: ``[M, 4H, P]``.
        b_ih: ``[M, 4H]`` or None.
        b_hh: ``[M, 4H]`` or None.
        w_hr: the projection ``[M, P, H]`` or None.
        batch_sizes: how many rows each step has.
        reverse: run from the last step to the first; a sequence begins with ``h0`` and ``c0`` at
            its own last step.

    Returns:
        The outputs of all steps ``[M, N, P]``, and every sequence's last state, ``[M, B, P]`` and
        ``[M, B, H]``.

    Raises:
        RuntimeError: a shape, a dtype or a device does not fit.
    """
    y, h_n, c_n, _, _ = _lstm(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, list(batch_sizes), reverse)
    return y, h_n, c_n


def gru(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    batch_sizes: Sequence[int],
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """One layer and direction of every model's GRU.

    Args:
        x: ``[M, N, I]``, see `lstm`.
        h0: ``[M, B, H]``.
        w_ih: ``[M, 3H, I]``, the gates in the order r, z, n.
        w_hh: ``[M, 3H, H]``.
        b_ih: ``[M, 3H]`` or None.
        b_hh: ``[M, 3H]`` or None.
        batch_sizes: how many rows each step has.
        reverse: see `lstm`.

    Returns:
        The outputs of all steps ``[M, N, H]``, and every sequence's last state ``[M, B, H]``.

    Raises:
        RuntimeError: a shape, a dtype or a device does not fit.
    """
    y, h_n, _ = _gru(x, h0, w_ih, w_hh, b_ih, b_hh, list(batch_sizes), reverse)
    return y, h_n


def rnn(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    batch_sizes: Sequence[int],
    reverse: bool = False,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    """One layer and direction of every model's RNN.

    Args:
        x: ``[M, N, I]``, see `lstm`.
        h0: ``[M, B, H]``.
        w_ih: ``[M, H, I]``.
        w_hh: ``[M, H, H]``.
        b_ih: ``[M, H]`` or None.
        b_hh: ``[M, H]`` or None.
        batch_sizes: how many rows each step has.
        reverse: see `lstm`.
        relu: ReLU instead of tanh.

    Returns:
        The outputs of all steps ``[M, N, H]``, and every sequence's last state ``[M, B, H]``.

    Raises:
        RuntimeError: a shape, a dtype or a device does not fit.
    """
    y, h_n = _rnn(x, h0, w_ih, w_hh, b_ih, b_hh, list(batch_sizes), reverse, relu)
    return y, h_n
