"""Letting a bundle have the models of a checkpoint, before that is loaded."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..bundle import Bundle
from ..errors import CheckpointError
from ..structure import walk
from .encoding import Decoder
from .format import MANIFEST

__all__ = ["resize"]


def resize(bundle: Bundle, manifest: Mapping[str, Any]) -> None:
    """Removes models whose id the checkpoint lacks, and makes those that it has beyond.

    Their plain attributes are those of a model that stays, or as the checkpoint has noted them;
    weights and all else are what is about to be loaded.

    Raises:
        CheckpointError: the bundle has a model that the saved one never had.
        ModelBatchError: somebody who has something for each model cannot follow.
    """
    ids = [int(model["id"]) for model in manifest["models"]]
    own = bundle.model_ids
    given = int(manifest.get("next_id", 1 + max(ids)))
    if max(own) >= given:
        raise CheckpointError(
            f"the checkpoint is of another bundle: it never had a model {max(own)}, as this one "
            f"has; it has seen {given} models, and has {len(ids)}"
        )
    source = [own.index(model_id) if model_id in own else None for model_id in ids]
    kept = [old for old in source if old is not None]
    fresh = []
    for slot, old in enumerate(source):
        if old is None:
            model = bundle.export(kept[0] if kept else 0)
            _set_attributes(model, manifest["attributes"], slot)
            fresh.append(model)
    bundle._change_models(source, fresh, ids=ids, template=True)


def _set_attributes(model: nn.Module, recorded: Mapping[str, Any], slot: int) -> None:
    attributes = Decoder({}, MANIFEST, torch.device("cpu")).decode(recorded)
    modules = dict(zip(*walk(model)))
    for path, values in attributes.items():
        prefix, _, name = path.rpartition(".")
        if name in modules[prefix].__dict__:
            modules[prefix].__dict__[name] = values[slot]
