"""Models, data and trainers of the tests with Lightning; one LightningModule per model as truth."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from modelbatch.integrations.lightning import BundleModule

M = 8
CLASSES = 3
RATES = [0.02 * 1.6**i for i in range(M)]
DECAYS = [0.0, 0.01, 0.1, 0.2, 0.0, 0.05, 0.3, 0.02]


def data(count: int = 52, seed: int = 0, dtype: torch.dtype = torch.float64) -> TensorDataset:
    """Classes that a line does not separate."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 1).long()
    return TensorDataset(x.to(dtype), y)


def loader(dataset: TensorDataset, batch_size: int = 8, seed: int | None = 7) -> DataLoader:
    """Shuffled in an order of its own, or not at all; torch's generator is left alone."""
    generator = torch.Generator().manual_seed(seed or 0)
    return DataLoader(dataset, batch_size, shuffle=seed is not None, generator=generator)


def net(dtype: torch.dtype = torch.float64, dropout: float = 0.2) -> nn.Module:
    model = nn.Sequential(
        nn.Linear(5, 9, bias=False),
        nn.BatchNorm1d(9),
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(9, CLASSES),
    )
    return model.to(dtype)


def build(
    i: int, seeds: list[int] | None = None, dtype: torch.dtype = torch.float64, dropout: float = 0.2
) -> nn.Module:
    """Model i as it is after `torch.manual_seed` of its seed, whatever its precision."""
    torch.manual_seed(100 + i if seeds is None else seeds[i])
    return net(torch.float64, dropout).to(dtype)


def warm_up_and_decay(step: int) -> float:
    """A factor for the learning rate: up in 3 steps, linearly down to 0 until step 20."""
    return min((step + 1) / 3, max(0.0, (20 - step) / 20))


class Alone(LightningModule):
    """What a user has without this package."""

    def __init__(self, model: nn.Module, optimizer_cls: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.optimizer_cls, self.options = model, optimizer_cls, options
        self.losses: list[Tensor] = []
        self.schedule: Callable[[int], float] | None = warm_up_and_decay

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        outputs = self.model(x)
        self.log("val_loss", F.cross_entropy(outputs, y), batch_size=len(y))
        self.log("val_acc", (outputs.argmax(1) == y).double().mean(), batch_size=len(y))

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_cls(self.model.parameters(), **self.options)
        if self.schedule is None:
            return optimizer
        scheduler = LambdaLR(optimizer, self.schedule)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


class Losses(Callback):
    """The losses `[M]` of every batch."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.rows.append(outputs["losses"].clone())


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """One that leaves nothing behind."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "max_epochs": 3,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), **{**settings, **options})


def options_of(optimizer_cls: type[torch.optim.Optimizer], i: int) -> dict[str, Any]:
    rate = RATES[i] if optimizer_cls is torch.optim.SGD else RATES[i] / 20
    more = {"momentum": 0.9} if optimizer_cls is torch.optim.SGD else {}
    return {"lr": rate, "weight_decay": DECAYS[i], **more}


def bundle(
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.SGD,
    count: int = M,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> BundleModule:
    """The models of `build`, each drawing what it would draw alone."""
    seeds = [100 + i for i in range(count)]
    configs = [options_of(optimizer_cls, i) for i in range(count)]
    settings: dict[str, Any] = {
        "lr_list": [config.pop("lr") for config in configs],
        "optimizer_cls": optimizer_cls,
        "optimizer_kwargs": configs,
        "lr_scheduler": LambdaLR,
        "lr_scheduler_kwargs": {"lr_lambda": warm_up_and_decay},
        "lr_scheduler_interval": "step",
        "seeds": seeds,
        "rng": "torch",
    }
    dropout = options.pop("dropout", 0.2)
    return BundleModule(lambda i: build(i, dtype=dtype, dropout=dropout), **{**settings, **options})


def alone(
    i: int,
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.SGD,
    dtype: torch.dtype = torch.float64,
    start: nn.Module | None = None,
    dropout: float = 0.2,
) -> Alone:
    """Model i by itself; torch's generator stands where its stream in the bundle does."""
    model = build(i, dtype=dtype, dropout=dropout)
    if start is not None:
        model.load_state_dict(start.state_dict())
    return Alone(model, optimizer_cls, options_of(optimizer_cls, i))
