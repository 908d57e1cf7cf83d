"""The accuracy metric."""

import pytest
import torch
from torch import Tensor

from modelbatch import ModelBatchError
from modelbatch.training import accuracy

LOGITS = torch.tensor([[2.0, 1, 0], [0, 3, 1], [0, 1, 5], [1, 0, 0]])
CLASSES = torch.tensor([0, 1, 1, 0])


def test_classes() -> None:
    assert accuracy(LOGITS, CLASSES) == 0.75
    assert accuracy(LOGITS, CLASSES, reduction="none").tolist() == [1, 1, 0, 1]
    assert accuracy(LOGITS, torch.eye(3)[CLASSES]) == 0.75  # probabilities


def test_several_predictions_per_sample() -> None:
    """Classes in dim 1, as for cross entropy, or in the last."""
    outputs, targets = LOGITS.T.unsqueeze(0), CLASSES.unsqueeze(0)
    assert accuracy(outputs, targets) == 0.75
    assert accuracy(LOGITS.unsqueeze(0), targets) == 0.75
    assert accuracy(outputs, targets, reduction="none").shape == (1, 4)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
def test_yes_or_no(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    outputs = torch.tensor([-1.0, 2, 3, -0.5]).reshape(shape)
    targets = torch.tensor([0, 1, 0, 1]).to(dtype)
    assert accuracy(outputs, targets.reshape(shape)) == 0.5
    assert accuracy(outputs, targets) == 0.5  # [B, 1] against [B], too


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_not_counted_in_16_bits(dtype: torch.dtype) -> None:
    outputs = torch.zeros(5000, 2, dtype=dtype)
    outputs[:4999, 0] = 1
    result: Tensor = accuracy(outputs, torch.cat([torch.zeros(4999), torch.zeros(1)]).long())
    assert result.dtype == torch.float32
    assert result == 1.0
    outputs[0, 1] = 2
    assert accuracy(outputs, torch.zeros(5000).long()) == pytest.approx(0.9998)


def test_what_is_refused() -> None:
    with pytest.raises(ModelBatchError, match=r"\(4, 3\).*\(5,\)"):
        accuracy(LOGITS, torch.zeros(5))
    with pytest.raises(ModelBatchError, match="reduction"):
        accuracy(LOGITS, CLASSES, reduction="sum")
