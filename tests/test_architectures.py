"""Together equals alone, for the kinds of networks people train in numbers."""

from typing import Any

import torch
import torch.nn.functional as F
from bundle_case import BundleCase
from torch import Tensor, nn


class TestMLP(BundleCase):
    def make_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
        )

    def make_batch(self) -> Any:
        return torch.randn(8, 20), torch.randint(4, (8,))


class ConvNet(nn.Module):
    """Convolutions, batch statistics, dropout of elements and of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout2d(0.2),
            nn.Conv2d(4, 6, 3, padding=1),
            nn.ReLU(),
        )
        self.drop = nn.Dropout(0.25)
        self.head = nn.Linear(6 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.features(x).flatten(1)))


class TestConvNet(BundleCase):
    has_dropout = True

    def make_model(self) -> nn.Module:
        return ConvNet()

    def make_batch(self) -> Any:
        return torch.randn(6, 1, 8, 8), torch.randint(5, (6,))


class BagOfWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8, padding_idx=0)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).mean(1))


class TestEmbedding(BundleCase):
    def make_model(self) -> nn.Module:
        return BagOfWords()

    def make_batch(self) -> Any:
        return torch.randint(30, (7, 5)), torch.randint(3, (7,))


class TestConv1d(BundleCase):
    def make_model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv1d(3, 8, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv1d(8, 8, 3, groups=4, dilation=2, padding="same"),
            nn.LeakyReLU(0.1),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(8, 4),
        )

    def make_batch(self) -> Any:
        return torch.randn(5, 3, 24), torch.randint(4, (5,))


class TransformerClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.embedding = nn.Embedding(20, 16)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == 0
        hidden = self.encoder(self.embedding(tokens), src_key_padding_mask=padding)
        return self.head(hidden.mean(1))


class TestTransformerEncoder(BundleCase):
    has_dropout = True
    steps = 15

    def make_model(self) -> nn.Module:
        return TransformerClassifier()

    def make_batch(self) -> Any:
        tokens = torch.randint(1, 20, (4, 6))
        tokens[:, -1] = 0
        return tokens, torch.randint(3, (4,))


class AutoEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.decoder = nn.ConvTranspose2d(4, 1, 3, stride=2, padding=1, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.decoder(F.elu(self.encoder(x))))


class TestAutoEncoder(BundleCase):
    loss_fn = staticmethod(F.mse_loss)

    def make_model(self) -> nn.Module:
        return AutoEncoder()

    def make_batch(self) -> Any:
        x = torch.rand(4, 1, 8, 8)
        return x, x


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.heads = nn.ModuleDict({"value": nn.Linear(8, 1), "label": nn.Linear(8, 3)})

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        hidden = F.silu(self.norm(self.body(x))) * scale
        return {name: head(hidden) for name, head in self.heads.items()}


def two_losses(outputs: dict[str, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    value, label = targets
    return F.mse_loss(outputs["value"], value) + F.cross_entropy(outputs["label"], label)


class TestDictOutputs(BundleCase):
    loss_fn = staticmethod(two_losses)

    def make_model(self) -> nn.Module:
        return TwoHeads()

    def make_batch(self) -> Any:
        x = (torch.randn(5, 6), torch.rand(5, 1))
        return x, (torch.randn(5, 1), torch.randint(3, (5,)))


class TiedLanguageModel(nn.Module):
    """The output layer uses the embedding's own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6)
        self.mix = nn.Linear(6, 6)
        self.output = nn.Linear(6, 12, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(torch.tanh(self.mix(self.embedding(tokens))))


def next_token(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


class TestTiedWeights(BundleCase):
    loss_fn = staticmethod(next_token)

    def make_model(self) -> nn.Module:
        return TiedLanguageModel()

    def make_batch(self) -> Any:
        return torch.randint(12, (4, 7)), torch.randint(12, (4, 7))
