"""What users reported that plain `torch.vmap` cannot do, and can after `import modelbatch`.

Every test does what the reporter of the issue in its name did.
"""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._C._functorch as functorch
from rnn_case import assert_close
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

import modelbatch  # noqa: F401  (adds the rules)


@pytest.fixture(autouse=True)
def _no_slow_fallback() -> Iterator[None]:
    """An operation that vmap would loop over warns, and warnings are errors."""
    functorch._set_vmap_fallback_warning_enabled(True)
    torch.manual_seed(0)
    yield
    functorch._set_vmap_fallback_warning_enabled(False)


def test_pytorch_105982_same_lstm_with_different_weights() -> None:
    models = [nn.LSTM(8, 64, batch_first=True) for _ in range(4)]
    base = copy.deepcopy(models[0]).to("meta")
    parameters, buffers = stack_module_state(models)
    x = torch.randn(32, 16, 8)

    def call(parameters: Any, buffers: Any, x: Tensor) -> Any:
        return functional_call(base, (parameters, buffers), (x,))

    out, (h, c) = vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)
    for i, model in enumerate(models):
        expected, (own_h, own_c) = model(x)
        assert_close([out[i], h[i], c[i]], [expected, own_h, own_c], 1e-5)


def test_pytorch_134606_gru_over_unbatched_sequences() -> None:
    rnn = nn.GRU(10, 2, 1)
    h0 = torch.zeros(1, 2)
    inputs = torch.randn(3, 5, 10)
    out, h = vmap(rnn, in_dims=(0, None))(inputs, h0)
    for i, x in enumerate(inputs):
        assert_close([out[i], h[i]], list(rnn(x, h0)), 1e-5)


def test_functorch_1147_gru_over_sequences_and_states() -> None:
    rnn = nn.GRU(10, 2, 1)
    inputs, states = torch.randn(3, 5, 10), torch.randn(3, 1, 2)
    out, h = vmap(rnn)(inputs, states)
    for i, (x, h0) in enumerate(zip(inputs, states, strict=True)):
        assert_close([out[i], h[i]], list(rnn(x, h0)), 1e-5)


class Dynamics(nn.Module):
    """A dynamics model: what a state becomes by an action."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, actions: Tensor, state: Tensor) -> Tensor:
        predictions = []
        for action in actions:
            state = self.cell(action, state)
            predictions.append(self.head(state))
        return torch.stack(predictions)


def test_pytorch_112459_ensemble_of_gru_cell_dynamics() -> None:
    models = [Dynamics().double() for _ in range(5)]
    base = copy.deepcopy(models[0])
    stacked, _ = stack_module_state(models)
    parameters = {name: value.detach() for name, value in stacked.items()}
    actions, state = torch.randn(4, 7, 3).double(), torch.zeros(7, 6).double()
    target = torch.randn(4, 7, 2).double()

    def loss(parameters: Any) -> Tensor:
        return (functional_call(base, parameters, (actions, state)) - target).pow(2).mean()

    for _ in range(3):  # train the ensemble, and every member alone
        gradients = vmap(grad(loss))(parameters)
        parameters = {name: p - 0.1 * gradients[name] for name, p in parameters.items()}
        for model in models:
            model.zero_grad()
            (model(actions, state) - target).pow(2).mean().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
    predictions = vmap(lambda p: functional_call(base, p, (actions, state)))(parameters)
    assert_close(predictions, torch.stack([model(actions, state) for model in models]), 1e-9)


def test_pytorch_144850_gru_cell() -> None:
    cell = nn.GRUCell(4, 5)
    inputs, states = torch.randn(3, 2, 4), torch.randn(3, 2, 5)
    assert_close(
        vmap(cell)(inputs, states),
        torch.stack([cell(x, h) for x, h in zip(inputs, states, strict=True)]),
        1e-5,
    )


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor, hx: Tensor) -> Tensor:
        return self.head(self.gru(x, hx)[0])


def test_functorch_1089_per_sample_gradients_of_a_gru() -> None:
    model = Sequence().double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x, t = torch.randn(6, 4, 3).double(), torch.randn(6, 4, 1).double()
    hx = torch.randn(2, 6, 5).double()

    def loss(parameters: Any, x: Tensor, t: Tensor, hx: Tensor) -> Tensor:
        arguments = (x.unsqueeze(0), hx.unsqueeze(1))
        return nn.functional.mse_loss(functional_call(model, parameters, arguments), t.unsqueeze(0))

    found = vmap(grad(loss), in_dims=(None, 0, 0, 1))(parameters, x, t, hx)
    for i in range(6):
        model.zero_grad()
        own = model(x[i : i + 1], hx[:, i : i + 1].contiguous())
        nn.functional.mse_loss(own, t[i : i + 1]).backward()
        for name, p in model.named_parameters():
            assert_close(found[name][i], p.grad)


def test_pytorch_105311_batch_of_jacobians_of_an_lstm() -> None:
    lstm, head = nn.LSTM(2, 4, 2).double(), nn.Linear(4, 1).double()
    xs = torch.randn(3, 5, 2).double()

    def call(x: Tensor) -> Tensor:
        return head(lstm(x)[0])

    found = vmap(jacrev(call))(xs)
    expected = [torch.autograd.functional.jacobian(call, x) for x in xs]
    assert_close(found, torch.stack(expected))
    found.pow(2).sum().backward()  # the reporter trains on the jacobian
    with_double_backward = [p.grad.clone() for p in lstm.parameters() if p.grad is not None]
    lstm.zero_grad()
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # oneDNN's layer has no double backward
    try:
        for x in xs:
            jacobian = torch.autograd.functional.jacobian(call, x, create_graph=True)
            jacobian.pow(2).sum().backward()
    finally:
        torch._C._set_mkldnn_enabled(enabled)
    assert_close(with_double_backward, [p.grad for p in lstm.parameters()], 1e-9)
