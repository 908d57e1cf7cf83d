"""Which trials the pruners end."""

import pytest

from modelbatch import ModelBatchError
from modelbatch.sweep import MedianPruner, SuccessiveHalving


def test_the_median_ends_the_worse_half_and_then_who_falls_behind() -> None:
    pruner = MedianPruner(warmup_epochs=1)
    assert pruner.prune(0, {i: float(i) for i in range(6)}) == []
    assert pruner.prune(1, {i: float(i) for i in range(6)}) == [3, 4, 5]
    assert pruner.prune(2, {0: 0.0, 1: 2.0, 2: 9.0}) == [2]
    # another bundle is compared with the first, epoch by epoch: 0, 1, ..., 5 and 2.5
    assert pruner.prune(0, {7: 2.5}) == []
    assert pruner.prune(1, {7: 2.5}) == []
    # then with 0, 2, 9, 3, 4, 5
    assert pruner.prune(2, {7: 3.5}) == []
    assert pruner.prune(3, {7: 8.0}) == [7]
    pruner.reset()
    assert pruner.prune(5, {7: 8.0, 8: 9.0}) == []  # too few are known


def test_successive_halving_keeps_a_share_at_each_rung() -> None:
    pruner = SuccessiveHalving(min_epochs=2, reduction_factor=3)
    values = {i: float(9 - i) for i in range(9)}
    assert pruner.prune(0, values) == []
    assert pruner.prune(1, values) == [0, 1, 2, 3, 4, 5]
    rest = {6: 1.0, 7: 2.0, 8: 3.0}
    assert pruner.prune(2, rest) == pruner.prune(3, rest) == pruner.prune(4, rest) == []
    assert pruner.prune(5, rest) == [7, 8]
    # a later bundle has to be among the best third of twelve at the first rung
    assert pruner.prune(1, {20: 2.2, 21: 2.5, 22: float("inf")}) == [22]
    assert pruner.prune(1, {30: 3.7}) == [30]
    pruner.reset()
    assert pruner.prune(1, {5: float("inf")}) == [5]


@pytest.mark.parametrize(
    "make",
    [
        lambda: MedianPruner(warmup_epochs=-1),
        lambda: MedianPruner(min_trials=1),
        lambda: SuccessiveHalving(min_epochs=0),
        lambda: SuccessiveHalving(reduction_factor=1),
        lambda: SuccessiveHalving(min_epochs=True),
    ],
)
def test_bad_arguments(make: object) -> None:
    with pytest.raises(ModelBatchError, match="must be an integer from"):
        make()  # type: ignore[operator]
