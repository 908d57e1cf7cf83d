"""Lightning's own loggers, and ModelBatch's callbacks in a Trainer."""

import csv
import json
from pathlib import Path

import pytest
import torch
from integrations.lightning.lightning_case import M, bundle, data, loader, trainer
from lightning.pytorch.callbacks import Callback as LightningCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from modelbatch import BestModel, Callback, EarlyStopping, MetricsLogger, NaNCallback, accuracy
from modelbatch.integrations.lightning import BundleConfigurationError, BundleModule, PackCallback

VALIDATION = data(30, seed=1)


def fit(module, *callbacks, **settings):
    own = trainer(*callbacks, **{"max_epochs": 2, **settings})
    own.fit(module, loader(data()), loader(VALIDATION, 8, seed=None))
    return own


class Memory(Logger):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.rows: list[tuple[int, dict]] = []

    name = "memory"
    version = 0

    @rank_zero_only
    def log_metrics(self, metrics, step):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass


def test_few_scalars_per_step_and_vectors_now_and_then():
    memory = Memory()
    module = bundle(metric_fns={"acc": accuracy})
    fit(module, logger=memory, log_every_n_steps=5)
    # Lightning counts from 0: its 5th and 10th step
    columns = [step for step, row in memory.rows if "train_loss_model_0" in row]
    assert columns == [4, 9]
    scalars = [(step, row) for step, row in memory.rows if "train_loss" in row]
    assert [step for step, _ in scalars] == [4, 9]
    for _, row in scalars:
        assert row.keys() == {
            *("train_loss", "train_loss/best", "train_loss/median", "train_loss/worst", "epoch"),
        }
        assert row["train_loss/best"] <= row["train_loss/median"] <= row["train_loss/worst"]
    vector = next(row for step, row in memory.rows if "train_loss_model_0" in row and step == 9)
    own = [vector[f"train_loss_model_{i}"] for i in range(M)]
    shown = next(row for step, row in scalars if step == 9)
    assert min(own) == pytest.approx(shown["train_loss/best"])
    assert vector["active_models"] == M and "lr/median" in vector
    validated = [row for _, row in memory.rows if "val_acc_model_3" in row]
    assert len(validated) == 2 and "val_loss_model_0" in validated[0]


