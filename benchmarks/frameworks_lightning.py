"""Sixteen small MLPs through Lightning: one BundleModule against a Trainer for each model.

python benchmarks/frameworks_lightning.py --rounds 5
"""

import argparse
import logging
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bundle import mlp
from harness import compare, save, show
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from modelbatch.integrations.lightning import BundleModule

MODELS, WIDTHS, BATCH, BATCHES = 16, (20, 16, 16, 4), 32, 200


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
    num_models: int = MODELS,
    widths: tuple[int, ...] = WIDTHS,
    batch: int = BATCH,
    batches: int = BATCHES,
    rounds: int = 5,
    clip: float | None = 1.0,
) -> dict:
    """Milliseconds per training step of all models, and ratios, by way to train them.

    Args:
        num_models: how many.
        widths: of each MLP.
        batch: samples in a batch.
        batches: of an epoch; a turn is one `fit` of one epoch.
        rounds: turns of each way, one after the other.
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

    ways: dict[str, Callable[[], object]] = {
        "BundleModule, one Trainer": together,
        f"{num_models} Trainers": separately,
    }
    result = compare(ways, rounds)
    for row in result.values():
        for key in ("ms", "ms_min"):
            row[key] = round(row[key] / batches, 5)
    return result


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    results = []
    for count, widths in ((MODELS, WIDTHS), (1, WIDTHS), (MODELS, (784, 128, 10))):
        result = measure(count, widths, rounds=args.rounds)
        title = f"Lightning, MLP {'-'.join(map(str, widths))}, B={BATCH}, Adam, clip, M={count}"
        show(f"{title}, per step (ratios to BundleModule)", result)
        results.append({"workload": title, "models": count, "batch": BATCH, "variants": result})
    print(save("frameworks_lightning", results))


if __name__ == "__main__":
    main()
