"""Random functions inside a bundle's forward: every model draws from its own stream."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..attributes import PerModelFloat
from ..errors import BatchingError
from ..ops import random as philox
from ..random import torch_rng
from .mode import Call, NeedsBatchedFactories, enter_all, handles_per_model_numbers, register

_VF = torch._C._VariableFunctions

enter_all(
    [
        F.multi_head_attention_forward,
        F.gumbel_softmax,
        F.dropout1d,
        F.dropout2d,
        F.dropout3d,
        F.alpha_dropout,
        F.feature_alpha_dropout,
        F.rrelu,
    ]
)


# ---- drawing


def seeded_by_model(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a random function once for each model with torch's generators set to its stream.

    With `rng="torch"` that is the model's own generator state. Otherwise the state is seeded from
    the next word of the model's stream, which serves distributions without a formula here.
    """
    leaves, spec = tree_flatten((args, kwargs))
    if any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise BatchingError("a random function is given a generator of the model's own")
    columns: list[Any] = []
    for leaf in leaves:
        if call.level is not None and call.is_batched(leaf):
            columns.append(call.unwrap(leaf)[0].unbind(0))
        elif isinstance(leaf, PerModelFloat):
            columns.append(leaf.values)
        else:
            columns.append((leaf,) * call.num_models)
    seeds: list[int] | None = None
    if call.streams.kind == "philox":
        words = philox.uniform(
            call.streams.seed, call.streams.step, call.streams.next_op(), [1], torch.float64
        )
        seeds = (words.flatten() * 2.0**53).to(torch.int64).tolist()
    results = []
    with torch_rng(call.device), call.lowered():
        for i, row in enumerate(zip(*columns) if columns else [()] * call.num_models):
            one_args, one_kwargs = tree_unflatten(list(row), spec)
            if seeds is not None:
                torch.manual_seed(seeds[i])
                results.append(func(*one_args, **one_kwargs))
            else:
                with call.streams.as_model(i):
                    results.append(func(*one_args, **one_kwargs))
    return results[0] if call.level is None else call.stack(results)


def _uniform(call: Call, size: Any, dtype: torch.dtype) -> Tensor:
    """Physical `[M, *size]` in [0, 1)."""
    streams = call.streams
    return philox.uniform(streams.seed, streams.step, streams.next_op(), list(size), dtype)


def _normal(call: Call, size: Any, dtype: torch.dtype) -> Tensor:
    streams = call.streams
    return philox.normal(streams.seed, streams.step, streams.next_op(), list(size), dtype)


def _draw_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.float64


def _probabilities(call: Call, p: Any) -> Tensor:
    """Drop probabilities as float64 `[M]`."""
    if isinstance(p, PerModelFloat):
        return call.streams.constant(p.values)
    return call.streams.constant((float(p),) * call.num_models)


def _write(call: Call, target: Tensor, value: Tensor) -> Tensor:
    """Fill a tensor of the forward in place with physical `[M, ...]` values."""
    if call.level is not None and not call.is_batched(target):
        raise NeedsBatchedFactories
    return target.copy_(call.wrap(value.to(target.dtype)))


# ---- dropout


def _drop(call: Call, x: Tensor, p: Any, group: int) -> Tensor:
    physical = call.physical(x)
    out = philox.dropout(
        physical,
        _probabilities(call, p),
        call.streams.seed,
        call.streams.step,
        call.streams.next_op(),
        group,
    )
    return call.wrap(out)


def _drops_nothing(p: Any) -> bool:
    return not isinstance(p, PerModelFloat) and p == 0


def _valid(p: Any) -> bool:
    values = p.values if isinstance(p, PerModelFloat) else (p,)
    return all(v is not None and 0.0 <= v <= 1.0 for v in values)


