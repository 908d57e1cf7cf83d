"""Small MLPs through Lightning: one BundleModule against a Trainer for each model, in turns."""

import logging
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bundle import mlp
from harness import compare
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from modelbatch.integrations.lightning import BundleModule

BATCH, BATCHES = 32, 200


class Single(LightningModule):
    """What one has without this package; it logs its loss, as the bundle does."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), lr=self.lr)


def trainer(clip: float | None) -> Trainer:
    """Only what trains."""
    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def measure(
    num_models: int,
    widths: tuple[int, ...],
    rounds: int = 5,
    batch: int = BATCH,
    batches: int = BATCHES,
    clip: float | None = 1.0,
) -> dict:
    """Milliseconds per training step of all models, and ratios, by way to train them.

    Args:
        num_models: how many.
        widths: of each MLP.
        rounds: turns of each way, one after the other.
        batch: samples in a batch.
        batches: of an epoch; a turn is one `fit` of one epoch.
        clip: `gradient_clip_val`.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    data = TensorDataset(
        torch.randn(batch * batches, widths[0]), torch.randint(widths[-1], (batch * batches,))
    )
    loader = DataLoader(data, batch)
    rates = [1e-3 * (i + 1) / num_models for i in range(num_models)]
    bundle = BundleModule(lambda i: mlp(*widths), lr_list=rates, optimizer_cls="Adam")
    singles = [Single(mlp(*widths), rate) for rate in rates]

    def together() -> None:
        trainer(clip).fit(bundle, loader)

    def separately() -> None:
        for single in singles:
            trainer(clip).fit(single, loader)

    threads = torch.get_num_threads()

    def separately_on_one_thread() -> None:
        torch.set_num_threads(1)
        separately()
        torch.set_num_threads(threads)

    ways: dict[str, Callable[[], object]] = {
        "BundleModule": together,
        "a Trainer each": separately,
        "a Trainer each, one thread": separately_on_one_thread,
    }
    result = compare(ways, rounds)
    for row in result.values():
        for key in ("ms", "ms_min"):
            row[key] = round(row[key] / batches, 5)
    return result
