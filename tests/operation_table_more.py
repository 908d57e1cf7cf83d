"""The second half of the table of operations: losses, statistics, indexing, signals, attention."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from operation_table import (
    Arg,
    _with,
    add,
    boolean,
    complex_numbers,
    constant,
    integers,
    normal,
    p,
    positive_definite,
    uniform,
    x,
)
from torch import Tensor, nn

# ---- losses

LOSSES: dict[str, Callable[..., Tensor]] = {}
"""Losses of (outputs, targets) with a `reduction`, also for `compute_loss`."""


def _loss(name: str, function: Callable[..., Tensor], *args: Arg, **options: Any) -> None:
    if len(args) == 2:
        LOSSES[name] = function
    for reduction in ("mean", "sum", "none"):
        add(
            f"{name}({reduction})",
            lambda *t, f=function, r=reduction: f(*t, reduction=r),
            *args,
            **options,
        )


for _n in ["l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss"]:
    _loss(_n, getattr(F, _n), x(4, 6), x(4, 6))
_loss("cross_entropy", F.cross_entropy, x(4, 6), integers(6, 4))
_loss(
    "cross_entropy(smoothing)",
    lambda a, b, reduction: F.cross_entropy(a, b, reduction=reduction, label_smoothing=0.1),
    x(4, 6),
    integers(6, 4),
)
_loss(
    "cross_entropy(weight)",
    lambda a, b, w, reduction: F.cross_entropy(a, b, w, reduction=reduction, ignore_index=2),
    x(4, 6),
    integers(6, 4),
    uniform(6, role="b"),
)
_loss("cross_entropy(images)", F.cross_entropy, x(2, 6, 3, 3), integers(6, 2, 3, 3))
_loss(
    "cross_entropy(soft)",
    lambda a, b, reduction: F.cross_entropy(a, b.softmax(1), reduction=reduction),
    x(4, 6),
    x(4, 6),
)
_loss(
    "nll_loss",
    lambda a, b, reduction: F.nll_loss(a.log_softmax(1), b, reduction=reduction),
    x(4, 6),
    integers(6, 4),
)
_loss(
    "binary_cross_entropy",
    F.binary_cross_entropy,
    uniform(4, 6),
    uniform(4, 6),
    autocast=False,
)
_loss("bce_with_logits", F.binary_cross_entropy_with_logits, x(4, 6), uniform(4, 6))
for _log in (False, True):
    _loss(
        f"kl_div(log_target={_log})",
        lambda a, b, reduction, log=_log: F.kl_div(
            a.log_softmax(1),
            b.log_softmax(1) if log else b.softmax(1),
            reduction="batchmean" if reduction == "mean" else reduction,
            log_target=log,
        ),
        x(4, 6),
        x(4, 6),
        nan=True,
    )
_loss("poisson_nll_loss", F.poisson_nll_loss, x(4, 6), uniform(4, 6))
for _width in (6, 1):
    _loss(
        f"gaussian_nll_loss({_width})",
        lambda a, b, v, reduction: F.gaussian_nll_loss(a, b, v, full=True, reduction=reduction),
        x(4, 6),
        x(4, 6),
        uniform(4, _width),
    )


def _signs(t: Tensor, like: Tensor) -> Tensor:
    return (t * 2 - 1).to(like.dtype)


_loss(
    "hinge_embedding_loss",
    lambda a, b, reduction: F.hinge_embedding_loss(a, b * 2 - 1, reduction=reduction),
    x(4, 6),
    integers(2, 4, 6),
)
_loss(
    "soft_margin_loss",
    lambda a, b, reduction: F.soft_margin_loss(a, _signs(b, a), reduction=reduction),
    x(4, 6),
    integers(2, 4, 6),
    nan=True,
)
_loss("multi_margin_loss", F.multi_margin_loss, x(4, 6), integers(6, 4), nan=True)
_loss(
    "multi_margin_loss(weight)",
    lambda a, b, w, reduction: F.multi_margin_loss(a, b, 2, 0.7, w, reduction=reduction),
    x(4, 6),
    integers(6, 4),
    uniform(6, role="b"),
)
_LABELS = [[0, 3, -1, 1, 2, 0], [1, -1, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0], [2, 1, 0, -1, 0, 0]]
_loss("multilabel_margin_loss", F.multilabel_margin_loss, x(4, 6), constant(_LABELS), nan=True)
_loss(
    "multilabel_soft_margin_loss",
    lambda a, b, reduction: F.multilabel_soft_margin_loss(a, b.to(a.dtype), reduction=reduction),
    x(4, 6),
    integers(2, 4, 6),
)
_loss(
    "margin_ranking_loss",
    lambda a, b, t, reduction: F.margin_ranking_loss(a, b, t * 2 - 1, 0.1, reduction=reduction),
    x(4),
    x(4),
    integers(2, 4),
    nan=True,
)
_loss(
    "cosine_embedding_loss",
    lambda a, b, t, reduction: F.cosine_embedding_loss(a, b, t * 2 - 1, 0.1, reduction=reduction),
    x(4, 6),
    x(4, 6),
    integers(2, 4),
)
_loss(
    "triplet_margin_loss",
    lambda a, b, c, reduction: F.triplet_margin_loss(a, b, c, swap=True, reduction=reduction),
    x(4, 6),
    x(4, 6),
    x(4, 6),
    nan=True,
)
_loss(
    "ctc_loss",
    lambda a, b, reduction: F.ctc_loss(a.log_softmax(2), b, (9, 8), (3, 2), reduction=reduction),
    x(9, 2, 6),
    integers(6, 2, 3, low=1),
    nan=True,
)
_loss(
    "ctc_loss(tensors)",
    lambda a, b, i, t, reduction: F.ctc_loss(
        a.log_softmax(2), b, i, t, reduction=reduction, zero_infinity=True
    ),
    x(9, 2, 6),
    integers(6, 2, 3, low=1),
    constant([9, 8]),
    constant([3, 2]),
)
add(
    "ctc_loss(one row)",
    lambda a, b: F.ctc_loss(a.log_softmax(2), b, (9, 8), (3, 2)),
    x(9, 2, 6),
    integers(6, 5, low=1),
    loops=True,
)

# ---- reductions and statistics

for _n in [
    "sum",
    "mean",
    "prod",
    "std",
    "var",
    "norm",
    "logsumexp",
    "amax",
    "amin",
    "argmax",
    "argmin",
    "nansum",
]:
    add(f"{_n}(dim)", _with(getattr(torch, _n), dim=1), x(4, 5))
for _n in ["sum", "mean", "max", "min", "median", "std_mean"]:
    add(f"{_n}()", getattr(torch, _n), x(4, 5))
for _n in ["cumsum", "cumprod", "logcumsumexp", "sort", "argsort"]:
    add(_n, _with(getattr(torch, _n), dim=0), x(4, 5))
add("topk", lambda t: torch.topk(t, 2, dim=0), x(4, 5))
add("quantile", lambda t: torch.quantile(t, 0.3, dim=1), x(4, 5), nan=True)
add("quantile()", lambda t: torch.quantile(t, 0.3), x(4, 5))
add(
    "quantile(several)",
    lambda t: t.quantile(torch.tensor([0.2, 0.7], dtype=t.dtype), dim=-1, keepdim=True),
    x(4, 5),
    autocast=False,
)
add("nanquantile", lambda t: torch.nanquantile(t, 0.3, dim=0), x(4, 5))
add("renorm", lambda t: torch.renorm(t, 2, 0, 1.0), x(4, 5), nan=True)
add("trace", torch.trace, x(4, 5))
add("bincount", lambda i: torch.bincount(i, minlength=6), integers(6, 40))
add(
    "bincount(weights)",
    lambda i, w: torch.bincount(i, w, 6),
    integers(6, 9),
    normal("b", 9),
    autocast=False,
)
add("histc", lambda t: torch.histc(t.detach(), 5, -2, 2), x(40), loops=True, autocast=False)
add("vander", lambda t: torch.vander(t.detach()), x(4), loops=True)

# ---- indexing

add("isin", torch.isin, integers(9, 4, 5), integers(9, 3))
add("take", torch.take, x(4, 5), integers(20, 3), nan=True)
add("put", lambda t, i, s: t.put(i, s), x(4, 5), constant([3, 11, 0]), x(3), nan=True)
add("masked_scatter", torch.masked_scatter, x(4, 5), boolean(4, 5), x(4, 5), nan=True)
add("masked_fill", lambda t, m: t.masked_fill(m, -1e4), x(4, 5), boolean(4, 5))
add("gather", lambda t, i: torch.gather(t, 1, i), x(4, 5), integers(5, 4, 3))
add(
    "scatter_add",
    lambda t, i, s: torch.scatter_add(t, 1, i, s),
    x(4, 5),
    integers(5, 4, 2),
    x(4, 2),
)
add("index_select", lambda t, i: torch.index_select(t, 1, i), x(4, 5), integers(5, 3))
add("index_add", lambda t, i, s: torch.index_add(t, 0, i, s), x(4, 5), integers(4, 3), x(3, 5))
add(
    "index_reduce",
    lambda t, i, s: torch.index_reduce(t, 0, i, s, "mean"),
    x(4, 5),
    integers(4, 3),
    x(3, 5),
    autocast=False,
)
add("x[i]", lambda t, i: t[i], x(4, 5), integers(4, 3))
add("column_stack", lambda a, b: torch.column_stack([a, b]), x(4), x(4, 2))
add("hstack", lambda a, b: torch.hstack([a, b]), x(4, 3), x(4, 2))
add("cat", lambda a, b: torch.cat([a, b], 1), x(4, 3), p(4, 2))
for _side in ("right", "left"):
    add(
        f"pad_sequence({_side})",
        lambda a, b, s=_side: nn.utils.rnn.pad_sequence([a, b], True, 1.5, padding_side=s),
        x(4, 5),
        x(3, 5),
    )
add("where", lambda a, b: torch.where(a > 0, a, b), x(4, 5), x(4, 5))
add(
    "where(0-d)",
    lambda a, b: torch.where(a > 0, a.float(), b.double()).detach(),
    x(4, 5),
    p(),
    autocast=False,
)

# ---- in place and layout

add("clamp_", lambda t: (t * 1).clamp_(-1, 1), x(4, 5), nan=True)
add("lerp_", lambda a, b: (a * 1).lerp_(b, 0.3), x(4, 5), x(4, 5), nan=True)
add("lerp_(tensor)", lambda a, b: (a * 1).lerp_(b, b), x(4, 5), x(4, 5))
add("addcmul_", lambda a, b: (a * 1).addcmul_(b, b, value=0.5), x(4, 5), x(4, 5))
add("addcdiv_", lambda a, b: (a * 1).addcdiv_(b, b.abs() + 1), x(4, 5), x(4, 5))
add("fill_diagonal_", lambda t: (t * 1).fill_diagonal_(2.0), x(4, 5), nan=True)
add("fill_diagonal_(wrap)", lambda t: (t * 1).fill_diagonal_(2.0, wrap=True), x(9, 3))
add("scatter_(value)", lambda t, i: (t * 1).scatter_(1, i, 2.0), x(4, 5), integers(5, 4, 2))
add("zeros.scatter_", lambda i: torch.zeros(4, 5).scatter_(1, i, 1.0), integers(5, 4, 2))
add(
    "zeros.scatter_add_",
    lambda s, i: torch.zeros(6, 2, dtype=s.dtype).scatter_add_(0, i, s),
    x(4, 2),
    integers(6, 4, 2),
)
add("zeros[:, t] =", lambda t: _columns(t), x(4, 3, 5))
add(
    "contiguous(channels_last)",
    lambda t: t.contiguous(memory_format=torch.channels_last),
    x(2, 3, 4, 5),
)
add("to(channels_last)", lambda t: t.to(memory_format=torch.channels_last) * 2, x(2, 3, 4, 5))
add("x.data", lambda t: t.data * t, x(4, 5))
add("x.requires_grad", lambda t: t * (2 if (t * 1).requires_grad else 1), x(4, 5))
add("x.grad_fn", lambda t: t * (2 if (t * 1).grad_fn is not None else 1), x(4, 5))


def _columns(t: Tensor) -> Tensor:
    out = torch.zeros(4, 3, 5, dtype=t.dtype)
    for i in range(3):
        out[:, i] = t[:, i] * 2
    return out


def _hooked(t: Tensor) -> Tensor:
    y = t * 2
    if y.requires_grad:
        y.register_hook(lambda g: g * g)
    return y * 1


add("register_hook", _hooked, x(4, 5))


def _asserted(t: Tensor) -> Tensor:
    torch._assert_async(torch.isfinite(t).all())
    return t * 2


add("_assert_async", _asserted, x(4, 5))
add("if x.sum() > 0", lambda t: t * 2 if t.sum() > 0 else -t, x(4, 5), loops=True)
add("x.item()", lambda t: t * t.sum().item(), x(4, 5), loops=True, autocast=False)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        return t * t

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return 2 * grads[0] * ctx.saved_tensors[0]


add("autograd.Function", _Square.apply, x(4, 5), loops=True)

# ---- signals, complex numbers, linear algebra

_WINDOW = torch.hann_window(8, dtype=torch.float64)


def _spectrum(t: Tensor) -> Tensor:
    return torch.stft(t, 8, 4, window=_WINDOW.to(t.dtype), return_complex=True)


for _shape in ((32,), (2, 32)):
    add(f"stft{_shape}", _spectrum, x(*_shape), autocast=False, nan=True)
    add(
        f"istft{_shape}",
        lambda t: torch.istft(_spectrum(t), 8, 4, window=_WINDOW.to(t.dtype)),
        x(*_shape),
        autocast=False,
    )
add(
    "stft(own window)",
    lambda t, w: torch.stft(t, 8, 4, window=w, return_complex=True),
    x(2, 32),
    p(8),
    loops=True,
    autocast=False,
)
for _n in ["fft", "ifft", "rfft", "fft2", "rfft2", "hfft", "ihfft"]:
    add(f"fft.{_n}", getattr(torch.fft, _n), x(4, 6))
add("complex abs", lambda z: (z * z.conj()).abs(), complex_numbers(4, 4), autocast=False)
_LINALG: dict[str, Callable[..., Any]] = {
    "inv": torch.linalg.inv,
    "det": torch.linalg.det,
    "slogdet": torch.linalg.slogdet,
    "cholesky": torch.linalg.cholesky,
    "eigvalsh": torch.linalg.eigvalsh,
    "svdvals": torch.linalg.svdvals,
    "qr": torch.linalg.qr,
    "pinv": torch.linalg.pinv,
    "matrix_norm": torch.linalg.matrix_norm,
    "lu": torch.linalg.lu,
    "lu_factor": lambda a: torch.linalg.lu_factor(a)[0],
    "matrix_exp": torch.linalg.matrix_exp,
}
for _n, _f in _LINALG.items():
    add(f"linalg.{_n}", _f, positive_definite())
add("linalg.lu(batch)", torch.linalg.lu, positive_definite(2))
add("linalg.solve", torch.linalg.solve, positive_definite(), x(4, 3))
add(
    "linalg.solve_triangular",
    lambda a, b: torch.linalg.solve_triangular(a.tril(), b, upper=False),
    positive_definite(),
    x(4, 3),
)

# ---- attention

for _n, _shapes in {
    "4-d": ((2, 2, 4, 8), (2, 2, 5, 8)),
    "3-d": ((2, 4, 8), (2, 5, 8)),
    "2-d": ((4, 8), (5, 8)),
}.items():
    add(
        f"attention({_n})",
        F.scaled_dot_product_attention,
        x(*_shapes[0]),
        x(*_shapes[1]),
        x(*_shapes[1]),
    )
    add(
        f"attention({_n},mask with gradient)",
        F.scaled_dot_product_attention,
        x(*_shapes[0]),
        x(*_shapes[1]),
        x(*_shapes[1]),
        p(4, 5),
    )
add(
    "attention(causal)",
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    x(2, 2, 4, 8),
    x(2, 2, 4, 8),
    x(2, 2, 4, 8),
)
