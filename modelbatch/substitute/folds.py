"""Functions without weights: the models join the batch axis, and torch runs once.

Everything here runs below the models' vmap level, where autograd, autocast and torch's own argument
checks act as they do for one model.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .embedding import _flat_index
from .mode import Call, Rule, register


def any_batched(call: Call, *values: Any) -> bool:
    """Whether any tensor in the structures differs between models."""
    return call.level is not None and any(call.is_batched(leaf) for leaf in tree_leaves(values))


def loop(
    call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], why: str = ""
) -> Any:
    """Compute a function model by model, and have it reported."""
    name = getattr(func, "__name__", str(func))
    call.loops[name] = why or "no formula for all models at once reproduces it"
    if call.record is not None:
        call.record(name, "loop over models")
    return call.for_each_model(func, args, kwargs)


def register_loop(*functions: Any) -> None:
    """Have functions computed model by model wherever an argument differs between models."""

    def rule(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not any_batched(call, args, kwargs):
            return NotImplemented
        return loop(call, func, args, kwargs)

    register(*functions)(rule)


def fold(
    call: Call, func: Callable[..., Any], tensors: list[Tensor], rank: int | None = None
) -> Any:
    """Call `func` on tensors whose leading batch axis took the models in.

    Args:
        call: the forward call.
        func: called with the folded tensors; every tensor it returns has the batch axis first.
        tensors: one model's tensors. All have a batch axis, or none has.
        rank: dimensions of the first tensor if it has a batch axis; None if it surely has one.
            Without a batch axis the models become it.
    """
    has_batch = rank is None or tensors[0].dim() == rank
    with call.lowered():
        physical = [call.physical(t) for t in tensors]
        out = func(*((p.flatten(0, 1) if has_batch else p) for p in physical))
        if has_batch:
            size = tensors[0].shape[0]
            out = tree_map(lambda t: t.unflatten(0, (call.num_models, size)), out)
    return tree_map(call.wrap, out)


def _fold_first(count: int, rank: int | None) -> Rule:
    """A rule that folds the first `count` positional arguments."""

    def rule(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors, rest = list(args[:count]), args[count:]
        if len(tensors) < count and "input" in kwargs:
            kwargs = dict(kwargs)
            tensors.insert(0, kwargs.pop("input"))
        if (
            len(tensors) < count
            or not any_batched(call, tensors)
            or any_batched(call, rest, kwargs)
        ):
            return NotImplemented
        return fold(call, lambda *t: func(*t, *rest, **kwargs), tensors, rank)

    return rule


for _dims in (1, 2, 3):
    register(getattr(F, f"max_unpool{_dims}d"))(_fold_first(2, _dims + 2))
register(F.interpolate, torch.native_channel_shuffle, F.native_channel_shuffle)(
    _fold_first(1, None)
)
register(F.max_pool3d, F.max_pool3d_with_indices, F.adaptive_avg_pool3d)(_fold_first(1, 5))
register(F.grid_sample)(_fold_first(2, None))
register_loop(
    torch.histc,
    torch.histogram,
    torch.nonzero_static,
    torch.segment_reduce,
    torch.vander,
    torch.fake_quantize_per_channel_affine,
    torch.allclose,
    torch.equal,
    Tensor.histc,
    Tensor.histogram,
    Tensor.allclose,
    Tensor.equal,
)
for _name in ("grouped_mm", "linear_cross_entropy"):
    if hasattr(F, _name):
        register_loop(getattr(F, _name))


@register(F.affine_grid)
def affine_grid(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.affine_grid(theta, size, align_corners)`; `theta` is `[B, 2, 3]` or `[B, 3, 4]`."""

    def unpack(theta: Tensor, size: Any, align_corners: Any = None) -> Any:
        return theta, list(size), align_corners

    theta, size, align_corners = unpack(*args, **kwargs)
    if not any_batched(call, theta) or theta.dim() != 3 or size[0] != theta.shape[0]:
        return NotImplemented
    size[0] *= call.num_models
    return fold(call, lambda t: func(t, size, align_corners), [theta])


