"""M models in one BundledTrainer equal M models with a Trainer each."""

from typing import Any

import pytest
import torch
from hf_case import accuracy, arguments, berts, config, largest_difference, texts
from transformers import BertForSequenceClassification, Trainer

from modelbatch.integrations.huggingface import BundledTrainer

M = 8
RATES = [1e-3 * (i + 1) for i in range(M)]


def _compare_logs(bundled: Any, alone: Any, i: int, tolerance: float) -> int:
    compared = 0
    for mine, own in zip(bundled.state.log_history, alone.state.log_history, strict=True):
        assert mine["step"] == own["step"]
        for name in ("loss", "grad_norm", "train_loss"):
            if name in own:
                assert mine[f"model_{i:03d}_{name}"] == pytest.approx(own[name], abs=tolerance)
                compared += 1
        for name in ("loss", "accuracy"):
            if f"eval_{name}" in own:
                value = mine[f"eval_model_{i:03d}_{name}"]
                assert value == pytest.approx(own[f"eval_{name}"], abs=tolerance)
                compared += 1
    return compared


class Watched(Trainer):
    """Keeps the loss of every training batch as it is, where Trainer adds them up in float32."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.seen = [*getattr(self, "seen", ()), self.losses_of_batch.clone()]
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if not isinstance(self, BundledTrainer):
            self.losses_of_batch = (loss[0] if isinstance(loss, tuple) else loss).detach()
        return loss


class WatchedBundle(Watched, BundledTrainer):
    pass


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_eight_berts_equal_eight_trainers(tmp_path, optim) -> None:
    options = {
        "optim": optim,
        "num_train_epochs": 2,
        "gradient_accumulation_steps": 2,  # 5 batches: the last step has one
        "warmup_steps": 2,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "eval_strategy": "epoch",
    }
    data, held_out = texts(18), texts(6, seed=1)
    more = {"train_dataset": data, "eval_dataset": held_out, "compute_metrics": accuracy}
    bundled = WatchedBundle(
        models=berts(M), args=arguments(tmp_path, **options), learning_rates=RATES, **more
    )
    bundled.train()
    for i, model in enumerate(berts(M)):
        args = arguments(tmp_path, **{**options, "learning_rate": RATES[i]})
        trainer = Watched(model, args, **more)
        trainer.train()
        assert largest_difference(model, bundled.model.models[i]) < 1e-8
        losses, own = torch.stack(bundled.seen)[:, i], torch.stack(trainer.seen)
        assert losses.dtype == own.dtype == torch.float64
        assert len(own) == 10 and (losses - own).abs().max() < 1e-8
        # what is logged are sums in float32, Trainer's as well as ours
        assert _compare_logs(bundled, trainer, i, 1e-6) >= 17
    assert bundled.model.optimizer.parameter_options  # some do not decay, by the user's names


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_single_precision_errs_as_little_as_trainers_do(tmp_path, optim) -> None:
    """Against Trainers that compute in float64 from the same float32 weights."""
    options = {
        "optim": optim,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "num_train_epochs": 2,
        "learning_rate": 1e-3 if optim == "adamw_torch" else 0.1,
    }
    data = texts(24)
    bundled = BundledTrainer(
        models=berts(3, torch.float32), args=arguments(tmp_path, **options), train_dataset=data
    )
    bundled.train()
    for i in range(3):
        weights = []
        for dtype in (torch.float64, torch.float32):
            model = berts(3, torch.float32)[i].to(dtype)
            Trainer(model, arguments(tmp_path, **options), train_dataset=data).train()
            weights.append(torch.cat([p.detach().double().flatten() for p in model.parameters()]))
        exact, alone = weights
        own = bundled.model.models[i].parameters()
        mine = torch.cat([p.detach().double().flatten() for p in own])
        error = (alone - exact).norm()
        assert 0 < error < 1e-3 * exact.norm()
        assert (mine - exact).norm() <= 2 * error, f"model {i}"


def test_the_gradient_clip_matters(tmp_path) -> None:
    def norms(limit: float) -> list[float]:
        args = arguments(tmp_path, optim="sgd", max_grad_norm=limit, learning_rate=1.0)
        bundled = BundledTrainer(models=berts(2), args=args, train_dataset=texts(8))
        bundled.train()
        return [p.double().norm().item() for p in bundled.model.parameters()]

    assert norms(0.01) != norms(100.0)


def test_options_of_each_model(tmp_path) -> None:
    own = [
        {"learning_rate": 1e-3, "weight_decay": 0.0, "adam_beta1": 0.8},
        {"learning_rate": 3e-3, "weight_decay": 0.5, "warmup_steps": 3, "max_grad_norm": 0.05},
        {"learning_rate": "2e-3", "lr_scheduler_type": "cosine", "adam_epsilon": 1e-3},
    ]
    data = texts(20)
    bundled = BundledTrainer(
        models=berts(3), args=arguments(tmp_path), per_model_args=own, train_dataset=data
    )
    bundled.train()
    for i, model in enumerate(berts(3)):
        fields = {k: float(v) if k == "learning_rate" else v for k, v in own[i].items()}
        Trainer(model, arguments(tmp_path, **fields), train_dataset=data).train()
        assert largest_difference(model, bundled.model.models[i]) < 1e-8


def test_optimizer_class_and_its_options(tmp_path) -> None:
    data, given = texts(12), (torch.optim.SGD, {"lr": 0.05, "nesterov": False})
    kwargs = [{"momentum": m} for m in (0.0, 0.5, 0.9)]
    bundled = BundledTrainer(
        models=berts(3),
        args=arguments(tmp_path),
        optimizer_cls_and_kwargs=given,
        optimizer_kwargs=kwargs,
        train_dataset=data,
    )
    bundled.train()
    for i, model in enumerate(berts(3)):
        own = (given[0], {**given[1], **kwargs[i]})
        args = arguments(tmp_path)
        Trainer(model, args, optimizer_cls_and_kwargs=own, train_dataset=data).train()
        assert largest_difference(model, bundled.model.models[i]) < 1e-8


def test_model_init_and_seeds(tmp_path) -> None:
    def build() -> Any:
        return BertForSequenceClassification(config()).double()

    data = texts(12)
    args = arguments(tmp_path, data_seed=3)
    bundled = BundledTrainer(args=args, model_init=build, seeds=[5, 7], train_dataset=data)
    bundled.train()
    for i, seed in enumerate([5, 7]):
        own = arguments(tmp_path, data_seed=3, seed=seed)
        trainer = Trainer(args=own, model_init=build, train_dataset=data)
        trainer.train()
        assert largest_difference(trainer.model, bundled.model.models[i]) < 1e-8


def test_custom_loss_and_label_smoothing(tmp_path) -> None:
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        own = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
        return own / num_items_in_batch

    data = texts(18)
    for fields, more in (
        ({"label_smoothing_factor": 0.2}, {}),
        ({}, {"compute_loss_func": loss}),
    ):
        options = {**fields, "gradient_accumulation_steps": 2, "optim": "sgd"}
        args = arguments(tmp_path, **options)
        bundled = BundledTrainer(models=berts(2), args=args, train_dataset=data, **more)
        bundled.train()
        for i, model in enumerate(berts(2)):
            trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=data, **more)
            trainer.train()
            assert largest_difference(model, bundled.model.models[i]) < 1e-6
            assert _compare_logs(bundled, trainer, i, 1e-6) == 2 * 3 + 1


def test_plateau_of_each_model(tmp_path) -> None:
    options = {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "threshold": 0.05},
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    rates = [1e-4, 3e-2]
    more = {"train_dataset": texts(24), "eval_dataset": texts(6, seed=1)}
    args = arguments(tmp_path, **options)
    bundled = BundledTrainer(models=berts(2), args=args, learning_rates=rates, **more)
    bundled.train()
    for i, model in enumerate(berts(2)):
        own = arguments(tmp_path, **{**options, "learning_rate": rates[i]})
        trainer = Trainer(model, own, **more)
        trainer.train()
        assert trainer.optimizer.param_groups[0]["lr"] < rates[i]
        assert bundled.lr_scheduler.get_last_lr()[i] == trainer.optimizer.param_groups[0]["lr"]
        assert largest_difference(model, bundled.model.models[i]) < 1e-8


def test_a_model_that_diverges_alone(tmp_path) -> None:
    """A NaN spoils neither the other models, nor the printed mean, nor the clipping."""
    data = texts(12)
    models = berts(3)
    with torch.no_grad():
        models[1].classifier.weight.fill_(torch.nan)
    bundled = BundledTrainer(
        models=models,
        args=arguments(tmp_path, eval_strategy="epoch"),
        train_dataset=data,
        eval_dataset=texts(6, seed=1),
        compute_metrics=accuracy,
    )
    bundled.train()
    for i, model in enumerate(berts(3)):
        if i != 1:
            Trainer(model, arguments(tmp_path), train_dataset=data).train()
            assert largest_difference(model, bundled.model.models[i]) < 1e-8
    last = [entry for entry in bundled.state.log_history if "eval_loss" in entry][-1]
    assert last["eval_loss"] == min(last["eval_model_000_loss"], last["eval_model_002_loss"])