@pytest.mark.parametrize("log_models", ["auto", "none"])
def test_csv(tmp_path, log_models):
    logger = CSVLogger(tmp_path, name="runs", version=0)
    fit(bundle(log_models=log_models), logger=logger, log_every_n_steps=1)
    text = (tmp_path / "runs/version_0/metrics.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert any(row["val_loss/best"] for row in rows)
    assert ("train_loss_model_7" in rows[0]) == (log_models == "auto")


def test_tensorboard(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name="runs", version=0, default_hp_metric=False)
    module = bundle(model_hparams=[{"note": f"n{i}"} for i in range(M)])
    fit(module, logger=logger, log_every_n_steps=5)
    directory = tmp_path / "runs" / "version_0"
    seen = events.EventAccumulator(str(directory), size_guidance={"histograms": 0}).Reload()
    assert {"train_loss/models", "val_loss/models"} <= set(seen.Tags()["histograms"])
    scalars = set(seen.Tags()["scalars"])
    assert {"val_loss/best", "train_loss/worst", "lr/max", "active_models"} <= scalars
    assert not any("model_0" in tag for tag in scalars)
    steps = [event.step for event in seen.Scalars("train_loss/best")]
    assert steps == [event.step for event in seen.Histograms("train_loss/models")] == [4, 9]
    runs = sorted(path.name for path in directory.glob("model_*"))
    assert runs == [f"model_{i:03d}" for i in range(M)]
    of_model = events.EventAccumulator(str(directory / "model_003")).Reload()
    last = of_model.Scalars("result/val_loss")[-1].value
    assert last == pytest.approx(module.per_model_metrics["val_loss"][3].item())


def test_tensorboard_with_a_curve_for_each_model(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name="", version=0, default_hp_metric=False)
    fit(bundle(log_models="scalars", count=2), logger=logger, log_every_n_steps=1)
    seen = events.EventAccumulator(str(tmp_path / "version_0")).Reload()
    assert "val_loss_model_1" in seen.Tags()["scalars"]
    assert not seen.Tags()["histograms"]


@pytest.mark.filterwarnings(
    "ignore:.*:DeprecationWarning:wandb",
    "ignore:.*:DeprecationWarning:google",
    "ignore:.*:DeprecationWarning:pydantic",
)
def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    for name in ("CACHE", "DATA", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    rows: list[dict] = []
    logger = WandbLogger(project="bundle", save_dir=tmp_path, offline=True)
    experiment = logger.experiment
    log = experiment.log
    monkeypatch.setattr(experiment, "log", lambda row, *a, **k: (rows.append(row), log(row))[1])
    fit(bundle(count=3), logger=logger, log_every_n_steps=5)
    experiment.finish()
    wandb.teardown()
    histograms = [row for row in rows if "train_loss/models" in row]
    assert [row["trainer/global_step"] for row in histograms] == [4, 9]
    table = next(row["models"] for row in rows if "models" in row)
    assert len(table.data) == 3 and table.columns[:3] == ["model", "active", "seed"]
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert file.stat().st_size > 1000


# ---- ModelBatch's callbacks


class Tell(Callback):
    def __init__(self):
        self.seen: list[tuple] = []

    def _note(self, name, event, *more):
        self.seen.append((name, event.epoch, event.step, *more))

    def on_train_start(self, event):
        self._note("start", event, event.epochs, event.num_batches)

    def on_epoch_start(self, event):
        self._note("epoch", event)

    def on_train_step(self, event):
        self._note("step", event, event.batch_size, tuple(event.losses.shape))

    def on_validation_step(self, event):
        self._note("validation", event, sorted(event.metrics))

    def on_epoch_end(self, event):
        self._note("epoch_end", event, sorted(event.metrics))

    def on_train_end(self, event):
        self._note("end", event)


def test_what_a_pack_is_told():
    tell = Tell()
    module = bundle(metric_fns={"acc": accuracy})
    settings = {"accumulate_grad_batches": 2, "num_sanity_val_steps": 2, "max_epochs": 1}
    fit(module, PackCallback(tell), **settings)
    steps = [("step", 0, k, 16, (M,)) for k in (1, 2, 3)] + [("step", 0, 4, 4, (M,))]
    validation = [("validation", 0, 4, ["val_acc"])] * 4
    assert tell.seen == [
        ("start", 0, 0, 1, 7),
        ("epoch", 0, 0),
        *steps,
        *validation,
        ("epoch_end", 0, 4, ["loss", "val_acc", "val_loss"]),
        ("end", 0, 4),
    ]


def test_a_model_that_diverges_is_frozen_and_the_others_go_on():
    module = bundle(count=3)

    class Break(LightningCallback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 4:
                with torch.no_grad():
                    pl_module.bundle[1][0].weight.fill_(float("inf"))

    own = fit(module, Break(), PackCallback(NaNCallback("freeze")))
    assert module.bundle.active.tolist() == [True, False, True]
    assert own.global_step == 14 and own.callback_metrics["val_loss/best"].isfinite()


def test_every_model_stops_by_itself_and_the_run_with_the_last():
    module = bundle(count=3)
    stop = EarlyStopping("val_loss", patience=1, min_delta=[0.0, 100.0, 100.0])
    own = fit(module, PackCallback(stop), max_epochs=3)
    assert module.bundle.active.tolist() == [True, False, False] and own.current_epoch == 3
    module = bundle(count=3)
    stop = EarlyStopping("val_loss", patience=1, min_delta=100.0)
    own = fit(module, PackCallback(stop), max_epochs=9)
    assert own.current_epoch == 2 and stop.stopped_epochs.tolist() == [1, 1, 1]


def test_a_frozen_model_keeps_every_bit_and_its_schedule():
    module = bundle(torch.optim.AdamW, count=3)
    module.bundle.freeze(1)
    before = [own[1].clone() for own in module.state_dict().values()]
    own = fit(module, gradient_clip_val=0.1)
    for name, old in zip(module.state_dict(), before):
        assert torch.equal(module.state_dict()[name][1], old), name
    (config,) = own.lr_scheduler_configs
    assert [s.last_epoch for s in config.scheduler.schedulers] == [14, 0, 14]


def test_training_ends_when_all_are_frozen_by_hand():
    class Freeze(LightningCallback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                module.bundle.freeze(range(M))

    own = fit(bundle(), Freeze(), max_epochs=5)
    assert own.global_step == 3


def test_files_of_callbacks_are_closed_after_an_exception(tmp_path):
    class Fail(LightningCallback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("no more")

    path = tmp_path / "log.jsonl"
    with pytest.raises(RuntimeError, match="no more"):
        fit(bundle(count=2), PackCallback(MetricsLogger(path)), Fail())
    assert len([json.loads(line) for line in Path(path).read_text().splitlines()]) == 3


def test_epochs_without_validation_do_not_count():
    best, tell = BestModel("val_loss"), Tell()
    fit(bundle(count=2), PackCallback([best, tell]), max_epochs=4, check_val_every_n_epoch=2)
    ends = [row for row in tell.seen if row[0] == "epoch_end"]
    assert [row[1] for row in ends] == [1, 3]


def test_a_pack_wants_a_bundle():
    from integrations.lightning.lightning_case import alone

    with pytest.raises(BundleConfigurationError, match="follows a BundleModule, got Alone"):
        fit(alone(0), PackCallback(Tell()))
    assert BundleModule
