"""What a checkpoint holds, without a bundle to load it into."""

import os
from pathlib import Path
from typing import Any

import torch

from .encoding import Decoder
from .format import MANIFEST, OPTIMIZER
from .reading import read

__all__ = ["checkpoint_info"]


def checkpoint_info(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what a checkpoint says about itself; the bundle that it is of is not needed.

    Args:
        directory: of the checkpoint.

    Returns:
        `num_models`; `models`, a list of dicts with `id`, `seed`, `active`, `hyper_parameters` (the
        options of the optimizer) and `attributes` (the numbers in which the models differ);
        `optimizer`, the name of its class or None; `rng`; `states`, the names of what was saved
        with `states=`; `tensors`, the shapes by name; `modelbatch` and `torch`, the versions that
        have written it.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    checkpoint = read(Path(directory), (OPTIMIZER,))
    manifest = checkpoint.manifest
    optimizer = manifest["optimizer"]
    tensors = checkpoint.tensors.get(OPTIMIZER, {})
    decoder = Decoder(tensors, checkpoint.path(OPTIMIZER), torch.device("cpu"))
    groups = [] if optimizer is None else optimizer.get("groups", [])
    attributes = Decoder({}, MANIFEST, torch.device("cpu")).decode(manifest["attributes"])
    models = [
        {
            **model,
            "hyper_parameters": decoder.decode(groups[i]) if groups else {},
            "attributes": {name: values[i] for name, values in attributes.items()},
        }
        for i, model in enumerate(manifest["models"])
    ]
    return {
        "num_models": manifest["num_models"],
        "models": models,
        "optimizer": None if optimizer is None else optimizer["class"],
        "rng": manifest["random"]["kind"],
        "states": sorted(manifest["states"]),
        "tensors": {name: tuple(own["shape"]) for name, own in manifest["tensors"].items()},
        "modelbatch": manifest["modelbatch"],
        "torch": manifest["torch"],
    }
