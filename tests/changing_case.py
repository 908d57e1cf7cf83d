"""Models, data and separate training for the tests of bundles whose models change."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOLERANCE = 1e-9  # of the largest value, in float64
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {"amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    "adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.5}),
    "adadelta": (torch.optim.Adadelta, {}),
    "adamax": (torch.optim.Adamax, {}),
    "radam": (torch.optim.RAdam, {}),
    "nadam": (torch.optim.NAdam, {}),
    "asgd": (torch.optim.ASGD, {"t0": 3.0}),
    "rprop": (torch.optim.Rprop, {}),
    "adafactor": (torch.optim.Adafactor, {}),
    "a class of one's own": (type("Own", (torch.optim.Adam,), {}), {}),
}


class Net(nn.Module):
    """Tied parameters, batch norm, a buffer that is not saved and one that the forward assigns."""

    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Linear(4, 5, bias=False)  # batch norm takes a bias out again
            self.norm = nn.BatchNorm1d(5)
            self.middle = nn.Linear(5, 5)
            self.again = nn.Linear(5, 5)
            self.last = nn.Linear(5, 3)
        self.again.weight = self.middle.weight
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("scale", torch.ones(5), persistent=False)
        self.register_buffer("calls", torch.zeros(()))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        h = self.dropout(torch.tanh(self.norm(self.first(x)) * self.scale))
        return self.last(torch.tanh(self.again(torch.tanh(self.middle(h)))))


def nets(count: int, first: int = 0, **options: Any) -> list[nn.Module]:
    return [Net(first + i, **options) for i in range(count)]


def batches(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    xs = torch.randn(count, 8, 4, generator=generator, dtype=torch.float64)
    ys = torch.randint(3, (count, 8), generator=generator)
    return list(zip(xs, ys))


class Alone:
    """One model with its own torch optimizer, and maybe a schedule and a limit of its gradient."""

    def __init__(self, model: nn.Module, cls: Any, options: Any, **more: Any) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = cls(self.model.parameters(), **options)
        schedule = more.get("schedule")
        self.scheduler = None if schedule is None else schedule(self.optimizer)
        self.clip = more.get("clip")

    def step(self, x: Tensor, y: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.item()


def assert_close(model: nn.Module, alone: nn.Module) -> None:
    """Parameters and all buffers agree."""
    own = dict([*model.named_parameters(), *model.named_buffers()])
    for name, value in [*alone.named_parameters(), *alone.named_buffers()]:
        size = value.detach().abs().max().clamp(min=1e-30)
        error = (own[name].detach() - value.detach()).abs().max()
        assert error <= TOLERANCE * size, (name, error.item())


def tensors(mb: Any) -> dict[str, Tensor]:
    """Every stacked tensor, buffers that are not saved included."""
    return {slot.name: mb._stack.tensor(slot).detach() for slot in mb._stack.slots}


def assert_same_bits(a: Any, b: Any) -> None:
    """Two bundles have the same tensors, optimizer states and streams."""
    one, two = tensors(a), tensors(b)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert same(a.optimizer.state_dict(), b.optimizer.state_dict())
    assert a.seeds == b.seeds and torch.equal(a._streams.step, b._streams.step)
    assert a.active.tolist() == b.active.tolist()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def everything(mb: Any) -> Any:
    """What must not change in a bundle by a refused call."""
    optimizer = mb.optimizer
    return copy.deepcopy(
        [
            tensors(mb),
            None if optimizer is None else optimizer.state_dict(),
            mb.model_ids,
            mb.seeds,
            mb._streams.step,
            mb.active,
            [p.grad for p in mb.parameters()],
            [p.detach() for model in mb.models for p in model.parameters()],
            mb._next_id,
        ]
    )
