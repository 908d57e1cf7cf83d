"""Evaluation and prediction of a bundle under Trainer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import EvalLoopOutput, denumpify_detensorize

from ...errors import ModelBatchError
from .bundle import PreTrainedBundle, stack_padded
from .metrics import (
    EvalLosses,
    direction_of,
    index_nested,
    map_nested,
    model_first,
    of_model,
    summarise,
)

_Base: Any = object  # Trainer comes after the mixin

__all__ = ["EvaluationMixin"]


class EvaluationMixin(_Base):
    """The part of `HFTrainerMixin` that evaluates and predicts."""

    model: PreTrainedBundle
    metric_summary: str
    losses_of_batch: Tensor | None = None
    """The models' losses `[M]` of the last batch, detached."""
    metrics_of_each: dict[str, list[Any]]
    """The last evaluation: M values of each metric, without the prefix."""
    _eval_losses: EvalLosses | None = None
    compute_metrics: Any
    preprocess_logits_for_metrics: Any

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Tensor | None, Any, Any]:
        """One batch of an evaluation.

        Returns:
            The mean loss, the logits `[B, ..., M]` (Trainer joins batches along the first axis,
            and pads the second), and the labels.
        """
        if getattr(self.args, "predict_with_generate", False) and not prediction_loss_only:
            return self._generated(inputs, ignore_keys, gen_kwargs)
        self.losses_of_batch = None
        loss, logits, labels = super().prediction_step(
            model, inputs, prediction_loss_only, ignore_keys=ignore_keys
        )
        self._note_losses(self.losses_of_batch, inputs)
        return loss, map_nested(_model_axis_last, logits), labels

    def _generated(
        self, inputs: dict[str, Any], ignore_keys: list[str] | None, gen_kwargs: dict[str, Any]
    ) -> tuple[Tensor | None, Any, Any]:
        """`Seq2SeqTrainer.prediction_step` for one model after another."""
        bundle, results = self.model, []
        try:
            for model in bundle.models:
                self.model = model  # type: ignore[assignment]
                step = super().prediction_step
                results.append(step(model, dict(inputs), False, ignore_keys, **gen_kwargs))
        finally:
            self.model = bundle
        losses, tokens, labels = zip(*results)
        if losses[0] is not None:
            self.losses_of_batch = torch.stack(list(losses))
            self._note_losses(self.losses_of_batch, inputs)
            losses = (self.losses_of_batch.mean(),)
        if tokens[0] is None:
            return losses[0], None, None
        pad = getattr(bundle.config, "pad_token_id", None)
        stacked = stack_padded(list(tokens), 0 if pad is None else pad)
        return losses[0], _model_axis_last(stacked), labels[0]

    def _note_losses(self, losses: Tensor | None, inputs: dict[str, Any]) -> None:
        if losses is None or self._eval_losses is None:
            return
        size = find_batch_size(inputs)
        # Seq2SeqTrainer gathers with `gather`, by which the last batch counts as a full one
        gather = getattr(self.gather_function, "func", self.gather_function)
        if size is None or getattr(gather, "__name__", "") == "gather":
            size = self.args.eval_batch_size
        self._eval_losses.add(losses, size)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's own loop, with metrics of each model.

        Returns:
            Trainer's result; the predictions are `[M, N, ...]`.
        """
        own = self.compute_metrics, self.preprocess_logits_for_metrics
        self._eval_losses, self.metrics_of_each = EvalLosses(), {}
        if own[0] is not None:
            self.compute_metrics = lambda prediction: self._metrics_of_all(own[0], prediction)
        if own[1] is not None:
            self.preprocess_logits_for_metrics = lambda logits, labels: _preprocessed(
                own[1], logits, labels, self.model.num_models
            )
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            means = self._eval_losses.means(self.args.logging_nan_inf_filter)
        finally:
            self.compute_metrics, self.preprocess_logits_for_metrics = own
            self._eval_losses = None
        metrics = dict(output.metrics or {})
        metrics.pop(f"{metric_key_prefix}_loss", None)
        if means is not None:
            self.metrics_of_each = {"loss": means, **self.metrics_of_each}
        metrics.update(self._summary(metric_key_prefix))
        predictions = model_first(output.predictions)
        return EvalLoopOutput(predictions, output.label_ids, metrics, output.num_samples)

    def _metrics_of_all(self, function: Any, prediction: EvalPrediction) -> dict[str, Any]:
        """What the user's `compute_metrics` says of each model's predictions."""
        assert self._eval_losses is not None
        for i in range(self.model.num_models):
            options: dict[str, Any] = {}
            if prediction.losses is not None:
                options["losses"] = self._eval_losses.of_samples(i)
            if prediction.inputs is not None:
                options["inputs"] = prediction.inputs
            predictions = index_nested(prediction.predictions, i)
            found = function(EvalPrediction(predictions, prediction.label_ids, **options))
            for name, value in denumpify_detensorize(found).items():
                values = self.metrics_of_each.setdefault(name, [float("nan")] * len(self.model))
                values[i] = value
        return {}

    def _summary(self, prefix: str) -> dict[str, Any]:
        self.metrics_of_each = {
            name.removeprefix(f"{prefix}_"): own for name, own in self.metrics_of_each.items()
        }
        ids = self.model.model_ids
        found = summarise(
            self.metrics_of_each, ids, prefix, self._more_is_better, self.metric_summary
        )
        watched = (self.args.metric_for_best_model or "loss").removeprefix("eval_")
        values = self.metrics_of_each.get(watched)
        best = found.get(f"{prefix}_{watched}_best")
        if values is not None and best in values:
            found[f"{prefix}_best_model"] = ids[values.index(best)]
        return found

    def _more_is_better(self, name: str) -> bool:
        return direction_of(name, self.args.metric_for_best_model, self.args.greater_is_better)

    def _values_to_watch(self) -> Tensor:
        """The models' values `[M]` of `metric_for_best_model` in the last evaluation."""
        metric = (self.args.metric_for_best_model or "loss").removeprefix("eval_")
        values = self.metrics_of_each.get(metric)
        if values is None:
            raise ModelBatchError(
                f"metric_for_best_model={metric!r} is not a metric of each model; these are: "
                f"{', '.join(self.metrics_of_each)}"
            )
        return torch.tensor([float(value) for value in values], dtype=torch.float64)

    def metrics_of_model(
        self, metrics: dict[str, Any], i: int, prefix: str = "eval"
    ) -> dict[str, Any]:
        """An evaluation's metrics as a Trainer of model i alone would have returned them.

        Args:
            metrics: what `evaluate` returned.
            i: which model.
            prefix: of the keys.
        """
        return of_model(metrics, self.model.model_ids[i], set(self.metrics_of_each), prefix)


def _model_axis_last(array: Tensor) -> Tensor:
    return array.movedim(0, -1).contiguous() if array.dim() > 1 else array


def _preprocessed(
    function: Callable[[Any, Any], Any], logits: Any, labels: Any, num_models: int
) -> Any:
    """The user's function of one model's logits and labels, for all models: `[B, ..., M]`."""
    columns = [function(index_nested(logits, i), labels) for i in range(num_models)]

    def stacked(parts: list[Any]) -> Any:
        if isinstance(parts[0], tuple | list):
            return type(parts[0])(stacked(list(column)) for column in zip(*parts))
        return torch.stack(parts, dim=-1) if isinstance(parts[0], Tensor) else parts[0]

    return stacked(columns)
