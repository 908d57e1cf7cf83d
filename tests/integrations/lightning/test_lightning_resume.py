"""Checkpoints: a resumed training equals one that was never stopped; what else they are for."""

import copy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from integrations.lightning.lightning_case import (
    CLASSES,
    Losses,
    M,
    bundle,
    data,
    loader,
    net,
    trainer,
)
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from modelbatch import (
    BestModel,
    CheckpointError,
    DataRouter,
    EarlyStopping,
    ModelBatchError,
    PerModelLoader,
    StratifiedDataRouter,
)
from modelbatch.integrations.lightning import BundleModule, PackCallback

SETTINGS = {"max_epochs": 4, "accumulate_grad_batches": 2}
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


def make(**options) -> BundleModule:
    return bundle(torch.optim.AdamW, count=4, rng="philox", **options)


def plain_loader(dataset, shuffle=True) -> DataLoader:
    """Its order comes from torch's own generator, as users have it."""
    return DataLoader(dataset, 8, shuffle=shuffle)


def saving(directory) -> list[Callback]:
    keep = ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1, save_last=True)
    return [PackCallback([EarlyStopping("val_loss", patience=2), BestModel("val_loss")]), keep]


def fit(module, *callbacks, ckpt_path=None, loaders=None, **settings):
    train, val = loaders or (plain_loader(data()), plain_loader(data(30, 1), shuffle=False))
    settings["enable_checkpointing"] = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    own = trainer(*callbacks, **{**SETTINGS, **settings})
    own.fit(module, train, val, ckpt_path=ckpt_path)
    return own


def everything(module, own) -> dict:
    """All that a training goes on from, to be compared bit for bit."""
    packs = [c for c in own.callbacks if isinstance(c, PackCallback)]
    return {
        "weights": module.state_dict(),
        "optimizer": module.bundle.optimizer.state_dict(),
        "schedules": [c.scheduler.state_dict() for c in own.lr_scheduler_configs],
        "streams": [module.bundle._streams.step, module.bundle.seeds],
        "active": module.bundle.active,
        "pack": [pack.state_dict() for pack in packs],
        "metrics": {k: v for k, v in module.per_model_metrics.items() if k != "train_loss"},
        "steps": own.global_step,
        "random": torch.get_rng_state(),
    }


def assert_same(own, other, path="") -> None:
    assert type(own) is type(other), path
    if isinstance(own, dict):
        assert own.keys() == other.keys(), path
        for key in own:
            assert_same(own[key], other[key], f"{path}/{key}")
    elif isinstance(own, list | tuple):
        assert len(own) == len(other), path
        for k, pair in enumerate(zip(own, other)):
            assert_same(*pair, f"{path}/{k}")
    elif isinstance(own, torch.Tensor):
        assert torch.equal(own.nan_to_num(9e9), other.nan_to_num(9e9)), path
    else:
        assert own == other, path


def uninterrupted(directory):
    torch.manual_seed(11)
    module = make()
    own = fit(module, *saving(directory))
    return everything(module, own)


