"""Tiny models and data for the tests of Trainer."""

import copy
import os
import warnings
from typing import Any

import numpy as np
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what transformers' optional parts say at import
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        Trainer,
        TrainingArguments,
    )
    from transformers.utils import logging as hf_logging

hf_logging.set_verbosity_error()


def config(**options: Any) -> BertConfig:
    plain = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 16,
        "num_labels": 3,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return BertConfig(**{**plain, **options})


def berts(count: int, dtype: torch.dtype = torch.float64, **options: Any) -> list[Any]:
    models = []
    for i in range(count):
        torch.manual_seed(i)
        models.append(BertForSequenceClassification(config(**options)).to(dtype))
    return models


def texts(count: int, length: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Sequences whose label is how often the token 5 is in them."""
    generator = torch.Generator().manual_seed(seed)
    data = []
    for _ in range(count):
        ids = torch.randint(5, 40, (length,), generator=generator)
        label = int(torch.randint(0, 3, (), generator=generator))
        ids[:label] = 5
        mask = torch.ones(length, dtype=torch.long)
        mask[length - 2 :] = int(torch.randint(0, 2, (), generator=generator))
        data.append({"input_ids": ids, "attention_mask": mask, "labels": label})
    return data


def arguments(folder: Any, cls: Any = TrainingArguments, **options: Any) -> Any:
    plain = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return cls(str(folder), **{**plain, **options})


def accuracy(prediction: Any) -> dict[str, float]:
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": float(np.mean(right))}


def alone(model: Any, args: Any, i: int, trainer: Any = Trainer, **options: Any) -> Any:
    """A Trainer of one model; `i` sets what differs between the models."""
    return trainer(copy.deepcopy(model), args, **options)


def largest_difference(a: Any, b: Any) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p.detach() - q.detach()).abs().max()) for p, q in pairs)
