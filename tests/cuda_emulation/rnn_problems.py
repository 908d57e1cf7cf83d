"""Layers on torch tensors, for the emulated operators, those on a device and torch's own modules.

``python rnn_problems.py LIBRARY FILE`` loads the emulated operators' library, runs
:func:`switch_problems` and saves the results: the switch of the persistent kernels is read when a
library is loaded, so both settings need a process each. ``cuda`` in place of the library takes the
operators of the installed package and a device.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from cuda_emulation.rnn_cases import GATES

Tensors = dict[str, torch.Tensor]
# Rows of a problem's results: the operators' order.
BACKWARD = {
    "lstm": ["x", "h0", "c0", "w_ih", "w_hh", "b_ih", "w_hr"],
    "gru": ["x", "h0", "w_ih", "w_hh", "b_ih", "b_hh"],
    "rnn": ["x", "h0", "w_ih", "w_hh", "b_ih"],
}
MODULES = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}
PARAMETERS = {
    "weight_ih": "w_ih",
    "weight_hh": "w_hh",
    "bias_ih": "b_ih",
    "bias_hh": "b_hh",
    "weight_hr": "w_hr",
}


@dataclass
class Problem:
    """Arguments of an operator and of its backward; dim 0 of a tensor is M, or 1."""

    cell: str  # of rnn_cases.CELLS
    tensors: Tensors
    batch_sizes: list[int]
    reverse: bool = False

    @property
    def name(self) -> str:
        """Of the operator."""
        return self.cell if self.cell in ("lstm", "gru") else "rnn"

    @property
    def models(self) -> int:
        return max(tensor.shape[0] for tensor in self.tensors.values())

    def changed(self, change: Any) -> "Problem":
        """With ``change(name, tensor)`` for each tensor."""
        tensors = {name: change(name, tensor) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)

    def to(self, *arguments: Any) -> "Problem":
        return self.changed(lambda _, tensor: tensor.to(*arguments))

    def without(self, *names: str) -> "Problem":
        return replace(self, tensors={n: t for n, t in self.tensors.items() if n not in names})

    def forward(self, ops: Any) -> tuple[torch.Tensor, ...]:
        given = self.tensors.get
        states = [given("h0"), given("c0")] if self.name == "lstm" else [given("h0")]
        weights = [given("w_ih"), given("w_hh"), given("b_ih"), given("b_hh")]
        weights += [given("w_hr")] if self.name == "lstm" else []
        options: list[Any] = [self.batch_sizes, self.reverse]
        options += [self.cell == "relu"] if self.name == "rnn" else []
        return getattr(ops, self.name)(given("x"), *states, *weights, *options)

    def backward(
        self, ops: Any, results: tuple[torch.Tensor, ...], needs: tuple[bool, bool, bool]
    ) -> tuple[torch.Tensor, ...]:
        given = self.tensors.get
        is_lstm = self.name == "lstm"
        grads = [given("grad_y"), given("grad_h_n"), *([given("grad_c_n")] if is_lstm else [])]
        states = [given("h0"), given("c0")] if is_lstm else [given("h0")]
        weights = [given("w_ih"), given("w_hh"), *([given("w_hr")] if is_lstm else [])]
        saved = [results[0], *results[3 if is_lstm else 2 :]]
        options: list[Any] = [self.batch_sizes, self.reverse]
        options += [self.cell == "relu"] if self.name == "rnn" else []
        operator = getattr(ops, f"{self.name}_backward")
        return operator(*grads, given("x"), *states, *weights, *saved, *options, *needs)

    def run(self, ops: Any, needs: tuple[bool, bool, bool] = (True, True, True)) -> Tensors:
        """Results of forward, and gradients by the names of what they are of."""
        results = self.forward(ops)
        found = dict(zip(["y", "h_n", "c_n", "gates", "cells"], results))
        if self.name == "gru":
            found["gates"] = found.pop("c_n")
        grads = self.backward(ops, results, needs)
        found.update(zip([f"grad {name}" for name in BACKWARD[self.name]], grads))
        return found

    def separate(self, dtype: torch.dtype) -> Tensors:
        """The same by torch's modules, one model after the other: what [M, ...] they make."""
        models = [self.one_model(model, dtype) for model in range(self.models)]
        return {name: torch.stack([results[name] for results in models]) for name in models[0]}

    def one_model(self, model: int, dtype: torch.dtype) -> Tensors:
        given = {
            name: tensor[model if len(tensor) > 1 else 0].detach().to(dtype, copy=True)
            for name, tensor in self.tensors.items()
        }
        module, parameters = self.module(given, dtype)
        leaves = {name: given[name].requires_grad_() for name in ("x", "h0")}
        state: Any = given["h0"]
        outputs, hidden = given["h0"].shape[1], given["w_hh"].shape[0] // GATES[self.cell]
        # torch knows no layer that is only reversed: the other direction's states are zeros.
        zeros = [given["h0"].new_zeros(self.batch_sizes[0], outputs)] if self.reverse else []
        state = torch.stack([*zeros, given["h0"]])
        if self.name == "lstm":
            leaves["c0"] = given["c0"].requires_grad_()
            zeros = [given["c0"].new_zeros(self.batch_sizes[0], hidden)] if self.reverse else []
            state = state, torch.stack([*zeros, given["c0"]])
        sizes = torch.tensor(self.batch_sizes)
        packed = torch.nn.utils.rnn.PackedSequence(given["x"], sizes)
        y, states = module(packed, state)
        found = {"y": y.data[:, -outputs:]}
        states = states if self.name == "lstm" else (states,)
        found.update(zip(["h_n", "c_n"], [both[-1] for both in states]))
        loss = torch.zeros((), dtype=dtype)
        for name, result in found.items():
            if f"grad_{name}" in given:
                loss = loss + (result * given[f"grad_{name}"]).sum()
        loss.backward()
        found = {name: result.detach() for name, result in found.items()}
        for name, leaf in {**leaves, **parameters}.items():
            found[f"grad {name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        if self.name != "gru":
            found.pop("grad b_hh", None)  # is that of b_ih
        return found

    def module(self, given: Tensors, dtype: torch.dtype) -> tuple[torch.nn.Module, Tensors]:
        """torch's, and its parameters that take part by their names here."""
        options: dict[str, Any] = {"bias": "b_ih" in given, "bidirectional": self.reverse}
        if "w_hr" in given:
            options["proj_size"] = given["w_hr"].shape[0]
        if self.name == "rnn":
            options["nonlinearity"] = self.cell
        hidden = given["w_hh"].shape[0] // GATES[self.cell]
        module = MODULES[self.name](given["x"].shape[1], hidden, dtype=dtype, **options)
        suffix = "_l0_reverse" if self.reverse else "_l0"
        parameters = {}
        for theirs, ours in PARAMETERS.items():
            if ours in given and hasattr(module, theirs + suffix):
                parameters[ours] = getattr(module, theirs + suffix)
                with torch.no_grad():
                    parameters[ours].copy_(given[ours])
        return module, parameters


def make_problem(
    cell: str,
    *,
    models: int = 2,
    batch_sizes: list[int] | None = None,
    inputs: int = 5,
    hidden: int = 7,
    outputs: int | None = None,
    reverse: bool = False,
    dtype: torch.dtype = torch.float64,
    shared: tuple[str, ...] = (),
) -> Problem:
    batch_sizes = [3, 3, 3] if batch_sizes is None else batch_sizes
    generator = torch.Generator().manual_seed(0)
    rows, batch, gates = sum(batch_sizes), batch_sizes[0], GATES[cell] * hidden
    state = hidden if outputs is None else outputs
    shapes: dict[str, tuple[int, ...]] = {
        "x": (rows, inputs),
        "h0": (batch, state),
        "w_ih": (gates, inputs),
        "w_hh": (gates, state),
        "b_ih": (gates,),
        "b_hh": (gates,),
        "grad_y": (rows, state),
        "grad_h_n": (batch, state),
    }
    if cell == "lstm":
        shapes |= {"c0": (batch, hidden), "grad_c_n": (batch, hidden)}
    if outputs is not None:
        shapes["w_hr"] = (outputs, hidden)
    tensors = {}
    for name, shape in shapes.items():
        size = (1 if name in shared else models, *shape)
        values = torch.randn(size, generator=generator, dtype=torch.float64)
        # Weights as torch draws them, so that states neither die out nor saturate.
        tensors[name] = (values * hidden**-0.5 if name.startswith("w_") else values).to(dtype)
    return Problem(cell, tensors, batch_sizes, reverse)


def errors(found: Tensors, exact: Tensors) -> dict[str, float]:
    """The largest error of each result, relative to its largest value."""
    result = {}
    for name, right in exact.items():
        scale = right.double().abs().amax().item() if right.numel() else 0.0
        wrong = (found[name].detach().cpu().double() - right.double()).abs()
        # NaN counts as wrong, and so does another value where all should be zero.
        largest = wrong.nan_to_num(float("inf")).amax().item() if right.numel() else 0.0
        result[name] = largest if scale == 0.0 else largest / scale
    return result


def tolerance(problem: Problem, exact: Tensors) -> float:
    """Of the largest value; float64: 1e-10. The rest: twice torch's own error, plus a rounding."""
    dtype = problem.tensors["x"].dtype
    if dtype == torch.float64:
        return 1e-10
    alone = errors(problem.separate(dtype), exact)
    return 2 * max(alone.values()) + torch.finfo(dtype).eps


def assert_equals_torch(found: Tensors, problem: Problem) -> None:
    exact = problem.separate(torch.float64)
    allowed = tolerance(problem, exact)
    wrong = {name: e for name, e in errors(found, exact).items() if not e <= allowed}
    assert not wrong, f"more than {allowed}"


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)