@pytest.mark.parametrize("epoch", [0, 2])
def test_resumed_equals_uninterrupted(tmp_path, epoch):
    """Shuffling by torch's generator, dropout, schedules, a frozen model, the callbacks."""
    expected = uninterrupted(tmp_path)
    assert not expected["active"].all()  # some stopped early
    torch.manual_seed(99)
    module = make()
    own = fit(module, *saving(tmp_path), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert_same(everything(module, own), expected)


def test_killed_and_resumed(tmp_path):
    expected = uninterrupted(tmp_path / "whole")
    program = Path(__file__).with_name("resumed_program.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "killed")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).resolve().parents[3],
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    torch.manual_seed(99)
    module = make()
    own = fit(module, *saving(tmp_path / "killed"), ckpt_path="last")
    assert_same(everything(module, own), expected)


def test_resume_in_the_middle_of_an_epoch(tmp_path):
    """With a loader that knows where it is, here one with an order for each model."""

    def loaders():
        return PerModelLoader(data().tensors, 8, seeds=[1, 2, 3, 4]), plain_loader(
            data(30, 1), shuffle=False
        )

    def steps():
        return ModelCheckpoint(
            tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=False
        )

    torch.manual_seed(5)
    module, losses = make(), Losses()
    own = fit(module, losses, steps(), loaders=loaders(), max_epochs=2)
    expected = everything(module, own)
    torch.manual_seed(6)
    resumed, more = make(), Losses()
    path = tmp_path / "step=2.ckpt"
    other = fit(resumed, more, steps(), ckpt_path=path, loaders=loaders(), max_epochs=2)
    assert len(more.rows) == len(losses.rows) - 4
    assert_same(more.rows, losses.rows[4:])
    assert_same(everything(resumed, other), expected)


def test_a_router_goes_on_where_it_was(tmp_path):
    def run(path=None, epochs=3):
        torch.manual_seed(3)
        module = make(router=StratifiedDataRouter(4, "bootstrap"))
        losses = Losses()
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        fit(module, losses, keep, ckpt_path=path, max_epochs=epochs)
        return losses.rows

    whole = run()
    rest = run(tmp_path / "epoch=0.ckpt")
    assert_same(rest, whole[7:])


def test_load_from_checkpoint_with_build(tmp_path):
    module = make()
    fit(module, *saving(tmp_path), max_epochs=1)
    path = tmp_path / "last.ckpt"
    loaded = BundleModule.load_from_checkpoint(path, build=lambda i: net())
    assert_same(loaded.state_dict(), module.state_dict())
    assert loaded.bundle.model_ids == [0, 1, 2, 3] and loaded.bundle.seeds == module.bundle.seeds
    assert isinstance(loaded.bundle.optimizer, torch.optim.AdamW) or loaded._optimizer_cls
    assert [c["lr"] for c in loaded._configs] == [c["lr"] for c in module._configs]
    # plain values and tensors only
    content = torch.load(path, weights_only=True)["modelbatch"]
    assert content["num_models"] == 4
    assert [own["weight_decay"] for own in content["hparams_of_models"]] == [0.0, 0.01, 0.1, 0.2]


class Wide(BundleModule):
    def __init__(self, widths_seed: int, count: int) -> None:
        self.widths_seed = widths_seed
        super().__init__(num_models=count, model_hparams=[{"note": f"n{i}"} for i in range(count)])
        self.save_hyperparameters()

    def build(self, i):
        return nn.Linear(5, CLASSES).double()

    def configure_optimizers(self):
        from modelbatch import OptimizerFactory

        return OptimizerFactory(torch.optim.SGD, {"lr": 0.1}).create_optimizer(self.bundle)


def test_load_from_checkpoint_of_a_subclass(tmp_path):
    module = Wide(3, count=2)
    own = fit(module, max_epochs=1)
    own.save_checkpoint(tmp_path / "own.ckpt")
    loaded = Wide.load_from_checkpoint(tmp_path / "own.ckpt")
    assert loaded.hparams == {"widths_seed": 3, "count": 2}
    assert_same(loaded.state_dict(), module.state_dict())
    assert loaded.hparams_of_models[1]["note"] == "n1"


def test_best_model_selection_by_validate_and_test(tmp_path):
    module = make()
    keep = ModelCheckpoint(tmp_path, monitor="val_loss/best", filename="best")
    own = fit(module, keep)
    (result,) = own.validate(
        module, plain_loader(data(30, 1), shuffle=False), ckpt_path="best", verbose=False
    )
    assert result["val_loss/best"] == pytest.approx(keep.best_model_score.item())


def test_the_best_of_every_model_is_kept(tmp_path):
    """ModelCheckpoint's best is one epoch for the whole bundle; BestModel's is each model's own."""
    best = BestModel("val_loss")
    module = make()
    seen = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            values = pl_module.per_model_metrics["val_loss"].clone()
            seen.append((values, copy.deepcopy(pl_module.state_dict())))

    fit(module, PackCallback(best), Watch(), max_epochs=4)
    values = torch.stack([own for own, _ in seen])
    assert torch.equal(best.best_values, values.min(0).values)
    assert torch.equal(best.best_epochs, values.argmin(0))
    best.restore()
    for i, epoch in enumerate(values.argmin(0).tolist()):
        for name, own in module.state_dict().items():
            assert torch.equal(own[i], seen[epoch][1][name][i])


def test_exported_models_are_plain_and_independent(tmp_path):
    module = make()
    fit(module, max_epochs=1)
    own = module.export_model(2)
    assert type(own) is nn.Sequential
    torch.save(own.state_dict(), tmp_path / "model.pt")
    fresh = net()
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    x = data().tensors[0]
    module.bundle.eval()
    assert torch.allclose(fresh.eval()(x), module(x)[2])
    before = own[0].weight.clone()
    module.train()
    fit(module, max_epochs=1)
    assert torch.equal(own[0].weight, before)


def test_checkpoints_of_something_else_are_refused(tmp_path):
    module = make()
    own = fit(module, max_epochs=1)
    path = tmp_path / "own.ckpt"
    own.save_checkpoint(path)
    with pytest.raises(CheckpointError, match="4 models, BundleModule has 3.*num_models=4"):
        fit(bundle(count=3, rng="philox"), ckpt_path=path)
    with pytest.raises(CheckpointError, match="rng='philox', the bundle's are rng='torch'"):
        fit(bundle(count=4), ckpt_path=path)
    content = torch.load(path)
    content["modelbatch"]["format_version"] = 7
    torch.save(content, tmp_path / "new.ckpt")
    with pytest.raises(CheckpointError, match="format version 7"):
        fit(make(), ckpt_path=tmp_path / "new.ckpt")
    del content["modelbatch"]
    torch.save(content, tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="not one of a BundleModule"):
        fit(make(), ckpt_path=tmp_path / "plain.ckpt")


def test_models_that_left_have_left_after_a_resume_too(tmp_path):
    class Prune(Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 0:
                module.bundle.prune(1)

    def keep():
        return ModelCheckpoint(
            tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True
        )

    torch.manual_seed(1)
    module = make(gradient_clip_val=[0.1, 0.2, 0.3, 0.4], metric_fns=None)
    own = fit(module, Prune(), keep())
    assert module.bundle.model_ids == [0, 2, 3] and module.gradient_clip_val == [0.1, 0.3, 0.4]
    assert module.per_model_metrics["val_loss"].shape == (3,)
    torch.manual_seed(2)
    other = make(gradient_clip_val=[0.1, 0.2, 0.3, 0.4])
    resumed = fit(other, Prune(), keep(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert other.bundle.model_ids == [0, 2, 3] and other.num_models == 3
    assert_same(everything(other, resumed), everything(module, own))


def test_bad_arguments_are_refused():
    for arguments, message in (
        ({}, "say how many models"),
        ({"num_models": 2, "lr_list": [0.1]}, "num_models 2, lr_list 1"),
        ({"num_models": 2}, "has no models: give build="),
        ({"build": net, "models": [net()]}, "not both"),
        ({"build": net, "lr_list": [0.1]}, "need optimizer_cls"),
        ({"build": net, "lr_list": [0.1], "optimizer_cls": "Bad"}, "no optimizer 'Bad'"),
        ({"build": net, "num_models": 1, "loss_fn": 3}, "loss_fn must be callable"),
        ({"build": net, "num_models": 1, "log_models": "x"}, "log_models"),
        ({"build": net, "num_models": 1, "lr_scheduler_interval": "x"}, "interval"),
        ({"build": net, "num_models": 1, "metric_fns": {"loss": net}}, "must not be called"),
        ({"build": net, "num_models": 1, "router": 3}, "must be a DataRouter"),
        ({"build": net, "lr_list": [-1.0], "optimizer_cls": "SGD"}, "model 0"),
    ):
        with pytest.raises(ModelBatchError, match=message):
            BundleModule(**arguments)
    assert BundleModule(net, num_models=M, router=DataRouter()).num_models == M
    assert len(loader(data())) == 7
