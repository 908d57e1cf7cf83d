"""Checkpoints of a bundle in Trainer's form, and single models in that of `from_pretrained`."""

import json
import os
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from ..._version import __version__
from ...errors import CheckpointError, ModelBatchError
from .best import BestWeights
from .bundle import PreTrainedBundle
from .callbacks import BundleCallback

_Base: Any = object  # Trainer comes after the mixin

__all__ = ["BUNDLE_NAME", "STATE_NAME", "SavingMixin"]

BUNDLE_NAME = "bundle.json"
"""Says which models a checkpoint has; for people and for programs."""
STATE_NAME = "bundle_state.pt"
"""What training goes on from, besides what Trainer saves itself."""
TRAINING_ARGS_NAME = "training_args.bin"


class SavingMixin(_Base):
    """The part of `HFTrainerMixin` that saves and loads."""

    model: PreTrainedBundle
    best: BestWeights | None = None
    """The best weights of each model, with `load_best_model_at_end`."""

    # ---- one model

    def export_model(self, i: int, output_dir: str | os.PathLike[str]) -> None:
        """Save one model as `save_pretrained` would, for `from_pretrained` to load.

        The tokenizer (`processing_class`) goes along.

        Args:
            i: which model.
            output_dir: made if need be.

        Raises:
            ModelBatchError: there is no model i, or it has no `save_pretrained`.
        """
        model = self.model.export(i)
        if not isinstance(model, PreTrainedModel):
            raise ModelBatchError(
                f"a {type(model).__name__} has no save_pretrained; trainer.model.save_model(i, "
                "path) saves its state dict"
            )
        model.save_pretrained(output_dir)
        self._save_processing_class(output_dir)

    def _save_processing_class(self, output_dir: Any) -> None:
        owner: Any = self.processing_class
        if owner is None:
            owner = getattr(self.data_collator, "tokenizer", None)
        if owner is not None:
            owner.save_pretrained(output_dir)

    # ---- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the stacked weights, `[M, ...]` each, tied ones once."""
        folder = self.args.output_dir if output_dir is None else output_dir
        if not self.args.should_save:
            return
        os.makedirs(folder, exist_ok=True)
        tensors = _tied_once(self.model.state_dict() if state_dict is None else state_dict)
        safetensors.torch.save_file(
            tensors, os.path.join(folder, SAFE_WEIGHTS_NAME), metadata={"format": "pt"}
        )
        with open(os.path.join(folder, BUNDLE_NAME), "w", encoding="utf-8") as file:
            json.dump(self._description(), file, indent=2)
        self._save_processing_class(folder)
        torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _description(self) -> dict[str, Any]:
        models = self.model.models
        return {
            "modelbatch": __version__,
            "num_models": len(models),
            "model_ids": self.model.model_ids,
            "model_class": type(models[0]).__name__,
            "seeds": self.model.seeds,
        }

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = {
            "model_ids": self.model.model_ids,
            "active": self.model.active.cpu(),
            "streams": self.model._streams.state_dict(),
            "best": None if self.best is None else self.best.state_dict(),
            "callbacks": [callback.state_dict() for callback in self._bundle_callbacks()],
        }
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, STATE_NAME))

    def _bundle_callbacks(self) -> list[BundleCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, BundleCallback)]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the stacked weights.

        Raises:
            CheckpointError: there are none, or they are those of another bundle; nothing has
                changed then.
        """
        path = os.path.join(resume_from_checkpoint, SAFE_WEIGHTS_NAME)
        if not os.path.isfile(path):
            raise CheckpointError(f"Can't find a valid checkpoint at {resume_from_checkpoint}")
        _check_description(resume_from_checkpoint, self.model)
        saved = safetensors.torch.load_file(path, device="cpu")
        full = {}
        for name, tensor in _with_first_names(self.model.state_dict()):
            for_name = saved.get(name)
            if for_name is None or for_name.shape != tensor.shape:
                got = "lacks it" if for_name is None else f"has {tuple(for_name.shape)}"
                raise CheckpointError(
                    f"{path}: '{name}' has the shape {tuple(tensor.shape)} in this bundle, the "
                    f"checkpoint {got}"
                )
            full[name] = for_name
        self.model.load_state_dict(full, strict=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = "" if checkpoint is None else os.path.join(checkpoint, STATE_NAME)
        if not os.path.isfile(path):
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        bundle, streams = self.model, self.model._streams
        flags = state["active"].tolist()
        for flag, change in ((True, bundle.unfreeze), (False, bundle.freeze)):
            change([i for i, active in enumerate(flags) if active == flag])
        if state["streams"]["kind"] == streams.kind and state["streams"]["seeds"] == bundle.seeds:
            streams.load_state_dict(state["streams"])
        if state["best"] is not None and self.best is not None:
            self.best.load_state_dict(state["best"])
        for callback, own in zip(self._bundle_callbacks(), state["callbacks"]):
            callback.load_state_dict(own)

    # ---- best weights

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As in Trainer, by the metric's own key; each model's own best is kept besides."""
        if self.best is not None:
            self.best.update(self._values_to_watch(), self.state.global_step)
        return super()._determine_best_metric(metrics, trial)

    def _values_to_watch(self) -> Tensor:
        raise NotImplementedError

    def _load_best_model(self) -> None:
        """Give every model the weights that were its own best."""
        if self.best is not None:
            self.best.restore()


def _tied_once(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in _with_first_names(tensors)}


def _with_first_names(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Each tensor under the first of its names."""
    found: dict[Any, tuple[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.shape) if tensor.numel() else name
        found.setdefault(key, (name, tensor))
    return list(found.values())


def _check_description(folder: str, bundle: PreTrainedBundle) -> None:
    path = os.path.join(folder, BUNDLE_NAME)
    if not os.path.isfile(path):
        raise CheckpointError(f"{folder} has no {BUNDLE_NAME}: it is no checkpoint of a bundle")
    with open(path, encoding="utf-8") as file:
        saved = json.load(file)
    model_class = type(bundle.models[0]).__name__
    if saved["num_models"] != bundle.num_models or saved["model_class"] != model_class:
        raise CheckpointError(
            f"{folder} has {saved['num_models']} models of {saved['model_class']}, this bundle "
            f"{bundle.num_models} of {model_class}"
        )
