"""Optimizers, schedules, routed data, and what a bundle refuses."""

import itertools
import warnings
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F
from integrations.lightning.lightning_case import (
    CLASSES,
    RATES,
    Losses,
    M,
    alone,
    build,
    bundle,
    data,
    loader,
    net,
    trainer,
)
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.optim import lr_scheduler

from modelbatch import (
    DataRouter,
    ModelBatchError,
    OptimizerFactory,
    StratifiedDataRouter,
    per_model,
)
from modelbatch.integrations.lightning import BundleConfigurationError, BundleModule, _available

PLAIN = {"lr_scheduler": None, "lr_scheduler_kwargs": None}


def fit(module, *callbacks, **settings):
    own = trainer(*callbacks, **{"max_epochs": 2, **settings})
    own.fit(module, loader(data()), loader(data(30, 1), 8, seed=None))
    return own


def test_every_model_watches_its_own_plateau():
    module = bundle(
        lr_scheduler=lr_scheduler.ReduceLROnPlateau,
        lr_scheduler_kwargs={"patience": 0, "threshold": 0.05},
        lr_scheduler_interval="epoch",
    )
    own = fit(module, max_epochs=5)
    (config,) = own.lr_scheduler_configs
    rates = config.scheduler.get_last_lr()
    for i in range(M):
        single = alone(i)
        optimizer = torch.optim.SGD(single.model.parameters(), **single.options)
        plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.05)
        single.configure_optimizers = lambda o=optimizer, p=plateau: {
            "optimizer": o,
            "lr_scheduler": {"scheduler": p, "monitor": "val_loss"},
        }
        fit(single, max_epochs=5)
        assert plateau.get_last_lr()[0] == pytest.approx(rates[i])
    assert len({round(rate / start, 9) for rate, start in zip(rates, RATES)}) > 1


def test_a_plateau_in_configure_optimizers_needs_a_monitor():
    class Own(type(bundle())):
        def configure_optimizers(self):
            optimizer = OptimizerFactory(torch.optim.SGD, {"lr": 0.1}).create_optimizer(self.bundle)
            scheduler = OptimizerFactory.create_lr_scheduler(
                optimizer, lr_scheduler.ReduceLROnPlateau
            )
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, **self.monitor},
            }

    module = Own(build, 2, seeds=[1, 2])
    module.monitor = {}
    with pytest.raises(BundleConfigurationError, match="must include a monitor"):
        fit(module)
    module.monitor = {"monitor": "val_loss/best"}
    assert fit(module).lr_scheduler_configs[0].reduce_on_plateau
    module.monitor = {"monitor": "train_loss_epoch"}
    with pytest.raises(BundleConfigurationError, match="of which there is no number for each"):
        fit(module)


def test_different_schedules_of_torch():
    def schedule(optimizer, i):
        if i == 0:
            return lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return lr_scheduler.ConstantLR(optimizer, factor=1.0)

    module = bundle(
        count=2, lr_scheduler=schedule, lr_scheduler_kwargs=None, lr_scheduler_interval="epoch"
    )
    rates = fit(module).lr_scheduler_configs[0].scheduler.get_last_lr()
    assert rates == [0.005, 0.032]


def test_lbfgs():
    options = {"max_iter": 4, "line_search_fn": "strong_wolfe"}
    module = BundleModule(
        lambda i: build(i, dropout=0.0),
        lr_list=[0.1, 0.5],
        optimizer_cls=torch.optim.LBFGS,
        optimizer_kwargs=options,
    )
    losses = Losses()
    fit(module, losses, max_epochs=1)
    for i, rate in enumerate((0.1, 0.5)):
        single = alone(i, torch.optim.LBFGS, dropout=0.0)
        single.options, single.schedule = {"lr": rate, **options}, None
        fit(single, max_epochs=1)
        weight = single.model[0].weight
        assert (module.bundle[i][0].weight - weight).abs().max() < 1e-8 * weight.abs().max()
    # a batch counts once for the epoch, however often the search computes it
    assert module._means.state_dict("train")["counts"]["train_loss"] == 52
    with pytest.raises(BundleConfigurationError, match="cannot accumulate"):
        fit(module, accumulate_grad_batches=2)


def test_hooks_see_the_bundles_optimizer():
    """Lightning's wrapper shows groups, states and what else the optimizer has."""

    class WarmUp(type(bundle())):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
            for k, group in enumerate(optimizer.param_groups):
                group["lr"] = 0.01 * (k + 1)
            optimizer.step(closure=optimizer_closure)
            self.norms = optimizer.last_grad_norms
            assert isinstance(optimizer, torch.optim.AdamW)
            assert len(optimizer.state_dict()["param_groups"]) == 3

    module = bundle(torch.optim.AdamW, count=3, **PLAIN)
    module.__class__ = WarmUp
    own = fit(module, gradient_clip_val=0.2)
    assert [group["lr"] for group in own.optimizers[0].param_groups] == [0.01, 0.02, 0.03]
    assert module.norms.shape == (3,)
    assert module.optimizers().param_groups is own.optimizers[0].param_groups
    assert own.optimizers[0].clip_grad_norm is None  # the limits are those of one step