@handles_per_model_numbers
@register(F.dropout, random=True)
def dropout(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`F.dropout(input, p=0.5, training=True, inplace=False)`."""

    def unpack(input: Tensor, p: Any = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return input, p, training, inplace

    x, p, training, inplace = unpack(*args, **kwargs)
    if not training or not _valid(p):
        return func(x, float.__float__(p), training, inplace)
    return _dropout(call, F.dropout, x, p, inplace, 1, {"training": True})


@handles_per_model_numbers
@register(_VF.dropout, _VF.dropout_, _VF.feature_dropout, _VF.feature_dropout_, random=True)
def builtin_dropout(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.dropout(input, p, train)`, `torch.feature_dropout` and their in-place forms."""

    def unpack(input: Tensor, p: Any, train: bool) -> Any:
        return input, p, train

    x, p, training = unpack(*args, **kwargs)
    if not training or not _valid(p):
        return func(x, float.__float__(p), training)
    name = func.__name__
    group = math.prod(x.shape[2:]) if name.startswith("feature") else 1
    return _dropout(call, func, x, p, name.endswith("_"), max(group, 1), {"train": True})


def _dropout(
    call: Call, func: Any, x: Tensor, p: Any, inplace: bool, group: int, mode: dict[str, bool]
) -> Tensor:
    if _drops_nothing(p) or x.numel() == 0:
        return x
    if call.streams.kind == "torch":
        return seeded_by_model(call, func, (x, p), mode)
    if x.dtype.is_complex:
        return seeded_by_model(call, func, (x, p), mode)
    out = _drop(call, x, p, group)
    if not inplace:
        return out
    if call.level is not None and not call.is_batched(x):
        raise NeedsBatchedFactories
    return x.copy_(out)


# SELU's fixed point, which takes the place of a dropped value (Klambauer et al., 2017)
_ALPHA = -1.7580993408473766


@handles_per_model_numbers
@register(
    _VF.alpha_dropout,
    _VF.alpha_dropout_,
    _VF.feature_alpha_dropout,
    _VF.feature_alpha_dropout_,
    random=True,
)
def alpha_dropout(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Alpha dropout: dropped values become `alpha'`, then mean and variance are restored."""

    def unpack(input: Tensor, p: Any, train: bool) -> Any:
        return input, p, train

    x, p, training = unpack(*args, **kwargs)
    if not training or not _valid(p):
        return func(x, float.__float__(p), training)
    if _drops_nothing(p) or x.numel() == 0:
        return x
    if call.streams.kind == "torch":
        return seeded_by_model(call, func, args, kwargs)
    name = func.__name__
    shape = [*x.shape[:2], *([1] * (x.dim() - 2))] if name.startswith("feature") else list(x.shape)
    column = [-1, *([1] * x.dim())]
    probability = _probabilities(call, p)
    slope = ((_ALPHA**2 * probability + 1) * (1 - probability)).rsqrt()
    shift = -slope * _ALPHA * probability
    slope, shift = slope.to(x.dtype).view(column), shift.to(x.dtype).view(column)
    kept = _uniform(call, shape, torch.float64) >= probability.view(column)
    physical = call.physical(x)
    out = torch.where(kept, physical, torch.full_like(slope, _ALPHA)) * slope + shift
    out = torch.where(probability.view(column) < 1, out, torch.zeros_like(out))
    return x.copy_(call.wrap(out)) if name.endswith("_") else call.wrap(out)


@handles_per_model_numbers
@register(_VF.rrelu, _VF.rrelu_, random=True)
def rrelu(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Randomised leaky ReLU: negative values are scaled by a slope drawn for each element."""

    def unpack(
        input: Tensor, lower: Any = 1 / 8, upper: Any = 1 / 3, training: bool = False, **_: Any
    ) -> Any:
        return input, lower, upper, training

    x, lower, upper, training = unpack(*args, **kwargs)
    if call.streams.kind == "torch" and training:
        return seeded_by_model(call, func, args, kwargs)
    dims = x.dim() + 1
    low, high = (call.column(v, dims, x.dtype) for v in (lower, upper))
    if training:
        slope = low + (high - low) * _uniform(call, x.shape, x.dtype)
    else:
        slope = (low + high) / 2
    physical = call.physical(x)
    out = call.wrap(torch.where(physical <= 0, physical * slope, physical))
    return x.copy_(out) if func.__name__.endswith("_") else out


# ---- random tensors


def _size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    size = kwargs.get("size", args)
    if len(size) == 1 and not isinstance(size[0], int):
        size = size[0]
    return [int(s) for s in size]


def _needs_torch(call: Call, kwargs: dict[str, Any]) -> bool:
    return call.streams.kind == "torch" or kwargs.get("generator") is not None


def _finish(call: Call, value: Tensor, kwargs: dict[str, Any]) -> Tensor:
    device = kwargs.get("device")
    if device is not None:
        value = value.to(device)
    return call.wrap(value)


@register(torch.rand, torch.randn, random=True)
def rand(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.rand(*size)` and `torch.randn(*size)`."""
    if _needs_torch(call, kwargs) or "out" in kwargs:
        return seeded_by_model(call, func, args, kwargs)
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    draw = _uniform if func is torch.rand else _normal
    return _finish(call, draw(call, _size(args, kwargs), dtype), kwargs)


@register(torch.rand_like, torch.randn_like, random=True)
def rand_like(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.rand_like(x)` and `torch.randn_like(x)`."""
    if _needs_torch(call, kwargs):
        return seeded_by_model(call, func, args, kwargs)
    x = args[0] if args else kwargs["input"]
    draw = _uniform if func is torch.rand_like else _normal
    return _finish(call, draw(call, x.shape, kwargs.get("dtype") or x.dtype), kwargs)


def _integers(call: Call, low: int, high: int, size: Any, dtype: torch.dtype) -> Tensor:
    fraction = _uniform(call, size, torch.float64)
    return (fraction * (high - low)).floor_().to(torch.int64).add_(low).to(dtype)


@register(torch.randint, random=True)
def randint(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.randint(low=0, high, size)`."""
    if _needs_torch(call, kwargs) or "out" in kwargs:
        return seeded_by_model(call, func, args, kwargs)
    numbers = [a for a in args if isinstance(a, int)]
    size = kwargs.get("size") or args[-1]
    low = kwargs.get("low", numbers[0] if len(numbers) == 2 else 0)
    high = kwargs.get("high", numbers[-1] if numbers else None)
    if high is None or high <= low:
        return func(*args, **kwargs)
    dtype = kwargs.get("dtype") or torch.int64
    return _finish(call, _integers(call, low, high, size, dtype), kwargs)


@register(torch.randint_like, random=True)
def randint_like(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.randint_like(x, low=0, high)`."""
    if _needs_torch(call, kwargs):
        return seeded_by_model(call, func, args, kwargs)
    x, *numbers = args
    low = kwargs.get("low", numbers[0] if len(numbers) == 2 else 0)
    high = kwargs.get("high", numbers[-1] if numbers else None)
    if high is None or high <= low:
        return func(*args, **kwargs)
    dtype = kwargs.get("dtype") or x.dtype
    return _finish(call, _integers(call, low, high, x.shape, dtype), kwargs)


@register(torch.randperm, random=True)
def randperm(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.randperm(n)`: the order that sorts n uniform numbers."""
    if _needs_torch(call, kwargs) or "out" in kwargs:
        return seeded_by_model(call, func, args, kwargs)
    n = args[0] if args else kwargs["n"]
    order = _uniform(call, [n], torch.float64).argsort(stable=True, dim=1)
    return _finish(call, order.to(kwargs.get("dtype") or torch.int64), kwargs)


@register(torch.bernoulli, Tensor.bernoulli, random=True)
def bernoulli(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.bernoulli(p)` and `torch.bernoulli(x, p)`."""
    if _needs_torch(call, kwargs) or "out" in kwargs:
        return seeded_by_model(call, func, args, kwargs)
    x = args[0] if args else kwargs["input"]
    p = args[1] if len(args) > 1 else kwargs.get("p")
    chance = call.physical(x) if p is None else float(p)
    out = _uniform(call, x.shape, _draw_dtype(x.dtype)) < chance
    return call.wrap(out.to(x.dtype))


@register(torch.normal, random=True)
def normal(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`torch.normal(mean, std)` with tensors or numbers, and `torch.normal(mean, std, size)`."""
    if _needs_torch(call, kwargs) or "out" in kwargs:
        return seeded_by_model(call, func, args, kwargs)

    def unpack(mean: Any = 0.0, std: Any = 1.0, size: Any = None, **_: Any) -> Any:
        return mean, std, size

    mean, std, size = unpack(*args, **kwargs)
    tensors = [t for t in (mean, std) if isinstance(t, Tensor)]
    if size is None and not tensors:
        return func(*args, **kwargs)
    if size is None:
        size = torch.broadcast_shapes(*(t.shape for t in tensors))
    dtype = kwargs.get("dtype") or (tensors[0].dtype if tensors else torch.get_default_dtype())
    noise = call.wrap(_normal(call, size, dtype))
    return noise * std + mean


# ---- in-place draws


@register(
    Tensor.uniform_,
    Tensor.normal_,
    Tensor.bernoulli_,
    Tensor.exponential_,
    Tensor.log_normal_,
    Tensor.cauchy_,
    Tensor.geometric_,
    random=True,
)
def fill(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`x.uniform_(a, b)` and the other distributions with a formula."""
    x, *numbers = args
    if call.level is not None and not call.is_batched(x):
        raise NeedsBatchedFactories
    if _needs_torch(call, kwargs):
        drawn = seeded_by_model(call, lambda t, *a, **k: func(t.clone(), *a, **k), args, kwargs)
        return x.copy_(drawn)
    options = {k: v for k, v in kwargs.items() if k != "generator"}
    name = func.__name__
    if name in ("normal_", "log_normal_"):
        default = (0.0, 1.0) if name == "normal_" else (1.0, 2.0)
        mean, std = _two(numbers, options, "mean", "std", default)
        value = _normal(call, x.shape, _draw_dtype(x.dtype)) * std + mean
        return _write(call, x, value.exp() if name == "log_normal_" else value)
    if name == "bernoulli_":
        p = numbers[0] if numbers else options.get("p", 0.5)
        chance = call.physical(p) if isinstance(p, Tensor) else p
        return _write(call, x, _uniform(call, x.shape, _draw_dtype(x.dtype)) < chance)
    u = _uniform(call, x.shape, _draw_dtype(x.dtype))
    if name == "uniform_":
        low, high = _two(numbers, options, "from", "to", (0.0, 1.0))
        return _write(call, x, low + (high - low) * u)
    if name == "exponential_":
        rate = numbers[0] if numbers else options.get("lambd", 1.0)
        return _write(call, x, torch.log1p(-u) / -rate)
    if name == "cauchy_":
        median, sigma = _two(numbers, options, "median", "sigma", (0.0, 1.0))
        return _write(call, x, median + sigma * torch.tan(math.pi * (u - 0.5)))
    p = numbers[0] if numbers else options["p"]  # geometric_
    return _write(call, x, (torch.log1p(-u) / math.log1p(-p)).floor() + 1)


def _two(
    numbers: list[Any], options: dict[str, Any], a: str, b: str, default: tuple[float, float]
) -> tuple[Any, Any]:
    first = numbers[0] if numbers else options.get(a, default[0])
    return first, numbers[1] if len(numbers) > 1 else options.get(b, default[1])


@register(
    torch.multinomial,
    Tensor.multinomial,
    torch.poisson,
    torch.binomial,
    torch._standard_gamma,
    torch._sample_dirichlet,
    random=True,
)
def by_model(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Distributions that only torch can draw."""
    return seeded_by_model(call, func, args, kwargs)


@register(Tensor.random_, random=True)
def random_fill(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`x.random_(...)`."""
    if call.level is not None and not call.is_batched(args[0]):
        raise NeedsBatchedFactories
    drawn = seeded_by_model(call, lambda t, *a, **k: t.clone().random_(*a, **k), args, kwargs)
    return args[0].copy_(drawn)
