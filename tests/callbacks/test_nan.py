"""NaNCallback: each action on each cause, and that no other model notices."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelbatch import BundleGradScaler, ModelBatch, ModelBatchError
from modelbatch.callbacks import Event, NaNCallback

RATES = [0.05, None, 0.02, None, 0.01]  # None: huge
BAD = [1, 3]
GOOD = [0, 2, 4]


@pytest.fixture
def rates(huge: float) -> list[float]:
    return [huge if rate is None else rate for rate in RATES]


OPTIMIZERS = [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adadelta, torch.optim.Adagrad]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_freeze_stops_diverging_models_and_nobody_else(
    loop: Any, recorder: Any, rows: Any, rates: list[float], optimizer: Any
) -> None:
    watched = loop(rates, [NaNCallback(), recorder], optimizer)
    frozen: dict[int, list[Tensor]] = {}

    def note(event: Event) -> None:
        for i in BAD:
            if not event.mb.active[i] and i not in frozen:
                frozen[i] = rows(event.mb, i)

    watched.poison = note
    watched.run(4)
    alone = loop(rates, [], optimizer)
    alone.run(4)
    assert any(not math.isfinite(row[i]) for row in alone.losses for i in BAD)
    assert watched.mb.active.tolist() == [i in GOOD for i in range(5)]
    assert sorted(i for _, models, _ in recorder.seen for i in models) == BAD
    for i in GOOD:
        torch.testing.assert_close(rows(watched.mb, i), rows(alone.mb, i), rtol=0, atol=0)
        assert [row[i] for row in watched.losses] == [row[i] for row in alone.losses]
    for i in BAD:  # from the step after the freeze on, not one bit changed
        torch.testing.assert_close(rows(watched.mb, i), frozen[i], rtol=0, atol=0, equal_nan=True)


def test_training_ends_when_nobody_is_left(loop: Any, huge: float, recorder: Any) -> None:
    run = loop([huge, huge], [NaNCallback(), recorder])
    event = run.run(50)
    assert event.stop and event.epoch < 49
    assert run.mb.active.tolist() == [False, False]


def _poison_gradient(event: Event) -> None:
    if event.step == 2:
        grad = event.mb.get_parameter("3.weight").grad
        assert grad is not None
        grad[1, 0, 2] = math.inf


def _poison_weight(event: Event) -> None:
    if event.step == 2:
        with torch.no_grad():
            event.mb.get_parameter("0.bias")[1, 3] = math.nan


def _poison_loss(event: Event) -> None:
    if event.step == 2:
        assert event.losses is not None
        event.losses[1] = -math.inf


CAUSES = {"gradient": _poison_gradient, "weights": _poison_weight, "loss": _poison_loss}


@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_is_seen_at_once_and_named(loop: Any, cause: str) -> None:
    run = loop([0.01] * 3, [NaNCallback("raise")])
    run.poison = CAUSES[cause]
    with pytest.raises(ModelBatchError, match=rf"at step 2: model 1: {cause}$"):
        run.run(2)
    assert run.event.step == 2


@pytest.mark.parametrize("cause", ["gradient", "weights"])
def test_a_cause_can_be_left_out(loop: Any, cause: str) -> None:
    option = {"gradient": "check_gradients", "weights": "check_weights"}[cause]
    run = loop([0.01] * 3, [NaNCallback("raise", **{option: False})])
    run.poison = CAUSES[cause]
    run.batches = run.batches[:2]  # the next step's loss would show it
    run.run(1)
    assert run.event.step == 2


def test_the_interval_is_kept(loop: Any, recorder: Any, rates: list[float]) -> None:
    run = loop(rates, [NaNCallback(interval=4), recorder])
    run.run(4)
    steps = {step for step, _, _ in recorder.seen}
    assert steps and all(step % 4 == 0 for step in steps)


def test_warn_warns_once_per_model(loop: Any, rates: list[float]) -> None:
    run = loop(rates, [NaNCallback("warn")])
    with pytest.warns(UserWarning, match="not finite at step") as caught:
        run.run(4)
    texts = [str(warning.message) for warning in caught]
    for i in range(5):
        assert sum(f"model {i}:" in text for text in texts) == (i in BAD)
    assert run.mb.active.all()


def test_a_frozen_model_is_left_alone(loop: Any, rates: list[float]) -> None:
    run = loop(rates, [NaNCallback("raise")])
    run.mb.freeze(BAD)
    run.poison = _poison_weight  # of model 1, which is frozen
    run.run(4)


def test_reset_puts_back_the_last_good_weights(loop: Any, rows: Any) -> None:
    callback = NaNCallback("reset", keep_every=2)
    run = loop([0.05] * 3, [callback], torch.optim.Adam)
    kept: list[Tensor] = []

    def poison(event: Event) -> None:
        if event.step == 4:
            kept.extend(rows(event.mb, 1))
        if event.step == 5:
            _ruin(event, 1)

    run.poison = poison
    optimizer = run.mb.optimizer
    assert optimizer is not None
    run.run(2)  # 6 steps: ruined at 5, put back to step 4, then one step
    alone = loop([0.05] * 3, [], torch.optim.Adam)
    alone.run(2)
    for i in (0, 2):
        torch.testing.assert_close(rows(run.mb, i), rows(alone.mb, i), rtol=0, atol=0)
    assert callback.resets == {1: 1}
    steps = [_steps(optimizer, i) for i in range(3)]
    assert steps == [6, 1, 6]  # the optimizer of model 1 was as new
    # by hand: the kept weights, and one step of a fresh Adam
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))
    model.load_state_dict(dict(zip(model.state_dict(), kept, strict=True)))
    own = torch.optim.Adam(model.parameters(), lr=0.05)
    x, y = run.batches[2]
    ((model(x) - y) ** 2).mean().backward()
    own.step()
    for k, (one, other) in enumerate(
        zip(rows(run.mb, 1), model.state_dict().values(), strict=True)
    ):
        if k != 1:  # the bias before a BatchNorm: Adam makes a step out of the rounding of zero
            torch.testing.assert_close(one, other)


def _ruin(event: Event, i: int) -> None:
    with torch.no_grad():
        for parameter in event.mb.parameters():
            parameter[i] = math.nan
        event.mb.get_buffer("1.running_var")[i] = math.nan


def _steps(optimizer: torch.optim.Optimizer, i: int) -> int:
    (first, *_) = optimizer.param_groups[i]["params"]
    return int(optimizer.state[first]["step"])


def test_reset_to_a_fresh_model(loop: Any, rows: Any) -> None:
    made: list[int] = []

    def build(i: int) -> nn.Module:
        made.append(i)
        torch.manual_seed(100 + i)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))

    run = loop([0.01] * 3, [NaNCallback("reset", reset_to=build)])
    run.batches = run.batches[:2]

    def poison(event: Event) -> None:
        if event.step == 2:
            _ruin(event, 2)

    run.poison = poison
    run.run(1)
    assert made == [2]
    torch.testing.assert_close(
        rows(run.mb, 2), list(build(2).state_dict().values()), rtol=0, atol=0
    )


def test_reset_refuses_a_model_of_another_shape(loop: Any) -> None:
    run = loop([0.01] * 2, [NaNCallback("reset", reset_to=lambda: nn.Linear(4, 1))])
    run.poison = lambda event: _ruin(event, 1)
    with pytest.raises(ModelBatchError, match=r"in model 1, the fresh model has"):
        run.run(1)
    run = loop([0.01] * 2, [NaNCallback("reset", reset_to=lambda: 3)])  # type: ignore[return-value]
    run.poison = lambda event: _ruin(event, 1)
    with pytest.raises(ModelBatchError, match=r"model 1 returned a int"):
        run.run(1)


def test_whoever_diverges_for_ever_is_frozen_at_last(
    loop: Any, rates: list[float], recorder: Any
) -> None:
    callback = NaNCallback("reset", max_resets=2, keep_every=1000)
    run = loop(rates, [callback, recorder])
    run.run(8)
    assert callback.resets == {1: 2, 3: 2}
    assert run.mb.active.tolist() == [i in GOOD for i in range(5)]
    assert all("after 2 resets" in reason for _, _, reason in recorder.seen)


def test_a_lower_learning_rate_after_a_reset_saves_the_model(loop: Any, huge: float) -> None:
    callback = NaNCallback("reset", lr_factor=1e-32, keep_every=1000)
    run = loop([0.01, huge], [callback])
    run.run(8)
    assert callback.resets == {1: 1}
    assert run.mb.active.all() and all(map(math.isfinite, run.losses[-1]))
    assert run.mb.optimizer.param_groups[1]["lr"] == huge * 1e-32


def test_a_torch_optimizer_on_the_stack_is_cleared_too(loop: Any) -> None:
    run = loop([0.01] * 3, [NaNCallback("reset")])
    run.mb.optimizer = torch.optim.Adam(run.mb.parameters(), lr=0.01)
    run.event.optimizer = run.mb.optimizer
    run.batches = run.batches[:2]

    def poison(event: Event) -> None:
        if event.step == 2:
            _ruin(event, 0)

    run.poison = poison
    run.run(1)
    for state in run.mb.optimizer.state.values():
        assert not state["exp_avg"][0].any() and state["exp_avg"][1].any()


def test_prune_removes_the_bad_models(loop: Any, rates: list[float]) -> None:
    run = loop(rates, [NaNCallback("prune")])
    run.run(4)
    good = [i for i in range(len(rates)) if i not in BAD]
    assert run.mb.model_ids == good and run.mb.active.all()
    only = loop([rates[i] for i in good], [])
    only.batches = run.batches
    for own, i in zip(only.mb.models, good):
        own.load_state_dict(loop(rates, []).mb[i].state_dict())
    only.run(4)
    for a, b in zip(run.mb.parameters(), only.mb.parameters()):
        assert torch.equal(a, b)


def test_when_all_are_bad_they_are_frozen(loop: Any) -> None:
    run = loop([1e30] * 2, [NaNCallback("prune")])
    run.run(8)
    assert len(run.mb) >= 1 and not run.mb.active.any() and run.event.stop


def test_overflows_are_the_scalers_to_deal_with(loop: Any) -> None:
    run = loop([0.01] * 3, [NaNCallback()])
    scaler = run.mb.grad_scaler = BundleGradScaler(init_scale=2.0**127, growth_interval=10**6)
    run.run(50)  # the scale comes down from overflowing
    assert run.mb.active.all()
    assert (scaler._scale > 1).all()
    assert all(map(math.isfinite, run.losses[-1]))


def test_whom_no_scale_helps_is_frozen(loop: Any) -> None:
    run = loop([0.01] * 3, [NaNCallback()])
    run.mb.grad_scaler = BundleGradScaler(init_scale=4.0)

    def poison(event: Event) -> None:  # an infinite gradient, though loss and weights are fine
        grad = event.mb.get_parameter("3.weight").grad
        assert grad is not None
        grad[1] = math.inf

    run.poison = poison
    run.run(1)
    assert run.mb.active.all()  # its scale is 4 still
    run.mb.grad_scaler._scale[1] = 1.0
    run.run(1)
    assert run.mb.active.tolist() == [True, False, True]


def test_the_state_comes_back(loop: Any, rows: Any) -> None:
    first = NaNCallback("reset", keep_every=1)
    run = loop([0.01] * 3, [first])

    def poison(event: Event) -> None:
        if event.step == 2:
            _ruin(event, 1)

    run.poison = poison
    run.run(1)
    good = rows(run.mb, 1)
    second = NaNCallback("reset", keep_every=1000)
    second.load_state_dict(run.pack.state_dict()["NaNCallback"])
    assert second.resets == first.resets == {1: 1}
    with torch.no_grad():
        for parameter in run.mb.parameters():
            parameter.fill_(7)  # on_train_start must not keep these
    other = loop([0.01] * 3, [second])
    other.mb.load_state_dict(run.mb.state_dict())
    other.batches = other.batches[:1]
    other.poison = lambda event: _ruin(event, 1)
    other.run(1)
    torch.testing.assert_close(rows(other.mb, 1), good, rtol=0, atol=0)
    assert second.resets == {1: 2}


def test_models_that_were_warned_of_stay_so_after_a_resume(loop: Any, huge: float) -> None:
    first = NaNCallback("warn")
    run = loop([0.01, huge], [first])
    with pytest.warns(UserWarning, match="model 1"):
        run.run(3)
    second = NaNCallback("warn")
    second.load_state_dict(first.state_dict())
    run.pack = type(run.pack)([second])
    run.run(1)  # warnings are errors


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"action": "stop"}, "action must be one of"),
        ({"interval": 0}, "interval must be an integer of at least 1"),
        ({"interval": True}, "interval"),
        ({"keep_every": 2.5}, "keep_every"),
        ({"max_resets": -1}, "max_resets"),
        ({"lr_factor": 0.0}, "lr_factor must be positive"),
        ({"reset_to": nn.Linear}, 'for "reset" only'),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ModelBatchError, match=text):
        NaNCallback(**arguments)


def test_one_read_of_the_device(loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step costs does not depend on the number of models."""

    def count(num_models: int) -> list[str]:
        run = loop([0.01] * num_models, [NaNCallback()])
        run.run(1)
        reads: list[str] = []
        for name in ("__bool__", "tolist", "item", "__float__", "__int__"):
            original: Callable[..., Any] = getattr(Tensor, name)

            def counted(self: Tensor, *, _f: Any = original, _n: str = name) -> Any:
                reads.append(_n)
                return _f(self)

            monkeypatch.setattr(Tensor, name, counted)
        run.pack.on_train_step(run.event)
        monkeypatch.undo()
        return reads

    assert count(2) == count(9) == ["__bool__"]


def test_models_without_gradients(fresh: Any) -> None:
    mb = ModelBatch([fresh() for _ in range(2)])
    callback = NaNCallback("raise")
    callback.on_train_step(Event(mb, step=1))  # neither losses nor gradients
    mb.get_parameter("0.bias").data[1] = math.nan
    with pytest.raises(ModelBatchError, match="model 1: weights"):
        callback.on_train_step(Event(mb, step=2))
