"""Models that see the training data in orders of their own."""

from typing import Any

import pytest
import torch
from hf_case import arguments, berts, largest_difference, texts
from torch.utils.data import IterableDataset
from transformers import (
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
)

from modelbatch import ModelBatchError
from modelbatch.integrations.huggingface import BundledTrainer

SEEDS = [11, 5, 11]


def _orders(**more: Any) -> list[dict[str, Any]]:
    return [{"data_seed": seed, **more} for seed in SEEDS]


def _bundled(tmp_path: Any, models: list[Any], per_model: Any, data: Any, **options: Any) -> Any:
    more = {
        name: options.pop(name)
        for name in ("compute_loss_func", "data_collator")
        if name in options
    }
    args = arguments(tmp_path, **options)
    return BundledTrainer(
        models=models, args=args, per_model_args=per_model, train_dataset=data, **more
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_as_a_trainer_with_this_data_seed(tmp_path, accumulation) -> None:
    options = {"num_train_epochs": 2, "gradient_accumulation_steps": accumulation}
    data = texts(18)  # the last batch is smaller
    bundled = _bundled(tmp_path, berts(3), _orders(), data, **options)
    bundled.train()
    for i, model in enumerate(berts(3)):
        own = arguments(tmp_path, data_seed=SEEDS[i], **options)
        trainer = Trainer(model, own, train_dataset=data)
        trainer.train()
        assert largest_difference(model, bundled.model.models[i]) < 1e-8
        for mine, theirs in zip(bundled.state.log_history, trainer.state.log_history, strict=True):
            if "loss" in theirs:
                name = f"model_{i:03d}_loss"
                assert mine[name] == pytest.approx(theirs["loss"], abs=1e-6)
    assert largest_difference(bundled.model.models[0], bundled.model.models[1]) > 1e-3


def test_a_run_that_goes_on_in_the_middle_of_an_epoch(tmp_path) -> None:
    options = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
    data = texts(16)
    whole = _bundled(tmp_path / "whole", berts(3), _orders(), data, **options)
    whole.train()
    again = _bundled(tmp_path / "again", berts(3), _orders(), data, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def _language_models(count: int) -> list[Any]:
    models = []
    for i in range(count):
        torch.manual_seed(i)
        config = GPT2Config(
            vocab_size=40,
            n_positions=16,
            n_embd=16,
            n_layer=1,
            n_head=2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
        models.append(GPT2LMHeadModel(config).double())
    return models


def test_items_of_the_batch_are_the_models_own(tmp_path) -> None:
    """A language model divides by the number of its own labels, which is another in each order."""
    generator = torch.Generator().manual_seed(0)
    data = []
    for k in range(16):
        ids = torch.randint(1, 40, (10,), generator=generator)
        labels = ids.clone()
        labels[: k % 7] = -100
        data.append({"input_ids": ids, "labels": labels})
    options = {"gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    bundled = _bundled(tmp_path, _language_models(3), _orders(), data, **options)
    bundled.train()
    for i, model in enumerate(_language_models(3)):
        own = arguments(tmp_path, data_seed=SEEDS[i], **options)
        Trainer(model, own, train_dataset=data).train()
        assert largest_difference(model, bundled.model.models[i]) < 1e-8


def test_losses_of_ones_own_get_the_models_own_items(tmp_path) -> None:
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        own = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
        return own / num_items_in_batch

    data = texts(12)
    for k, item in enumerate(data):
        item["labels"] = -100 if k % 3 == 0 else item["labels"]
    options = {"optim": "sgd", "learning_rate": 0.1}
    more = {"compute_loss_func": loss}
    bundled = _bundled(tmp_path, berts(3), _orders(), data, **options, **more)
    bundled.train()
    for i, model in enumerate(berts(3)):
        own = arguments(tmp_path, data_seed=SEEDS[i], **options)
        Trainer(model, own, train_dataset=data, **more).train()
        assert largest_difference(model, bundled.model.models[i]) < 1e-8


def test_sequences_are_filled_up_to_the_longest_of_all(tmp_path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="[PAD]"
    )
    data = [
        {"input_ids": item["input_ids"][: 3 + k % 6].tolist(), "labels": item["labels"]}
        for k, item in enumerate(texts(16))
    ]
    collator = DataCollatorWithPadding(tokenizer)
    bundled = _bundled(tmp_path, berts(3), _orders(), data, data_collator=collator)
    bundled.train()
    for i, model in enumerate(berts(3)):
        own = arguments(tmp_path, data_seed=SEEDS[i])
        Trainer(model, own, train_dataset=data, data_collator=collator).train()
        assert largest_difference(model, bundled.model.models[i]) < 1e-8


def test_the_seed_of_a_model(tmp_path) -> None:
    own = [{"seed": 4}, {}, {"seed": 9}]
    bundled = _bundled(tmp_path, berts(3), own, texts(8), seed=20)
    assert bundled.model.seeds == [4, 21, 9]
    with pytest.raises(ModelBatchError, match="seeds or per_model_args"):
        BundledTrainer(
            models=berts(2),
            args=arguments(tmp_path),
            per_model_args=[{"seed": 1}, {}],
            seeds=[1, 2],
        )


class _Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(texts(8))


@pytest.mark.parametrize(
    ("options", "data", "match"),
    [
        ({"max_steps": 2}, _Stream(), "dataset with a length, got a _Stream"),
        ({"train_sampling_strategy": "group_by_length"}, texts(8), "group_by_length"),
        (
            {"accelerator_config": {"use_seedable_sampler": False}},
            texts(8),
            "use_seedable_sampler",
        ),
    ],
)
def test_what_has_no_order_by_a_seed_is_refused(tmp_path, options, data, match) -> None:
    bundled = _bundled(tmp_path, berts(3), _orders(), data, **options)
    with pytest.raises(ModelBatchError, match=match):
        bundled.train()
