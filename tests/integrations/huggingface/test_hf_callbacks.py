"""ModelBatch's callbacks under Trainer, loggers, and what is refused."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_case import accuracy, arguments, berts, texts
from transformers import TrainerCallback

from modelbatch import (
    BestModel,
    Callback,
    EarlyStopping,
    ModelBatch,
    ModelBatchError,
    NaNCallback,
)
from modelbatch.integrations.huggingface import BundleCallback, BundledTrainer
from modelbatch.integrations.huggingface.refusals import refuse, refuse_accelerator


class Recorder(Callback):
    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def on_train_start(self, event: Any) -> None:
        self.events.append(("train_start", event.epochs))

    def on_epoch_start(self, event: Any) -> None:
        self.events.append(("epoch_start", event.epoch))

    def on_train_step(self, event: Any) -> None:
        assert event.mb[0].classifier.weight.shape == (3, 16)
        assert event.mb.gradients(1)["classifier.weight"] is not None
        self.events.append(("train_step", (event.step, event.losses.tolist())))

    def on_epoch_end(self, event: Any) -> None:
        self.events.append(("epoch_end", (event.epoch, sorted(event.metrics))))

    def on_train_end(self, event: Any) -> None:
        self.events.append(("train_end", event.step))


def _trainer(tmp_path: Any, callbacks: Any, count: int = 2, **options: Any) -> Any:
    args = arguments(tmp_path, **{"num_train_epochs": 2, "eval_strategy": "epoch", **options})
    return BundledTrainer(
        models=berts(count),
        args=args,
        train_dataset=texts(8),
        eval_dataset=texts(4, seed=1),
        compute_metrics=accuracy,
        callbacks=callbacks,
    )


def test_events_and_their_vectors(tmp_path) -> None:
    recorder = Recorder()
    trainer = _trainer(tmp_path, [recorder], gradient_accumulation_steps=2)
    trainer.train()
    names = [name for name, _ in recorder.events]
    epoch = ["epoch_start", "train_step", "epoch_end"]
    assert names == ["train_start", *epoch, *epoch, "train_end"]
    steps = [value for name, value in recorder.events if name == "train_step"]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for (step, losses), entry in zip(steps, logs, strict=True):
        assert step == entry["step"]
        own = [entry["model_000_loss"], entry["model_001_loss"]]
        assert losses == pytest.approx(own)
    ends = [value for name, value in recorder.events if name == "epoch_end"]
    assert ends == [(k, ["loss", "val_accuracy", "val_loss"]) for k in range(2)]


def test_a_model_that_is_lost_is_frozen_and_a_plateau_ends_it(tmp_path) -> None:
    early = EarlyStopping("val_loss", patience=1)
    best = BestModel("val_loss")
    trainer = _trainer(
        tmp_path, [NaNCallback(), best, early], 3, num_train_epochs=5, learning_rate=0.0
    )
    with torch.no_grad():
        trainer.model.models[2].classifier.weight.fill_(torch.nan)
    trainer.train()  # nothing gets better: all stop after their patience
    assert trainer.state.global_step < 10
    assert not trainer.model.active.any()
    assert best.best_epochs.tolist()[:2] == [0, 0] and best.best_epochs[2] == -1


def test_callbacks_are_resumed(tmp_path) -> None:
    best = BestModel("val_loss")
    _trainer(tmp_path, [best], save_strategy="epoch").train()
    again = BestModel("val_loss")
    trainer = _trainer(tmp_path, [again], save_strategy="epoch")
    trainer.train(resume_from_checkpoint=True)
    assert torch.equal(again.best_values, best.best_values)


def test_models_do_not_come_and_go_in_training(tmp_path) -> None:
    class Prunes(Callback):
        def on_train_step(self, event: Any) -> None:
            event.mb.prune([0])

    with pytest.raises(ModelBatchError, match="freeze them"):
        _trainer(tmp_path, [Prunes()]).train()


def test_the_adapter_needs_its_trainer() -> None:
    with pytest.raises(ModelBatchError, match="belongs to a BundledTrainer"):
        BundleCallback(Recorder()).on_train_begin(None, None, None)


def test_tensorboard_through_report_to(tmp_path, monkeypatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = _trainer(tmp_path, None, report_to=["tensorboard"])
    trainer.train()
    board = EventAccumulator(str(next((tmp_path / "board").rglob("events*")).parent))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {"train/loss", "train/model_001_loss", "eval/loss", "eval/model_001_accuracy"} <= tags


@pytest.mark.filterwarnings(
    "ignore:.*:DeprecationWarning:wandb",
    "ignore:.*:DeprecationWarning:google",
    "ignore:.*:DeprecationWarning:pydantic",
)
def test_wandb_through_report_to(tmp_path, monkeypatch) -> None:
    wandb = pytest.importorskip("wandb")
    settings = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "WANDB_PROJECT": "bundle",
        **{f"WANDB_{name}_DIR": str(tmp_path / name) for name in ("CACHE", "DATA", "CONFIG")},
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()  # another test may have started it with other settings
    rows: list[dict[str, Any]] = []
    log = wandb.sdk.wandb_run.Run.log
    monkeypatch.setattr(
        wandb.sdk.wandb_run.Run,
        "log",
        lambda run, data, *a, **k: (rows.append(data), log(run, data, *a, **k))[1],
    )
    trainer = _trainer(tmp_path, None, report_to=["wandb"], run_name="two")
    trainer.train()
    config = wandb.run.config
    assert config["hidden_size"] == 16 and config["num_train_epochs"] == 2
    assert config["model/num_parameters"] == trainer.model.num_parameters()
    wandb.finish()
    wandb.teardown()  # the file is complete then
    (steps, ends) = ([row for row in rows if name in row] for name in ("train/loss", "eval/loss"))
    assert len(steps) == 4 and all("train/model_001_loss" in row for row in steps)
    assert len(ends) == 2 and all("eval/model_001_accuracy" in row for row in ends)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert file.stat().st_size > 1000


def test_what_loggers_ask_of_a_model(tmp_path) -> None:
    logged: list[dict[str, Any]] = []
    trainer = _trainer(tmp_path, None)

    class Logger(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            assert model.config.to_dict()["hidden_size"] == 16
            assert "hidden_size" in model.config.to_json_string()
            assert model.num_parameters() == sum(p.numel() for p in model.parameters())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            assert all(isinstance(value, int | float) for value in logs.values())
            logged.append(logs)

    trainer.add_callback(Logger())
    trainer.train()
    assert any("model_001_grad_norm" in logs for logs in logged)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("deepspeed", "config.json", "DeepSpeed does not go around a bundle"),
        ("fsdp", "full_shard", "FSDP does not go around a bundle"),
        ("world_size", 2, "DistributedDataParallel does not.*CUDA_VISIBLE_DEVICES"),
        ("n_gpu", 2, "DataParallel does not.*CUDA_VISIBLE_DEVICES"),
        ("activation_checkpointing", True, "per_device_train_batch_size"),
        ("torch_compile", True, "enable_compile"),
        ("neftune_noise_alpha", 5.0, "hooks"),
        ("use_liger_kernel", True, "kernels"),
        ("push_to_hub", True, "export_model"),
        ("batch_eval_metrics", True, "compute_metrics"),
        ("auto_find_batch_size", True, "per_device_train_batch_size"),
    ],
)
def test_refused_with_what_to_do(field, value, match) -> None:
    plain = {"deepspeed": None, "fsdp": "", "world_size": 1, "n_gpu": 0}
    with pytest.raises(ModelBatchError, match=match):
        refuse(SimpleNamespace(**{**plain, field: value}))


def test_what_accelerate_was_told_is_refused() -> None:
    state = SimpleNamespace(deepspeed_plugin=object())
    with pytest.raises(ModelBatchError, match="DeepSpeed"):
        refuse_accelerator(SimpleNamespace(state=state))


def test_bad_arguments(tmp_path) -> None:
    args = arguments(tmp_path)
    bad: list[tuple[dict[str, Any], str]] = [
        ({}, "give a list of models"),
        ({"model": berts(1)[0]}, "single BertForSequenceClassification"),
        ({"models": berts(2), "num_models": 3}, "num_models=3"),
        ({"models": berts(2), "learning_rates": [1.0]}, "1 entries for 2 models"),
        ({"models": berts(2), "learning_rates": 0.1}, "must be a list of 2"),
        ({"models": berts(2), "seeds": [1, 2, 3]}, "seeds has 3"),
        ({"models": berts(2), "metric_summary": "worst"}, "metric_summary"),
        ({"models": berts(1), "per_model_args": [{"num_train_epochs": 2}]}, "num_train_epochs"),
        ({"models": berts(1), "optimizer_kwargs": [3]}, "must be a dict"),
        (
            {"models": berts(1), "learning_rates": [1.0], "per_model_args": [{"learning_rate": 1}]},
            "learning_rates or per_model_args",
        ),
        (
            {
                "model": ModelBatch(berts(1), [0.1], torch.optim.SGD),
                "learning_rates": [1.0],
            },
            "has an optimizer already",
        ),
        ({"model": ModelBatch(berts(1)), "seeds": [1]}, "has its seeds already"),
    ]
    for options, match in bad:
        with pytest.raises(ModelBatchError, match=match):
            BundledTrainer(args=args, **options)


def test_an_optimizer_that_would_mix_the_models_is_refused(tmp_path) -> None:
    bundle = ModelBatch(berts(2))
    plain = torch.optim.SGD(bundle.parameters(), lr=0.1)
    trainer = BundledTrainer(
        bundle, arguments(tmp_path), train_dataset=texts(4), optimizers=(plain, None)
    )
    with pytest.raises(ModelBatchError, match="would mix the models"):
        trainer.train()


def test_a_missing_library_names_the_extra(monkeypatch) -> None:
    for name in [name for name in sys.modules if "integrations.huggingface" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r'pip install "modelbatch\[hf\]"'):
        import modelbatch.integrations.huggingface  # noqa: F401
