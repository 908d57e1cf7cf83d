"""Every refusal names the culprit and leaves models and bundle as they were."""

from typing import Any

import pytest
import torch
from bundle_case import row
from small_models import Everything, mlp
from torch import Tensor, nn

from modelbatch import ModelBatch, ModelBatchError, StructureMismatchError


class Other(nn.Module):
    def __init__(self, width: int = 3, bias: bool = True, name: str = "a") -> None:
        super().__init__()
        self.layer = nn.Linear(2, width, bias=bias)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def shared_module() -> list[nn.Module]:
    inner = nn.Linear(2, 2)
    return [nn.Sequential(inner), nn.Sequential(inner)]


def shared_parameter() -> list[nn.Module]:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.weight = a.weight
    return [a, b]


def untied() -> list[nn.Module]:
    a, b = Everything(), Everything()
    b.tied.weight = nn.Parameter(torch.randn(4, 4))
    return [a, b]


def hooked_parameter() -> list[nn.Module]:
    models: list[nn.Module] = [nn.Linear(2, 2), nn.Linear(2, 2)]
    models[1].weight.register_hook(lambda g: g)  # type: ignore[operator,union-attr]
    return models


same = nn.Linear(2, 2)
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "empty": (lambda: [], ModelBatchError, "at least one model"),
    "not a module": (lambda: [nn.Linear(2, 2), 3], ModelBatchError, r"models\[1\] is a int"),
    "same model twice": (lambda: [same, same], ModelBatchError, "must not share"),
    "shared module": (shared_module, ModelBatchError, r"module '0' of models\[1\]"),
    "shared parameter": (shared_parameter, ModelBatchError, r"parameter 'weight' of models\[1\]"),
    "other class": (
        lambda: [nn.Sequential(nn.ReLU()), nn.Sequential(nn.Tanh())],
        StructureMismatchError,
        "module '0' is a ReLU in model 0 and a Tanh in model 1",
    ),
    "other shape": (
        lambda: [Other(), Other(4)],
        StructureMismatchError,
        r"'layer.weight' has shape \(3, 2\) in model 0 and \(4, 2\) in model 1",
    ),
    "missing parameter": (
        lambda: [Other(), Other(bias=False)],
        StructureMismatchError,
        r"layer\.bias",
    ),
    "more modules": (
        lambda: [nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU(), nn.ReLU())],
        StructureMismatchError,
        "model 1 has 3 modules, model 0 has 2",
    ),
    "other dtype": (
        lambda: [Other(), Other().double()],
        StructureMismatchError,
        "dtype torch.float32 in model 0",
    ),
    "other device": (
        lambda: [Other(), Other().to("meta")],
        StructureMismatchError,
        "device cpu in model 0",
    ),
    "other mode": (
        lambda: [Other(), Other().eval()],
        StructureMismatchError,
        "train mode in model 0",
    ),
    "other requires_grad": (
        lambda: [Other(), Other().requires_grad_(False)],
        StructureMismatchError,
        "requires_grad",
    ),
    "other string": (
        lambda: [Other(), Other(name="b")],
        StructureMismatchError,
        "attribute 'name' differs between models: 'a' in model 0, 'b' in model 1",
    ),
    "tied differently": (untied, StructureMismatchError, "tie"),
    "hook on a parameter": (
        hooked_parameter,
        StructureMismatchError,
        "'weight' has a gradient hook",
    ),
    "lazy": (
        lambda: [nn.LazyLinear(2), nn.LazyLinear(2)],
        StructureMismatchError,
        "not initialised",
    ),
    "a single module": (lambda: nn.Linear(2, 2), ModelBatchError, "single module"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("case", REFUSED)
def test_models_that_do_not_fit_are_refused_unchanged(case: str) -> None:
    make, error, message = REFUSED[case]
    models = make()
    with pytest.raises(error, match=message):
        ModelBatch(models)
    for model in models if isinstance(models, list) else []:
        if isinstance(model, nn.Module) and case != "lazy":
            assert all(p._base is None for p in model.parameters())


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "too few rates": (
        {"lr_list": [0.1], "optimizer_cls": torch.optim.SGD},
        ModelBatchError,
        "1.*2|2.*1",
    ),
    "negative rate": (
        {"lr_list": [0.1, -1.0], "optimizer_cls": torch.optim.SGD},
        ModelBatchError,
        "model 1",
    ),
    "nan rate": (
        {"lr_list": [float("nan"), 0.1], "optimizer_cls": torch.optim.Adam},
        ModelBatchError,
        "model 0",
    ),
    "bad beta": (
        {
            "lr_list": [0.1, 0.1],
            "optimizer_cls": torch.optim.Adam,
            "optimizer_kwargs": [{}, {"betas": (0.9, 1.5)}],
        },
        ModelBatchError,
        "model 1",
    ),
    "unknown option": (
        {
            "lr_list": [0.1, 0.1],
            "optimizer_cls": torch.optim.SGD,
            "optimizer_kwargs": {"momentums": 0.9},
        },
        ModelBatchError,
        "momentums",
    ),
    "rates without class": ({"lr_list": [0.1, 0.1]}, ModelBatchError, "need optimizer_cls"),
    "seeds": ({"seeds": [1]}, ModelBatchError, "seeds has 1 entries for 2 models"),
    "bad seed": ({"seeds": [1, 0.5]}, ModelBatchError, r"seeds\[1\]"),
    "rng": ({"rng": "numpy"}, ModelBatchError, "numpy"),
    "fallback": ({"fallback": "maybe"}, ModelBatchError, "maybe"),
    "chunk_size": ({"chunk_size": 2}, NotImplementedError, "chunk_size"),
    "memory_budget": ({"memory_budget": "80%"}, NotImplementedError, "memory_budget"),
    "devices": ({"devices": ["cpu", "cpu"]}, NotImplementedError, "devices"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_fail_before_anything_changes(case: str) -> None:
    arguments, error, message = BAD_ARGUMENTS[case]
    models = [mlp(), mlp()]
    pointers = [p.data_ptr() for m in models for p in m.parameters()]
    with pytest.raises(error, match=message):
        ModelBatch(models, **arguments)
    assert pointers == [p.data_ptr() for m in models for p in m.parameters()]


def test_later_features_are_refused_by_name() -> None:
    bundle = ModelBatch([mlp(), mlp()])
    with pytest.raises(NotImplementedError, match="capture_cuda_graph"):
        bundle.capture_cuda_graph()


def test_misuse_of_a_bundle_is_refused() -> None:
    bundle = ModelBatch([mlp(), mlp()])
    with pytest.raises(ModelBatchError, match="has no optimizer"):
        bundle.step()
    with pytest.raises(ModelBatchError, match="has no optimizer"):
        bundle.train_step(torch.randn(2, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ModelBatchError, match="come from its models"):
        bundle.extra = nn.Linear(2, 2)
    part = bundle.get_submodule("0")
    with pytest.raises(ModelBatchError, match="call the bundle"):
        part(torch.randn(2, 4))
    with pytest.raises(ModelBatchError, match="never run"):
        part.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelBatchError, match="reduction"):
        bundle.compute_loss(bundle(torch.randn(2, 4)), torch.zeros(2).long(), reduction="max")
    with pytest.raises(ModelBatchError, match=r"output 0 has shape \(5, 3\)"):
        bundle.compute_loss(torch.randn(5, 3), torch.zeros(5).long())
    assert row(bundle(torch.randn(2, 4)), 0).shape == (2, 3)
