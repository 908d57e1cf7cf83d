"""One call of a CPU kernel of LSTM, GRU or RNN, and what torch computes for each model alone."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from modelbatch import _extension as _extension  # Registers the operators.

OPS = torch.ops.modelbatch
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
CELLS = list(GATES)


@dataclass
class Case:
    """The arguments of one call; names in `shared` have one slice for all models."""

    cell: str
    models: int = 2
    batch_sizes: list[int] = field(default_factory=lambda: [3] * 4)
    inputs: int = 5
    hidden: int = 7
    proj: int = 0
    bias: bool = True
    reverse: bool = False
    shared: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64
    scale: float = 1.0

    @property
    def names(self) -> list[str]:
        names = ["x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr"]
        absent = set()
        if self.cell != "lstm":
            absent |= {"c0", "w_hr"}
        if not self.bias:
            absent |= {"b_ih", "b_hh"}
        if self.proj == 0:
            absent |= {"w_hr"}
        return [name for name in names if name not in absent]

    def make(self) -> dict[str, Tensor]:
        rows, batch = sum(self.batch_sizes), self.batch_sizes[0]
        gates = GATES[self.cell] * self.hidden
        outputs = self.proj or self.hidden
        sizes = {
            "x": (rows, self.inputs),
            "h0": (batch, outputs),
            "c0": (batch, self.hidden),
            "w_ih": (gates, self.inputs),
            "w_hh": (gates, outputs),
            "b_ih": (gates,),
            "b_hh": (gates,),
            "w_hr": (outputs, self.hidden),
        }
        generator = torch.Generator().manual_seed(0)
        bound = self.scale / math.sqrt(self.hidden)

        def draw(name: str) -> Tensor:
            models = 1 if name in self.shared else self.models
            values = torch.randn(models, *sizes[name], generator=generator, dtype=torch.float64)
            return (values * (bound if name[0] in "wb" else 1.0)).to(self.dtype)

        return {name: draw(name) for name in self.names}

    def cotangents(self) -> list[Tensor]:
        rows, batch = sum(self.batch_sizes), self.batch_sizes[0]
        outputs = self.proj or self.hidden
        generator = torch.Generator().manual_seed(1)
        sizes = [(rows, outputs), (batch, outputs)]
        if self.cell == "lstm":
            sizes.append((batch, self.hidden))
        return [
            torch.randn(self.models, *size, generator=generator, dtype=torch.float64).to(self.dtype)
            for size in sizes
        ]


def forward(case: Case, tensors: dict[str, Tensor]) -> list[Tensor]:
    """All results of the operator, with the saved ones."""
    get = tensors.get
    tail = (case.batch_sizes, case.reverse)
    if case.cell == "lstm":
        names = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
        return list(OPS.lstm(*map(get, names), *tail))
    names = ("x", "h0", "w_ih", "w_hh", "b_ih", "b_hh")
    if case.cell == "gru":
        return list(OPS.gru(*map(get, names), *tail))
    return list(OPS.rnn(*map(get, names), *tail, case.cell == "rnn_relu"))


def backward(
    case: Case,
    tensors: dict[str, Tensor],
    results: list[Tensor],
    grads: list[Tensor | None],
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> dict[str, Tensor]:
    """Gradients by name; [0] where they are not needed."""
    get = tensors.get
    tail = (case.batch_sizes, case.reverse)
    if case.cell == "lstm":
        names = ("x", "h0", "c0", "w_ih", "w_hh", "w_hr")
        y, _, _, gates, cells = results
        out = OPS.lstm_backward(*grads, *map(get, names), y, gates, cells, *tail, *needs)
        dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr = out
        named = {"x": dx, "h0": dh0, "c0": dc0, "w_ih": dw_ih, "w_hh": dw_hh}
        return {**named, "b_ih": db, "b_hh": db, "w_hr": dw_hr}
    names = ("x", "h0", "w_ih", "w_hh")
    if case.cell == "gru":
        y, _, gates = results
        out = OPS.gru_backward(*grads, *map(get, names), y, gates, *tail, *needs)
        return dict(zip(("x", "h0", "w_ih", "w_hh", "b_ih", "b_hh"), out, strict=True))
    y, _ = results
    relu = case.cell == "rnn_relu"
    out = OPS.rnn_backward(*grads, *map(get, names), y, *tail, relu, *needs)
    dx, dh0, dw_ih, dw_hh, db = out
    return {"x": dx, "h0": dh0, "w_ih": dw_ih, "w_hh": dw_hh, "b_ih": db, "b_hh": db}


def one_by_torch(case: Case, t: dict[str, Tensor]) -> list[Tensor]:
    """y [N, P], h_n and c_n of one model, by torch's packed functions."""
    names = ["w_ih", "w_hh", *(["b_ih", "b_hh"] if case.bias else [])]
    names += ["w_hr"] if case.proj else []
    params = [t[name] for name in names]
    states = [t["h0"][None]] + ([t["c0"][None]] if case.cell == "lstm" else [])
    if case.reverse:  # torch runs backwards in the second of two directions only.
        params = [torch.zeros_like(p) for p in params] + params
        states = [torch.cat([torch.zeros_like(s), s]) for s in states]
    function = getattr(torch, case.cell)
    y, *last = function(
        t["x"],
        torch.tensor(case.batch_sizes),
        states if case.cell == "lstm" else states[0],
        params,
        case.bias,
        1,
        0.0,
        False,
        case.reverse,
    )
    return [y[:, -(case.proj or case.hidden) :], *(state[-1] for state in last)]


def by_torch(
    case: Case, tensors: dict[str, Tensor], grads: list[Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Results and gradients [M, ...] of separate models."""
    outputs, gradients = [], []
    for model in range(case.models):
        own = {
            name: t[model % t.shape[0]].detach().clone().requires_grad_()
            for name, t in tensors.items()
        }
        results = one_by_torch(case, own)
        outputs.append([r.detach() for r in results])
        seeds = [g[model] for g in grads]
        gradients.append(torch.autograd.grad(results, list(own.values()), seeds))
    stacked = [torch.stack(r) for r in zip(*outputs, strict=True)]
    named = (torch.stack(g) for g in zip(*gradients, strict=True))
    return stacked, dict(zip(tensors, named, strict=True))


def assert_near(actual: Tensor, expected: Tensor, rtol: float, name: str = "") -> None:
    assert actual.shape == expected.shape, name
    if expected.numel() > 0:
        atol = rtol * float(expected.abs().max())
        torch.testing.assert_close(
            actual, expected, rtol=0.0, atol=atol, msg=lambda m: f"{name}: {m}"
        )


def check(case: Case, rtol: float = 1e-10) -> None:
    tensors, grads = case.make(), case.cotangents()
    expected, expected_grads = by_torch(case, tensors, grads)
    results = forward(case, tensors)
    for name, actual, want in zip(("y", "h_n", "c_n"), results, expected, strict=False):
        assert_near(actual, want, rtol, name)
    gradients = backward(case, tensors, results, grads)
    for name in tensors:
        assert_near(gradients[name], expected_grads[name], rtol, f"gradient of {name}")
