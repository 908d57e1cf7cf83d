"""Torch operations that a forward may hold, one model each, for `test_operations`.

An entry is a function of one model's tensors. The letters say where a tensor lives in the model
that the test builds: `x` arguments are inputs, `p` parameters, `b` buffers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Make = Callable[[torch.Generator], Tensor]


@dataclass
class Arg:
    """One tensor argument: where it lives and how it is made."""

    role: str
    make: Make


@dataclass
class Entry:
    """One operation.

    Attributes:
        name: the test's id.
        function: called with one model's tensors.
        args: what it is called with.
        loops: whether it is rightly computed model by model, with a warning.
        autocast: whether autocast is tested too.
        nan: whether a NaN in one model is tested too.
    """

    name: str
    function: Callable[..., Any]
    args: list[Arg]
    loops: bool = False
    autocast: bool = True
    nan: bool = False
    options: dict[str, Any] = field(default_factory=dict)


ENTRIES: dict[str, Entry] = {}


def add(name: str, function: Callable[..., Any], *args: Arg, **options: Any) -> None:
    assert name not in ENTRIES, name
    ENTRIES[name] = Entry(name, function, list(args), **options)


def normal(role: str, *shape: int) -> Arg:
    return Arg(role, lambda g: torch.randn(shape, generator=g, dtype=torch.float64))


def x(*shape: int) -> Arg:
    return normal("x", *shape)


def p(*shape: int) -> Arg:
    return normal("p", *shape)


def uniform(*shape: int, role: str = "x") -> Arg:
    return Arg(role, lambda g: torch.rand(shape, generator=g, dtype=torch.float64) * 0.9 + 0.05)


def integers(high: int, *shape: int, low: int = 0) -> Arg:
    return Arg("x", lambda g: torch.randint(low, high, shape, generator=g))


def constant(value: Any) -> Arg:
    return Arg("x", lambda g: torch.as_tensor(value).clone())


def boolean(*shape: int) -> Arg:
    return Arg("x", lambda g: torch.rand(shape, generator=g) > 0.5)


def positive_definite(*batch: int, size: int = 4) -> Arg:
    def make(g: torch.Generator) -> Tensor:
        a = torch.randn(*batch, size, size, generator=g, dtype=torch.float64)
        return a @ a.mT + torch.eye(size, dtype=torch.float64) * torch.arange(1, size + 1)

    return Arg("x", make)


def complex_numbers(*shape: int) -> Arg:
    return Arg("x", lambda g: torch.randn(shape, generator=g, dtype=torch.complex128))


def _with(function: Callable[..., Any], *rest: Any, **options: Any) -> Callable[[Tensor], Any]:
    """A function of its first argument alone."""
    return lambda t: function(t, *rest, **options)


def _in_place(function: Callable[..., Any]) -> Callable[[Tensor], Any]:
    return lambda t: function(t * 1, inplace=True)


# ---- activations

for _n in [
    "relu",
    "relu6",
    "elu",
    "selu",
    "celu",
    "leaky_relu",
    "logsigmoid",
    "hardshrink",
    "tanhshrink",
    "softsign",
    "softplus",
    "softshrink",
    "tanh",
    "sigmoid",
    "hardsigmoid",
    "silu",
    "mish",
    "hardswish",
    "hardtanh",
    "gelu",
]:
    add(_n, getattr(F, _n), x(4, 6))
for _n in ["relu", "elu", "leaky_relu", "hardtanh", "silu"]:
    add(f"{_n}(inplace)", _in_place(getattr(F, _n)), x(4, 6))
add("prelu", F.prelu, x(4, 6), p(1), nan=True)
add("prelu(channels)", F.prelu, x(4, 6, 5), p(6))
add("rrelu(eval)", lambda t: F.rrelu(t), x(4, 6))
add("glu", F.glu, x(4, 6))
add("threshold", lambda t: F.threshold(t, 0.1, 20.0), x(4, 6))
for _n in ["softmax", "log_softmax", "softmin"]:
    add(_n, _with(getattr(F, _n), dim=0), x(4, 6))

# ---- pooling and resampling

_SIZES = {1: (9,), 2: (7, 8), 3: (6, 6, 5)}
for _d, _size in _SIZES.items():
    for _tag, _shape in (("", (2, 3, *_size)), (",one sample", (3, *_size))):
        for _n in ("avg_pool", "max_pool"):
            _f = getattr(F, f"{_n}{_d}d")
            add(f"{_n}{_d}d{_tag}", lambda t, f=_f: f(t, 3, 2, 1, ceil_mode=True), x(*_shape))
        for _n in ("adaptive_avg_pool", "adaptive_max_pool"):
            add(f"{_n}{_d}d{_tag}", _with(getattr(F, f"{_n}{_d}d"), 3), x(*_shape))

        def _unpool(t: Tensor, d: int = _d, output: tuple[int, ...] = _size) -> Tensor:
            pooled, index = getattr(F, f"max_pool{d}d")(t, 2, return_indices=True)
            result: Tensor = getattr(F, f"max_unpool{d}d")(pooled, index, 2, output_size=output)
            return result

        add(f"max_unpool{_d}d{_tag}", _unpool, x(*_shape), nan=True)
        add(
            f"lp_pool{_d}d{_tag}",
            _with(getattr(F, f"lp_pool{_d}d"), 2.0, 2),
            x(*_shape),
        )
        if _d > 1:
            _f = getattr(F, f"fractional_max_pool{_d}d")
            add(
                f"fractional_max_pool{_d}d(samples){_tag}",
                lambda t, r, f=_f: f(t, 2, output_size=3, _random_samples=r.detach()),
                x(*_shape),
                uniform(2 if not _tag else 1, 3, _d),
            )
for _mode, _shape in (
    ("nearest", (2, 3, 5, 6)),
    ("nearest-exact", (2, 3, 7)),
    ("nearest-exact", (2, 3, 5, 6)),
    ("nearest-exact", (2, 3, 4, 5, 3)),
    ("linear", (2, 3, 7)),
    ("bilinear", (2, 3, 5, 6)),
    ("bicubic", (2, 3, 5, 6)),
    ("trilinear", (2, 3, 4, 5, 3)),
    ("area", (2, 3, 5, 6)),
    ("area", (2, 3, 4, 5, 3)),
):
    add(
        f"interpolate({_mode},{len(_shape) - 2}d)",
        lambda t, m=_mode: F.interpolate(t, scale_factor=2, mode=m),
        x(*_shape),
    )
for _padding in ("zeros", "border", "reflection"):
    add(
        f"grid_sample({_padding})",
        lambda t, g, m=_padding: F.grid_sample(t, g * 2 - 1, "bilinear", m, align_corners=False),
        x(2, 3, 5, 6),
        uniform(2, 4, 4, 2),
    )
add("affine_grid(2d)", lambda t: F.affine_grid(t, (2, 3, 5, 6), False), x(2, 2, 3), nan=True)
add("affine_grid(3d)", lambda t: F.affine_grid(t, (2, 3, 4, 5, 6), True), x(2, 3, 4))
add(
    "native_channel_shuffle",
    lambda t: F.native_channel_shuffle(t.detach(), 2),
    x(2, 6, 3, 3),
    nan=True,
)
add("channel_shuffle", lambda t: F.channel_shuffle(t, 2), x(2, 6, 3, 3))
add("pixel_shuffle", lambda t: F.pixel_shuffle(t, 2), x(2, 8, 3, 3))
add("pixel_unshuffle", lambda t: F.pixel_unshuffle(t, 2), x(2, 2, 6, 6))
add("unfold", lambda t: F.unfold(t, 3, padding=1, stride=2), x(2, 3, 6, 6))
add("fold", lambda t: F.fold(t, (6, 6), 3, padding=1), x(2, 27, 36))
for _mode in ("constant", "reflect", "replicate", "circular"):
    add(f"pad({_mode})", lambda t, m=_mode: F.pad(t, (1, 2, 2, 1), mode=m), x(2, 3, 6, 6))

# ---- normalisation

for _norm, _shape, _features in (
    ("layer_norm", (4, 5, 6), (6,)),
    ("layer_norm", (4, 5, 6), (5, 6)),
    ("layer_norm", (6,), (6,)),
):
    add(
        f"{_norm}{_shape}{_features}",
        lambda t, w, b, s=_features: F.layer_norm(t, s, w, b),
        x(*_shape),
        p(*_features),
        p(*_features),
        nan=True,
    )
add("layer_norm(no bias)", lambda t, w: F.layer_norm(t, (6,), w), x(4, 6), p(6))
add("layer_norm(no affine)", lambda t: F.layer_norm(t, (6,)), x(4, 6))
for _shape in ((4, 6), (4, 6, 5), (2, 6, 3, 3)):
    add(
        f"group_norm{_shape}",
        lambda t, w, b: F.group_norm(t, 2, w, b),
        x(*_shape),
        p(6),
        p(6),
        nan=True,
    )
add("group_norm(no affine)", lambda t: F.group_norm(t, 3), x(4, 6, 5))
add("rms_norm", lambda t, w: F.rms_norm(t, (6,), w), x(4, 5, 6), p(6))
add("rms_norm(no weight)", lambda t: F.rms_norm(t, (6,)), x(4, 5, 6))
add("local_response_norm", lambda t: F.local_response_norm(t, 3), x(2, 6, 5, 5))
add("normalize", F.normalize, x(4, 6))
add("normalize(out)", lambda t: F.normalize(t.detach(), out=torch.empty_like(t)), x(4, 6))
add("instance_norm", lambda t: F.instance_norm(t), x(4, 6, 5, 5))
add(
    "instance_norm(affine)",
    lambda t, w, b: F.instance_norm(t, weight=w, bias=b),
    x(4, 6, 5),
    p(6),
    p(6),
    nan=True,
)
for _own in (True, False):
    add(
        f"instance_norm(running,{_own})",
        lambda t, w, b, m, v, own=_own: (F.instance_norm(t, m, v, w, b, own), m * 1, v * 1),
        x(4, 6, 5),
        p(6),
        p(6),
        normal("b", 6),
        uniform(6, role="b"),
    )

# ---- products

add("linear", F.linear, x(4, 5), p(6, 5), p(6), nan=True)
add("bilinear", F.bilinear, x(4, 5), x(4, 6), p(3, 5, 6), p(3), nan=True)
add("bilinear(3-d)", F.bilinear, x(2, 4, 5), x(2, 4, 6), p(3, 5, 6))
add("conv_tbc", lambda t, w, b: torch.conv_tbc(t, w, b, 1), x(7, 2, 4), p(3, 4, 6), p(6))
for _a, _b in (((4,), (4,)), ((3, 4), (4,)), ((4,), (4, 3)), ((3, 4), (4, 5)), ((2, 3, 4), (4, 5))):
    add(f"matmul{_a}{_b}", torch.matmul, x(*_a), p(*_b))
add("mm", torch.mm, x(3, 4), p(4, 5))
add("mv", torch.mv, x(3, 4), p(4))
add("dot", torch.dot, x(4), p(4))
add("vdot", torch.vdot, x(4), p(4))
add("inner", torch.inner, x(4), p(4))
add("outer", torch.outer, x(4), p(5))
add("bmm", torch.bmm, x(2, 3, 4), p(2, 4, 5))
add("baddbmm", torch.baddbmm, p(2, 3, 5), x(2, 3, 4), x(2, 4, 5))
add("addbmm", torch.addbmm, p(3, 5), x(2, 3, 4), x(2, 4, 5))
add("addmm", lambda b, t, w: torch.addmm(b, t, w, beta=0.5, alpha=2.0), p(5), x(3, 4), p(4, 5))
add("addmv", torch.addmv, p(3), x(3, 4), p(4))
add("addr", torch.addr, x(3, 4), x(3), p(4))
add("multi_dot", lambda a, b, c: torch.linalg.multi_dot([a, b, c]), x(3, 4), p(4, 5), p(5, 2))
add("einsum", lambda a, b: torch.einsum("bi,oi->bo", a, b), x(4, 5), p(3, 5))
add(
    "einsum(3)",
    lambda a, b, c: torch.einsum("bi,oij,bj->bo", a, b, c),
    x(4, 5),
    p(3, 5, 6),
    x(4, 6),
)
add("tensordot", lambda a, b: torch.tensordot(a, b, dims=([2], [0])), x(2, 3, 4), p(4, 5))
add("kron", torch.kron, x(2, 3), p(3, 2))
_SPARSE = torch.eye(4, dtype=torch.float64).roll(1, 0).to_sparse()
for _n, _f in {
    "sparse.mm": lambda t: torch.sparse.mm(_SPARSE.to(t.dtype), t),
    "sparse @ x": lambda t: _SPARSE.to(t.dtype) @ t,
}.items():
    add(_n, _f, x(4, 5), autocast=False, nan=True)
add("weight_norm", lambda v, g: torch._weight_norm(v, g, 0), p(6, 5), p(6, 1))
add("weight_norm(all)", lambda v, g: torch._weight_norm(v, g, -1), p(6, 5), p())

# ---- embeddings

_TABLE, _IDS = (10, 6), (4, 5)
add("embedding", F.embedding, integers(10, *_IDS), p(*_TABLE))
add("embedding(padding)", lambda i, w: F.embedding(i, w, 2), integers(10, *_IDS), p(*_TABLE))
for _mode in ("sum", "mean", "max"):
    _bag = F.embedding_bag
    add(
        f"embedding_bag({_mode})",
        lambda i, w, m=_mode: F.embedding_bag(i, w, mode=m),
        integers(10, *_IDS),
        p(*_TABLE),
        nan=True,
    )
    add(
        f"embedding_bag({_mode},offsets)",
        lambda i, w, o, m=_mode: F.embedding_bag(i, w, o, mode=m),
        integers(10, 12),
        p(*_TABLE),
        constant([0, 3, 3, 7]),
    )
    add(
        f"embedding_bag({_mode},last offset)",
        lambda i, w, o, m=_mode: F.embedding_bag(i, w, o, mode=m, include_last_offset=True),
        integers(10, 12),
        p(*_TABLE),
        constant([0, 3, 7, 12]),
    )
    add(
        f"embedding_bag({_mode},padding)",
        lambda i, w, m=_mode: F.embedding_bag(i, w, mode=m, padding_idx=1),
        integers(3, *_IDS),
        p(*_TABLE),
        nan=True,
    )
if torch.__version__ >= "2.15":  # earlier ones divide more than once
    add(
        "embedding_bag(frequency)",
        lambda i, w: F.embedding_bag(i, w, mode="mean", scale_grad_by_freq=True),
        integers(4, *_IDS),
        p(*_TABLE),
    )
add(
    "embedding_bag(weights)",
    lambda i, w, s: F.embedding_bag(i, w, mode="sum", per_sample_weights=s),
    integers(10, *_IDS),
    p(*_TABLE),
    p(*_IDS),
)
add(
    "embedding_bag(max_norm)",
    lambda i, w: F.embedding_bag(i, w, max_norm=1.0, padding_idx=1),
    integers(10, *_IDS),
    normal("b", *_TABLE),
)
add("one_hot", lambda i: F.one_hot(i, 10), integers(10, 4))

# ---- distances

add("cosine_similarity", F.cosine_similarity, x(4, 6), x(4, 6))
add("pairwise_distance", F.pairwise_distance, x(4, 6), x(4, 6))
for _p in (1.0, 2.0, 3.0, float("inf")):
    add(f"cdist({_p})", lambda a, b, q=_p: torch.cdist(a, b, q), x(4, 6), x(5, 6))
    add(f"pdist({_p})", lambda a, q=_p: F.pdist(a, q), x(5, 6))
add("cdist(many)", torch.cdist, x(30, 6), x(31, 6))
add("dist", torch.dist, x(4, 6), x(4, 6))

# ---- recurrent cells


def _cell(function: Any, gates: int, two: bool = False) -> Callable[..., Any]:
    def run(t: Tensor, h: Tensor, wi: Tensor, wh: Tensor, bi: Tensor, bh: Tensor) -> Any:
        return function(t, (h, h * 0.5) if two else h, wi, wh, bi, bh)

    return run


for _n, _gates in (("gru", 3), ("lstm", 4), ("rnn_tanh", 1), ("rnn_relu", 1)):
    add(
        f"{_n}_cell",
        _cell(getattr(torch, f"{_n}_cell"), _gates, _n == "lstm"),
        x(2, 5),
        x(2, 6),
        p(6 * _gates, 5),
        p(6 * _gates, 6),
        p(6 * _gates),
        p(6 * _gates),
        nan=True,
    )
