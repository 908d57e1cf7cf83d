"""Validation, test and prediction; what is logged, monitored and stopped by it."""

import math

import pytest
import torch
import torch.nn.functional as F
from integrations.lightning.lightning_case import (
    CLASSES,
    Losses,
    M,
    alone,
    build,
    bundle,
    data,
    loader,
    trainer,
)
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from modelbatch import ModelBatchError, accuracy
from modelbatch.integrations.lightning import BundleModule

VALIDATION = data(30, seed=1)


def fitted(*callbacks, **settings):
    module = bundle(metric_fns={"acc": accuracy})
    own = trainer(*callbacks, **settings)
    own.fit(module, loader(data()), loader(VALIDATION, 8, seed=None))
    return module, own


def test_metrics_of_every_model_are_those_of_its_own_trainer():
    """Batches of 8, 8, 8 and 6: means over samples, not over batches."""
    module, own = fitted()
    for i in (0, 3, M - 1):
        single = alone(i)
        other = trainer()
        other.fit(single, loader(data()), loader(VALIDATION, 8, seed=None))
        for name in ("val_loss", "val_acc"):
            expected = float(other.callback_metrics[name])
            assert module.per_model_metrics[name][i].item() == pytest.approx(expected, rel=1e-6)
    values, logged = module.per_model_metrics["val_loss"], own.callback_metrics
    assert logged["val_loss/best"] == values.min() and logged["val_loss/worst"] == values.max()
    assert logged["val_loss"].item() == pytest.approx(values.mean().item())
    assert logged["val_loss/median"].item() == pytest.approx(values.quantile(0.5).item())
    assert logged["val_acc/max"] == module.per_model_metrics["val_acc"].max()
    assert logged["train_loss_epoch/best"] <= logged["train_loss_epoch/worst"]
    assert module.best_model() == int(values.argmin())
    assert module.best_model("val_acc") == int(module.per_model_metrics["val_acc"].argmax())


def test_the_train_loss_of_an_epoch_is_of_that_epoch():
    losses = Losses()
    module, own = fitted(losses, max_epochs=3)
    sizes = torch.tensor([8.0] * 6 + [4.0], dtype=torch.float64)
    expected = (torch.stack(losses.rows[-7:]) * sizes[:, None]).sum(0) / 52
    assert torch.allclose(module._means.means("train")["train_loss"], expected)
    assert own.callback_metrics["train_loss_epoch/best"].item() == pytest.approx(
        expected.min().item()
    )


def test_best_is_of_the_epoch_not_of_a_batch():
    """The mean over batches of each batch's best is lower than the best model's mean."""

    class Watch(Callback):
        def __init__(self):
            self.rows = []

        def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, *_):
            self.rows.append((outputs["losses"].clone(), len(batch[1])))

    watch = Watch()
    module, own = fitted(watch, max_epochs=1)
    total = sum(losses * count for losses, count in watch.rows) / 30
    assert torch.allclose(total, module.per_model_metrics["val_loss"])
    assert own.callback_metrics["val_loss/best"].item() == pytest.approx(total.min().item())
    of_batches = sum(losses.min() * count for losses, count in watch.rows) / 30
    assert of_batches < total.min() * 0.9999


def test_lightnings_early_stopping_and_checkpoint_watch_the_best(tmp_path):
    stop = EarlyStopping("val_loss/best", patience=1, min_delta=10.0)
    keep = ModelCheckpoint(
        tmp_path,
        monitor="val_loss/best",
        filename="{epoch}-{val_loss/best:.3f}",
        auto_insert_metric_name=False,
        save_top_k=1,
    )
    _, own = fitted(stop, keep, enable_checkpointing=True, max_epochs=9)
    assert own.current_epoch == 2 and stop.stopped_epoch == 1
    assert keep.best_model_score.item() <= own.callback_metrics["val_loss/best"].item()
    assert math.isfinite(keep.best_model_score)


def test_a_diverged_model_is_none_of_the_best_and_does_not_hide_them():
    module = bundle()
    with torch.no_grad():
        module.bundle[4][0].weight.fill_(float("nan"))
    own = trainer(EarlyStopping("val_loss/best", patience=5))  # check_finite=True
    own.fit(module, loader(data()), loader(VALIDATION, 8, seed=None))
    assert own.current_epoch == 3
    values = module.per_model_metrics["val_loss"]
    assert values[4].isnan() and own.callback_metrics["val_loss"].isfinite()
    assert own.callback_metrics["val_loss/best"] == values[values.isfinite()].min()
    assert module.best_model() != 4


def test_what_a_frozen_model_has_reached_still_counts():
    module = bundle(count=3)
    best = [0]

    class Freeze(Callback):
        def on_train_epoch_end(self, trainer, module):
            best[0] = module.best_model()
            module.bundle.freeze(best[0])

    own = trainer(Freeze(), max_epochs=1)
    own.fit(module, loader(data()), loader(VALIDATION, 8, seed=None))
    (result,) = own.validate(module, loader(VALIDATION, 8, seed=None), verbose=False)
    assert result["val_loss/best"] == module.per_model_metrics["val_loss"][best[0]].item()


