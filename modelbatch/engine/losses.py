"""Which losses the engine computes: one row per function and module of torch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoding import Loss
from .program import LossSpec, Refusal

__all__ = ["options_of", "read_loss"]

# What a loss may be given; what is not named here must have its default.
_FUNCTIONS: dict[Any, tuple[str, frozenset[str]]] = {
    F.cross_entropy: (
        "cross_entropy",
        frozenset({"weight", "ignore_index", "label_smoothing", "reduction"}),
    ),
    F.nll_loss: ("nll", frozenset({"weight", "ignore_index", "reduction"})),
    F.mse_loss: ("mse", frozenset({"reduction"})),
    F.l1_loss: ("l1", frozenset({"reduction"})),
    F.huber_loss: ("huber", frozenset({"reduction", "delta"})),
    F.smooth_l1_loss: ("smooth_l1", frozenset({"reduction", "beta"})),
    F.binary_cross_entropy_with_logits: ("bce", frozenset({"reduction", "pos_weight"})),
}

_MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.CrossEntropyLoss: (
        "cross_entropy",
        ("weight", "ignore_index", "label_smoothing", "reduction"),
    ),
    nn.NLLLoss: ("nll", ("weight", "ignore_index", "reduction")),
    nn.MSELoss: ("mse", ("reduction",)),
    nn.L1Loss: ("l1", ("reduction",)),
    nn.HuberLoss: ("huber", ("reduction", "delta")),
    nn.SmoothL1Loss: ("smooth_l1", ("reduction", "beta")),
    nn.BCEWithLogitsLoss: ("bce", ("reduction", "weight", "pos_weight")),
}

_KINDS = {
    "mse": Loss.MSE,
    "l1": Loss.L1,
    "huber": Loss.HUBER,
    "smooth_l1": Loss.SMOOTH_L1,
    "bce": Loss.BCE_LOGITS,
}


def options_of(loss_fn: Callable[..., Tensor]) -> tuple[str, dict[str, Any]]:
    """The name of a loss that the engine knows, and its options.

    Raises:
        Refusal: it does not know this one, or not this option.
    """
    if isinstance(loss_fn, nn.Module):
        known = _MODULES.get(type(loss_fn))
        if known is None:
            raise Refusal(f"the loss {type(loss_fn).__name__} is not in the engine's vocabulary")
        hooks = loss_fn._forward_hooks or loss_fn._forward_pre_hooks
        if hooks or loss_fn._backward_hooks or loss_fn._backward_pre_hooks:
            raise Refusal("the loss has hooks")
        if "forward" in loss_fn.__dict__:
            raise Refusal("the loss has a forward of its own")
        return known[0], {name: getattr(loss_fn, name) for name in known[1]}
    function, given = loss_fn, {}
    if type(loss_fn) is functools.partial:
        function, given = loss_fn.func, loss_fn.keywords
        if loss_fn.args:
            raise Refusal("the loss has positional arguments of its own")
    try:
        row = _FUNCTIONS.get(function)
    except TypeError:  # it cannot be hashed
        row = None
    if row is None:
        name = getattr(function, "__name__", type(function).__name__)
        raise Refusal(f"the loss '{name}' is not in the engine's vocabulary")
    odd = sorted(given.keys() - row[1])
    if odd:
        raise Refusal(f"the loss has the option {odd[0]}=")
    return row[0], dict(given)


def read_loss(
    loss_fn: Callable[..., Tensor],
    outputs: tuple[int, ...],
    target: tuple[int, ...],
    dtype: torch.dtype,
    target_dtype: torch.dtype,
    weighted: bool,
) -> LossSpec:
    """A loss as the program has it.

    Args:
        loss_fn: the user's.
        outputs: shape of one model's outputs.
        target: shape of one model's targets.
        dtype: of the outputs.
        target_dtype: of the targets.
        weighted: whether samples have weights.

    Raises:
        Refusal: it is none that the engine computes, or the targets have another form.
    """
    name, options = options_of(loss_fn)
    if weighted and type(loss_fn) is functools.partial:
        raise Refusal("sample weights with a loss that is a functools.partial")
    reduction = options.get("reduction", "mean")
    if reduction not in ("mean", "sum") or (weighted and reduction == "sum"):
        raise Refusal(f'the loss has reduction="{reduction}"')
    sums = reduction == "sum"
    if name in ("cross_entropy", "nll"):
        return _classes(name, options, outputs, target, dtype, target_dtype, sums)
    if target != outputs or target_dtype != dtype:
        raise Refusal("the targets do not have the shape and dtype of the outputs")
    spec = LossSpec(_KINDS[name], sums=sums)
    if name == "huber":
        spec.delta = _positive("delta", options.get("delta", 1.0))
    elif name == "smooth_l1":
        beta = options.get("beta", 1.0)
        if beta == 0:
            return LossSpec(Loss.L1, sums=sums)
        spec.delta = _positive("beta", beta)
    elif name == "bce":
        if options.get("weight") is not None:
            raise Refusal("the loss has the option weight=")
        width = outputs[-1] if len(outputs) > 1 else 1
        positive = options.get("pos_weight")
        if isinstance(positive, Tensor) and positive.dtype != dtype:
            raise Refusal("the pos_weight has another dtype than the outputs")
        spec.columns = _columns("pos_weight", options.get("pos_weight"), width)
    return spec


def _classes(
    name: str,
    options: Mapping[str, Any],
    outputs: tuple[int, ...],
    target: tuple[int, ...],
    dtype: torch.dtype,
    target_dtype: torch.dtype,
    sums: bool,
) -> LossSpec:
    if len(outputs) != 2:
        raise Refusal("outputs of classes must be [B, C]")
    kind = Loss.NLL if name == "nll" else Loss.CROSS_ENTROPY
    ignore_index = options.get("ignore_index", -100)
    if name == "cross_entropy" and target == outputs and target_dtype == dtype:
        kind = Loss.CROSS_ENTROPY_SOFT
        if ignore_index >= 0:
            raise Refusal("the loss has the option ignore_index=")
        ignore_index = 0
    elif target != outputs[:1] or target_dtype != torch.int64:
        raise Refusal("the targets are neither class numbers [B] nor probabilities [B, C]")
    spec = LossSpec(kind, ignore_index=ignore_index, sums=sums)
    smoothing = options.get("label_smoothing", 0.0)
    if smoothing != 0.0:
        if not 0.0 <= smoothing <= 1.0:
            raise Refusal(f"label_smoothing={smoothing}")
        spec.smoothing = float(smoothing)
    weight = options.get("weight")
    if weight is not None and weight.dtype != dtype:
        raise Refusal("the class weights have another dtype than the outputs")
    if weight is not None and weight.shape != (outputs[1],):
        raise Refusal("the class weights do not have the shape [C]")
    spec.columns = _columns("weight", weight, outputs[1])
    return spec


def _positive(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or not value > 0:
        raise Refusal(f"the loss has {name}={value!r}")
    return float(value)


def _columns(name: str, weight: Any, width: int) -> list[float] | None:
    """Numbers for the columns of the outputs."""
    if weight is None:
        return None
    if type(weight) not in (Tensor, nn.Parameter) or weight.requires_grad:
        raise Refusal(f"the loss has a {name}= that is no plain tensor")
    if weight.device.type != "cpu" or weight.shape not in ((width,), (1,), ()):
        raise Refusal(f"the loss has a {name}= of shape {tuple(weight.shape)}")
    values: list[float] = weight.detach().double().reshape(-1).tolist()
    return values if len(values) == width else values * width
