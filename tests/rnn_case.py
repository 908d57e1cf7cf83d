"""What the tests of recurrent layers in a bundle share."""

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from modelbatch import ModelBatch

CLASSES: dict[str, type[nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


class Layer(nn.Module):
    """A recurrent module that takes its initial states one by one."""

    def __init__(self, kind: str, *args: Any, **kwargs: Any):
        super().__init__()
        self.rnn = CLASSES[kind](*args, **kwargs)

    def forward(self, x: Any, *states: Tensor) -> Any:
        if not states:
            return self.rnn(x)
        return self.rnn(x, states if isinstance(self.rnn, nn.LSTM) else states[0])


def pairwise(choices: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Few combinations in which every two values of different options meet at least once."""
    names = list(choices)

    def pairs(case: dict[str, int]) -> set[Any]:
        return set(itertools.combinations([(n, case[n]) for n in names if n in case], 2))

    wanted = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(choices[a]))
        for j in range(len(choices[b]))
    }
    cases = []
    while wanted:
        first = min(wanted)
        case = dict(first)
        for name in names:
            if name in case:
                continue

            met = [len(wanted & pairs({**case, name: i})) for i in range(len(choices[name]))]
            case[name] = met.index(max(met))
        wanted -= pairs(case)
        cases.append({name: choices[name][case[name]] for name in names})
    return cases


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-10, what: str = "") -> None:
    """Relative to the largest expected value, tensor by tensor."""
    a, b = tree_leaves(actual), tree_leaves(expected)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        if x is None and y is None:
            continue
        assert x.shape == y.shape, f"{what}: {tuple(x.shape)} instead of {tuple(y.shape)}"
        assert x.dtype == y.dtype, f"{what}: {x.dtype} instead of {y.dtype}"
        if not y.numel():
            continue
        scale = max(y.abs().max().item(), 1e-30)
        error = (x - y).abs().max().item()
        assert error <= tolerance * scale, f"{what}: {error:.2e} of {scale:.2e}"


def compare_with_alone(
    models: list[nn.Module],
    inputs: list[Tensor],
    shared: list[bool],
    tolerance: float = 1e-10,
    **kwargs: Any,
) -> None:
    """Outputs and the gradients of parameters and inputs, together and alone.

    Args:
        models: the models.
        inputs: `[M, ...]`, or without the first axis where all models get the same.
        shared: which of the inputs are.
        tolerance: relative to the largest value of each tensor.
        kwargs: of `ModelBatch`.
    """
    from modelbatch import per_model, shared as same

    bundle = ModelBatch(copy.deepcopy(models), fallback="error", **kwargs)
    given = [t.detach().requires_grad_() for t in inputs]
    marked = [same(t) if s else per_model(t) for t, s in zip(given, shared, strict=True)]
    outputs = bundle(*marked)
    cotangents = tree_map(torch.randn_like, outputs)
    pairs = list(zip(tree_leaves(outputs), tree_leaves(cotangents), strict=True))
    sum((o * c).sum() for o, c in pairs).backward()  # type: ignore[union-attr]
    expected_inputs = [torch.zeros_like(t) for t in inputs]
    for i, model in enumerate(models):
        own = [t.detach() if s else t[i].detach() for t, s in zip(inputs, shared, strict=True)]
        own = [t.requires_grad_() for t in own]
        model.zero_grad()
        expected = model(*own)
        assert_close(tree_map(lambda t, i=i: t[i], outputs), expected, tolerance, "outputs")
        rows = [(o, c[i]) for o, (_, c) in zip(tree_leaves(expected), pairs, strict=True)]
        sum((o * c).sum() for o, c in rows).backward()  # type: ignore[union-attr]
        found = bundle.gradients(i)
        for name, parameter in model.named_parameters():
            assert_close(found[name], parameter.grad, tolerance, name)
        for total, t, s in zip(expected_inputs, own, shared, strict=True):
            if s:
                total += t.grad  # type: ignore[arg-type]
            else:
                total[i] = t.grad  # type: ignore[assignment,call-overload]
    for t, expected_grad in zip(given, expected_inputs, strict=True):
        assert_close(t.grad, expected_grad, tolerance, "gradient of an input")
