"""Files of one model: what plain torch and other programs read and write."""

import contextlib
import io
import os
import secrets
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..bundle import Bundle
from ..errors import CheckpointError
from .files import sync_directory, tensor_bytes, write_synced
from .save import one_model
from .tensors import check_cast

__all__ = ["load_model", "save_model"]


def save_model(bundle: Bundle, i: int, path: str | os.PathLike[str]) -> None:
    """See `ModelBatch.save_model`."""
    i = bundle._number(i)
    target = Path(path)
    if target.suffix == ".safetensors":
        data = tensor_bytes(one_model(i, bundle.models[i]))
    else:
        buffer = io.BytesIO()
        torch.save(
            {name: _own(value) for name, value in bundle.models[i].state_dict().items()}, buffer
        )
        data = buffer.getvalue()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        try:
            write_synced(temporary, data)
            os.replace(temporary, target)
            sync_directory(target.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be saved: {error}") from error


def _own(value: Any) -> Any:
    # torch.save writes the whole memory that a view looks at.
    return value.detach().clone() if isinstance(value, Tensor) else value


def load_model(
    bundle: Bundle,
    i: int,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    strict: bool = True,
) -> None:
    """See `ModelBatch.load_model`."""
    i = bundle._number(i)
    if isinstance(source, Mapping):
        where, state = "the state dict", dict(source)
    else:
        where, state = str(source), _read(Path(source))
    model = bundle.models[i]
    own = model.state_dict()
    _check(own, state, where, strict)
    tensors = [value for value in own.values() if isinstance(value, Tensor)]
    before = [_own(tensor) for tensor in tensors]
    try:
        model.load_state_dict(state, strict=False)
    except Exception as error:
        for tensor, content in zip(tensors, before):
            tensor.copy_(content)
        raise CheckpointError(f"{where}: {error}") from error
    # The model's tensors are views with version counters of their own.
    for slot in bundle._stack.slots:
        torch.autograd.graph.increment_version(bundle._stack.tensor(slot))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        if data[8:9] == b"{":
            return safetensors.torch.load(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"{path} was truncated or altered: {error}") from error
    except Exception as error:  # torch.load has no error of its own
        kind = "a file of torch.save" if zipfile.is_zipfile(io.BytesIO(data)) else "a state dict"
        raise CheckpointError(
            f"{path} cannot be read as {kind} of tensors only, or as safetensors: {error}"
        ) from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a state dict")
    return dict(state)


def _check(own: Mapping[str, Any], state: Mapping[str, Any], where: str, strict: bool) -> None:
    for name, value in state.items():
        if name not in own:
            if strict:
                hint = "; the file may hold the state dict under a key" if _nested(value) else ""
                raise CheckpointError(f"{where}: '{name}' is no tensor of the model{hint}")
            continue
        mine = own[name]
        if not isinstance(mine, Tensor):
            continue  # extra state, which the module itself reads
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{where}: '{name}' is a {type(value).__name__}, not a tensor")
        if value.shape != mine.shape:
            raise CheckpointError(
                f"{where}: '{name}' has the shape {tuple(value.shape)}, that of the model "
                f"{tuple(mine.shape)}"
            )
        check_cast(value, mine, f"{where}: '{name}'")
    missing = [name for name in own if name not in state]
    if missing and strict and not _only_ties(own, state, missing):
        raise CheckpointError(f"{where}: '{missing[0]}' is missing")


def _nested(value: Any) -> bool:
    return isinstance(value, Mapping | nn.Module)


def _only_ties(own: Mapping[str, Any], state: Mapping[str, Any], missing: list[str]) -> bool:
    """Whether what is missing is there under another name of the same tensor."""
    there = {own[name].data_ptr() for name in state if isinstance(own.get(name), Tensor)}
    return all(isinstance(own[name], Tensor) and own[name].data_ptr() in there for name in missing)