def test_limits_of_every_model():
    limits = [0.1 * (i + 1) for i in range(M)]
    module, losses = bundle(gradient_clip_val=limits), Losses()
    fit(module, losses)
    for i in (0, 5):
        single = alone(i)
        fit(single, gradient_clip_val=limits[i])
        column = torch.stack(losses.rows)[:, i]
        assert (column - torch.stack(single.losses)).abs().max() < 1e-9
    with pytest.raises(BundleConfigurationError, match="use one of them"):
        fit(module, gradient_clip_val=0.5)

    class Twice(type(module)):
        def configure_optimizers(self):
            return OptimizerFactory(
                torch.optim.SGD, {"lr": 0.1}, clip_grad_norm=1.0
            ).create_optimizer(self.bundle)

    with pytest.raises(BundleConfigurationError, match="clipped by the optimizer already"):
        fit(Twice(net, 2), gradient_clip_val=0.5)
    fit(Twice(net, 2))


def test_a_clip_in_a_hook_of_ones_own():
    class Own(type(bundle())):
        def configure_gradient_clipping(
            self, optimizer, gradient_clip_val, gradient_clip_algorithm
        ):
            if self.current_epoch == 0:
                self.clip_gradients(
                    optimizer, gradient_clip_val=[0.1, 0.2], gradient_clip_algorithm="norm"
                )

    norms: list = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            norms.append(module.bundle.optimizer.last_grad_norms)

    fit(Own(build, lr_list=[0.1, 0.2], optimizer_cls="SGD"), Watch())
    assert [own is not None for own in norms] == [True] * 7 + [False] * 7


# ---- data


class Digits(LightningDataModule):
    def train_dataloader(self):
        return loader(data())

    def val_dataloader(self):
        return loader(data(30, 1), 8, seed=None)


def test_a_data_module_needs_no_change():
    rows = []
    for own_data in (False, True):
        module, losses = bundle(), Losses()
        own = trainer(losses, max_epochs=1)
        if own_data:
            own.fit(module, datamodule=Digits())
        else:
            own.fit(module, loader(data()), loader(data(30, 1), 8, seed=None))
        rows.append(torch.stack(losses.rows))
    assert torch.equal(*rows)


def test_a_router_gives_every_model_its_own_samples():
    """Folds: with a mask each model trains as it would on its own part of every batch."""
    count, router = 2, StratifiedDataRouter(2, "round_robin")
    plain = {"dropout": 0.0, **PLAIN}
    module, losses = bundle(count=count, router=router, **plain), Losses()
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2, "gradient_clip_val": 0.3}
    trainer(losses, **settings).fit(module, loader(data(), seed=None))
    for i in range(count):
        single = alone(i, dropout=0.0)
        single.schedule = None
        parts = [(x[i::count], y[i::count]) for x, y in loader(data(), seed=None)]
        trainer(**settings).fit(single, torch.utils.data.DataLoader(parts, batch_size=None))
        column = torch.stack(losses.rows)[:, i]
        assert (column - torch.stack(single.losses)).abs().max() < 1e-9


@pytest.mark.parametrize("scaled", [False, True])
def test_a_model_without_samples_rests(scaled):
    """In a step of which no batch has a sample for it; with momentum it would move else."""

    class Ends(DataRouter):
        def __init__(self):
            super().__init__("mask")
            self.count = 0

        def route_batch(self, inputs, targets, masks=None, indices=None):
            masks = torch.ones(2, len(targets))
            masks[1] = float(self.count < 2)
            if self.count == 6:
                masks[:] = 0
            self.count += 1
            return super().route_batch(inputs, targets, masks=masks)

    weights = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            weights.append(module.bundle.get_parameter("0.weight").detach().clone())

    from lightning.pytorch.plugins.precision import MixedPrecision

    options = {}
    if scaled:
        scaler = torch.amp.GradScaler("cpu")
        options["plugins"] = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    module = bundle(count=2, router=Ends(), dtype=torch.float32, **PLAIN)
    floats = data(dtype=torch.float32)
    trainer(Watch(), max_epochs=1, **options).fit(module, loader(floats))
    moved = [(b[i] != a[i]).any().item() for i in (0, 1) for a, b in itertools.pairwise(weights)]
    assert moved[:6] == [True] * 5 + [False]
    assert moved[6:] == [True] + [False] * 5
    assert module.bundle.active.all()


