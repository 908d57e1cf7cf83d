"""Construction, views, inputs, outputs and training of a bundle, and every refusal."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bundle_case import assert_relative, state
from small_models import Everything, bits, mlp
from torch import Tensor, nn

import modelbatch
from modelbatch import ModelBatch, ModelBatchError, StructureMismatchError

# ---- one copy of the weights, live views


@pytest.mark.parametrize("num_models", [1, 2, 7])
def test_models_are_views_of_one_stack(num_models: int) -> None:
    models = [Everything() for _ in range(num_models)]
    before = bits(models)
    bundle = ModelBatch(models)
    assert len(bundle) == bundle.num_models == num_models
    assert all(a is b for a, b in zip(bundle.models, models))
    assert all(torch.equal(a, b) for a, b in zip(before, bits(bundle)))
    stacked = bundle.state_dict()
    assert set(stacked) == set(models[0].state_dict())
    assert [n for n, _ in bundle.named_parameters()] == [n for n, _ in models[0].named_parameters()]
    assert [n for n, _ in bundle.named_buffers()] == [n for n, _ in models[0].named_buffers()]
    for name, tensor in stacked.items():
        assert tensor.shape[0] == num_models
        for i, model in enumerate(models):
            assert model.state_dict()[name].data_ptr() == tensor[i].data_ptr()


def views_hold(bundle: ModelBatch) -> bool:
    stacked = bundle.state_dict()
    return all(
        v.data_ptr() == stacked[k][i].data_ptr() and v.dtype == stacked[k].dtype
        for i, model in enumerate(bundle.models)
        for k, v in model.state_dict().items()
    )


def test_views_survive_conversion_and_loading() -> None:
    bundle = ModelBatch([Everything() for _ in range(3)])
    original = bundle.models
    bundle.double()
    assert views_hold(bundle) and bundle[0].scale.dtype == torch.float64
    bundle.half().float().to("cpu")
    assert views_hold(bundle)
    saved = {k: torch.randn_like(v.float()).to(v.dtype) for k, v in bundle.state_dict().items()}
    saved["same.weight"] = saved["frozen.weight"]
    saved["same.bias"] = saved["frozen.bias"]
    saved["tied.weight"] = saved["blocks.0.0.weight"]
    for assign in (False, True):
        bundle.load_state_dict(saved, assign=assign)
        assert views_hold(bundle)
        assert torch.equal(bundle[2].scale, saved["scale"][2])
    bundle[1].load_state_dict(bundle[0].state_dict())
    assert torch.equal(bundle.state_dict()["scale"][1], saved["scale"][0])
    assert all(a is b for a, b in zip(bundle.models, original))
    assert bundle[0].tied.weight is bundle[0].blocks[0][0].weight


def test_tied_and_frozen_parameters_stay_so() -> None:
    bundle = ModelBatch(
        [Everything() for _ in range(3)], lr_list=[0.1] * 3, optimizer_cls=torch.optim.SGD
    )
    x, y = torch.randn(6, 4), torch.randint(4, (6,))
    frozen = bundle.state_dict()["frozen.weight"].clone()
    bundle.train_step(x, y)
    assert torch.equal(bundle.state_dict()["frozen.weight"], frozen)
    assert not dict(bundle.named_parameters())["frozen.weight"].requires_grad
    tied = bundle.state_dict()
    assert tied["tied.weight"].data_ptr() == tied["blocks.0.0.weight"].data_ptr()


def test_a_thousand_models() -> None:
    models = [nn.Linear(3, 2) for _ in range(1000)]
    alone = copy.deepcopy(models[::250])
    bundle = ModelBatch(models, lr_list=[0.1] * 1000, optimizer_cls=torch.optim.SGD)
    x, y = torch.randn(5, 3), torch.randint(2, (5,))
    losses = bundle.train_step(x, y)
    assert losses.shape == (1000,)
    for k, model in enumerate(alone):
        loss = F.cross_entropy(model(x), y)
        torch.testing.assert_close(losses[250 * k], loss.detach())


def test_editing_a_model_edits_the_bundle() -> None:
    bundle = ModelBatch([mlp() for _ in range(3)])
    x = torch.randn(2, 4)
    before = bundle(x)
    with torch.no_grad():
        bundle[1][2].bias.add_(1.0)
    after = bundle(x)
    torch.testing.assert_close(after[1], before[1] + 1.0)
    assert torch.equal(after[0], before[0])


def test_deepcopy_is_an_independent_bundle() -> None:
    bundle = ModelBatch([Everything() for _ in range(2)])
    other = copy.deepcopy(bundle)
    assert views_hold(other)
    with torch.no_grad():
        other[0].scale.zero_()
    assert bundle[0].scale.abs().sum() > 0
    x = torch.randn(4, 4)
    assert other(x).shape == (2, 4, 4)


def test_a_detached_model_is_noticed() -> None:
    bundle = ModelBatch([mlp() for _ in range(3)])
    bundle[1].double()
    with pytest.raises(ModelBatchError, match=r"'0.weight' of models\[1\] no longer shares"):
        bundle.train()


def test_names_that_are_methods_of_the_bundle() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.models = nn.ModuleList([nn.Linear(2, 2)])
            self.metrics = nn.Linear(2, 2)
            self.step = nn.Parameter(torch.ones(2))
            self.active = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.active(self.metrics(self.models[0](x))) * self.step

    models = [Named() for _ in range(2)]
    bundle = ModelBatch(copy.deepcopy(models), lr_list=[0.1, 0.2], optimizer_cls=torch.optim.SGD)
    assert set(bundle.state_dict()) == set(models[0].state_dict())
    x, y = torch.randn(3, 2), torch.randint(2, (3,))
    torch.testing.assert_close(bundle(x)[1], models[1](x))
    bundle.train_step(x, y)
    assert bundle.metrics()["active_models"] == 2.0


# ---- from_factory


def test_from_factory_equals_separate_initialisation() -> None:
    bundle = ModelBatch.from_factory(mlp, 3, seeds=[4, 5, 6])
    for i, seed in enumerate([4, 5, 6]):
        torch.manual_seed(seed)
        expected = mlp().state_dict()
        assert all(torch.equal(v, bundle[i].state_dict()[k]) for k, v in expected.items())
    assert bundle.seeds == [4, 5, 6] and views_hold(bundle)
    state_before = torch.get_rng_state()
    ModelBatch.from_factory(mlp, 2, seeds=[1, 2])
    assert torch.equal(state_before, torch.get_rng_state())


def test_from_factory_passes_the_number_only_where_it_is_asked_for() -> None:
    def numbered(i: int) -> nn.Module:
        model = nn.Linear(1, 1)
        nn.init.constant_(model.weight, float(i))
        return model

    bundle = ModelBatch.from_factory(numbered, 3)
    assert [m.weight.item() for m in bundle.models] == [0.0, 1.0, 2.0]
    widths = ModelBatch.from_factory(mlp, 2)  # its only parameter has a default
    assert widths[0][0].out_features == 5
    torch.manual_seed(3)
    unseeded = ModelBatch.from_factory(lambda: nn.Linear(2, 2), 2)
    torch.manual_seed(3)
    assert torch.equal(unseeded[0].weight, nn.Linear(2, 2).weight)


def test_from_factory_refuses() -> None:
    with pytest.raises(ModelBatchError, match="num_models"):
        ModelBatch.from_factory(mlp, 0)
    with pytest.raises(ModelBatchError, match="model 0 returned a int"):
        ModelBatch.from_factory(lambda: 3, 2)
    with pytest.raises(StructureMismatchError, match="weight.*model 0.*model 1"):
        ModelBatch.from_factory(lambda i: nn.Linear(2, 2 + i), 2)
    with pytest.raises(ModelBatchError, match="seeds has 1 entries for 2 models"):
        ModelBatch.from_factory(mlp, 2, seeds=[1])


# ---- inputs and outputs


class Flexible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor, *, y: Tensor | None = None, flag: bool = True) -> Any:
        out = self.a(x)
        if y is not None:
            out = out + self.b(y)
        return out if flag else (out, {"twice": 2 * out, "none": None, "name": "net"})


def test_keyword_arguments_and_nested_outputs() -> None:
    models = [Flexible() for _ in range(3)]
    bundle = ModelBatch(copy.deepcopy(models))
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    out, extra = bundle(x, y=y, flag=False)
    assert extra["name"] == "net" and extra["none"] is None
    for i, model in enumerate(models):
        expected, expected_extra = model(x, y=y, flag=False)
        torch.testing.assert_close(out[i], expected)
        torch.testing.assert_close(extra["twice"][i], expected_extra["twice"])


def test_shared_and_own_inputs_can_be_mixed() -> None:
    models = [Flexible() for _ in range(3)]
    x, own = torch.randn(4, 3), torch.randn(3, 4, 3)
    shared = ModelBatch(copy.deepcopy(models))
    separate = ModelBatch(copy.deepcopy(models), shared_input=False)
    a = shared(x, y=modelbatch.per_model(own))
    b = separate(modelbatch.shared(x), y=own)
    for i, model in enumerate(models):
        expected = model(x, y=own[i])
        torch.testing.assert_close(a[i], expected)
        torch.testing.assert_close(b[i], expected)
    with pytest.raises(ModelBatchError, match=r"input 0 has shape \(4, 3\).*size 3"):
        separate(x, y=own)
    with pytest.raises(ModelBatchError, match="wrap a tensor"):
        modelbatch.shared([1.0])


@dataclasses.dataclass(frozen=True)
class Result:
    logits: Tensor
    extra: dict[str, Tensor]
    label: str = "x"


class ReturnsDataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Result:
        out = self.layer(x)
        return Result(out, {"sum": out.sum()})


def test_dataclass_outputs() -> None:
    models = [ReturnsDataclass() for _ in range(2)]
    bundle = ModelBatch(copy.deepcopy(models))
    x, y = torch.randn(4, 3), torch.randint(2, (4,))
    out = bundle(x)
    assert isinstance(out, Result) and out.label == "x"
    torch.testing.assert_close(out.extra["sum"][1], models[1](x).extra["sum"])
    loss = bundle.compute_loss(out, y, lambda o, t: F.cross_entropy(o.logits, t))
    torch.testing.assert_close(
        loss, torch.stack([F.cross_entropy(m(x).logits, y) for m in models]).mean()
    )


def test_hugging_face_outputs() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
        num_labels=3,
    )
    torch.manual_seed(0)
    models = [transformers.BertForSequenceClassification(config).double() for _ in range(2)]
    bundle = ModelBatch(copy.deepcopy(models), rng="torch", seeds=[1, 2], fallback="error")
    tokens, labels = torch.randint(30, (4, 6)), torch.randint(3, (4,))
    out = bundle(input_ids=tokens, labels=labels)
    for i, model in enumerate(models):
        torch.manual_seed(i + 1)
        expected = model.train(bundle.training)(input_ids=tokens, labels=labels)
        assert type(out) is type(expected)
        assert_relative(out.logits[i], expected.logits, 1e-9)
        assert_relative(out.loss[i], expected.loss, 1e-9)


def test_an_output_that_no_model_changes_still_gets_the_model_axis() -> None:
    class Passes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, self.layer(x)

    x = torch.randn(3, 2)
    same, out = ModelBatch([Passes() for _ in range(4)])(x)
    assert same.shape == (4, 3, 2) and out.shape == (4, 3, 2)
    assert torch.equal(same[3], x)


def test_a_wrong_call_raises_what_one_model_raises() -> None:
    bundle = ModelBatch([mlp() for _ in range(3)])
    before = bits(bundle)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        bundle(torch.randn(2, 5))
    with pytest.raises(TypeError):
        bundle(torch.randn(2, 4), wrong=1)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(bundle)))


# ---- training


def test_gradients_and_metrics() -> None:
    bundle = ModelBatch(
        [mlp() for _ in range(3)], lr_list=[0.1, 0.2, 0.3], optimizer_cls=torch.optim.SGD
    )
    bundle.enable_engine(False)  # which keeps no gradients
    assert bundle.latest_losses is None and "loss_mean" not in bundle.metrics()
    losses = bundle.train_step(torch.randn(5, 4), torch.randint(3, (5,)))
    metrics = bundle.metrics()
    assert metrics["loss_mean"] == pytest.approx(losses.mean().item())
    assert metrics["loss_best"] == losses.min().item()
    assert metrics["best_model"] == losses.argmin().item()
    assert [metrics[f"lr_model_{i}"] for i in range(3)] == [0.1, 0.2, 0.3]
    for i in range(3):
        own = torch.cat([g.flatten() for g in bundle.gradients(i).values() if g is not None])
        assert metrics[f"grad_norm_model_{i}"] == pytest.approx(own.norm().item(), rel=1e-5)
        assert metrics[f"loss_model_{i}"] == losses[i].item()
    bundle.zero_grad()
    assert all(p.grad is None for p in bundle.parameters())
    assert bundle.gradients(0) == {n: None for n, _ in bundle.named_parameters()}


def test_gradient_memory_is_kept_but_never_taken_from_a_holder() -> None:
    bundle = ModelBatch([nn.Linear(64, 64) for _ in range(4)])
    weight = dict(bundle.named_parameters())["weight"]
    x, y = torch.randn(8, 64), torch.randint(64, (8,))

    def backward() -> None:
        bundle.zero_grad()
        assert weight.grad is None
        bundle.compute_loss(bundle(x), y).backward()

    backward()
    assert weight.grad is not None
    first = weight.grad.data_ptr()
    backward()
    assert weight.grad.data_ptr() == first
    held, copy_of_held = weight.grad[1], weight.grad[1].clone()
    bundle.zero_grad()
    x = x * 2
    bundle.compute_loss(bundle(x), y).backward()
    assert torch.equal(held, copy_of_held)
    # accumulation adds up
    once = weight.grad.clone()
    bundle.compute_loss(bundle(x), y).backward()
    torch.testing.assert_close(weight.grad, 2 * once)


def test_evaluate_averages_over_samples_and_restores_modes() -> None:
    models = [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)) for _ in range(2)]
    models = [m.train() for m in models]
    bundle = ModelBatch(copy.deepcopy(models))
    data = [(torch.randn(b, 4), torch.randint(3, (b,))) for b in (5, 2)]
    saved = bits(bundle)
    result = bundle.evaluate(
        data, metric_fns={"accuracy": lambda o, t: (o.argmax(1) == t).float().mean()}
    )
    assert bundle.training and all(m.training for m in bundle.models)
    assert all(torch.equal(a, b) for a, b in zip(saved, bits(bundle)))
    x, y = torch.cat([d[0] for d in data]), torch.cat([d[1] for d in data])
    for i, model in enumerate(models):
        out = model.eval()(x)
        torch.testing.assert_close(result["loss"][i], F.cross_entropy(out, y).detach())
        assert result["accuracy"][i] == pytest.approx((out.argmax(1) == y).float().mean().item())
    assert not result["loss"].requires_grad
    with pytest.raises(ModelBatchError, match="no samples"):
        bundle.evaluate([])
    with pytest.raises(ModelBatchError, match=r"must yield \(x, y\)"):
        bundle.evaluate([torch.randn(2, 4)])


def test_freezing_counts() -> None:
    bundle = ModelBatch([mlp() for _ in range(4)])
    bundle.freeze([0, -1])
    assert bundle.active.tolist() == [False, True, True, False]
    loss = bundle.compute_loss(bundle(torch.randn(3, 4)), torch.randint(3, (3,)))
    assert bundle.latest_losses is not None
    torch.testing.assert_close(loss.detach(), bundle.latest_losses[1:3].mean())
    loss.backward()
    weight = dict(bundle.named_parameters())["0.weight"]
    assert weight.grad is not None and not weight.grad[0].any() and weight.grad[1].any()
    bundle.unfreeze(0)
    assert bundle.metrics()["active_models"] == 3.0
    with pytest.raises(ModelBatchError, match="no model 4 in a bundle of 4"):
        bundle.freeze([1, 4])
    assert bundle.active.tolist() == [True, True, True, False]


def test_train_step_takes_tensors_tuples_and_dicts() -> None:
    models = [Flexible() for _ in range(2)]
    x, t = torch.randn(4, 3), torch.randint(2, (4,))
    expected = None
    for inputs in (x, (x,), {"x": x}):
        bundle = ModelBatch(
            copy.deepcopy(models), lr_list=[0.1, 0.1], optimizer_cls=torch.optim.SGD
        )
        bundle.train_step(inputs, t)
        expected = expected or state(bundle)
        assert all(torch.equal(v, expected[k]) for k, v in bundle.state_dict().items())


@pytest.mark.parametrize("engine", [False, True])
def test_a_failing_step_changes_nothing(engine: bool) -> None:
    models = [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)) for _ in range(3)]
    bundle = ModelBatch(models, lr_list=[0.1] * 3, optimizer_cls=torch.optim.Adam)
    bundle.enable_engine(engine)
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    bundle.train_step(x, y)
    before, step = bits(bundle), bundle._streams.step.clone()
    grads = [p.grad.clone() for p in bundle.parameters() if p.grad is not None]
    assert len(grads) == (0 if engine else 4)
    with pytest.raises(ModelBatchError, match="loss of model 0 failed: Target . is out of bounds"):
        bundle.train_step(x, torch.full((6,), 7))
    with pytest.raises((ModelBatchError, ValueError, RuntimeError)):
        bundle.train_step(x, torch.randint(3, (5,)))
    assert all(torch.equal(a, b) for a, b in zip(before, bits(bundle)))
    assert torch.equal(step, bundle._streams.step)
    after = [p.grad for p in bundle.parameters() if p.grad is not None]
    assert len(after) == len(grads) and all(torch.equal(g, h) for g, h in zip(grads, after))


def test_a_copied_bundle_trains_on_its_own() -> None:
    bundle = ModelBatch(
        [mlp() for _ in range(2)], lr_list=[0.1] * 2, optimizer_cls=torch.optim.Adam
    )
    x, y = torch.randn(5, 4), torch.randint(3, (5,))
    bundle.train_step(x, y)
    other = copy.deepcopy(bundle)
    before = bits(bundle)
    other.train_step(x, y)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(bundle)))
    bundle.train_step(x, y)
    assert all(torch.equal(a, b) for a, b in zip(bits(other), bits(bundle)))


def test_a_bundle_shows_its_model_and_explain_its_operations() -> None:
    bundle = ModelBatch([mlp() for _ in range(2)])
    assert "num_models=2" in repr(bundle)
    assert "Linear(in_features=4, out_features=5" in repr(bundle)
    report = bundle.explain(torch.randn(2, 4))
    assert [(op.name, op.path, op.count) for op in report.operations] == [
        ("linear", "modelbatch rule", 2),
        ("relu", "torch rule", 1),
    ]
    assert not report.fallbacks