def test_modes_are_restored_in_every_model():
    class Modes(Callback):
        def on_validation_batch_start(self, trainer, module, *_):
            assert not any(m.training for model in module.bundle.models for m in model.modules())

        def on_train_batch_start(self, trainer, module, *_):
            for model in module.bundle.models:
                assert model.training and model[3].training and not model[1].training

    module = bundle()
    for model in module.bundle.models:
        model[1].eval()  # batch statistics are frozen, say
    module.bundle.refresh()
    before = module.bundle[2][1].running_mean.clone()
    own = trainer(Modes(), num_sanity_val_steps=2)
    own.fit(module, loader(data()), loader(VALIDATION, 8, seed=None))
    assert torch.equal(module.bundle[2][1].running_mean, before)
    own.test(module, loader(VALIDATION, 8, seed=None), verbose=False)
    assert module.bundle[2].training


def test_the_sanity_check_leaves_nothing():
    module = bundle()

    class Look(Callback):
        def on_train_start(self, trainer, module):
            assert module.per_model_metrics == {}
            assert not trainer.callback_metrics

    own = trainer(Look(), num_sanity_val_steps=2)
    own.fit(module, loader(data()), loader(VALIDATION, 8, seed=None))
    assert module.per_model_metrics["val_loss"].shape == (M,)


def test_several_validation_loaders():
    module = bundle(metric_fns={"acc": accuracy})
    own = trainer(ModelCheckpoint(monitor="x", save_top_k=0), enable_checkpointing=True)
    other = data(16, seed=5)
    loaders = [loader(VALIDATION, 8, seed=None), loader(other, 8, seed=None)]
    results = own.validate(module, loaders, verbose=False)
    assert len(results) == 2
    for k, own_data in enumerate((VALIDATION, other)):
        name = f"val_acc/dataloader_idx_{k}"
        values = module.per_model_metrics[name]
        x, y = own_data.tensors
        module.bundle.eval()
        expected = (module(x).argmax(-1) == y).double().mean(-1)
        assert torch.allclose(values, expected)
        assert own.callback_metrics[f"{name}/max"] == expected.max()


def test_test_and_predict():
    module, own = fitted(max_epochs=1)
    (result,) = own.test(module, loader(VALIDATION, 8, seed=None), verbose=False)
    assert result["test_loss/best"] == module.per_model_metrics["test_loss"].min()
    x = VALIDATION.tensors[0]
    with torch.no_grad():
        module.bundle.eval()
        expected = module(x)
    for loaders in (
        loader(VALIDATION, 8, seed=None),
        DataLoader(x, 8),
        DataLoader(torch.utils.data.TensorDataset(x), 8),
    ):
        outputs = torch.cat(own.predict(module, loaders), 1)
        assert outputs.shape == (M, 30, CLASSES)
        assert torch.allclose(outputs, expected)


def test_fast_dev_run_and_limits():
    module, losses = bundle(), Losses()
    own = trainer(losses, fast_dev_run=True)
    own.fit(module, loader(data()), loader(VALIDATION, 8, seed=None))
    assert len(losses.rows) == 1
    own = trainer(losses, limit_train_batches=2, limit_val_batches=1, max_epochs=2)
    own.fit(bundle(), loader(data()), loader(VALIDATION, 8, seed=None))
    assert len(losses.rows) == 1 + 4
    own = trainer(losses, max_steps=3, max_epochs=-1, accumulate_grad_batches=2)
    own.fit(bundle(), loader(data()))
    assert len(losses.rows) == 5 + 6 and own.global_step == 3


def test_without_inference_mode():
    module = bundle()
    own = trainer(inference_mode=False)
    own.fit(module, loader(data()), loader(VALIDATION, 8, seed=None))
    assert not module.per_model_metrics["val_loss"].is_inference()


class Own(BundleModule):
    """Steps of a user's own, vectorised."""

    def __init__(self, width: int, rates: list[float]) -> None:
        self.width = width
        super().__init__(lr_list=rates, optimizer_cls=torch.optim.Adam)

    def build(self, i):
        torch.manual_seed(i)
        return nn.Sequential(nn.Linear(5, self.width), nn.ReLU(), nn.Linear(self.width, CLASSES))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = self.bundle.compute_loss(self(x), y, F.cross_entropy)
        self.log_per_model("train_loss", self.bundle.latest_losses, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        outputs = self(x)  # [M, B, C]
        self.log_per_model("val_loss", self.bundle.compute_loss(outputs, y, reduction="none"))
        self.log_per_model("val_acc", (outputs.argmax(-1) == y).float().mean(-1))


def test_a_subclass_with_steps_of_its_own():
    module = Own(6, [1e-2, 1e-3])
    own = trainer(max_epochs=2)
    floats = data(dtype=torch.float32)
    own.fit(module, loader(floats), loader(data(30, 1, torch.float32), 8, seed=None))
    assert module.per_model_metrics["val_acc"].shape == (2,)
    plain = BundleModule(
        lambda i: Own.build(Own(6, [1.0]), i),
        lr_list=[1e-2, 1e-3],
        optimizer_cls="Adam",
        metric_fns={"acc": accuracy},
    )
    other = trainer(max_epochs=2)
    other.fit(plain, loader(floats), loader(data(30, 1, torch.float32), 8, seed=None))
    for name in ("train_loss", "val_loss", "val_acc", "val_loss/best", "train_loss_epoch/median"):
        assert own.callback_metrics[name] == other.callback_metrics[name], name


def test_what_cannot_be_logged_is_refused():
    module = Own(6, [1e-2, 1e-3])
    with pytest.raises(ModelBatchError, match=r"one number for each of the 2 models, got \(3,\)"):
        module.log_per_model("val_loss", torch.zeros(3))
    with pytest.raises(ModelBatchError, match="no 'val_loss' of the models yet"):
        module.best_model()
    assert build(0)[4].out_features == CLASSES
