"""Networks, losses and optimizers that the engine takes, and how to compare it with the rest."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bundle_case import assert_relative
from torch import Tensor, nn

from modelbatch import ModelBatch, OptimizerFactory


class Residual(nn.Module):
    """Norms, dropout and a residual, in a forward of its own."""

    def __init__(self, p: float = 0.3):
        super().__init__()
        self.first = nn.Linear(6, 8, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.inner = nn.LayerNorm(8)
        self.second = nn.Linear(8, 8)
        self.drop = nn.Dropout(p)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norm(self.first(x.view(x.size(0), -1))))
        h = h + self.drop(torch.tanh(self.second(self.inner(h))))
        return self.out(h)


class Bag(nn.Module):
    """The mean of embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5, padding_idx=2)
        self.out = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.embed(x)).mean(1))


def mlp(*activations: nn.Module) -> nn.Sequential:
    layers: list[nn.Module] = []
    for activation in activations:
        layers += [nn.Linear(6, 6), activation]
    return nn.Sequential(*layers, nn.Linear(6, 4))


def _floats(batch: int) -> Tensor:
    return torch.randn(batch, 6, dtype=torch.float64)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 4), _floats),
    "tanh": (lambda: mlp(nn.Tanh(), nn.Sigmoid()), _floats),
    "smooth": (lambda: mlp(nn.GELU(), nn.SiLU(), nn.GELU(approximate="tanh")), _floats),
    "kinks": (lambda: mlp(nn.ELU(0.7), nn.Softplus(2.0, 1.0), nn.LeakyReLU(0.2)), _floats),
    "relu": (lambda: mlp(nn.ReLU(), nn.ReLU(inplace=True)), _floats),
    "residual": (Residual, _floats),
    "cumulative": (
        lambda: nn.Sequential(
            nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5, momentum=None), nn.Linear(5, 4)
        ),
        _floats,
    ),
    "rows": (
        lambda: nn.Sequential(
            nn.LayerNorm(3), nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(8, 4)
        ),
        lambda batch: torch.randn(batch, 2, 3, dtype=torch.float64),
    ),
    "bag": (Bag, lambda batch: torch.randint(11, (batch, 7))),
}


def _classes(batch: int) -> Tensor:
    return torch.randint(4, (batch,))


def _values(batch: int) -> Tensor:
    return torch.randn(batch, 4, dtype=torch.float64)


def _shares(batch: int) -> Tensor:
    return torch.rand(batch, 4, dtype=torch.float64).softmax(1)


_WEIGHT = torch.tensor([0.3, 1.0, 2.0, 0.7], dtype=torch.float64)

LOSSES: dict[str, tuple[Any, Callable[[int], Tensor]]] = {
    "cross_entropy": (F.cross_entropy, _classes),
    "cross_entropy_options": (
        nn.CrossEntropyLoss(weight=_WEIGHT, ignore_index=1, label_smoothing=0.1),
        _classes,
    ),
    "cross_entropy_sum": (nn.CrossEntropyLoss(reduction="sum"), _classes),
    "probabilities": (nn.CrossEntropyLoss(weight=_WEIGHT, label_smoothing=0.2), _shares),
    "nll": (nn.NLLLoss(weight=_WEIGHT), _classes),
    "mse": (F.mse_loss, _values),
    "mse_sum": (nn.MSELoss(reduction="sum"), _values),
    "l1": (F.l1_loss, _values),
    "huber": (nn.HuberLoss(delta=0.6), _values),
    "smooth_l1": (nn.SmoothL1Loss(beta=0.4), _values),
    "smooth_l1_zero": (nn.SmoothL1Loss(beta=0.0), _values),
    "bce": (nn.BCEWithLogitsLoss(pos_weight=_WEIGHT), _shares),
}

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    "adam": (torch.optim.Adam, {"weight_decay": 0.01}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True, "maximize": True}),
    "adamw": (torch.optim.AdamW, {}),
    "rmsprop": (torch.optim.RMSprop, {"weight_decay": 0.01}),
    "rmsprop_momentum": (torch.optim.RMSprop, {"momentum": 0.5}),
    "rmsprop_centered": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    "adagrad": (torch.optim.Adagrad, {"lr_decay": 0.01, "initial_accumulator_value": 0.1}),
}


def make_bundle(
    build: Callable[[], nn.Module],
    optimizer: str = "adam",
    num_models: int = 3,
    dtype: torch.dtype = torch.float64,
    **kwargs: Any,
) -> ModelBatch:
    """A bundle of models that differ, each with a learning rate of its own."""
    cls, options = OPTIMIZERS[optimizer]
    torch.manual_seed(0)
    models = [build().to(dtype) for _ in range(num_models)]
    seeds = list(range(num_models))
    bundle = ModelBatch(models, seeds=kwargs.pop("seeds", seeds), fallback="error", **kwargs)
    configs = [{"lr": 0.01 * (1 + i % 3), **options} for i in range(num_models)]
    OptimizerFactory(cls).create_optimizer(bundle, configs)
    return bundle


def pair(*args: Any, **kwargs: Any) -> tuple[ModelBatch, ModelBatch]:
    """The same bundle twice, without the engine the second time."""
    first, second = make_bundle(*args, **kwargs), make_bundle(*args, **kwargs)
    second.enable_engine(False)
    return first, second


def states(bundle: ModelBatch) -> dict[str, Any]:
    """All that a step changes: tensors by name."""
    assert bundle.optimizer is not None
    found: dict[str, Any] = {k: v.detach().clone() for k, v in bundle.state_dict().items()}
    for k, state in bundle.optimizer.state_dict()["state"].items():
        found |= {f"{k}.{name}": torch.as_tensor(v).clone() for name, v in state.items()}
    found["streams"] = bundle._streams.step.clone()
    return found


def assert_same(a: ModelBatch, b: ModelBatch, tolerance: float) -> None:
    """Compare everything, each tensor relative to its largest value; 0 for bits."""
    ours, theirs = states(a), states(b)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if tolerance == 0:
            assert torch.equal(value, theirs[name]), name
        else:
            assert_relative(value, theirs[name], tolerance, name)


def by_engine(bundle: ModelBatch) -> bool:
    """Whether the last step was the engine's."""
    return bundle._engine.status is not None
