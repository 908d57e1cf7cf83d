"""16 tiny BERTs in one BundledTrainer against a Trainer for each, in turns."""

import contextlib
import io
import os
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch

MODELS, LAYERS, WIDTH, LENGTH, BATCH, STEPS = 16, 2, 64, 32, 16, 30


def measure(rounds: int = 3, steps: int = STEPS) -> dict:
    """Milliseconds of one training step of all models, see `harness.compare`.

    Args:
        rounds: how often each side takes its turn.
        steps: training steps in one turn.

    Returns:
        `{"separate": {...}, "bundled": {...}, "speedup": x}`; the reference is `separate`.
    """
    from harness import compare

    with tempfile.TemporaryDirectory() as folder:
        found = compare(_variants(folder, steps), rounds)
    for own in found.values():
        own.update({name: round(own[name] / steps, 4) for name in ("ms", "ms_min")})
    return {**found, "speedup": round(1 / found["bundled"]["ratio"], 3)}


def _variants(folder: str, steps: int) -> dict[str, Callable[[], object]]:
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

    args = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
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
    alone = [Trainer(model(i), args, train_dataset=data) for i in range(MODELS)]
    together = BundledTrainer(
        models=[model(i) for i in range(MODELS)],
        args=args,
        learning_rates=[1e-3 * 1.1**i for i in range(MODELS)],
        train_dataset=data,
    )

    def quietly(trainers: list[Any]) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            for trainer in trainers:
                trainer.train()

    return {"separate": lambda: quietly(alone), "bundled": lambda: quietly([together])}
