"""What the tests of sweeps share: data, models, and a trial trained alone by plain torch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelbatch.random import derive_seed
from modelbatch.sweep.data import epoch_order

SAMPLES, FEATURES, CLASSES = 22, 5, 3


def data(samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(samples, FEATURES, generator=generator, dtype=torch.float64)
    y = (x[:, :CLASSES] + 0.3 * torch.randn(samples, CLASSES, generator=generator)).argmax(1)
    return x, y


def build(config: dict[str, Any]) -> nn.Module:
    width = config.get("width", 6)
    activation = {"tanh": nn.Tanh, "gelu": nn.GELU}[config.get("activation", "tanh")]
    layers: list[nn.Module] = [nn.Linear(FEATURES, width), activation()]
    if "dropout" in config:
        layers.append(nn.Dropout(config["dropout"]))
    layers.append(nn.Linear(width, CLASSES))
    return nn.Sequential(*layers).double()


def alone(
    config: dict[str, Any],
    number: int,
    epochs: int,
    *,
    seed: int = 0,
    batch_size: int = 8,
    optimizer_cls: Any = torch.optim.Adam,
    options: tuple[str, ...] = ("lr", "weight_decay", "betas", "momentum", "eps"),
) -> tuple[list[float], list[float], nn.Module]:
    """Losses and validation losses by epoch, and the model, with nothing but torch."""
    x, y = data()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.get("seed", derive_seed(number, seed)))
        model = build(config)
    optimizer_cls = config.get("optimizer_cls", optimizer_cls)
    if isinstance(optimizer_cls, str):
        optimizer_cls = getattr(torch.optim, optimizer_cls)
    own = {k: v for k, v in config.items() if k in options}
    optimizer = optimizer_cls(model.parameters(), **own)
    losses, val_losses = [], []
    for epoch in range(epochs):
        total = 0.0
        for rows in epoch_order(SAMPLES, seed, epoch).split(config.get("batch_size", batch_size)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            if "clip_grad_norm" in config:
                nn.utils.clip_grad_norm_(model.parameters(), config["clip_grad_norm"])
            optimizer.step()
            total += loss.item() * len(rows)
        losses.append(total / SAMPLES)
        with torch.no_grad():
            val_losses.append(F.cross_entropy(model(x[:10]), y[:10]).item())
    return losses, val_losses, model


def close(actual: Any, expected: Any) -> bool:
    """Equal to 1e-9 of the largest value, as everywhere in float64."""
    a = torch.as_tensor(actual, dtype=torch.float64)
    b = torch.as_tensor(expected, dtype=torch.float64)
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-9 * b.abs().max())