@register(torch.linalg.lu)
def lu(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.linalg.lu`, which takes any number of batch axes."""
    if len(args) != 1 or not any_batched(call, args) or "out" in kwargs:
        return NotImplemented
    with call.lowered():
        return tuple(call.wrap(t) for t in func(call.physical(args[0]), **kwargs))


@register(torch.fake_quantize_per_tensor_affine)
def fake_quantize(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An elementwise function whose scale is the same for all models."""
    if not any_batched(call, args[:1]) or any_batched(call, args[1:], kwargs):
        return NotImplemented
    with call.lowered():
        return call.wrap(func(call.physical(args[0]), *args[1:], **kwargs))


# ---- signals


@register(torch.stft, Tensor.stft)
def stft(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.stft` of signals `[T]` or `[B, T]` with one window for all models."""
    x, rest = args[0] if args else kwargs.get("input"), args[1:]
    if not any_batched(call, args, kwargs) or not isinstance(x, Tensor) or x.dim() > 2:
        return NotImplemented
    if not args or any_batched(call, rest, kwargs):
        return loop(call, func, args, kwargs, "the window differs between the models")
    return fold(call, lambda t: func(t, *rest, **kwargs), [x], rank=2)


@register(torch.istft, Tensor.istft)
def istft(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.istft` of spectra `[F, T]` or `[B, F, T]` with one window for all models."""
    x, rest = args[0] if args else kwargs.get("input"), args[1:]
    if not any_batched(call, args, kwargs) or not isinstance(x, Tensor) or x.dim() > 3:
        return NotImplemented
    if not args or any_batched(call, rest, kwargs):
        return loop(call, func, args, kwargs, "the window differs between the models")
    return fold(call, lambda t: func(t, *rest, **kwargs), [x], rank=3)


@register(torch.quantile, torch.nanquantile, Tensor.quantile, Tensor.nanquantile)
def quantile(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`quantile(input, q, dim=None, keepdim=False)` with the same `q` for all models."""

    def unpack(
        input: Tensor, q: Any, dim: Any = None, keepdim: bool = False, **options: Any
    ) -> Any:
        return input, q, dim, keepdim, options

    x, q, dim, keepdim, options = unpack(*args, **kwargs)
    if not any_batched(call, args, kwargs) or "out" in options:
        return NotImplemented
    if not call.is_batched(x) or any_batched(call, q) or (dim is None and keepdim):
        return loop(call, func, args, kwargs, "the quantile differs between the models")
    with call.lowered():
        physical = call.physical(x)
        if dim is None:
            out = func(physical.flatten(1), q, 1, keepdim, **options)
        else:
            out = func(physical, q, dim % max(x.dim(), 1) + 1, keepdim, **options)
        several = isinstance(q, Tensor) and q.dim() == 1
        return call.wrap(out.movedim(1, 0) if several else out)


@register(torch.bincount, Tensor.bincount)
def bincount(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.bincount(x, weights, minlength)`, each model counting in bins of its own."""

    def unpack(input: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Any:
        return input, weights, minlength

    x, weights, minlength = unpack(*args, **kwargs)
    if not any_batched(call, x, weights):
        return NotImplemented
    index = call.physical(x).to(torch.int64)
    if index.dim() != 2 or not index.numel():
        return loop(call, func, args, kwargs)
    low, high = index.aminmax(dim=1)
    bins = high.clamp(min=minlength - 1) + 1
    if bool((low < 0).any()) or bool((bins != bins[0]).any()):
        return loop(call, func, args, kwargs, "its size depends on the data")
    size = int(bins[0])
    offsets = torch.arange(call.num_models, device=index.device).unsqueeze(1) * size
    flat = None if weights is None else call.physical(weights).flatten()
    with call.lowered():
        counts = func((index + offsets).flatten(), flat, call.num_models * size)
    return call.wrap(counts.view(call.num_models, size))


# ---- losses that torch computes for each sample


def reduce(losses: Tensor, reduction: int) -> Tensor:
    """Reduce by torch's number of a reduction: 0 none, 1 mean, 2 sum."""
    return losses.mean() if reduction == 1 else losses.sum() if reduction == 2 else losses


@register(torch._C._nn.multilabel_margin_loss)
def multilabel_margin_loss(
    call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The margin loss of samples `[C]` or `[B, C]` with several classes each."""

    def unpack(input: Tensor, target: Tensor, reduction: int = 1) -> Any:
        return input, target, reduction

    x, target, reduction = unpack(*args, **kwargs)
    if not any_batched(call, x, target):
        return NotImplemented
    if x.shape != target.shape:
        return NotImplemented
    return reduce(fold(call, lambda a, b: func(a, b, 0), [x, target], rank=2), reduction)


@register(torch.ctc_loss)
def ctc_loss(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Connectionist temporal classification of `[T, B, C]` with targets `[B, S]`."""

    def unpack(
        log_probs: Tensor,
        targets: Tensor,
        input_lengths: Any,
        target_lengths: Any,
        blank: int = 0,
        reduction: int = 1,
        zero_infinity: bool = False,
    ) -> Any:
        return log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity

    x, targets, inputs, lengths, blank, reduction, zero_infinity = unpack(*args, **kwargs)
    if not any_batched(call, args, kwargs):
        return NotImplemented
    if x.dim() != 3 or targets.dim() != 2:
        return loop(call, func, args, kwargs, "targets of all samples are in one row")
    columns = [
        t if isinstance(t, Tensor) else torch.tensor(list(t), dtype=torch.int64)
        for t in (inputs, lengths)
    ]
    if any(t.shape != x.shape[1:2] for t in columns) or targets.shape[0] != x.shape[1]:
        return NotImplemented

    def run(by_sample: Tensor, targets: Tensor, inputs: Tensor, lengths: Tensor) -> Any:
        losses = func(by_sample.transpose(0, 1), targets, inputs, lengths, blank, 0, zero_infinity)
        return losses, lengths.to(losses).clamp(min=1)

    losses, divisor = fold(call, run, [x.transpose(0, 1), targets, *columns])
    return reduce(losses / divisor if reduction == 1 else losses, reduction)


# ---- pooling with drawn regions


def _fractional(dims: int) -> Rule:
    def rule(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = ("input", "kernel_size", "output_size", "output_ratio", "return_indices")
        options = {**dict(zip((*names, "_random_samples"), args)), **kwargs}
        x = options.pop("input")
        samples = options.pop("_random_samples", None)
        single = x.dim() == dims + 1
        if samples is None:
            size = (1 if single else x.shape[0], x.shape[-dims - 1], dims)
            with call:
                samples = torch.rand(size, dtype=x.dtype, device=x.device)
        if call.level is None:
            return func(x, **options, _random_samples=samples)
        if single:
            samples = samples.squeeze(0)
        return fold(
            call,
            lambda t, r: func(t, **options, _random_samples=r.view(-1, *r.shape[-2:])),
            [x, samples],
            rank=dims + 2,
        )

    return rule


for _dims in (2, 3):
    register(
        getattr(F, f"fractional_max_pool{_dims}d"),
        getattr(F, f"fractional_max_pool{_dims}d_with_indices"),
        random=True,
    )(_fractional(_dims))


# ---- bags of embeddings


@register(F.embedding_bag)
def embedding_bag(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.embedding_bag` as one look-up in the table of all models."""
    if not any_batched(call, args, kwargs):
        return NotImplemented
    return _embedding_bag(call, *args, **kwargs)


def _embedding_bag(
    call: Call,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    if input.dim() not in (1, 2) or (input.dim() == 2) != (offsets is None) or weight.dim() != 2:
        return NotImplemented
    if per_sample_weights is not None and per_sample_weights.shape != input.shape:
        return NotImplemented
    rows = weight.shape[0]
    if padding_idx is not None and not -rows <= padding_idx < rows:
        return NotImplemented
    table = call.physical(weight)
    index = _flat_index(call, input.to(torch.int64), rows)
    if max_norm is not None:
        if not call.is_batched(weight) or not table.is_contiguous():
            return NotImplemented
        with torch.no_grad(), call.lowered():
            torch.embedding_renorm_(
                table.detach().view(-1, table.shape[2]), index.flatten(), max_norm, norm_type
            )
    if padding_idx is not None:
        # one row stands for every model's padding: it is left out of the bag and never read
        padding_idx %= rows
        index = torch.where(call.physical(input) == padding_idx, padding_idx, index)
    bags = input.shape[0]
    starts = None
    if offsets is not None:
        local = call.physical(offsets).to(torch.int64)  # [M, bags]
        bags = offsets.shape[0] - include_last_offset
        wrong = (local[:, :1] != 0).any() | (local > input.shape[0]).any() | (local < 0).any()
        if include_last_offset:  # torch's kernels disagree about what to do with indices behind it
            wrong = wrong | (local[:, -1] != input.shape[0]).any()
        if type(wrong) is Tensor and wrong.is_cpu and bool(wrong):
            return NotImplemented
        first = torch.arange(call.num_models, device=local.device).unsqueeze(1) * input.shape[0]
        starts = (local + first).flatten()
    weights = None if per_sample_weights is None else call.physical(per_sample_weights).flatten()
    if offsets is None and weights is not None:
        weights = weights.view(-1, input.shape[1])
    with call.lowered():
        out = F.embedding_bag(
            index.flatten() if starts is not None else index.flatten(0, 1),
            table.reshape(-1, table.shape[2]),
            starts,
            None,
            norm_type,
            scale_grad_by_freq,
            mode,
            False,  # a sparse gradient could not become part of a stacked gradient
            weights,
            False,
            padding_idx,
        )
        # with a last offset, what lies behind it is one more bag, which is dropped
        out = out.view(call.num_models, math.prod(out.shape[:1]) // call.num_models, -1)
        return call.wrap(out[:, :bags])
