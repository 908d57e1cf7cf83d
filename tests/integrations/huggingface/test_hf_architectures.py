"""The architectures of transformers, in train mode, batched without any loop over models."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_case import arguments, berts, config, largest_difference, texts
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
)

from modelbatch import FallbackWarning, ModelBatch, StructureMismatchError
from modelbatch.integrations.huggingface import BundledTrainer, HFTrainerMixin, PreTrainedBundle

MASK = torch.ones(4, 8, dtype=torch.long)
MASK[0, 5:] = 0
TOKENS = torch.randint(5, 40, (4, 8), generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 2, 1, 1])
PLAIN = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TEXT = {"input_ids": TOKENS, "attention_mask": MASK}


def _gpt2(attention: str, **more: Any) -> GPT2Config:
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return GPT2Config(attn_implementation=attention, use_cache=False, **sizes, **ids, **more)


def _t5(attention: str = "sdpa") -> T5Config:
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2}
    start = {"num_heads": 2, "decoder_start_token_id": 0, "use_cache": False}
    return T5Config(attn_implementation=attention, **sizes, **start)


def _bert(attention: str) -> BertConfig:
    own = {"vocab_size": 40, "num_labels": 3, "attn_implementation": attention}
    return BertConfig(**own, max_position_embeddings=16, **PLAIN)


def _distilbert(attention: str) -> DistilBertConfig:
    own = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "num_labels": 3}
    sizes = {"vocab_size": 40, "max_position_embeddings": 16}
    return DistilBertConfig(attn_implementation=attention, **sizes, **own)


def _vit(attention: str) -> ViTConfig:
    own = {"image_size": 8, "patch_size": 4, "num_labels": 3, "attn_implementation": attention}
    return ViTConfig(**own, **PLAIN)


IMAGES = {"pixel_values": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
ARCHITECTURES: dict[str, tuple[Callable[[str], Any], dict[str, torch.Tensor]]] = {
    "bert": (
        lambda a: BertForSequenceClassification(_bert(a)),
        {**TEXT, "labels": CLASSES},
    ),
    "distilbert": (
        lambda a: DistilBertForSequenceClassification(_distilbert(a)),
        {**TEXT, "labels": CLASSES},
    ),
    "gpt2": (lambda a: GPT2LMHeadModel(_gpt2(a)), {**TEXT, "labels": TOKENS}),
    "gpt2-classes": (
        lambda a: GPT2ForSequenceClassification(_gpt2(a, num_labels=3)),
        {**TEXT, "labels": CLASSES},
    ),
    "vit": (lambda a: ViTForImageClassification(_vit(a)), {**IMAGES, "labels": CLASSES}),
    "t5": (
        lambda a: T5ForConditionalGeneration(_t5(a)),
        {**TEXT, "labels": TOKENS[:, :6].contiguous()},
    ),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_slow_fallback_in_train_mode(name, attention) -> None:
    build, inputs = ARCHITECTURES[name]
    bundle = PreTrainedBundle([build(attention).train() for _ in range(3)], fallback="error")
    report = bundle.explain(**inputs)
    assert report.fallbacks == [] and report.whole_forward is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        bundle(**inputs).loss.sum().backward()
    bundle.eval()
    expected = [model(**inputs).loss for model in bundle.models]
    torch.testing.assert_close(bundle(**inputs).loss, torch.stack(expected))


@pytest.mark.parametrize("name", ["distilbert", "gpt2", "vit", "t5"])
def test_trained_as_alone(tmp_path, name) -> None:
    """Their own losses, whatever these do with num_items_in_batch; accumulation counts once."""
    build, inputs = ARCHITECTURES[name]

    def models() -> list[Any]:
        made = []
        for i in range(2):
            torch.manual_seed(i)
            model = build("sdpa").double()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                for attribute in ("dropout", "attention_dropout"):
                    if type(getattr(module, attribute, None)) is float:
                        setattr(module, attribute, 0.0)
            made.append(model)
        return made

    rows = [{k: v[i % 4] for k, v in inputs.items()} for i in range(12)]
    for i, row in enumerate(rows):
        if row["labels"].dim():  # unequal numbers of tokens that count
            row["labels"] = row["labels"].clone()
            row["labels"][: i % 3] = -100
        if "pixel_values" in row:
            row["pixel_values"] = row["pixel_values"].double()
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "optim": "sgd"}
    bundled = BundledTrainer(
        models=models(), args=arguments(tmp_path, **options), train_dataset=rows
    )
    bundled.train()
    # Trainer has the models' losses of tokens computed in float32
    tolerance = 1e-6 if name in ("gpt2", "t5") else 1e-8
    for i, model in enumerate(models()):
        Trainer(model, arguments(tmp_path, **options), train_dataset=rows).train()
        assert largest_difference(model, bundled.model.models[i]) < tolerance


class BundledSeq2SeqTrainer(HFTrainerMixin, Seq2SeqTrainer):
    pass


def _sequences(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    draw = torch.randint(5, 40, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row[:6]} for row in draw]


def test_seq2seq_trainer_generates(tmp_path) -> None:
    def models() -> list[Any]:
        made = []
        for i in range(2):
            torch.manual_seed(i)
            made.append(T5ForConditionalGeneration(_t5()))
        return made

    options = {"predict_with_generate": True, "generation_max_length": 7}
    args = arguments(tmp_path, Seq2SeqTrainingArguments, **options)
    data = _sequences(6)
    bundled = BundledSeq2SeqTrainer(models=models(), args=args, eval_dataset=data)
    found = bundled.predict(data)
    metrics = bundled.evaluate()
    for i, model in enumerate(models()):
        alone = Seq2SeqTrainer(model, args, eval_dataset=data)
        expected = alone.predict(data)
        assert found.predictions[i].shape == expected.predictions.shape
        assert (found.predictions[i] == expected.predictions).all()
        own = alone.evaluate()
        assert metrics[f"eval_model_{i:03d}_loss"] == pytest.approx(own["eval_loss"], rel=1e-5)


def test_dropout_rates_of_each_model(tmp_path) -> None:
    """They stand in the configurations too, which no longer are equal then."""
    rates = [0.0, 0.5]
    models = [berts(1, hidden_dropout_prob=rate)[0] for rate in rates]
    trainer = BundledTrainer(models=models, args=arguments(tmp_path), train_dataset=texts(8))
    trainer.train()
    alone = berts(1)[0]
    Trainer(alone, arguments(tmp_path), train_dataset=texts(8)).train()
    assert largest_difference(alone, trainer.model.models[0]) < 1e-8
    assert largest_difference(alone, trainer.model.models[1]) > 1e-4
    trainer.export_model(1, tmp_path / "one")
    loaded = BertConfig.from_pretrained(tmp_path / "one")
    assert loaded.hidden_dropout_prob == 0.5


def test_dropout_streams_follow_the_seeds(tmp_path) -> None:
    def trained(seeds: list[int]) -> Any:
        models = [berts(1, hidden_dropout_prob=0.3)[0] for _ in seeds]
        trainer = BundledTrainer(
            models=models, args=arguments(tmp_path), seeds=seeds, train_dataset=texts(8)
        )
        trainer.train()
        return trainer.model

    bundle = trained([1, 2, 1])
    assert largest_difference(bundle.models[0], bundle.models[2]) == 0
    assert largest_difference(bundle.models[0], bundle.models[1]) > 1e-6
    # nor does it matter who else is there
    assert largest_difference(trained([2]).models[0], bundle.models[1]) < 1e-12


def test_configurations_that_do_not_fit() -> None:
    first, second = berts(2)
    second.config.pad_token_id = 3
    with pytest.raises(StructureMismatchError, match=r"config\.pad_token_id.*model 1"):
        PreTrainedBundle([first, second])


def test_a_number_read_from_the_configuration_is_honoured() -> None:
    class Reads(torch.nn.Module):
        def __init__(self, rate: float):
            super().__init__()
            self.config = config(hidden_dropout_prob=rate)
            self.weight = torch.nn.Parameter(torch.ones(1000))

        def forward(self) -> torch.Tensor:
            return torch.nn.functional.dropout(self.weight, self.config.hidden_dropout_prob)

    bundle = PreTrainedBundle([Reads(0.0), Reads(1.0)])
    assert bundle().sum(1).tolist() == [1000.0, 0.0]
    assert bundle.models[1].config.hidden_dropout_prob == 1.0


def test_a_plain_bundle_is_welcome(tmp_path) -> None:
    rates = [1e-3, 1e-2]
    bundle = ModelBatch(berts(2), lr_list=rates, optimizer_cls=torch.optim.SGD)
    trainer = BundledTrainer(bundle, arguments(tmp_path), train_dataset=texts(8))
    assert trainer.model is bundle
    trainer.train()
    for i, model in enumerate(berts(2)):
        own = (torch.optim.SGD, {"lr": rates[i], "weight_decay": 0.0})
        args = arguments(tmp_path)
        Trainer(model, args, optimizer_cls_and_kwargs=own, train_dataset=texts(8)).train()
        assert largest_difference(model, bundle.models[i]) < 1e-8


def test_bfloat16_stays_close(tmp_path) -> None:
    data = texts(8)
    args = arguments(tmp_path, bf16=True, optim="sgd")
    trainer = BundledTrainer(models=berts(2, torch.float32), args=args, train_dataset=data)
    trainer.train()
    for i, model in enumerate(berts(2, torch.float32)):
        start = berts(2, torch.float32)[i]
        Trainer(model, args, train_dataset=data).train()
        moved = largest_difference(model, start)
        # the update within bfloat16's eight bits, over a few roundings
        assert largest_difference(model, trainer.model.models[i]) < moved * 2**-5


def test_batches_padded_to_lengths_of_their_own(tmp_path) -> None:
    """Logits of tokens, `[B, T, classes]`, with another T in each batch."""
    model_inputs = [*texts(4, length=6), *texts(2, length=8, seed=1)]
    models = []
    for i in range(2):
        torch.manual_seed(i)
        models.append(GPT2LMHeadModel(_gpt2("sdpa")))
    data = [{"input_ids": item["input_ids"], "labels": item["input_ids"]} for item in model_inputs]
    trainer = BundledTrainer(models=models, args=arguments(tmp_path))
    found = trainer.predict(data)
    assert found.predictions.shape == (2, 6, 8, 40)
    assert (found.predictions[:, :4, 6:] == -100).all()
    expected = Trainer(models[1], arguments(tmp_path)).predict(data)
    assert abs(found.predictions[1] - expected.predictions).max() < 1e-5
