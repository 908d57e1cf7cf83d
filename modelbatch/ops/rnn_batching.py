"""`torch.vmap` over LSTM, GRU, RNN and their cells, and over packing sequences for them.

torch has no rules for these, or none that does not loop. `csrc/rnn/rnn_batching.cpp` has them for
the recurrent operators, the functions here those for packing. They are added only where torch has
no rule.

An operator whose rule is a composition of others must be taken apart before a transform inside of
vmap, such as the `torch.func.grad` of ``vmap(grad(f))``, takes it apart its own way. Therefore each
has a second kernel that comes before all transforms and hands it to the rule if vmap is one.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch._C._functorch as functorch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from modelbatch.ops import rnn_layers
from modelbatch.ops.rnn_rules import _is_tensor

RECURRENT = (
    *(f"{n}.{o}" for n in ("lstm", "gru", "rnn_tanh", "rnn_relu") for o in ("input", "data")),
    *(f"{n}_cell" for n in ("lstm", "gru", "rnn_tanh", "rnn_relu")),
)
PACKING = ("_pack_padded_sequence", "_pack_padded_sequence_backward", "_pad_packed_sequence")

_RULE = "FuncTorchBatchedDecomposition"
_RULE_KEY = torch._C.DispatchKey.FuncTorchBatchedDecomposition
_library = torch.library.Library("aten", "IMPL")


def has_rule(name: str) -> bool:
    """Whether an operator of aten, such as ``"lstm.input"``, has a batching rule.

    Args:
        name: the operator, with its overload if that has a name.
    """
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return any(has(f"aten::{name}", key) for key in ("FuncTorchBatched", _RULE))


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _under_vmap() -> bool:
    interpreters = functorch.get_interpreter_stack() or ()
    return any(i.key() == functorch.TransformType.Vmap for i in interpreters)


def _same_for_all(tensor: Tensor, what: str) -> Tensor:
    """A tensor of sizes without the wrappers of transforms.

    Raises:
        RuntimeError: it differs along an axis of vmap.
    """
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            raise RuntimeError(
                f"vmap: the {what} of packed sequences must be the same for all; here they differ "
                "along the axis of vmap. Pad the sequences instead of packing them"
            )
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def _has_symbols(args: Any) -> bool:
    """Whether a size is a symbol, as while torch.compile traces dynamic shapes."""
    return any(
        isinstance(size, torch.SymInt)
        for leaf in tree_leaves(args)
        if _is_tensor(leaf)
        for size in leaf.shape
    )


def _check_randomness() -> None:
    """Refuses to draw where vmap does, with its words.

    Raises:
        RuntimeError: an axis of vmap has ``randomness="error"``.
    """
    for interpreter in functorch.get_interpreter_stack() or ():
        if interpreter.key() == functorch.TransformType.Vmap:
            vmap: Any = functorch.CVmapInterpreterPtr(interpreter)
            if vmap.randomness() == functorch.RandomnessType.Error:
                raise RuntimeError(
                    "vmap: called random operation while in randomness error mode. Please either "
                    "use the 'same' or 'different' randomness flags on vmap or perform the "
                    "randomness operation out of vmap"
                )


# ---- the recurrent operators ---------------------------------------------------------------------


def _padded(kind: str, input: Tensor, hx: Any, params: Any, *options: Any) -> tuple[Tensor, ...]:
    """What the rule of csrc does, for sizes that are symbols."""
    o = rnn_layers.Options(*options)
    states = [t.unsqueeze(0) for t in ([hx] if _is_tensor(hx) else hx)]
    x = input.transpose(0, 1) if o.batch_first else input
    steps, batch = int(x.shape[0]), int(x.shape[1])

    def drop(rows: Tensor) -> Tensor:
        return torch.dropout(rows, o.dropout, True)

    y, *ends = rnn_layers.run_layers(
        kind,
        x.flatten(0, 1).unsqueeze(0),
        [batch] * steps,
        states,
        [p.unsqueeze(0) for p in params],
        o,
        drop if o.train and o.dropout else None,
    )
    found = [rnn_layers.pad_rows(y, steps, o), *ends]
    found = rnn_layers.autocast_results(kind, found, states, False)
    return tuple(t.squeeze(0) for t in found)


def _make_gate(name: str) -> Callable[..., Any]:
    op = _operator(name)
    kind = name.split(".")[0]
    options = 5 if name.endswith(".data") else 4  # the position of num_layers

    def gate(*args: Any, **kwargs: Any) -> Any:
        if name.endswith(".data"):
            args = (args[0], _same_for_all(args[1], "lengths"), *args[2:])
        if not _under_vmap():
            # A cell has a kernel for autocast on CUDA, which calls it again without autocast.
            cuda = torch._C.DispatchKey.AutocastCUDA
            if kind.endswith("_cell") and torch.is_autocast_enabled("cuda"):
                excluded = torch._C._dispatch_tls_is_dispatch_key_excluded(cuda)
                if not excluded and any(_is_tensor(a) and a.is_cuda for a in args):
                    return op._op_dk(cuda, *args, **kwargs)
            return op.decompose(*args, **kwargs)
        if not kind.endswith("_cell"):
            num_layers, dropout, train = args[options : options + 3]
            if train and dropout and num_layers > 1:
                _check_randomness()
        if name.endswith(".input") and _has_symbols(args[:3]):
            return _padded(kind, *args, **kwargs)
        return op._op_dk(_RULE_KEY, *args, **kwargs)

    return gate


# ---- packing -------------------------------------------------------------------------------------


def _pack(input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    values = _same_for_all(lengths, "lengths").tolist()
    return rnn_layers.pack_padded_sequence(input, values, batch_first)


def _pack_backward(grad: Tensor, input_size: Any, batch_sizes: Tensor, batch_first: bool) -> Tensor:
    sizes = _same_for_all(batch_sizes, "lengths").tolist()
    length = input_size[1 if batch_first else 0]
    return rnn_layers.pad_packed_sequence(grad, sizes, batch_first, 0.0, length)[0]


def _pad(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[Tensor, Tensor]:
    sizes = _same_for_all(batch_sizes, "lengths").tolist()
    return rnn_layers.pad_packed_sequence(data, sizes, batch_first, padding_value, total_length)


def _install() -> tuple[str, ...]:
    """Adds the missing rules, and returns the operators that have got one."""
    front = "FuncTorchDynamicLayerFrontMode"
    missing = [name for name in RECURRENT if not has_rule(name)]
    for name in missing:
        torch.ops.modelbatch.add_batching_rule(name)
        _library.impl(name, _make_gate(name), front)
    for name, rule in zip(PACKING, (_pack, _pack_backward, _pad), strict=True):
        if has_rule(name):
            continue
        missing.append(name)
        _library.impl(name, rule, _RULE)
        if name != "_pack_padded_sequence":  # the only one that is no composition
            _library.impl(name, rule, front)
    return tuple(missing)


ADDED = _install()
"""The operators of aten that have got their rule from here."""
