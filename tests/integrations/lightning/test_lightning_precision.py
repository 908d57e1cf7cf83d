"""Mixed precision: a loss scale for every model, and clipping with it."""

import pytest
import torch
from integrations.lightning.lightning_case import (
    Losses,
    M,
    alone,
    bundle,
    data,
    loader,
    trainer,
)
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision

from modelbatch import BundleGradScaler

FLOATS = data(dtype=torch.float32)


def floats(**options):
    return bundle(torch.optim.AdamW, dtype=torch.float32, **options)


class Overflow(Callback):
    """Makes the gradients of some models infinite in one step."""

    def __init__(self, models, step):
        self.models, self.step = models, step
        self.scales, self.weights = [], []

    def on_after_backward(self, trainer, module):
        if trainer.global_step == self.step:
            for i in self.models:
                module.bundle.get_parameter("0.weight").grad[i, 0, 0] = float("inf")

    def on_train_batch_end(self, trainer, module, *_):
        self.scales.append(trainer.precision_plugin.scaler.get_scale())
        self.weights.append(module.bundle.get_parameter("0.weight").detach().clone())


def half(scaler=None):
    """float16 on the CPU, which `precision="16-mixed"` refuses there."""
    return MixedPrecision("16-mixed", "cpu", scaler=scaler or torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("own_scaler", [False, True])
def test_an_overflow_skips_one_model_and_lowers_its_scale_alone(own_scaler):
    results = []
    for models in ((), (2, 5)):
        watch = Overflow(models, step=3)
        plugin = half(BundleGradScaler() if own_scaler else None)
        stock = plugin.scaler
        own = trainer(watch, plugins=plugin, gradient_clip_val=0.5, max_epochs=1)
        own.fit(floats(), loader(FLOATS))
        results.append(watch)
        assert plugin.scaler is stock  # for whatever the Trainer trains next
    usual, watch = results
    assert watch.scales[2] == [65536.0] * M
    assert watch.scales[3] == [32768.0 if i in (2, 5) else 65536.0 for i in range(M)]
    before, after = watch.weights[2], watch.weights[3]
    for i in range(M):
        assert torch.equal(before[i], after[i]) == (i in (2, 5))
        if i not in (2, 5):
            assert torch.equal(watch.weights[-1][i], usual.weights[-1][i])


def test_together_equals_alone_in_float16():
    """Against a stock GradScaler for each: clipped after unscaling, the same scales."""
    settings = {"gradient_clip_val": 0.2, "max_epochs": 1, "accumulate_grad_batches": 2}
    module, losses, plugin = floats(), Losses(), half()

    class Scales(Callback):
        def on_train_end(self, trainer, pl_module):
            self.last = plugin.scaler.get_scale()

    scales = Scales()
    trainer(losses, scales, plugins=plugin, **settings).fit(module, loader(FLOATS))
    for i in (0, M - 1):
        own, other = alone(i, torch.optim.AdamW, torch.float32), half()
        trainer(plugins=other, **settings).fit(own, loader(FLOATS))
        column = torch.stack(losses.rows)[:, i].float()
        # 2 ** -11 is the unit roundoff of float16; losses are of size 1
        assert (column - torch.stack(own.losses).float()).abs().max() < 8 * 2**-11
        assert scales.last[i] == other.scaler.get_scale()


def test_bfloat16_needs_no_scaler():
    module, losses = floats(), Losses()
    own = trainer(losses, precision="bf16-mixed", gradient_clip_val=0.2, max_epochs=2)
    own.fit(module, loader(FLOATS))
    assert own.precision_plugin.scaler is None
    assert module.bundle.get_parameter("0.weight").dtype == torch.float32
    single = alone(1, torch.optim.AdamW, torch.float32)
    other = trainer(precision="bf16-mixed", gradient_clip_val=0.2, max_epochs=2)
    other.fit(single, loader(FLOATS))
    column = torch.stack(losses.rows)[:, 1].float()
    # the unit roundoff of bfloat16, over 14 steps
    assert (column - torch.stack(single.losses).float()).abs().max() < 14 * 2**-8


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_true_precisions(precision):
    module = floats()
    own = trainer(precision=precision, max_epochs=1)
    own.fit(module, loader(FLOATS))
    expected = torch.float64 if precision == "64-true" else torch.bfloat16
    assert module.bundle.get_parameter("0.weight").dtype == expected
    assert module.bundle[3][0].weight.dtype == expected
    assert module.per_model_metrics["train_loss"].isfinite().all()


def test_scales_are_part_of_the_checkpoint(tmp_path):
    def run(epochs, path=None):
        watch = Overflow((1,), step=2)
        own = trainer(watch, plugins=half(), max_epochs=epochs)
        module = floats(rng="philox")
        own.fit(module, loader(FLOATS), ckpt_path=path)
        return module, own, watch

    _, own, watch = run(1)
    own.save_checkpoint(tmp_path / "own.ckpt")
    content = torch.load(tmp_path / "own.ckpt")
    assert "MixedPrecision" in content
    _, _, resumed = run(2, tmp_path / "own.ckpt")
    assert watch.scales[-1][1] == 32768.0
    assert len(resumed.scales) == 7


def test_a_step_unscales_by_hand_in_manual_optimization():
    class Manual(type(floats())):
        def training_step(self, batch, batch_idx):
            x, y = batch
            optimizer = self.optimizers()
            loss = self.bundle.compute_loss(self(x), y)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, 0.2, "norm")
            optimizer.step()
            return {"losses": self.bundle.latest_losses}

    results = []
    for manual in (False, True):
        module, losses = floats(lr_scheduler=None, lr_scheduler_kwargs=None), Losses()
        if manual:
            module.__class__ = Manual
            module.automatic_optimization = False
        clip = {} if manual else {"gradient_clip_val": 0.2}
        own = trainer(losses, plugins=half(), max_epochs=1, **clip)
        own.fit(module, loader(FLOATS))
        results.append(torch.stack(losses.rows))
    # clipping in place rounds to float32 what the step keeps in double
    assert torch.allclose(*results, rtol=1e-3)
