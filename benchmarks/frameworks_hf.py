"""Tiny BERTs through Hugging Face: one BundledTrainer against a Trainer for each, in turns."""

import contextlib
import io
import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from harness import compare

LAYERS, WIDTH, LENGTH, BATCH = 2, 64, 32, 16


def measure(num_models: int, rounds: int = 3, steps: int = 30) -> dict:
    """Milliseconds of one training step of all models, by way to train them.

    Args:
        num_models: how many.
        rounds: how often each way takes its turn.
        steps: training steps in one turn.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = compare(_variants(folder, num_models, steps), rounds)
    for row in result.values():
        row.update({key: round(row[key] / steps, 4) for key in ("ms", "ms_min")})
    return result


def _variants(folder: str, num_models: int, steps: int) -> dict[str, Callable[[], object]]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import (
            BertConfig,
            BertForSequenceClassification,
            Trainer,
            TrainingArguments,
        )

        from modelbatch.integrations.huggingface import BundledTrainer

    def model(i: int) -> Any:
        torch.manual_seed(i)
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=1000,
                hidden_size=WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=2,
                intermediate_size=4 * WIDTH,
                max_position_embeddings=LENGTH,
                num_labels=2,
            )
        )

    def arguments(rate: float) -> Any:
        return TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            warmup_steps=2,
            logging_steps=500,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )

    ids = torch.randint(5, 1000, (BATCH * steps, LENGTH))
    mask = torch.ones_like(ids[0])
    data = [
        {"input_ids": row, "attention_mask": mask, "labels": i % 2} for i, row in enumerate(ids)
    ]
    rates = [1e-3 * 1.1**i for i in range(num_models)]

    def separate() -> list[Any]:
        return [
            Trainer(model(i), arguments(rate), train_dataset=data) for i, rate in enumerate(rates)
        ]

    alone, compiled = separate(), separate()
    for trainer in compiled:
        trainer.model.compile()
    together = BundledTrainer(
        models=[model(i) for i in range(num_models)],
        args=arguments(1e-3),
        learning_rates=rates,
        train_dataset=data,
    )
    threads = torch.get_num_threads()

    def quietly(trainers: list[Any], num_threads: int = threads) -> None:
        torch.set_num_threads(num_threads)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for trainer in trainers:
                trainer.train()
        torch.set_num_threads(threads)

    return {
        "BundledTrainer": lambda: quietly([together]),
        "a Trainer each": lambda: quietly(alone),
        "a Trainer each, one thread": lambda: quietly(alone, 1),
        "a Trainer each, torch.compile": lambda: quietly(compiled),
    }
