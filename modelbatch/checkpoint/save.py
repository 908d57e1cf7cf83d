"""Saving a whole bundle."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..bundle import Bundle
from ..errors import CheckpointError
from .encoding import Encoder, dtype_name
from .files import Replacement
from .format import OPTIMIZER, RANDOM, STACKED, STATES, model_file
from .optimizer import class_name, collect_optimizer

__all__ = ["attribute_names", "extra_state_owners", "names_of", "one_model", "save_all"]


def save_all(
    bundle: Bundle,
    directory: str | os.PathLike[str],
    *,
    per_model: bool = False,
    states: Mapping[str, Any] | None = None,
) -> None:
    """See `ModelBatch.save_all`."""
    content, files = _collect(bundle, per_model, states or {})
    with Replacement(Path(directory)) as new:
        for name, tensors in files.items():
            new.write(name, tensors)
        new.commit(content)


def names_of(bundle: Bundle, slot: Any) -> list[str]:
    """All names of a tensor in the user's model; more than one if it is tied."""
    modules = bundle._stack.structure.module_names
    return [
        f"{modules[index]}.{attribute}" if modules[index] else attribute
        for index, attribute in slot.places
    ]


def attribute_names(bundle: Bundle) -> dict[str, list[Any]]:
    """The plain numbers that differ between the models, by qualified name."""
    structure = bundle._stack.structure
    return {
        f"{structure.module_names[index]}.{name}".lstrip("."): list(number.values)
        for (index, name), number in structure.per_model.items()
    }


def extra_state_owners(bundle: Bundle) -> dict[str, int]:
    """The modules that have a state beside their tensors: names, and places in the structure."""
    modules = zip(bundle._stack.structure.module_names, bundle._stack.modules[0])
    return {
        name: index
        for index, (name, module) in enumerate(modules)
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }


def _collect(
    bundle: Bundle, per_model: bool, states: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """The content of `bundle.json`, and the tensors of every file."""
    files: dict[str, dict[str, Tensor]] = {}
    ids = bundle.model_ids
    content: dict[str, Any] = {
        "modelbatch": __version__,
        "torch": str(torch.__version__),
        "num_models": len(bundle),
        "next_id": bundle._next_id,
        "models": [
            {"id": model_id, "seed": seed, "active": active}
            for model_id, seed, active in zip(ids, bundle.seeds, bundle._active)
        ],
        "attributes": {
            name: Encoder().encode(values, name, f"attribute '{name}'")
            for name, values in attribute_names(bundle).items()
        },
        "training": _training_modes(bundle),
    }
    content["random"], random = _random_streams(bundle)
    content["tensors"], files[STACKED] = _stacked(bundle)
    encoder = Encoder()
    content["optimizer"] = collect_optimizer(bundle, encoder)
    if bundle.optimizer is not None:
        files[OPTIMIZER] = encoder.tensors
    encoder = Encoder()
    content["grad_scaler"] = _grad_scaler(bundle, encoder)
    content["extra_state"] = {
        name: [
            encoder.encode(
                modules[index].get_extra_state(),
                f"extra_state.{name}.{i}",
                f"extra state of '{name}'",
            )
            for i, modules in enumerate(bundle._stack.modules)
        ]
        for name, index in extra_state_owners(bundle).items()
    }
    content["states"] = {
        name: encoder.encode(_state_of(name, owner), name, f"states[{name!r}]")
        for name, owner in states.items()
    }
    for name, tensors in ((RANDOM, random), (STATES, encoder.tensors)):
        if tensors:
            files[name] = tensors
    if per_model:
        for model_id, model in zip(ids, bundle.models):
            files[model_file(model_id)] = one_model(model_id, model)
    return content, files


def _training_modes(bundle: Bundle) -> dict[str, Any]:
    modules = zip(bundle._stack.structure.module_names, bundle._stack.modules[0])
    other = [name for name, module in modules if module.training != bundle.training]
    return {"training": bundle.training, "other_mode": other}


def _random_streams(bundle: Bundle) -> tuple[dict[str, Any], dict[str, Tensor]]:
    streams = bundle._streams
    record = {"kind": streams.kind, "steps": streams.step.tolist()}
    # Of a model's states the first is that of the CPU's generator, and there may be a GPU's.
    names = ("cpu", streams.device.type)
    by_generator = zip(names, zip(*streams.states))
    return record, {name: torch.stack(states) for name, states in by_generator}


def _stacked(bundle: Bundle) -> tuple[dict[str, Any], dict[str, Tensor]]:
    stack = bundle._stack
    records: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for slot in stack.slots:
        tensor = stack.tensor(slot)
        names = names_of(bundle, slot)
        index, attribute = slot.places[0]
        hidden = attribute in stack.modules[0][index]._non_persistent_buffers_set
        kind = "parameter" if slot.is_parameter else "hidden buffer" if hidden else "buffer"
        records[slot.name] = {
            "kind": kind,
            "dtype": dtype_name(tensor, f"'{slot.name}'"),
            "shape": list(tensor.shape),
            "names": names,
        }
        tensors[slot.name] = tensor
    return records, tensors


def _grad_scaler(bundle: Bundle, encoder: Encoder) -> dict[str, Any] | None:
    scaler = bundle.grad_scaler
    if scaler is None:
        return None
    state = encoder.encode(scaler.state_dict(), "grad_scaler", "the state of the gradient scaler")
    return {"class": class_name(type(scaler)), "state": state}


def _state_of(name: Any, owner: Any) -> Any:
    if not isinstance(name, str):
        raise CheckpointError(f"states must have strings as names, got {name!r}")
    for method in ("state_dict", "load_state_dict"):
        if not callable(getattr(owner, method, None)):
            raise CheckpointError(f"states[{name!r}]: a {type(owner).__name__} has no {method}()")
    return owner.state_dict()


def one_model(model_id: int, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of one model's safetensors file: its state dict, tied names and all.

    Raises:
        CheckpointError: something in it cannot be in such a file.
    """
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        where = f"model {model_id}: '{name}'"
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{where} is no tensor, so it cannot be saved as safetensors")
        if dtype_name(tensor, where) in ("complex64", "complex128"):
            raise CheckpointError(
                f"{where} is complex; safetensors files for other programs cannot hold that, so "
                "save without per_model, or this model with save_model(i, 'model.pt')"
            )
    return dict(tensors)
