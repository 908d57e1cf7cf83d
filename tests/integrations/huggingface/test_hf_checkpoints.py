"""Saving, resuming and exporting."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_case import arguments, berts, config, largest_difference, texts
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    Trainer,
)

from modelbatch import CheckpointError
from modelbatch.integrations.huggingface import BundledTrainer


def _trainer(folder: Any, count: int = 3, rng: str = "philox", **options: Any) -> Any:
    args = arguments(
        folder,
        num_train_epochs=2,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        warmup_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        **options,
    )
    return BundledTrainer(
        models=berts(count, hidden_dropout_prob=0.3),
        args=args,
        learning_rates=[1e-3 * 3**i for i in range(count)],
        train_dataset=texts(24),
        eval_dataset=texts(8, seed=1),
        rng=rng,
    )


@pytest.mark.parametrize("rng", ["philox", "torch"])
def test_resumed_equals_uninterrupted(tmp_path, rng) -> None:
    """With dropout, in the middle of an epoch, the best weights included."""
    whole = _trainer(tmp_path, rng=rng)
    whole.train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = _trainer(tmp_path, rng=rng)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == whole.state.global_step == 6
    assert torch.equal(resumed.best.values, whole.best.values)
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    states = (trainer.inner_optimizer.state_dict()["state"] for trainer in (resumed, whole))
    for a, b in zip(*(own.values() for own in states), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    kept = ("eval_loss", "eval_model_002_loss", "loss", "model_001_loss")
    tail = [{k: e[k] for k in kept if k in e} for e in whole.state.log_history]
    assert [{k: e[k] for k in kept if k in e} for e in resumed.state.log_history] == tail


def test_frozen_models_stay_frozen(tmp_path) -> None:
    first = _trainer(tmp_path)
    first.model.freeze(1)
    first.train()
    resumed = _trainer(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.model.active.tolist() == [True, False, True]


def test_what_a_checkpoint_has(tmp_path) -> None:
    trainer = _trainer(tmp_path)
    trainer.train()
    folder = tmp_path / "checkpoint-6"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"),
        *("trainer_state.json", "training_args.bin", "bundle.json", "bundle_state.pt"),
    }
    assert json.loads((folder / "bundle.json").read_text())["num_models"] == 3
    weights = load_file(folder / "model.safetensors")
    assert weights["classifier.weight"].shape == (3, 3, 16)


def test_other_checkpoints_are_refused(tmp_path) -> None:
    _trainer(tmp_path / "three").train()
    checkpoint = tmp_path / "three" / "checkpoint-6"
    four = _trainer(tmp_path / "four", count=4)
    with pytest.raises(CheckpointError, match="has 3 models of BertForSequenceClassification"):
        four.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "bundle.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint of a bundle"):
        _trainer(tmp_path / "x").train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(CheckpointError, match="Can't find a valid checkpoint"):
        _trainer(tmp_path / "x").train(resume_from_checkpoint=str(tmp_path))


def test_an_exported_model_is_one_of_transformers(tmp_path) -> None:
    trainer = _trainer(tmp_path / "run")
    trainer.train()
    trainer.export_model(1, tmp_path / "one")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "one")
    assert largest_difference(model.double(), trainer.model.models[1]) == 0
    batch = texts(1)[0]
    inputs = {name: batch[name][None] for name in ("input_ids", "attention_mask")}
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(**inputs).logits[1]
        torch.testing.assert_close(model.eval()(**inputs).logits, expected)
    # and trains on in a Trainer of its own
    Trainer(model, arguments(tmp_path / "alone"), train_dataset=texts(4)).train()
    trainer.model.save_pretrained(tmp_path / "each")
    assert sorted(path.name for path in (tmp_path / "each").iterdir()) == [
        f"model_{i:03d}" for i in range(3)
    ]


def test_tied_embeddings(tmp_path) -> None:
    """Tied weights are one tensor in the bundle, in a checkpoint and in an exported model."""

    def models() -> list[Any]:
        made = []
        for i in range(2):
            torch.manual_seed(i)
            made.append(BertForMaskedLM(config()).double())
        return made

    data = [{**item, "labels": item["input_ids"]} for item in texts(8)]
    args = arguments(tmp_path, save_strategy="epoch", weight_decay=0.1)
    trainer = BundledTrainer(models=models(), args=args, train_dataset=data)
    trainer.train()
    for i, model in enumerate(models()):
        own = arguments(tmp_path / str(i), weight_decay=0.1)
        Trainer(model, own, train_dataset=data).train()
        assert largest_difference(model, trainer.model.models[i]) < 1e-6  # losses are float32
    saved = load_file(Path(tmp_path) / "checkpoint-2" / "model.safetensors")
    assert "bert.embeddings.word_embeddings.weight" in saved
    assert "cls.predictions.decoder.weight" not in saved
    again = BundledTrainer(models=models(), args=args, train_dataset=data)
    again._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    trainer.export_model(0, tmp_path / "one")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "one")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    for model in (again.model.models[0], loaded.double()):
        assert largest_difference(model, trainer.model.models[0]) == 0
