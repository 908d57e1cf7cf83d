"""What a Lightning checkpoint needs to know of a bundle beside its stacked parameters."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from ...callbacks.report import hyper_parameters
from ...checkpoint.global_random import GlobalRandomState
from ...errors import CheckpointError
from .recording import Means

if TYPE_CHECKING:
    from ...batch import ModelBatch

__all__ = ["KEY", "Checkpointing"]

KEY = "modelbatch"
"""Where it stands in a checkpoint."""
_FORMAT = 1


class Checkpointing(LightningModule):
    """The part of `BundleModule` that goes into a checkpoint; see there."""

    bundle: "ModelBatch"
    router: Any
    model_hparams: list[dict[str, Any]] | None
    _means: Means

    @property
    def hparams_of_models(self) -> list[dict[str, Any]]:
        """M dicts: seed, optimizer options in which models differ, and the user's own."""
        own, _ = hyper_parameters(self.bundle, None)
        if self.model_hparams is not None:
            for values, more in zip(own, self.model_hparams, strict=True):
                values.update(more)
        return own

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds which models there are, what each was told, and where their randomness stands.

        It consists of plain values and tensors, so that `weights_only=True` reads it.
        """
        bundle = self.bundle
        content: dict[str, Any] = {
            "format_version": _FORMAT,
            "num_models": len(bundle),
            "model_ids": bundle.model_ids,
            "next_id": bundle._next_id,
            "active": list(bundle._active),
            "hparams_of_models": [_plain(own) for own in self.hparams_of_models],
            "model_hparams": None
            if self.model_hparams is None
            else [_plain(own) for own in self.model_hparams],
            "streams": bundle._streams.state_dict(),
            "means": self._means.state_dict("train"),
        }
        if hasattr(self.router, "state_dict"):
            content["router"] = self.router.state_dict()
        if self._fits():
            content["random"] = _plain(GlobalRandomState().state_dict())
        checkpoint[KEY] = content

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes over what `on_save_checkpoint` added.

        Models that had left the saved bundle leave this one too. Where a training goes on
        (`fit(ckpt_path=...)`), torch's, numpy's and Python's generators go on as well.

        Raises:
            CheckpointError: the checkpoint is of other models.
        """
        content = checkpoint.get(KEY)
        if not isinstance(content, Mapping):
            raise CheckpointError(
                f"the checkpoint has no '{KEY}', so it is not one of a BundleModule (or its"
                " on_save_checkpoint was overridden without super())"
            )
        if content["format_version"] != _FORMAT:
            raise CheckpointError(
                f"the checkpoint's '{KEY}' has format version {content['format_version']}, this"
                f" release reads {_FORMAT}"
            )
        bundle, streams = self.bundle, self.bundle._streams
        kind = content["streams"]["kind"]
        if kind != streams.kind:
            raise CheckpointError(
                f"the checkpoint's random streams are rng={kind!r}, the bundle's are "
                f"rng={streams.kind!r}"
            )
        self._follow_ids(content)
        streams.load_state_dict(content["streams"])
        bundle._ids = list(content["model_ids"])
        bundle._next_id = max(bundle._next_id, int(content["next_id"]))
        for value in (False, True):
            bundle._set_active(
                [i for i, flag in enumerate(content["active"]) if bool(flag) is value], value
            )
        if self.model_hparams is None and content["model_hparams"] is not None:
            self.model_hparams = [dict(own) for own in content["model_hparams"]]
        if "router" in content and hasattr(self.router, "load_state_dict"):
            self.router.load_state_dict(content["router"])
        if self._fits():
            self._means.load_state_dict("train", content["means"], streams.device)
            if "random" in content:
                GlobalRandomState().load_state_dict(_generators(content["random"]))

    def _fits(self) -> bool:
        trainer = self._trainer
        return trainer is not None and trainer.state.fn == TrainerFn.FITTING

    def _follow_ids(self, content: Mapping[str, Any]) -> None:
        """Lets those models leave that are not in the checkpoint.

        Raises:
            CheckpointError: the models of the checkpoint are not some of this bundle's.
        """
        bundle, saved = self.bundle, list(content["model_ids"])
        if len(saved) == len(bundle):
            return
        gone = [slot for slot, own in enumerate(bundle.model_ids) if own not in saved]
        if len(bundle) - len(gone) != len(saved):
            raise CheckpointError(
                f"the checkpoint is of {len(saved)} models, {type(self).__name__} has"
                f" {len(bundle)}; give it num_models={len(saved)}"
            )
        bundle.prune(gone)


def _plain(value: Any) -> Any:
    """Without classes that only a full unpickling could make again."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _generators(state: Mapping[str, Any]) -> dict[str, Any]:
    """What `GlobalRandomState` takes, of what `_plain` made of it."""
    version, internal, gauss = state["python"]
    name, keys, *rest = state["numpy"]
    return {
        **state,
        "python": (version, tuple(internal), gauss),
        "numpy": (name, np.array(keys, dtype=np.uint32), *rest),
        "torch": state["torch"].to(dtype=torch.uint8, device="cpu"),
    }
