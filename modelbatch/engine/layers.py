"""What the engine computes of torch: one row per layer, function and method.

A row takes the arguments of its layer, function or method, with `Value`s in the place of tensors,
adds instructions to the builder and returns the result.
"""

import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .encoding import Op
from .program import Builder, Refusal, Value

__all__ = ["CALLS", "CONCRETE", "FUNCTIONS", "IN_PLACE", "LAYERS", "METHODS", "Layer"]


class Layer:
    """A module of the vocabulary, with what the stack knows of it.

    Args:
        module: model 0's.
        name: its qualified name.
        slots: numbers of the slots of its parameters and buffers.
        numbers: reads a plain number of all models, by name: one number or M.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        slots: dict[str, int],
        numbers: Callable[[str], Any],
    ):
        self.module: Any = module
        self.name, self.slots, self.numbers = name, slots, numbers

    def slot(self, attribute: str) -> int:
        """Number of the slot of a parameter or buffer, -1 if there is none."""
        return self.slots.get(attribute, -1)

    def refuse(self, why: str) -> Refusal:
        """A refusal that names this module."""
        return Refusal(f"nn.{type(self.module).__name__} '{self.name}' {why}")


Row = Callable[[Builder, Layer, Value], Value]
LAYERS: dict[type[nn.Module], Row] = {}
"""By the exact class of a module."""


def _layer(cls: type[nn.Module]) -> Callable[[Row], Row]:
    def add(row: Row) -> Row:
        LAYERS[cls] = row
        return row

    return add


# ---- layers with parameters


@_layer(nn.Linear)
def _linear(b: Builder, layer: Layer, x: Value) -> Value:
    module = layer.module
    if len(x.shape) < 2 or x.shape[-1] != module.in_features:
        raise layer.refuse(f"gets an input of shape {x.shape}")
    if layer.slot("weight") < 0:
        raise layer.refuse("has no weight among its parameters")
    shape = (*x.shape[:-1], module.out_features)
    return b.emit(Op.LINEAR, x, shape, weight=layer.slot("weight"), bias=layer.slot("bias"))


@_layer(nn.LayerNorm)
def _layer_norm(b: Builder, layer: Layer, x: Value) -> Value:
    if len(x.shape) < 2 or tuple(layer.module.normalized_shape) != x.shape[-1:]:
        raise layer.refuse("is over more than the last axis")
    eps = b.number(layer.numbers("eps"))
    weight, bias = layer.slot("weight"), layer.slot("bias")
    return b.emit(Op.LAYER_NORM, x, x.shape, weight=weight, bias=bias, number=eps)


@_layer(nn.BatchNorm1d)
def _batch_norm(b: Builder, layer: Layer, x: Value) -> Value:
    module = layer.module
    if len(x.shape) != 2 or x.shape[1] != module.num_features:
        raise layer.refuse(f"gets an input of shape {x.shape}")
    if x.shape[0] < 2:
        raise layer.refuse("gets a batch of one sample")
    has_statistics = module.running_mean is not None
    if not module.training and (has_statistics or module.running_var is not None):
        raise layer.refuse("is in eval mode")
    eps = b.number(layer.numbers("eps"))
    momentum = layer.numbers("momentum")
    b.number(momentum)
    fields = {"weight": layer.slot("weight"), "bias": layer.slot("bias"), "number": eps}
    if module.training and module.track_running_stats:
        counter = layer.slot("num_batches_tracked")
        cumulative = momentum is None or (isinstance(momentum, tuple) and None in momentum)
        if cumulative and counter < 0:
            raise layer.refuse("counts no batches")
        fields |= {"counter": counter}
        if has_statistics:
            fields |= {"mean": layer.slot("running_mean"), "var": layer.slot("running_var")}
        elif counter >= 0:
            raise layer.refuse("counts batches without statistics")
    return b.emit(Op.BATCH_NORM, x, x.shape, **fields)


@_layer(nn.Embedding)
def _embedding(b: Builder, layer: Layer, x: Value) -> Value:
    module = layer.module
    if not (b.integers and x.index == 0) or len(x.shape) > 2:
        raise layer.refuse("gets something else than an input of integers [B] or [B, T]")
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise layer.refuse("has an option that the engine does not know")
    b.values[0] = (x.shape[1] if len(x.shape) == 2 else 1, 1)
    padding = -1 if module.padding_idx is None else module.padding_idx
    shape = (*x.shape, module.embedding_dim)
    return b.emit(Op.EMBEDDING, x, shape, weight=layer.slot("weight"), extra=padding)


# ---- layers without parameters


def _plain(op: Op) -> Row:
    return lambda b, layer, x: b.emit(op, x, x.shape)


for _cls, _op in (
    (nn.ReLU, Op.RELU),
    (nn.SiLU, Op.SILU),
    (nn.Tanh, Op.TANH),
    (nn.Sigmoid, Op.SIGMOID),
):
    LAYERS[_cls] = _plain(_op)


@_layer(nn.LeakyReLU)
def _leaky_relu(b: Builder, layer: Layer, x: Value) -> Value:
    return b.emit(Op.LEAKY_RELU, x, x.shape, number=b.number(layer.numbers("negative_slope")))


@_layer(nn.ELU)
def _elu(b: Builder, layer: Layer, x: Value) -> Value:
    return b.emit(Op.ELU, x, x.shape, number=b.number(layer.numbers("alpha")))


@_layer(nn.GELU)
def _gelu(b: Builder, layer: Layer, x: Value) -> Value:
    return gelu(b, x, layer.module.approximate)


@_layer(nn.Softplus)
def _softplus(b: Builder, layer: Layer, x: Value) -> Value:
    return softplus(b, x, layer.numbers("beta"), layer.numbers("threshold"))


@_layer(nn.Dropout)
def _dropout(b: Builder, layer: Layer, x: Value) -> Value:
    return dropout(b, x, layer.numbers("p"), layer.module.training)


@_layer(nn.Identity)
def _identity(b: Builder, layer: Layer, x: Value) -> Value:
    return x


@_layer(nn.Flatten)
def _flatten(b: Builder, layer: Layer, x: Value) -> Value:
    return flatten(b, x, layer.module.start_dim, layer.module.end_dim)


# ---- functions and methods


def gelu(b: Builder, input: Value, approximate: str = "none") -> Value:
    if approximate not in ("none", "tanh"):
        raise Refusal(f"gelu with approximate={approximate!r}")
    return b.emit(Op.GELU, input, input.shape, extra=int(approximate == "tanh"))


def softplus(b: Builder, input: Value, beta: Any = 1.0, threshold: Any = 20.0) -> Value:
    first = b.number(beta)
    b.number(threshold)
    return b.emit(Op.SOFTPLUS, input, input.shape, number=first)


def dropout(
    b: Builder, input: Value, p: Any = 0.5, training: Any = True, inplace: bool = False
) -> Value:
    if not isinstance(training, bool):
        raise Refusal("a dropout whose mode is computed")
    values = p if isinstance(p, tuple) else (p,)
    if not all(v is not None and 0.0 <= v <= 1.0 for v in values):
        raise Refusal(f"a dropout of p={p}")
    # with p = 0 for all models the general path draws nothing either
    if not training or (not isinstance(p, tuple) and p == 0):
        return input
    b.draws += 1
    return b.emit(Op.DROPOUT, input, input.shape, number=b.number(p), extra=b.draws - 1)


def flatten(b: Builder, input: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
    dims = len(input.shape)
    start, end = (d + dims if d < 0 else d for d in (start_dim, end_dim))
    if not 0 <= start <= end < dims:
        raise Refusal("a flatten of axes that are not there")
    if start == 0 and end > 0:
        raise Refusal("a flatten that mixes samples is not in the engine's vocabulary")
    size = math.prod(input.shape[start : end + 1])
    return b.reshape(input, (*input.shape[:start], size, *input.shape[end + 1 :]))


def reshape(b: Builder, input: Value, *shape: Any) -> Value:
    sizes = list(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else list(shape)
    total = math.prod(input.shape)
    if sizes.count(-1) == 1:
        known = -math.prod(sizes)
        if known <= 0 or total % known:
            raise Refusal(f"a reshape of {input.shape} to {tuple(sizes)}")
        sizes[sizes.index(-1)] = total // known
    if not sizes or math.prod(sizes) != total or min(sizes) < 0:
        raise Refusal(f"a reshape of {input.shape} to {tuple(sizes)}")
    return b.reshape(input, sizes)


def squeeze(b: Builder, input: Value, dim: int) -> Value:
    place = dim + len(input.shape) if dim < 0 else dim
    if not 0 < place < len(input.shape):
        raise Refusal("a squeeze of the batch is not in the engine's vocabulary")
    if input.shape[place] != 1:
        return input
    return b.reshape(input, input.shape[:place] + input.shape[place + 1 :])


def unsqueeze(b: Builder, input: Value, dim: int) -> Value:
    place = dim + len(input.shape) + 1 if dim < 0 else dim
    if not 0 < place <= len(input.shape):
        raise Refusal("an unsqueeze before the batch is not in the engine's vocabulary")
    return b.reshape(input, (*input.shape[:place], 1, *input.shape[place:]))


def mean(b: Builder, input: Value, dim: Any, keepdim: bool = False) -> Value:
    dims = len(input.shape)
    place = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    if not isinstance(place, int) or dims != 3 or place % dims != 1:
        raise Refusal("a mean over other axes than the rows of [B, T, E]")
    shape = (input.shape[0], 1, input.shape[2])
    result = b.emit(Op.MEAN_ROWS, input, shape)
    return result if keepdim else Value(result.index, (shape[0], shape[2]))


def add(b: Builder, input: Value, other: Value, alpha: Any = 1) -> Value:
    both = isinstance(input, Value) and isinstance(other, Value)
    if not both or input.shape != other.shape or alpha != 1:
        raise Refusal("an addition of anything but two results of the same shape")
    return b.emit(Op.ADD, input, input.shape, input2=other.index)


def _activation(op: Op) -> Callable[..., Value]:
    def row(b: Builder, input: Value, inplace: bool = False) -> Value:
        return b.emit(op, input, input.shape)

    return row


def leaky_relu(
    b: Builder, input: Value, negative_slope: float = 0.01, inplace: bool = False
) -> Value:
    return b.emit(Op.LEAKY_RELU, input, input.shape, number=b.number(negative_slope))


def elu(b: Builder, input: Value, alpha: float = 1.0, inplace: bool = False) -> Value:
    return b.emit(Op.ELU, input, input.shape, number=b.number(alpha))


def _same(b: Builder, input: Value) -> Value:
    return input


_RELU, _TANH, _SIGMOID = _activation(Op.RELU), _activation(Op.TANH), _activation(Op.SIGMOID)
_SILU = _activation(Op.SILU)

FUNCTIONS: dict[Any, Callable[..., Value]] = {
    **dict.fromkeys((F.relu, torch.relu), _RELU),
    **dict.fromkeys((F.tanh, torch.tanh), _TANH),
    **dict.fromkeys((F.sigmoid, torch.sigmoid), _SIGMOID),
    F.silu: _SILU,
    F.gelu: gelu,
    F.leaky_relu: leaky_relu,
    F.elu: elu,
    F.softplus: softplus,
    F.dropout: dropout,
    torch.flatten: flatten,
    torch.reshape: reshape,
    torch.squeeze: squeeze,
    torch.unsqueeze: unsqueeze,
    torch.mean: mean,
    **dict.fromkeys((torch.add, operator.add, operator.iadd), add),
}

METHODS: dict[str, Callable[..., Value]] = {
    "relu": _RELU,
    "tanh": _TANH,
    "sigmoid": _SIGMOID,
    "flatten": flatten,
    "reshape": reshape,
    "view": reshape,
    "squeeze": squeeze,
    "unsqueeze": unsqueeze,
    "mean": mean,
    "add": add,
    "contiguous": _same,
}

CONCRETE: dict[str, Callable[..., Any]] = {
    "size": lambda x, dim=None: torch.Size(x.shape) if dim is None else x.shape[dim],
    "dim": lambda x: len(x.shape),
    "shape": lambda x: torch.Size(x.shape),
    "ndim": lambda x: len(x.shape),
}
"""Methods and attributes whose result is no tensor."""

CALLS = frozenset(
    {
        *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv),
        operator.neg,
    }
)
"""Functions that are computed where all arguments are plain numbers or shapes."""

IN_PLACE = frozenset({operator.iadd})
"""Functions that write to their first argument."""


def call_row(row: Callable[..., Value], b: Builder, args: Any, kwargs: Any, name: str) -> Value:
    """Call a row of `FUNCTIONS` or `METHODS` with the user's arguments.

    Raises:
        Refusal: the row does not know these arguments.
    """
    kwargs = {("dim" if key == "axis" else key): value for key, value in kwargs.items()}
    try:
        bound = inspect.signature(row).bind(b, *args, **kwargs)
    except TypeError:
        raise Refusal(f"'{name}' with such arguments is not in the engine's vocabulary") from None
    if not isinstance(bound.arguments["input"], Value):
        raise Refusal(f"'{name}' of something that is no result of the forward")
    return row(*bound.args, **bound.kwargs)
