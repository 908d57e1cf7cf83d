"""Python values of tensors in a forward: batched where all models have the same."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from bundle_case import assert_relative
from torch import Tensor, nn

from modelbatch import BatchingError, FallbackWarning, ModelBatch, per_model


class Branches(nn.Module):
    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        nn.init.constant_(self.layer.bias, bias)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        out = self.layer(x)
        mask = out > 0.5
        if mask.any():
            out = out.masked_fill(mask, 0.5)
        return out


def test_a_branch_on_data_falls_back_to_the_loop_with_one_warning() -> None:
    torch.manual_seed(0)
    models = [Branches(10.0 * (-1) ** i).double() for i in range(4)]  # they go both ways
    bundle = ModelBatch(copy.deepcopy(models))
    x = torch.randn(5, 3, dtype=torch.float64)
    with pytest.warns(FallbackWarning, match="data-dependent control flow") as caught:
        first = bundle(x)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # it points at the user's line
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = bundle(x)
    bundle.compute_loss(second, torch.zeros(5, dtype=torch.long)).backward()
    for i, model in enumerate(models):
        assert_relative(first[i], model(x), 1e-12)
        F.cross_entropy(model(x), torch.zeros(5, dtype=torch.long)).backward()
        assert_relative(bundle.gradients(i)["layer.weight"], model.layer.weight.grad, 1e-10)
        assert bundle[i].count.item() == 2  # the failed attempt left no trace
    report = bundle.explain(x)
    assert report.fallbacks == ["data-dependent control flow"]
    assert "model by model" in str(report)
    assert bundle[0].count.item() == 2


def test_fallback_error_and_silent() -> None:
    x = torch.randn(5, 3)
    models = [Branches(10.0), Branches(-10.0)]
    strict = ModelBatch(copy.deepcopy(models), fallback="error")
    with pytest.raises(BatchingError, match="data-dependent"):
        strict(x)
    assert strict[0].count.item() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelBatch(copy.deepcopy(models), fallback="silent")(x)
    with pytest.raises(BatchingError):
        ModelBatch(models, fallback="error", base_batch=x)


@pytest.mark.parametrize("bias", [10.0, -10.0])
def test_a_branch_that_all_models_take_is_batched(bias: float) -> None:
    models = [Branches(bias).double() for _ in range(4)]
    bundle = ModelBatch(copy.deepcopy(models), fallback="error")
    x = torch.randn(5, 3, dtype=torch.float64)
    out = bundle(x)
    for i, model in enumerate(models):
        assert_relative(out[i], model(x), 1e-12)
    assert bundle.explain(x).fallbacks == []


class Reads(nn.Module):
    """Python values of tensors, in the forms that one meets."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = x[:, : int(lengths.max())] * self.weight
        if (lengths == 0).any() or lengths.sum().is_nonzero() is False:
            return x * 0
        sizes = lengths.tolist()
        zero = (0.0 * self.weight).item()  # its sign is that of the weight
        return x.sum() / sizes[0] + float(lengths[0]) + lengths[1].item() + 1 / (1 + abs(zero))


def test_values_that_all_models_have() -> None:
    models = [Reads() for _ in range(3)]
    bundle = ModelBatch(copy.deepcopy(models), fallback="error", shared_input=True)
    x, lengths = torch.randn(2, 6), torch.tensor([4, 3])
    out = bundle(per_model(x.expand(3, 2, 6)), per_model(lengths.expand(3, 2)))
    for i, model in enumerate(models):
        assert_relative(out[i], model(x, lengths), 1e-6)


def test_values_that_differ_are_not_taken_from_the_first() -> None:
    x, lengths = torch.randn(3, 2, 6), torch.tensor([[4, 3], [4, 2], [2, 5]])
    models = [Reads() for _ in range(3)]
    bundle = ModelBatch(copy.deepcopy(models), fallback="silent")
    out = bundle(per_model(x), per_model(lengths))
    for i, model in enumerate(models):
        assert_relative(out[i], model(x[i], lengths[i]), 1e-6)
    signs = ModelBatch([Reads(1.0), Reads(-1.0)], fallback="error")  # 0.0 and -0.0
    with pytest.raises(BatchingError, match=r"Tensor.item\(\)"):
        signs(x[0], lengths[0])


def test_a_value_is_read_anew_for_every_batch() -> None:
    """Compiled or not: what one batch had in common says nothing of the next."""
    models = [Branches() for _ in range(3)]
    bundle = ModelBatch(copy.deepcopy(models), fallback="silent")
    for x in (torch.full((2, 3), 50.0), torch.zeros(2, 3), torch.randn(2, 3)):
        out = bundle(x)
        for i, model in enumerate(models):
            assert_relative(out[i], model(x), 1e-6)
