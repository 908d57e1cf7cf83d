"""Metrics, predictions, best models and logs."""

from typing import Any

import numpy as np
import pytest
import torch
from hf_case import accuracy, arguments, berts, largest_difference, texts
from transformers import EarlyStoppingCallback, Trainer

from modelbatch.integrations.huggingface import BundledTrainer

HELD_OUT = texts(10, seed=1)  # the last batch is not full


def _trainers(tmp_path: Any, **more: Any) -> tuple[Any, list[Any]]:
    args = arguments(tmp_path)
    bundled = BundledTrainer(models=berts(3), args=args, eval_dataset=HELD_OUT, **more)
    return bundled, [Trainer(m, args, eval_dataset=HELD_OUT, **more) for m in berts(3)]


def test_evaluate_equals_each_model_alone(tmp_path) -> None:
    bundled, alone = _trainers(tmp_path, compute_metrics=accuracy)
    metrics = bundled.evaluate()
    own = [trainer.evaluate() for trainer in alone]
    for i, expected in enumerate(own):
        for name in ("loss", "accuracy"):
            found = metrics[f"eval_model_{i:03d}_{name}"]
            assert found == pytest.approx(expected[f"eval_{name}"], abs=1e-7)
        mine = bundled.metrics_of_model(metrics, i)
        assert set(mine) == set(expected)
        assert mine["eval_accuracy"] == expected["eval_accuracy"]
    losses = [expected["eval_loss"] for expected in own]
    rights = [expected["eval_accuracy"] for expected in own]
    assert metrics["eval_loss"] == metrics["eval_loss_best"] == pytest.approx(min(losses))
    assert metrics["eval_loss_mean"] == pytest.approx(sum(losses) / 3)
    assert metrics["eval_accuracy"] == max(rights)
    assert metrics["eval_best_model"] == losses.index(min(losses))


def test_the_mean_as_summary(tmp_path) -> None:
    bundled, _ = _trainers(tmp_path)
    bundled.metric_summary = "mean"
    metrics = bundled.evaluate()
    assert metrics["eval_loss"] == metrics["eval_loss_mean"] != metrics["eval_loss_best"]


def test_predictions_of_each_model(tmp_path) -> None:
    bundled, alone = _trainers(tmp_path, compute_metrics=accuracy)
    found = bundled.predict(HELD_OUT)
    assert found.predictions.shape == (3, 10, 3)  # [M, N, classes]
    for i, trainer in enumerate(alone):
        expected = trainer.predict(HELD_OUT)
        np.testing.assert_allclose(found.predictions[i], expected.predictions, atol=1e-12)
        assert found.metrics[f"test_model_{i:03d}_loss"] == pytest.approx(
            expected.metrics["test_loss"]
        )
        np.testing.assert_array_equal(found.label_ids, expected.label_ids)


def test_what_compute_metrics_is_given(tmp_path) -> None:
    seen: list[Any] = []

    def look(prediction: Any) -> dict[str, float]:
        seen.append((prediction.predictions, prediction.losses, prediction.inputs))
        return {"classes": float(len(set(prediction.predictions.tolist())))}

    def preprocess(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert logits.shape[1:] == (3,) and labels.shape == logits.shape[:1]
        return logits.argmax(-1)

    args = arguments(tmp_path, include_for_metrics=["loss", "inputs"])
    more = {"compute_metrics": look, "preprocess_logits_for_metrics": preprocess}
    bundled = BundledTrainer(models=berts(2), args=args, eval_dataset=HELD_OUT, **more)
    bundled.evaluate()
    mine, seen[:] = list(seen), []
    for i, model in enumerate(berts(2)):
        Trainer(model, args, eval_dataset=HELD_OUT, **more).evaluate()
        for found, expected in zip(mine[i], seen[i], strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_several_evaluation_sets(tmp_path) -> None:
    bundled = BundledTrainer(
        models=berts(2),
        args=arguments(tmp_path),
        eval_dataset={"near": HELD_OUT, "far": texts(4, seed=2)},
    )
    metrics = bundled.evaluate()
    assert metrics["eval_near_model_001_loss"] != metrics["eval_far_model_001_loss"]
    assert metrics["eval_far_loss"] == metrics["eval_far_loss_best"]


def _watching(tmp_path: Any, **more: Any) -> Any:
    return arguments(
        tmp_path,
        num_train_epochs=4,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        save_total_limit=2,
        **more,
    )


def test_each_model_gets_its_own_best_weights(tmp_path) -> None:
    rates = [1e-3, 0.2, 5e-2]  # they are best after different epochs
    data = texts(16)
    more = {"train_dataset": data, "eval_dataset": HELD_OUT}
    bundled = BundledTrainer(
        models=berts(3), args=_watching(tmp_path / "all"), learning_rates=rates, **more
    )
    bundled.train()
    best = bundled.best.steps.tolist()
    assert len(set(best)) > 1
    for i, model in enumerate(berts(3)):
        args = _watching(tmp_path / str(i))
        args.learning_rate = rates[i]
        trainer = Trainer(model, args, **more)
        trainer.train()
        assert trainer.state.best_global_step == best[i]
        assert trainer.state.best_metric == pytest.approx(float(bundled.best.values[i]))
        assert largest_difference(model, bundled.model.models[i]) < 1e-8


def test_best_metric_and_early_stopping_of_the_bundle(tmp_path) -> None:
    more = {"train_dataset": texts(8), "eval_dataset": HELD_OUT}
    bundled = BundledTrainer(
        models=berts(2),
        args=_watching(tmp_path),
        learning_rates=[0.0, 0.0],  # nothing ever gets better
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        **more,
    )
    bundled.train()
    assert bundled.state.global_step == 4  # two epochs of two steps
    evaluations = [e for e in bundled.state.log_history if "eval_loss" in e]
    assert bundled.state.best_metric == evaluations[0]["eval_loss"]
    assert bundled.state.best_global_step == 2


def test_logs_can_be_short(tmp_path) -> None:
    args = arguments(tmp_path, logging_steps=2)
    bundled = BundledTrainer(
        models=berts(2), args=args, train_dataset=texts(8), per_model_logs=False
    )
    result = bundled.train()
    for entry in bundled.state.log_history:
        assert not any(key.startswith("model_") for key in entry)
    assert bundled.state.log_history[0]["loss_best"] <= bundled.state.log_history[0]["loss"]
    assert result.metrics["train_loss_best"] <= result.metrics["train_loss"]
