"""Autocast for functions that vmap takes apart.

Under vmap a composite function is decomposed before autocast sees it. So its arguments are cast
here, by torch's own lists of operations for each device, and it runs with autocast disabled.
Functions that vmap does not take apart, or whose rule runs below vmap, need nothing of this.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..attributes import PerModelFloat
from .mode import _KNOW_PER_MODEL_NUMBERS, RULES, Call, Rule, handles_per_model_numbers

# What autocast does to a function: "lower" or "float32" casts its arguments, "float32 result" also
# sets its dtype option, "promote" casts to the widest argument, "off" leaves them alone although
# the parts of the function would be cast.
_LOSSES = (
    "l1_loss smooth_l1_loss huber_loss mse_loss nll_loss hinge_embedding_loss poisson_nll_loss "
    "cosine_embedding_loss binary_cross_entropy_with_logits "
    "_C.kl_div _C.margin_ranking_loss _C.triplet_margin_loss "
    "_C._nn.soft_margin_loss _C._nn.multi_margin_loss"
)
_LINALG = (
    "cond det eig eigh eigvals eigvalsh inv inv_ex lstsq lu_factor lu_solve matrix_rank "
    "qr slogdet solve solve_triangular svd svdvals tensorinv tensorsolve cholesky cholesky_ex "
    "householder_product"
)
_FFT = "fft ifft fft2 ifft2 fftn ifftn rfft irfft rfft2 irfft2 rfftn irfftn hfft ihfft"
POLICIES: dict[str, dict[str, str]] = {
    "cpu": {
        "lower": "prelu addmm addbmm baddbmm chain_matmul linalg.vecdot",
        "off": "mv dot vdot inner addmv bilinear",
        "float32": f"{_LOSSES} cross_entropy trace cdist logdet inverse "
        + " ".join(f"linalg.{n}" for n in _LINALG.split())
        + " "
        + " ".join(f"fft.{n}" for n in _FFT.split()),
    },
    "cuda": {
        "lower": "prelu addmm addmv addr mv addbmm baddbmm chain_matmul einsum linalg.vecdot "
        "linalg.multi_dot gru_cell lstm_cell rnn_tanh_cell rnn_relu_cell",
        "float32": f"{_LOSSES} rms_norm cosine_similarity dist cdist renorm logsumexp norm",
        "float32 result": "softmax log_softmax prod cumprod cumsum sum linalg.vector_norm "
        "linalg.matrix_norm",
        "promote": "dot vdot tensordot bilinear cross",
    },
}


def _resolve(name: str) -> list[Any]:
    """The functions and methods that go by a name."""
    if name.startswith("_C."):
        owners: list[Any] = [torch._C._nn if "_nn." in name else torch]
    elif "." in name:
        owners = [getattr(torch, name.split(".")[0])]
    else:
        owners = [torch, F, Tensor]
    found = [getattr(owner, name.split(".")[-1], None) for owner in owners]
    return [function for function in found if function is not None]


def _table() -> dict[Any, dict[str, str]]:
    table: dict[Any, dict[str, str]] = {}
    for device, kinds in POLICIES.items():
        for kind, names in kinds.items():
            for name in names.split():
                for function in _resolve(name):
                    table.setdefault(function, {})[device] = kind
    return table


def _eligible(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _cast(kind: str, device: str, values: Any, kwargs: dict[str, Any]) -> Any:
    """(args, kwargs) as torch's autocast would hand them on."""
    if kind == "off":
        return values, kwargs
    if kind == "float32 result":
        first = values[0] if values else None
        if _eligible(first) and kwargs.get("dtype") is None:
            kwargs = {**kwargs, "dtype": torch.float32}
        return values, kwargs
    dtype: torch.dtype | None
    if kind == "lower":
        dtype = torch.get_autocast_dtype(device)
    elif kind == "promote":
        dtypes = [t.dtype for t in tree_leaves((values, kwargs)) if _eligible(t)]
        dtype = functools.reduce(torch.promote_types, dtypes, dtypes[0]) if dtypes else None
    else:
        dtype = torch.float32
    if dtype is None:
        return values, kwargs
    return tree_map(lambda v: v.to(dtype) if _eligible(v) else v, (values, kwargs))


def _with_policy(inner: Rule | None, kinds: dict[str, str]) -> Rule:
    """A rule that casts before it goes on to another rule, or to torch."""
    by_itself = inner is not None and inner in _KNOW_PER_MODEL_NUMBERS

    def rule(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = call.device.type
        kind = kinds.get(device)
        numbers = call.per_model_numbers and not by_itself and _has_numbers(args, kwargs)
        if kind is None or call.level is None or not torch.is_autocast_enabled(device):
            if numbers:
                return call._by_value(func, args, kwargs)
            return NotImplemented if inner is None else inner(call, func, args, kwargs)
        args, kwargs = _cast(kind, device, args, kwargs)
        with torch.autocast(device, enabled=False):
            if numbers:
                return call._by_value(func, args, kwargs)
            if inner is not None:
                result = inner(call, func, args, kwargs)
                if result is not NotImplemented:
                    return result
            return call._default(func, args, kwargs)

    return handles_per_model_numbers(rule)


def _has_numbers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(leaf, PerModelFloat) for leaf in tree_leaves((args, kwargs)))


def install() -> None:
    """Put the policies in front of the rules that are registered so far."""
    for function, kinds in _table().items():
        RULES[function] = _with_policy(RULES.get(function), kinds)
