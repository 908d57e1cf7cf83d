"""Together equals alone, through Lightning: a bundle against a Trainer for every model."""

import pytest
import torch
from integrations.lightning.lightning_case import (
    Losses,
    M,
    alone,
    bundle,
    data,
    loader,
    trainer,
)
from torch import Tensor

SETTINGS = {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2, "max_epochs": 3}
OPTIMIZERS = (torch.optim.SGD, torch.optim.AdamW)


def together(optimizer_cls, dtype, start=None, **settings) -> tuple[Tensor, list[dict]]:
    """Losses `[steps, M]` and the final states of all models."""
    module, losses = bundle(optimizer_cls, dtype=dtype), Losses()
    own = {**SETTINGS, **settings}
    trainer(losses, **own).fit(module, loader(data(dtype=dtype)))
    norms = module.bundle.optimizer.last_grad_norms
    if own.get("gradient_clip_val"):
        assert norms is not None and len(set(norms.tolist())) == M
    return torch.stack(losses.rows), [module.export_model(i).state_dict() for i in range(M)]


def separately(optimizer_cls, dtype, wide=False, **settings) -> tuple[Tensor, list[dict]]:
    """The same from M Trainers; with `wide`, computed in float64 from weights of `dtype`."""
    columns, states = [], []
    for i in range(M):
        start = alone(i, optimizer_cls, dtype).model
        kind = torch.float64 if wide else dtype
        module = alone(i, optimizer_cls, kind, start=start)
        trainer(**{**SETTINGS, **settings}).fit(module, loader(data(dtype=kind)))
        columns.append(torch.stack(module.losses))
        states.append(module.model.state_dict())
    return torch.stack(columns, 1), states


def weights_of(states: list[dict]) -> Tensor:
    return torch.cat([own.double().flatten() for state in states for own in state.values()])


@pytest.mark.parametrize("optimizer_cls", OPTIMIZERS)
def test_eight_models_together_equal_eight_trainers(optimizer_cls):
    """Clipping, accumulation (with an incomplete last group), warm-up and decay, dropout."""
    losses, states = together(optimizer_cls, torch.float64)
    expected, expected_states = separately(optimizer_cls, torch.float64)
    assert losses.shape == (21, M)
    assert (losses - expected).abs().max() <= 1e-8 * expected.abs().max()
    own, other = weights_of(states), weights_of(expected_states)
    assert (own - other).abs().max() <= 1e-8 * other.abs().max()


@pytest.mark.parametrize("optimizer_cls", OPTIMIZERS)
def test_single_precision_errs_as_little_as_torch_does(optimizer_cls):
    """Dropout draws the same masks in both precisions only without: so it is left out here."""
    truth, true_states = _without_dropout(separately, optimizer_cls, torch.float32, wide=True)
    plain, plain_states = _without_dropout(separately, optimizer_cls, torch.float32)
    losses, states = _without_dropout(together, optimizer_cls, torch.float32)
    for own, other, true in (
        (losses.double(), plain.double(), truth),
        (weights_of(states), weights_of(plain_states), weights_of(true_states)),
    ):
        allowed = 2 * (other - true).abs().max()
        assert 0 < allowed < 1e-3
        assert (own - true).abs().max() <= allowed


def _without_dropout(run, *args, **kwargs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)
        return run(*args, **kwargs)


def test_clipping_by_value():
    settings = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    module, losses = bundle(), Losses()
    trainer(losses, **settings).fit(module, loader(data()))
    for i in (0, M - 1):
        own = alone(i)
        trainer(**settings).fit(own, loader(data()))
        column = torch.stack(losses.rows)[:, i]
        assert (column - torch.stack(own.losses)).abs().max() <= 1e-9


def test_the_number_of_models_scales_nothing():
    """The mean over models is for the eye; gradients are those of the sum."""
    results = []
    for count in (1, 2, 5):
        module, losses = bundle(count=count), Losses()
        trainer(losses, max_epochs=1).fit(module, loader(data()))
        results.append(torch.stack(losses.rows)[:, 0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=0.0)
    assert torch.equal(results[1], results[2])


def test_one_diverging_model_leaves_the_others_bits(request):
    """Neither the shown mean, nor clipping, nor the step couples models."""
    results = []
    for broken in (False, True):
        module, losses = bundle(torch.optim.AdamW), Losses()
        if broken:
            with torch.no_grad():
                module.bundle[2][0].weight.fill_(float("nan"))
        own = trainer(losses, gradient_clip_val=0.1)
        own.fit(module, loader(data()))
        assert own.callback_metrics["train_loss"].isfinite()
        keep = [i for i in range(M) if i != 2]
        results.append(
            (
                torch.stack(losses.rows)[:, keep],
                weights_of([module.export_model(i).state_dict() for i in keep]),
            )
        )
    for own, other in zip(*results):
        assert torch.equal(own, other)
