"""Bundles to be saved, and the comparison of everything that a checkpoint keeps."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelbatch import ModelBatch

M = 3


class Net(nn.Module):
    """Everything that has state: weights, tied weights, BatchNorm, dropout, a hidden buffer."""

    def __init__(self, p: float = 0.3, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(p)
        self.middle = nn.Linear(width, width)
        self.tied = nn.Linear(width, width)
        self.tied.weight = self.middle.weight
        self.last = nn.Linear(width, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.drop(torch.relu(self.norm(self.first(x))))
        return self.last(torch.tanh(self.tied(torch.relu(self.middle(x)))))


def build(
    cls: type | None = torch.optim.SGD,
    options: Any = None,
    *,
    seed: int = 0,
    num_models: int = M,
    dtype: torch.dtype = torch.float32,
    net: Any = None,
    lr: float = 0.02,
    **more: Any,
) -> ModelBatch:
    torch.manual_seed(seed)
    models = [(net or Net)(0.1 * (i + 1)) for i in range(num_models)]
    if cls is not None:
        more.update(
            lr_list=[lr * (i + 1) for i in range(num_models)],
            optimizer_cls=cls,
            optimizer_kwargs=options,
        )
    return ModelBatch([model.to(dtype) for model in models], **more)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (8,), generator=generator)


def train(mb: ModelBatch, steps: range, scheduler: Any = None, **options: Any) -> None:
    dtype = next(mb[0].parameters()).dtype
    for step in steps:
        x, y = batch(step, dtype)
        if isinstance(mb.optimizer, torch.optim.LBFGS) or hasattr(mb.optimizer, "evaluating"):

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                mb.zero_grad()
                losses = mb.compute_loss(mb(x), y, reduction="none")
                losses.sum().backward()
                return losses

            mb.step(closure)
        else:
            mb.train_step(x, y, **options)
        if scheduler is not None:
            scheduler.step()


def everything(mb: ModelBatch) -> dict[str, Any]:
    """All that `save_all` keeps of a bundle."""
    optimizer = mb.optimizer
    found: dict[str, Any] = {
        "tensors": {slot.name: mb._stack.tensor(slot) for slot in mb._stack.slots},
        "seeds": mb.seeds,
        "steps": mb._streams.step,
        "states": mb._streams.states,
        "active": mb.active,
        "modes": [[module.training for module in model.modules()] for model in mb.models],
        "training": mb.training,
        "scaler": None if mb.grad_scaler is None else mb.grad_scaler.state_dict(),
    }
    if hasattr(optimizer, "model_state_dict"):
        found["optimizer"] = [optimizer.model_state_dict(i) for i in range(len(mb))]
        found["limits"] = getattr(optimizer, "clip_grad_norm", None)
        found["lost"] = optimizer._views.lost
    elif optimizer is not None:
        found["optimizer"] = optimizer.state_dict()
    return copied(found)


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item) for item in value)
    return value


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Equal to the last bit, and of the same types."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device), where
        x, y = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
        assert torch.equal(x, y), where
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype, where
        assert a.shape == b.shape, where
        assert a.tobytes() == b.tobytes(), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        assert [*map(type, a)] == [*map(type, b)], where
        for key in a:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(a, float | np.floating):
        assert repr(a) == repr(b), where
    else:
        assert a == b, where
