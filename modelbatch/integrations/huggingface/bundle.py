"""`PreTrainedBundle`: a `ModelBatch` that shows Trainer what it asks of a model."""

import inspect
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...batch import ModelBatch
from .configs import ConfigOfAll, Numbers, compare_configs, standing_in

__all__ = ["PreTrainedBundle"]


class PreTrainedBundle(ModelBatch):
    """Models of Hugging Face as one bundle, with the attributes that Trainer reads from a model.

    Their configurations may differ in real numbers, such as dropout rates.

    Args:
        models: models of one architecture, each with a configuration object of its own.
        **kwargs: as for `ModelBatch`.

    Raises:
        StructureMismatchError: naming what differs, in which model, and both values.
        ModelBatchError: for any other bad argument; the models are then unchanged.
    """

    _config_numbers: Numbers

    def __init__(self, models: Iterable[nn.Module], *args: Any, **kwargs: Any):
        ignored = {*kwargs.pop("ignore_attributes", ()), "config"}
        super().__init__(models, *args, ignore_attributes=ignored, **kwargs)
        self._compare_configs()

    @classmethod
    def adopt(cls, bundle: ModelBatch) -> "PreTrainedBundle":
        """Let a `ModelBatch` be one of these, which stays the same object."""
        if not isinstance(bundle, PreTrainedBundle):
            bundle.__class__ = cls
            bundle._ignored |= {"config"}
        assert isinstance(bundle, PreTrainedBundle)
        bundle._compare_configs()
        return bundle

    def _compare_configs(self) -> None:
        names = self._stack.structure.module_names
        self._config_numbers = compare_configs(self._stack.modules, names)
        self._counts: dict[Any, int] = {}

    def refresh(self) -> None:  # noqa: D102 - inherited
        super().refresh()
        self._compare_configs()

    def train(self, mode: bool = True) -> "PreTrainedBundle":
        """As `ModelBatch.train`; at next to no cost where all is in this mode already.

        Trainer calls it at every step. `refresh()` looks at the models' attributes in any case.
        """
        if any(module.training != mode for module in (self, *self._stack.modules[0])):
            super().train(mode)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 - inherited
        if not self._config_numbers:
            return super().forward(*args, **kwargs)
        with standing_in(self._stack.modules[0], self._config_numbers):
            return super().forward(*args, **kwargs)

    # ---- what Trainer and its callbacks look for

    @property
    def config(self) -> Any:
        """The configuration of the first model; what is written to it goes to all."""
        return ConfigOfAll([model.config for model in self._stack.models])

    @property
    def generation_config(self) -> Any:
        """The generation options of the first model; what is written to them goes to all."""
        return ConfigOfAll([model.generation_config for model in self._stack.models])

    @property
    def main_input_name(self) -> str:
        """The name of the models' main input."""
        return getattr(self._stack.models[0], "main_input_name", "input_ids")

    @property
    def loss_type(self) -> Any:
        """Which loss the models compute themselves; None if they do not say."""
        return getattr(self._stack.models[0], "loss_type", None)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the models take `num_items_in_batch`, by Trainer's own rule."""
        model = self._stack.models[0]
        if hasattr(model, "accepts_loss_kwargs"):
            return bool(model.accepts_loss_kwargs)
        parameters = inspect.signature(model.forward).parameters.values()
        return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self._streams.device

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameters of all models together."""
        key = only_trainable, exclude_embeddings
        if key not in self._counts:
            model: Any = self._stack.models[0]
            if hasattr(model, "num_parameters"):
                own = model.num_parameters(*key)
            else:
                own = sum(p.numel() for p in model.parameters() if p.requires_grad or not key[0])
            self._counts[key] = int(own)
        return self._counts[key] * self.num_models

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """Let every model generate, one after another.

        Args:
            *args: as for the models' own `generate`; the same for all.
            **kwargs: likewise.

        Returns:
            The tokens `[M, B, T]`, filled up to the longest with the padding token.
        """
        tokens = [model.generate(*args, **kwargs) for model in self._stack.models]  # type: ignore[operator]
        pad = getattr(self.generation_config, "pad_token_id", None)
        return stack_padded(tokens, 0 if pad is None else pad)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Save each model to a folder of its own, `model_007`, as `from_pretrained` loads it.

        Args:
            save_directory: made if need be.
            **kwargs: handed to every model's `save_pretrained`.
        """
        for i, model_id in enumerate(self.model_ids):
            folder = os.path.join(save_directory, f"model_{model_id:03d}")
            self.export(i).save_pretrained(folder, **kwargs)  # type: ignore[operator]


def stack_padded(tensors: list[Tensor], value: Any) -> Tensor:
    """Stack tensors `[B, T]` along a new first axis, filled up on the right to the longest."""
    longest = max(tensor.shape[-1] for tensor in tensors)
    return torch.stack(
        [nn.functional.pad(t, (0, longest - t.shape[-1]), value=value) for t in tensors]
    )