def test_batches_of_ones_own():
    class Named(BundleModule):
        def unpack_batch(self, batch):
            return per_model(batch["x"].expand(2, -1, -1)), batch["y"]

    items = [{"x": x, "y": y} for x, y in zip(*data(16).tensors)]
    module = Named(build, lr_list=[0.1, 0.1], optimizer_cls="SGD", seeds=[1, 2])
    own = trainer(max_epochs=1)
    own.fit(module, torch.utils.data.DataLoader(items, 8))
    plain = BundleModule(build, lr_list=[0.1, 0.1], optimizer_cls="SGD", seeds=[1, 2])
    other = trainer(max_epochs=1)
    other.fit(plain, torch.utils.data.DataLoader(data(16), 8))
    assert torch.equal(own.callback_metrics["train_loss"], other.callback_metrics["train_loss"])


def test_an_attribute_that_differs_is_honoured():
    module = BundleModule(
        lambda i: net(dropout=0.1 * i), lr_list=[0.1] * 3, optimizer_cls="SGD", seeds=[1, 2, 3]
    )
    fit(module)
    assert [model[3].p for model in module.bundle.models] == [0.0, 0.1, 0.2]


def test_dropout_masks_are_the_models_own():
    """Different seeds, different masks; the same seed, the same."""

    def masks(seeds):
        module = BundleModule(models=[nn.Dropout(0.5) for _ in range(3)], seeds=seeds)
        return module(torch.ones(400))

    own = masks([1, 2, 1])
    assert torch.equal(own[0], own[2]) and not torch.equal(own[0], own[1])


def test_weight_averaging_is_the_models_own():
    module = bundle(count=2, **PLAIN)
    own = fit(module, StochasticWeightAveraging(0.01, swa_epoch_start=1), max_epochs=3)
    assert own.current_epoch == 3
    assert module.bundle[1][0].weight.isfinite().all()


# ---- refusals


@pytest.mark.parametrize("strategy", ["ddp", DDPStrategy(), "fsdp", "deepspeed"])
def test_strategies_for_one_large_model_are_refused(strategy):
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

    own = trainer()
    if strategy == "fsdp":
        own.strategy.__class__ = type("FSDPStrategy", (FSDPStrategy,), {})
        pytest.importorskip("torch.distributed.fsdp")
    elif strategy == "deepspeed":
        own.strategy.__class__ = type("DeepSpeedStrategy", (DeepSpeedStrategy,), {})
    else:
        own = trainer(strategy=strategy, devices=1)
    module = bundle(count=2)
    module._trainer = own
    with pytest.raises(BundleConfigurationError, match=r"devices=1.*integrations\.ray"):
        module.configure_callbacks()


def test_ddp_is_refused_before_processes_meet():
    with pytest.raises(BundleConfigurationError, match="DDPStrategy cannot train a bundle"):
        trainer(strategy="ddp", devices=1).fit(bundle(count=2), loader(data()))
    assert not torch.distributed.is_initialized()


def test_the_learning_rate_finder_is_refused():
    own = trainer()
    with pytest.raises(BundleConfigurationError, match="create_lr_sweep_configs"):
        Tuner(own).lr_find(bundle(count=2), loader(data()))
    with pytest.raises(BundleConfigurationError, match="one learning rate of one model"):
        fit(bundle(count=2), LearningRateFinder())


def test_the_batch_size_finder_finds_what_fits_the_bundle(tmp_path):
    class Sized(LightningDataModule):
        batch_size = 2

        def train_dataloader(self):
            return loader(data(), self.batch_size)

        def val_dataloader(self):
            return loader(data(30, 1), 8, seed=None)

    module, own, sizes = bundle(count=2), trainer(default_root_dir=tmp_path), Sized()
    before = module.state_dict()["bundle.0.weight"].clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Tuner(own).scale_batch_size(module, datamodule=sizes, max_trials=3)
    assert found == sizes.batch_size == 8
    assert torch.equal(module.state_dict()["bundle.0.weight"], before)


def test_other_things_of_one_model_are_refused():
    with pytest.raises(BundleConfigurationError, match="ModelPruning"):
        fit(bundle(count=2), ModelPruning("l1_unstructured"))
    with pytest.raises(BundleConfigurationError, match=r"enable_compile\(\)"):
        fit(torch.compile(bundle(count=2)))
    with pytest.raises(BundleConfigurationError, match="no optimizer"):
        fit(BundleModule(net, 2))

    class Stock(type(bundle())):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(BundleConfigurationError, match="a SGD of torch.*OptimizerFactory"):
        fit(Stock(net, 2))


def test_loss_and_outputs_of_the_wrong_kind():
    module = bundle(count=2, loss_fn=lambda o, y: F.cross_entropy(o, y, reduction="none"))
    with pytest.raises(ModelBatchError, match="one number for each model"):
        fit(module)
    assert CLASSES == 3


def test_missing_and_compromised_releases(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ImportError, match=r'pip install "modelbatch\[lightning\]"'):
        _available.check()
    monkeypatch.setattr(metadata, "version", lambda name: "2.6.2")
    with pytest.raises(ImportError, match=r"compromised releases 2\.6\.2 and 2\.6\.3"):
        _available.check()