def switch_problems(large: bool = False) -> list[Problem]:
    """What the persistent kernels take, forward and reverse, and what they do not: H = 65."""
    sizes = [5, 4, 4, 1]
    float32: Any = {"dtype": torch.float32}
    made = [
        make_problem(cell, hidden=hidden, batch_sizes=sizes, reverse=reverse, **float32)
        for cell in GATES
        for hidden, reverse in ((7, False), (32, True), (65, False))
    ]
    shared = ("x", "w_ih", "h0", "b_hh", "grad_y")
    made.append(make_problem("gru", shared=shared, **float32))
    if large:  # Much shared memory, and tiles of both sizes.
        for models in (2, 130):
            size: Any = {"models": models, "hidden": 64, "batch_sizes": [40] * 4}
            made += [make_problem(cell, **size, **float32) for cell in GATES]
    return made


def run_switched(library: str, file: Path, value: str) -> list[Tensors]:
    """Results of :func:`switch_problems` in a process whose switch has that value."""
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "MODELBATCH_PERSISTENT_RNN": value,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    subprocess.run(
        [sys.executable, str(Path(__file__)), library, str(file)], env=environment, check=True
    )
    return torch.load(file)


def main() -> None:
    on_device = sys.argv[1] == "cuda"
    if on_device:
        import modelbatch.ops  # noqa: F401  (registers the operators)

        ops = torch.ops.modelbatch
    else:
        torch.ops.load_library(sys.argv[1])
        ops = torch.ops.modelbatch_emulated
    results = []
    for problem in switch_problems(large=on_device):
        found = problem.to("cuda" if on_device else "cpu").run(ops)
        results.append({name: tensor.cpu() for name, tensor in found.items()})
    torch.save(results, sys.argv[2])


if __name__ == "__main__":
    main()
