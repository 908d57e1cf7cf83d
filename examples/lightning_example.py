"""Sixteen classifiers of handwritten digits in one LightningModule: which learning rate is best?

The steps are vectorised: `self(x)` is the output of all models, and every number a vector with one
entry for each of them. Lightning's own callbacks watch the best model; a model that no longer
improves is frozen, and the training ends with the last of them.

    python examples/lightning_example.py --models 16 --epochs 10
"""

import argparse
import logging
import sys
import tempfile
import warnings
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from modelbatch import EarlyStopping, create_lr_sweep_configs
from modelbatch.integrations.lightning import BundleModule, PackCallback


class LightningModuleExample(BundleModule):
    """M classifiers that differ in their learning rate."""

    def __init__(self, learning_rates: list[float], hidden: int = 32) -> None:
        self.hidden = hidden  # read by build, so it comes first
        super().__init__(lr_list=learning_rates, optimizer_cls=torch.optim.AdamW)
        self.save_hyperparameters()

    def build(self, i: int) -> nn.Module:
        return nn.Sequential(nn.Linear(64, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        # its gradient for each model is that of the model's own loss
        loss = self.bundle.compute_loss(self(x), y, self.loss_fn)
        self.log_per_model("train_loss", self.bundle.latest_losses, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)  # [M, B, 10]
        losses = self.bundle.compute_loss(logits, y, self.loss_fn, reduction="none")
        self.log_per_model("val_loss", losses)
        self.log_per_model("val_acc", (logits.argmax(-1) == y).float().mean(-1), prog_bar=True)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find a learning rate for digits with Lightning.")
    parser.add_argument("--models", type=positive, default=16, help="classifiers (default 16)")
    parser.add_argument("--epochs", type=positive, default=10, help="epochs (default 10)")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda (default cpu)")
    parser.add_argument("--seed", type=int, default=0, help="data and weights (default 0)")
    return parser.parse_args()


def load_data(seed: int) -> tuple[TensorDataset, TensorDataset]:
    images, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(images, dtype=torch.float32)[order] / 16
    y = torch.tensor(digits, dtype=torch.int64)[order]
    return TensorDataset(x[:1437], y[:1437]), TensorDataset(x[1437:], y[1437:])


def main() -> int:
    arguments = parse_arguments()
    try:
        device = torch.device(arguments.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # the data are small enough for the main process
    warnings.filterwarnings("ignore", ".*does not have many workers")
    seed_everything(arguments.seed, verbose=False)
    train, test = load_data(arguments.seed)
    rates = [c["lr"] for c in create_lr_sweep_configs(1e-4, 1.0, arguments.models)]
    module = LightningModuleExample(rates)

    with tempfile.TemporaryDirectory() as directory:
        keep = ModelCheckpoint(directory, monitor="val_acc/max", mode="max")
        trainer = Trainer(
            accelerator="cpu" if device.type == "cpu" else "gpu",
            devices=1 if device.index is None else [device.index],
            max_epochs=arguments.epochs,
            gradient_clip_val=1.0,  # of every model's own gradient
            callbacks=[PackCallback(EarlyStopping("val_loss", patience=3)), keep],
            logger=False,
            enable_progress_bar=sys.stderr.isatty(),
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(train, 64, shuffle=True), DataLoader(test, 128))
        # the epoch in which the best model was best; every model as it was then
        best = LightningModuleExample.load_from_checkpoint(keep.best_model_path)
        trainer.validate(best, DataLoader(test, 128), verbose=False)

    winner = best.best_model("val_acc")
    numbers = zip(*(best.per_model_metrics[name].tolist() for name in ("val_loss", "val_acc")))
    for i, (loss, accuracy) in enumerate(numbers):
        state = " " if module.bundle.active[i] else "*"
        mark = " best" if i == winner else ""
        print(f"model {i:>3}{state} lr {rates[i]:.2e}  loss {loss:8.4f}  {accuracy:6.1%}{mark}")
    print("* stopped early")
    classifier = best.export_model(winner)  # a plain module
    count = sum(parameter.numel() for parameter in classifier.parameters())
    print(f"exported model {winner}: {type(classifier).__name__} with {count} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
