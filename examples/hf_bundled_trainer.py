"""Sixteen tiny BERTs in one Trainer: which learning rate reads best?

They learn to say from sixteen words in a row which data set a text is about; the texts are those
that describe scikit-learn's data sets. The best model is saved as transformers saves it, and loaded
again.

    python examples/hf_bundled_trainer.py --models 16 --epochs 10
"""

import argparse
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded

import numpy as np
import sklearn.datasets
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    TrainingArguments,
)
from transformers.utils import logging as hf_logging

from modelbatch import create_lr_sweep_configs
from modelbatch.integrations.huggingface import BundledTrainer

WORDS = 16
UNKNOWN = 1


def corpus() -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str], int]:
    """Training and test sequences, the names of the classes, and the size of the vocabulary."""
    folder = Path(sklearn.datasets.__file__).parent / "descr"
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.rst"))}
    words = {name: re.findall(r"[a-z]+", text.lower()) for name, text in texts.items()}
    names = [name for name, own in words.items() if len(own) >= 20 * WORDS]
    known = sorted({word for name in names for word in words[name]})
    numbers = {word: i for i, word in enumerate(known, start=UNKNOWN + 1)}
    train: list[dict[str, Any]] = []
    test: list[dict[str, Any]] = []
    for label, name in enumerate(names):
        ids = torch.tensor([numbers[word] for word in words[name]])
        for k, piece in enumerate(ids.split(WORDS)[:-1]):
            # every fifth piece is kept for the test
            part = test if k % 5 == 4 else train
            part.append({"input_ids": piece, "labels": label})
    return train, test, names, len(known) + UNKNOWN + 1


def accuracy(prediction: Any) -> dict[str, float]:
    """Called once for each model, with its own logits."""
    right = prediction.predictions.argmax(-1) == prediction.label_ids
    return {"accuracy": float(np.mean(right))}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=positive, default=16, help="how many (default 16)")
    parser.add_argument("--epochs", type=positive, default=10, help="epochs (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights (default 0)")
    flags = parser.parse_args()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="'pin_memory' argument is set")

    train, test, names, vocabulary = corpus()
    print(f"{len(train)} + {len(test)} sequences about {len(names)} data sets")
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=WORDS,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    rates = [own["lr"] for own in create_lr_sweep_configs(1e-4, 3e-2, flags.models)]
    with tempfile.TemporaryDirectory() as folder:
        trainer = BundledTrainer(
            args=TrainingArguments(
                folder,
                num_train_epochs=flags.epochs,
                per_device_train_batch_size=16,
                warmup_steps=0.1,
                weight_decay=0.01,
                eval_strategy="epoch",
                save_strategy="epoch",
                save_total_limit=1,
                load_best_model_at_end=True,  # every model its own best epoch
                metric_for_best_model="accuracy",
                logging_strategy="epoch",
                seed=flags.seed,
                report_to=[],
                disable_tqdm=True,
                log_level="error",
            ),
            model_init=lambda: BertForSequenceClassification(config),
            learning_rates=rates,
            seeds=[flags.seed] * flags.models,  # they differ in nothing but the learning rate
            train_dataset=train,
            eval_dataset=test,
            compute_metrics=accuracy,
            per_model_logs=False,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        metrics = trainer.evaluate()
        print(f"{'learning rate':>13}  {'accuracy':>8}  {'loss':>6}  best epoch")
        steps = trainer.state.max_steps // flags.epochs
        for i, rate in enumerate(rates):
            own = trainer.metrics_of_model(metrics, i)
            epoch = int(trainer.best.steps[i]) // steps
            print(
                f"{rate:13.2e}  {own['eval_accuracy']:8.1%}  {own['eval_loss']:6.3f}  {epoch:10d}"
            )
        best = int(metrics["eval_best_model"])
        trainer.export_model(best, Path(folder) / "best")
        model = AutoModelForSequenceClassification.from_pretrained(Path(folder) / "best").eval()
        with torch.no_grad():
            logits = model(torch.stack([item["input_ids"] for item in test])).logits
        right = (logits.argmax(-1) == torch.tensor([item["labels"] for item in test])).float()
        print(f"best: learning rate {rates[best]:.2e}, accuracy {float(right.mean()):.1%} reloaded")


if __name__ == "__main__":
    main()
