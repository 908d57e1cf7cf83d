"""The models' gradients as views: shown on request, hidden and renewed."""

import pytest
import torch
from torch import nn

from modelbatch.optim.gradients import GradientViews


@pytest.fixture
def bundle(hand_made, regression):
    bundle = hand_made()
    bundle.losses(regression()).sum().backward()
    return bundle


@pytest.fixture
def views(bundle):
    return GradientViews(bundle.stacked, bundle.models, lambda: bundle.active)


def test_nothing_is_shown_before_refresh(bundle, views):
    assert not views.shown
    assert len(views.gradients) == 4
    views.refresh()
    assert views.shown
    for name, parameter in bundle.stacked.items():
        for i, model in enumerate(bundle.models):
            own = model.get_parameter(name)
            assert own.grad.data_ptr() == parameter.grad[i].data_ptr()
    views.clear()
    assert not views.shown
    assert not views.gradients
    assert all(p.grad is None for model in bundle.models for p in model.parameters())


def test_clear_does_not_look_at_models_that_show_nothing(bundle, views):
    kept = torch.ones(2, dtype=torch.float64)
    bundle.models[1][2].bias.grad = kept
    views.clear()
    assert bundle.models[1][2].bias.grad is kept
    views.clear(set_to_none=False)
    assert not views.shown


def test_changed_gradients_are_shown_at_the_next_refresh(bundle, views):
    views.refresh()
    parameter = bundle.stacked["2.bias"]
    parameter.grad = parameter.grad + 1
    bundle.stacked["0.weight"].grad = None
    views.refresh()
    assert torch.equal(bundle.models[2][2].bias.grad, parameter.grad[2])
    assert bundle.models[2][0].weight.grad is None


def test_flags(bundle, views):
    assert views.active_flags() == [True] * 3
    bundle.active[0] = False
    views.exclude([1])
    assert views.active_flags() == [False, False, True]
    views.exclude(())
    views.lose([2])
    assert views.active_flags() == [False, True, False]
    assert views.lost == {2}
    assert views.pattern[0] == (True,) * 3, "of the last refresh"
    views.refresh()
    assert views.pattern[0] == (False, True, False)
    assert bundle.models[2][0].weight.grad is None


def test_lost_models_are_found_when_their_gradients_are_finite(bundle, views):
    views.lose([0, 2])
    bundle.stacked["0.weight"].grad[2, 0, 0] = float("inf")
    bundle.stacked["2.bias"].data[1, 0] = float("nan")
    assert views.nonfinite_models() == [2]
    assert views.diverged_models() == [1]
    assert views.find_again() == [0]
    assert views.lost == {2}
    assert views.find_again() == []


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_nonfinite_sparse_gradients(hand_made):
    bundle = hand_made(lambda: nn.Sequential(nn.Embedding(6, 4, sparse=True)))
    views = GradientViews(bundle.stacked, bundle.models, lambda: bundle.active)
    values = torch.ones(3, 4, dtype=torch.float64)
    values[1, 2] = float("nan")
    places = torch.tensor([[0, 2, 2], [5, 1, 4]])
    bundle.stacked["0.weight"].grad = torch.sparse_coo_tensor(places, values, (3, 6, 4))
    assert views.nonfinite_models() == [2]
