"""The losses of a bundle under Trainer."""

from typing import Any

from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...inputs import per_model
from .bundle import PreTrainedBundle

_Base: Any = object  # Trainer comes after the mixin

__all__ = ["LossMixin"]


def _own_loss(losses: Tensor, _: Any) -> Tensor:
    """The loss that a model has computed itself."""
    return losses


class LossMixin(_Base):
    """The part of `HFTrainerMixin` that computes losses."""

    model: PreTrainedBundle
    losses_of_batch: Tensor | None = None
    """The models' losses `[M]` of the last batch, detached."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The losses of all models, as one scalar.

        Args:
            model: the bundle, possibly wrapped for mixed precision.
            inputs: the batch.
            return_outputs: return the models' outputs `[M, ...]` too.
            num_items_in_batch: what each model's loss is divided by, as in Trainer.

        Returns:
            A scalar whose value is the mean over active models, and whose gradient for each model
            is that of its own loss alone.
        """
        pops = self.label_smoother is not None or self.compute_loss_func is not None
        labels = inputs.pop("labels") if pops and "labels" in inputs else None
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            inputs = {**inputs, "num_items_in_batch": _of_each(num_items_in_batch)}
        outputs = model(**inputs)
        own_loss = self._smoothed_loss if labels is not None else None
        if self.compute_loss_func is not None:
            own_loss = self._custom_loss
        if own_loss is not None:
            targets = labels, _of_each(num_items_in_batch)
            loss = self.model.compute_loss(outputs, targets, own_loss)
        else:
            if isinstance(outputs, dict) and "loss" not in outputs:
                raise ValueError(
                    "The model did not return a loss from the inputs, only the following keys: "
                    f"{','.join(outputs.keys())}. For reference, the inputs it received are "
                    f"{','.join(inputs.keys())}."
                )
            own = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
            loss = self.model.compute_loss(own, (), _own_loss)
        self.losses_of_batch = self.model.latest_losses
        return (loss, outputs) if return_outputs else loss

    # Methods, and not closures made for each batch: what is known of a loss is known by function.
    def _custom_loss(self, outputs: Any, targets: tuple[Any, Any]) -> Tensor:
        assert self.compute_loss_func is not None
        labels, num_items = targets
        return self.compute_loss_func(outputs, labels, num_items_in_batch=num_items)

    def _smoothed_loss(self, outputs: Any, targets: tuple[Tensor, Any]) -> Tensor:
        assert self.label_smoother is not None
        labels, num_items = targets
        name = type(self.model.models[0]).__name__
        shifts = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        return self.label_smoother(
            outputs, labels, shift_labels=shifts, num_items_in_batch=num_items
        )


def _of_each(num_items: Any) -> Any:
    """A number of items for all models as it is, and numbers `[M]` as the models' own."""
    return per_model(num_items) if isinstance(num_items, Tensor) and num_items.dim() else num_items
