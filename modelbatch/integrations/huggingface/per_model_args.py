"""Training arguments that may differ between the models of a bundle."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainingArguments

from ...errors import ModelBatchError

__all__ = ["OWN_SCHEDULE", "PER_MODEL", "args_of_models", "check_count", "split"]

OWN_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
"""Those that give a model another schedule."""

PER_MODEL = (
    *("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("optim_args", "max_grad_norm", "seed", "data_seed", *OWN_SCHEDULE),
)
"""The fields of `TrainingArguments` that each model may have a value of its own for."""


def check_count(name: str, values: Any, num_models: int) -> list[Any]:
    """A list of one value per model.

    Raises:
        ModelBatchError: it has another length, or is no list.
    """
    if isinstance(values, str | Mapping) or not hasattr(values, "__len__"):
        raise ModelBatchError(f"{name} must be a list of {num_models}, one per model")
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    if len(values) != num_models:
        raise ModelBatchError(f"{name} has {len(values)} entries for {num_models} models")
    return values


def args_of_models(
    args: TrainingArguments,
    num_models: int,
    learning_rates: Sequence[float] | None,
    per_model_args: Sequence[Mapping[str, Any]] | None,
) -> list[TrainingArguments]:
    """The arguments as a Trainer of each model alone would have them.

    Args:
        args: those of all.
        num_models: M.
        learning_rates: M learning rates.
        per_model_args: M dicts of fields in `PER_MODEL`.

    Raises:
        ModelBatchError: another number of them, or a field that all models have to share.
    """
    own: list[dict[str, Any]] = [{} for _ in range(num_models)]
    if per_model_args is not None:
        for i, fields in enumerate(check_count("per_model_args", per_model_args, num_models)):
            for name in fields or ():
                if name not in PER_MODEL:
                    raise ModelBatchError(
                        f"per_model_args[{i}]: {name!r} cannot differ between models that train "
                        f"together; these can: {', '.join(PER_MODEL)}"
                    )
            own[i].update(fields or {})
    if learning_rates is not None:
        if any("learning_rate" in fields for fields in own):
            raise ModelBatchError("give learning rates in learning_rates or per_model_args")
        rates = check_count("learning_rates", learning_rates, num_models)
        for fields, rate in zip(own, rates):
            fields["learning_rate"] = rate
    if not any(own):
        return [args] * num_models
    return [_changed(args, fields) for fields in own]


def _changed(args: TrainingArguments, fields: Mapping[str, Any]) -> TrainingArguments:
    changed = copy.copy(args)
    for name, value in fields.items():
        before = getattr(args, name, None)
        if isinstance(value, str) and before is not None:  # "1e-3", "cosine"
            value = type(before)(value)
        setattr(changed, name, value)
    return changed


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hyper-parameters of a trial: those that a model of a bundle may have alone, and the rest."""
    own = {name: value for name, value in params.items() if name in PER_MODEL}
    return own, {name: value for name, value in params.items() if name not in PER_MODEL}
