"""Small modules that several test files build bundles from."""

from typing import Any

import torch
from torch import Tensor, nn


def mlp(width: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))


def bits(bundle_or_models: Any) -> list[Tensor]:
    models = getattr(bundle_or_models, "models", bundle_or_models)
    return [v.clone() for m in models for v in m.state_dict().values()]


class Everything(nn.Module):
    """Nested modules, buffers, tied and frozen parameters, a module without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))])
        self.act = nn.ReLU()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.blocks[0][0].weight
        self.same = self.frozen
        self.register_buffer("scale", torch.rand(4))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.same(self.tied(self.act(self.blocks[0](x)))) * self.scale
