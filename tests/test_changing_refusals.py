"""Changes of a bundle that cannot be: refused by name, with nothing changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from changing_case import Net, batches, everything, nets, same
from torch import nn
from torch.optim import lr_scheduler

from modelbatch import ModelBatch, ModelBatchError, OptimizerFactory, StructureMismatchError
from modelbatch.optim import BundleGradScaler


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(5, 4).double()


class Untied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.again.weight = nn.Parameter(torch.zeros(5, 5, dtype=torch.float64))


def odd(change: Callable[[Any], Any]) -> Net:
    net = Net()
    change(net)
    return net


def hooked() -> Net:
    net = Net()
    net.last.weight.register_hook(lambda grad: grad)
    return net


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "all of them": (lambda mb: mb.prune(range(3)), ModelBatchError, "at least one model"),
    "one twice": (lambda mb: mb.prune([1, -2]), ModelBatchError, "model 1 is named twice"),
    "no such model": (lambda mb: mb.prune([0, 3]), ModelBatchError, "no model 3"),
    "a bool": (lambda mb: mb.prune([True]), ModelBatchError, "no model True"),
    "a float": (lambda mb: mb.prune(torch.tensor([0.0])), ModelBatchError, "no model 0.0"),
    "replacing none": (lambda mb: mb.replace(7, Net()), ModelBatchError, "no model 7"),
    "no module": (lambda mb: mb.replace(0, 3), ModelBatchError, r"model 0 \(new\) is a int"),
    "no sequence": (lambda mb: mb.append(Net()), ModelBatchError, "sequence of modules"),
    "itself": (lambda mb: mb.replace(0, mb[0]), ModelBatchError, "also one of model 0"),
    "one of the others": (lambda mb: mb.append([mb[1]]), ModelBatchError, "also one of model 1"),
    "one twice anew": (
        lambda mb: mb.append([net := Net(), net]),
        ModelBatchError,
        r"also one of model 3 \(new\)",
    ),
    "other class": (
        lambda mb: mb.replace(2, Wider()),
        StructureMismatchError,
        r"is a Net in model 0 and a Wider in model 2 \(new\)",
    ),
    "other shape": (
        lambda mb: mb.append([odd(lambda n: setattr(n, "last", nn.Linear(5, 4).double()))]),
        StructureMismatchError,
        r"'last.weight' has shape \(3, 5\) in model 0 and \(4, 5\) in model 3 \(new\)",
    ),
    "other ties": (lambda mb: mb.append([Untied()]), StructureMismatchError, "Untied"),
    "other dtype": (
        lambda mb: mb.append([Net(), Net().float()]),
        StructureMismatchError,
        r"dtype torch.float64 in model 0 and torch.float32 in model 4 \(new\)",
    ),
    "other device": (
        lambda mb: mb.append([odd(lambda n: n.last.to("meta"))]),
        StructureMismatchError,
        "meta",
    ),
    "other mode": (lambda mb: mb.append([Net().eval()]), StructureMismatchError, "eval mode"),
    "other attribute": (
        lambda mb: mb.append([odd(lambda n: setattr(n.norm, "momentum", "much"))]),
        StructureMismatchError,
        "'norm.momentum' differs",
    ),
    "a gradient hook": (lambda mb: mb.append([hooked()]), StructureMismatchError, "gradient hook"),
    "seeds": (lambda mb: mb.append([Net()], seeds=[1, 2]), ModelBatchError, "2 entries for 1"),
    "bad seed": (lambda mb: mb.replace(0, Net(), seed=0.5), ModelBatchError, "64-bit integer"),
    "rates": (lambda mb: mb.append([Net()], lr=[0.1, 0.2]), ModelBatchError, "2 values for 1"),
    "negative rate": (
        lambda mb: mb.append([Net()], lr=-1.0),
        ModelBatchError,
        r"model 3 \(new\): option 'lr' is negative",
    ),
    "unknown option": (
        lambda mb: mb.replace(1, Net(), momentums=0.9),
        ModelBatchError,
        r"model 1 \(new\): Adam has no option 'momentums'",
    ),
    "option of all": (
        lambda mb: mb.replace(1, Net(), betas=(2.0, 0.9)),
        ModelBatchError,
        r"model 1 \(new\)",
    ),
    "no clipping": (
        lambda mb: mb.replace(1, Net(), clip_grad_norm=0.1),
        ModelBatchError,
        "does not clip",
    ),
    "no follower": (lambda mb: mb.follow(3), ModelBatchError, "cannot follow"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_nothing_changes_by_a_refused_call(case: str) -> None:
    call, error, message = REFUSED[case]
    mb = ModelBatch(nets(3), [0.1] * 3, torch.optim.Adam)
    mb.train_step(*batches(1)[0])
    scheduler = OptimizerFactory.create_lr_scheduler(
        mb.optimizer, lr_scheduler.StepLR, {"step_size": 1}
    )
    before, rates = everything(mb), scheduler.state_dict()
    with pytest.raises(error, match=message):
        call(mb)
    assert same(everything(mb), before) and scheduler.state_dict() == rates
    mb.train_step(*batches(1)[0])


def test_not_within_sample_weights() -> None:
    mb = ModelBatch(nets(3))
    with mb.sample_weights(torch.ones(3, 8)), pytest.raises(ModelBatchError, match="within"):
        mb.prune(0)
    mb.prune(0)


def test_not_during_a_line_search() -> None:
    mb = ModelBatch(nets(2), [0.1] * 2, torch.optim.LBFGS)

    def closure() -> Any:
        mb.prune(0)

    with pytest.raises(ModelBatchError, match="while LBFGS searches"):
        mb.step(closure)
    assert len(mb) == 2


def test_a_follower_that_cannot() -> None:
    class Follower:
        def check_models_change(self, change: Any) -> None:
            raise ModelBatchError("not now")

        def models_changed(self, change: Any) -> None:
            raise AssertionError

    mb, follower = ModelBatch(nets(2), [0.1] * 2, torch.optim.Adam), Follower()
    mb.follow(follower)
    before = everything(mb)
    with pytest.raises(ModelBatchError, match="not now"):
        mb.replace(0, Net(4))
    assert same(everything(mb), before)


def test_limits_that_differ_must_be_given() -> None:
    factory = OptimizerFactory(torch.optim.SGD, clip_grad_value=[0.1, 0.2])
    mb = ModelBatch(nets(2))
    factory.create_optimizer(mb)
    with pytest.raises(ModelBatchError, match=r"model 2 \(new\): clip_grad_value differs"):
        mb.append([Net()])
    with pytest.raises(ModelBatchError, match="must be above 0"):
        mb.append([Net()], clip_grad_value=0.0)
    mb.append([Net()], clip_grad_value=0.3)
    assert mb.optimizer.clip_grad_value == [0.1, 0.2, 0.3]


def test_no_options_without_an_optimizer() -> None:
    mb = ModelBatch(nets(2))
    with pytest.raises(ModelBatchError, match="has no optimizer"):
        mb.append([Net()], lr=0.1)


def test_an_attribute_that_a_forward_has_set() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: Any) -> Any:
            self.calls = self.calls + 1
            return super().forward(x)

    mb = ModelBatch([Counting(4, 2) for _ in range(2)])
    mb(torch.ones(3, 4))
    mb.prune(0)
    with pytest.raises(StructureMismatchError, match=r"'calls' was set by the forward"):
        mb.append([Counting(4, 2)])
    fresh = Counting(4, 2)
    fresh.calls = mb[0].calls
    mb.append([fresh])
    mb(torch.ones(3, 4))


class TestOptimizersOfTorch:
    """Stock optimizers over the stacked parameters."""

    def make(self, cls: Any = torch.optim.Adam, **options: Any) -> ModelBatch:
        mb = ModelBatch(nets(3))
        mb.optimizer = cls(mb.parameters(), **options)
        return mb

    def test_models_leave_elementwise_rules(self) -> None:
        mb, alone = self.make(lr=0.1), ModelBatch(nets(3))
        alone.optimizer = torch.optim.Adam(alone.parameters(), lr=0.1)
        for number, (x, y) in enumerate(batches(4)):
            if number == 2:
                mb.prune(1)
            mb.train_step(x, y)
            alone.train_step(x, y)
        for a, b in zip(mb.parameters(), alone.parameters()):
            torch.testing.assert_close(a, b[[0, 2]], rtol=1e-9, atol=1e-12)

    def test_none_joins_those_that_have_stepped(self) -> None:
        mb = self.make(lr=0.1)
        mb.append([Net(5)])  # nobody has yet
        mb.train_step(*batches(1)[0])
        with pytest.raises(ModelBatchError, match="counts the steps of all models together"):
            mb.replace(0, Net(6))
        with pytest.raises(ModelBatchError, match="no options for single models"):
            mb.replace(0, Net(6), lr=0.1)

    def test_rules_over_whole_tensors(self) -> None:
        mb = self.make(torch.optim.Adafactor)
        mb.train_step(*batches(1)[0])
        before = everything(mb)
        with pytest.raises(ModelBatchError, match="no parts of single models"):
            mb.prune(0)
        assert same(everything(mb), before)


def test_a_scaler_of_its_own_follows() -> None:
    mb = ModelBatch(nets(3), [0.1] * 3, torch.optim.SGD)
    mb.grad_scaler = BundleGradScaler(init_scale=8.0, growth_interval=2)
    for x, y in batches(3):
        mb.train_step(x, y)
    mb.freeze(0)
    mb.train_step(x, y)
    assert mb.grad_scaler.get_scale() == [16.0, 32.0, 32.0]
    mb.prune(1)
    assert mb.grad_scaler.get_scale() == [16.0, 32.0]
    mb.append([Net(4)], lr=0.1)
    assert mb.grad_scaler.get_scale() == [16.0, 32.0, 8.0]
    mb.train_step(x, y)
    mb.train_step(x, y)
    assert mb.grad_scaler.get_scale() == [16.0, 64.0, 16.0]
