"""Operation by operation: a bundle of three computes what each model computes alone."""

import copy
import warnings
from typing import Any

import pytest
import torch
from operation_table import ENTRIES, Entry
from operation_table_more import LOSSES
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import modelbatch
from modelbatch import FallbackWarning, ModelBatch

# what torch says about itself: index_reduce and nested tensors are not final
pytestmark = [
    pytest.mark.filterwarnings("ignore:index_reduce:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]

MODELS = 3
BATCHED = [entry for entry in ENTRIES.values() if not entry.loops]
LOOPED = [entry for entry in ENTRIES.values() if entry.loops]
SPOILED = [entry for entry in BATCHED if entry.nan]


def ids(entry: Entry) -> str:
    return entry.name


class Operation(nn.Module):
    """One model: holds the parameters and buffers of an entry, and takes its inputs."""

    def __init__(self, entry: Entry, seed: int):
        super().__init__()
        self.function, self.roles = entry.function, [arg.role for arg in entry.args]
        generator = torch.Generator().manual_seed(seed)
        for i, arg in enumerate(entry.args):
            value = arg.make(generator)
            if arg.role == "p":
                setattr(self, f"tensor{i}", nn.Parameter(value))
            elif arg.role == "b":
                self.register_buffer(f"tensor{i}", value)

    def forward(self, *inputs: Tensor) -> Any:
        given = iter(inputs)
        return self.function(
            *(
                next(given) if role == "x" else getattr(self, f"tensor{i}")
                for i, role in enumerate(self.roles)
            )
        )


def build(entry: Entry, dtype: torch.dtype = torch.float64) -> tuple[list[nn.Module], list[Tensor]]:
    """Three models, and their inputs stacked along a model axis."""
    models: list[nn.Module] = [Operation(entry, i).to(dtype) for i in range(MODELS)]
    generator = torch.Generator().manual_seed(10)
    inputs = [
        torch.stack([arg.make(generator) for _ in range(MODELS)])
        for arg in entry.args
        if arg.role == "x"
    ]
    return models, inputs


def leaves(tensors: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Fresh inputs that collect gradients, in a floating-point dtype if one is given."""
    fresh = []
    for tensor in tensors:
        if tensor.is_floating_point() and dtype is not None:
            tensor = tensor.to(dtype)
        differentiable = tensor.is_floating_point() or tensor.is_complex()
        fresh.append(tensor.detach().clone().requires_grad_(differentiable))
    return fresh


def backward(outputs: list[Tensor]) -> None:
    """A gradient that differs from element to element."""
    total = torch.zeros((), dtype=torch.float64)
    for out in outputs:
        if out.requires_grad:
            weights = torch.linspace(0.5, 1.5, max(out.numel(), 1), dtype=torch.float64)
            magnitude = torch.view_as_real(out.resolve_conj()).sum(-1) if out.is_complex() else out
            total = total + (magnitude.double().reshape(-1) * weights[: out.numel()]).sum()
    if total.requires_grad:
        total.backward()


def tensors_of(out: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def run_alone(
    models: list[nn.Module], inputs: list[Tensor], is_shared: list[bool]
) -> tuple[list[list[Tensor]], list[Tensor | None], list[dict[str, Tensor]]]:
    """Outputs of each model, gradients of the inputs, gradients of each model's parameters."""
    fresh = leaves(inputs)
    outputs = []
    for i, model in enumerate(models):
        row = [t if shared else t[i] for t, shared in zip(fresh, is_shared)]
        outputs.append(tensors_of(model(*row)))
        backward(outputs[-1])
    grads = [{n: q.grad for n, q in m.named_parameters() if q.grad is not None} for m in models]
    return outputs, [t.grad for t in fresh], grads


def run_bundle(
    models: list[nn.Module], inputs: list[Tensor], is_shared: list[bool], fallback: str = "error"
) -> tuple[list[list[Tensor]], list[Tensor | None], list[dict[str, Tensor]]]:
    bundle = ModelBatch(models, shared_input=False, fallback=fallback)
    fresh = leaves(inputs)
    marked = [modelbatch.shared(t) if shared else t for t, shared in zip(fresh, is_shared)]
    stacked = tensors_of(bundle(*marked))
    outputs = [[t[i] for t in stacked] for i in range(MODELS)]
    for rows in outputs:
        for row, whole in zip(rows, stacked):
            assert row.shape == whole.shape[1:]
    total = [out for rows in outputs for out in rows]
    weights = [torch.linspace(0.5, 1.5, max(t[0].numel(), 1), dtype=torch.float64) for t in stacked]
    loss = torch.zeros((), dtype=torch.float64)
    for t, w in zip(stacked, weights):
        if t.requires_grad:
            magnitude = torch.view_as_real(t.resolve_conj()).sum(-1) if t.is_complex() else t
            flat = magnitude.double().reshape(MODELS, -1)
            loss = loss + (flat * w[: flat.shape[1]]).sum()
    if loss.requires_grad:
        loss.backward()
    assert total
    grads = []
    for i in range(MODELS):
        own = bundle.gradients(i) if any(True for _ in models[0].parameters()) else {}
        grads.append({n: g for n, g in own.items() if g is not None})
    return outputs, [t.grad for t in fresh], grads


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, alone {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, alone {expected.shape}"
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = actual.detach().to(wide), expected.detach().to(wide)
    assert torch.equal(a.isnan(), b.isnan()), f"{what}: NaN in other places"
    assert torch.equal(a.isinf(), b.isinf()), f"{what}: infinite in other places"
    kept = ~(b.isnan() | b.isinf())
    error = (a - b)[kept].abs().max().item() if bool(kept.any()) else 0.0
    scale = max(b[kept].abs().max().item(), 1.0) if bool(kept.any()) else 1.0
    # float32 only where an entry computes in it; both run the same formula up to its rounding
    tolerance = 1e-10 if expected.dtype in (torch.float64, torch.complex128) else 1e-5
    assert error <= tolerance * scale, f"{what}: {error:.3e} of {scale:.3e}"


def variants(entry: Entry) -> list[list[bool]]:
    """Which inputs are shared: none; if there is something per model besides, each one in turn."""
    count = sum(arg.role == "x" for arg in entry.args)
    own = len(entry.args) - count
    cases = [[False] * count]
    if count and own:
        cases.append([True] * count)
    if count > 1:
        cases += [[i == j for j in range(count)] for i in range(count)]
    return [case for n, case in enumerate(cases) if case not in cases[:n]]


def share(inputs: list[Tensor], is_shared: list[bool]) -> list[Tensor]:
    return [t[0] if shared else t for t, shared in zip(inputs, is_shared)]


def compare(entry: Entry, is_shared: list[bool], fallback: str = "error") -> None:
    models, stacked = build(entry)
    inputs = share(stacked, is_shared)
    expected = run_alone(copy.deepcopy(models), inputs, is_shared)
    actual = run_bundle(models, inputs, is_shared, fallback)
    for i in range(MODELS):
        assert len(actual[0][i]) == len(expected[0][i])
        for k, (a, b) in enumerate(zip(actual[0][i], expected[0][i])):
            assert_close(a, b, f"output {k} of model {i}, shared {is_shared}")
        for name, grad in expected[2][i].items():
            assert_close(actual[2][i][name], grad, f"gradient of {name}, model {i}, {is_shared}")
    for k, (grad_a, grad_b) in enumerate(zip(actual[1], expected[1])):
        if grad_b is not None:
            assert grad_a is not None, f"no gradient of input {k}"
            assert_close(grad_a, grad_b, f"gradient of input {k}, shared {is_shared}")


@pytest.mark.parametrize("entry", BATCHED, ids=ids)
def test_equals_alone(entry: Entry) -> None:
    for is_shared in variants(entry):
        compare(entry, is_shared)


@pytest.mark.parametrize("entry", LOOPED, ids=ids)
def test_what_cannot_be_batched_warns_once_and_is_right(entry: Entry) -> None:
    is_shared = [False] * sum(arg.role == "x" for arg in entry.args)
    compare(entry, is_shared, "silent")
    models, inputs = build(entry)
    bundle = ModelBatch(models, shared_input=False)
    with pytest.warns(FallbackWarning):
        bundle(*inputs)
    bundle(*inputs)  # warnings are errors: it does not warn again
    with pytest.raises(modelbatch.BatchingError):
        ModelBatch(build(entry)[0], shared_input=False, fallback="error")(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("entry", [e for e in BATCHED if e.autocast], ids=ids)
def test_autocast_gives_the_dtypes_of_one_model(entry: Entry, dtype: torch.dtype) -> None:
    """Inputs in float32, or as another autocast operation left them; parameters in float32."""
    models, inputs = build(entry, torch.float32)
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
    is_shared = [False] * len(inputs)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("ignore")
        try:
            expected = run_alone(copy.deepcopy(models), inputs, is_shared)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            pytest.skip(f"not possible alone: {error}")
    with torch.autocast("cpu", torch.bfloat16):
        actual = run_bundle(models, inputs, is_shared)

    def kinds(results: Any) -> Any:
        return tree_map(lambda t: None if t is None else (t.dtype, tuple(t.shape)), results)

    assert kinds(actual) == kinds(expected)
    for a, b in zip(tree_leaves(actual[0]), tree_leaves(expected[0])):
        if b.is_floating_point():
            # a few roundings of bfloat16, which has 8 bits
            atol = 0.06 * _size(b)
            torch.testing.assert_close(a.double(), b.double(), rtol=0.06, atol=atol, equal_nan=True)


def _size(tensor: Tensor) -> float:
    finite = tensor.detach().double()
    finite = finite[finite.isfinite()]
    return max(finite.abs().max().item(), 1e-3) if finite.numel() else 1.0


@pytest.mark.parametrize("entry", SPOILED, ids=ids)
def test_nan_in_one_model_leaves_the_others_bit_identical(entry: Entry) -> None:
    results = []
    for spoil in (False, True):
        models, inputs = build(entry)
        if spoil:
            with torch.no_grad():
                for tensor in (*models[1].parameters(), *models[1].buffers()):
                    tensor.fill_(float("nan"))
                for tensor in inputs:
                    if tensor.is_floating_point():
                        tensor[1] = float("nan")
        outputs, grads, own = run_bundle(models, inputs, [False] * len(inputs))
        kept = [g[[0, 2]] for g in grads if g is not None]
        results.append(([outputs[0], outputs[2]], kept, [own[0], own[2]]))
    for a, b in zip(tree_leaves(results[0]), tree_leaves(results[1])):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_through_compute_loss(name: str) -> None:
    entry = ENTRIES[f"{name}(mean)"]
    _, (outputs, targets) = build(entry)
    models: list[nn.Module] = [nn.Identity() for _ in range(MODELS)]
    bundle = ModelBatch(models, shared_input=False, fallback="error")

    def loss_fn(a: Tensor, b: Tensor) -> Tensor:
        return LOSSES[name](a, b, reduction="mean")

    x = outputs.clone().requires_grad_()
    bundle.compute_loss(bundle(x), targets, loss_fn).backward()
    alone = outputs.clone().requires_grad_()
    losses = torch.stack([loss_fn(alone[i], targets[i]) for i in range(MODELS)])
    losses.sum().backward()
    assert bundle.latest_losses is not None
    assert_close(bundle.latest_losses, losses.detach(), "losses")
    assert x.grad is not None and alone.grad is not None
    assert_close(x.grad, alone.grad, "gradient of the outputs")


@pytest.mark.parametrize("offsets", [False, True])
def test_a_wrong_bag_index_raises_and_reads_no_other_model(offsets: bool) -> None:
    models = [nn.EmbeddingBag(10, 4) for _ in range(MODELS)]
    bundle = ModelBatch(models, fallback="error")
    wrong = torch.tensor([1, 12, 3]) if offsets else torch.tensor([[1, 12, 3]])
    extra = (torch.tensor([0]),) if offsets else ()
    with pytest.raises((IndexError, RuntimeError), match="ange|bound"):
        bundle(wrong, *extra)


class Checkpointed(nn.Module):
    """Recomputes its second half, with dropout, in the backward."""

    def __init__(self, reentrant: bool | None):
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self.reentrant = reentrant

    def half(self, h: Tensor) -> Tensor:
        dropped = nn.functional.dropout(torch.tanh(h), 0.5, self.training)
        result: Tensor = self.second(dropped)
        return result

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        if self.reentrant is None:
            return self.half(h)
        return torch.utils.checkpoint.checkpoint(self.half, h, use_reentrant=self.reentrant)


@pytest.mark.parametrize("rng", ["philox", "torch"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_draw_the_same_numbers_again(rng: str, reentrant: bool) -> None:
    torch.manual_seed(0)
    models = [Checkpointed(reentrant).double() for _ in range(MODELS)]
    plain = copy.deepcopy(models)
    for model in plain:
        model.reentrant = None
    x = torch.randn(4, 5, dtype=torch.float64)
    results = []
    for group in (models, plain):
        bundle = ModelBatch(group, rng=rng, seeds=[1, 2, 3], fallback="silent")
        out = bundle(x)
        out.square().sum().backward()
        results.append((out.detach(), [bundle.gradients(i) for i in range(MODELS)]))
    for a, b in zip(tree_leaves(results[0]), tree_leaves(results[1])):
        assert_close(a, b, "checkpointed")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_transformer_with_padding(training: bool, grad: bool, nested: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, dtype=torch.float64)
    models = []
    for _ in range(MODELS):
        model = nn.TransformerEncoder(copy.deepcopy(layer), 2, enable_nested_tensor=nested)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        models.append(model.train(training))
    alone = copy.deepcopy(models)
    bundle = ModelBatch(models, fallback="error")
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.set_grad_enabled(grad):
        out = bundle(x, src_key_padding_mask=padding)
        for i, model in enumerate(alone):
            own = model(x, src_key_padding_mask=padding)
            assert_close(out[i], own, f"model {i}")
            if grad:
                own.square().sum().backward()
        if grad:
            out.square().sum().backward()
            for i, model in enumerate(alone):
                for name, parameter in model.named_parameters():
                    got = bundle.gradients(i)[name]
                    assert got is not None and parameter.grad is not None
                    assert_close(got, parameter.grad, f"gradient of {name}, model {i}")


def own_padding() -> Tensor:
    """Two models' padding is at the end, as nested tensors need it; the third model's is not."""
    padding = torch.zeros(MODELS, 2, 5, dtype=torch.bool)
    padding[0, 0, 4], padding[1, 1, 2:], padding[2, 0, 0] = True, True, True
    return padding


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_attention_module_with_own_padding(training: bool, grad: bool, weights: bool) -> None:
    torch.manual_seed(0)
    models: list[nn.Module] = [
        nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64).train(training)
        for _ in range(MODELS)
    ]
    alone = copy.deepcopy(models)
    bundle = ModelBatch(models, shared_input=False, fallback="error")
    x = torch.randn(MODELS, 2, 5, 8, dtype=torch.float64)
    padding = own_padding()
    with torch.set_grad_enabled(grad):
        out, shares = bundle(x, x, x, key_padding_mask=padding, need_weights=weights)
        for i, model in enumerate(alone):
            own, own_shares = model(
                x[i], x[i], x[i], key_padding_mask=padding[i], need_weights=weights
            )
            assert_close(out[i], own, f"model {i}")
            if weights:
                assert_close(shares[i], own_shares, f"weights of model {i}")


def test_encoder_with_padding_of_each_model_its_own() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dtype=torch.float64)
    models = [
        nn.TransformerEncoder(layer, 1, norm=nn.LayerNorm(8, dtype=torch.float64)).eval()
        for _ in range(MODELS)
    ]
    alone = copy.deepcopy(models)
    bundle = ModelBatch(models, shared_input=False, fallback="error")
    x = torch.randn(MODELS, 2, 5, 8, dtype=torch.float64)
    padding = own_padding()
    with torch.no_grad():
        out = bundle(x, src_key_padding_mask=padding)
        for i, model in enumerate(alone):
            assert_close(out[i], model(x[i], src_key_padding_mask=padding[i]), f"model {i}")


@pytest.mark.parametrize(
    ("build_loss", "inputs"),
    [
        (lambda v: nn.MarginRankingLoss(margin=v), 2),
        (lambda v: nn.TripletMarginLoss(margin=v), 3),
        (lambda v: nn.InstanceNorm1d(6, eps=v, momentum=v, track_running_stats=True), 1),
        (lambda v: nn.LayerNorm(6, eps=v), 1),
        (lambda v: nn.GroupNorm(2, 6, eps=v), 1),
    ],
    ids=["margin ranking", "triplet margin", "instance norm", "layer norm", "group norm"],
)
def test_numbers_of_each_model_its_own(build_loss: Any, inputs: int) -> None:
    models = [build_loss(v).double() for v in (0.1, 0.5, 0.9)]
    alone = copy.deepcopy(models)
    torch.manual_seed(0)
    tensors = [torch.randn(4, 6, 6, dtype=torch.float64) for _ in range(inputs)]
    if isinstance(models[0], nn.MarginRankingLoss):
        tensors.append(torch.ones(4, 6, 6, dtype=torch.float64))
    bundle = ModelBatch(models, fallback="error")
    out = bundle(*tensors)
    for i, model in enumerate(alone):
        assert_close(out[i], model(*tensors), f"model {i}")
        for name, buffer in model.named_buffers():
            assert_close(bundle.state_dict()[name][i], buffer, f"{name} of model {i}")
