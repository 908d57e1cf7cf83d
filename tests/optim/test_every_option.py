"""Every option of every torch optimizer, with another value for each model of a bundle.

The options come from the constructors' signatures: what torch adds fails here until it is covered.
"""

import copy
import inspect
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from modelbatch import ModelBatch
from modelbatch.errors import ModelBatchError
from modelbatch.optim import LockstepLBFGS, ViewOptimizer

M = 3
CLASSES = {
    name: cls
    for name in optim.__all__
    if isinstance(cls := getattr(optim, name), type)
    and issubclass(cls, optim.Optimizer)
    and cls is not optim.Optimizer
}

# What an option is set to in each model. A class's own entry comes before the general one.
VALUES: dict[str, list[Any]] = {
    "alpha": [0.9, 0.5, 0.99],
    "amsgrad": [False, True, True],
    "beta2_decay": [-0.8, -0.6, -0.9],
    "betas": [(0.9, 0.999), (0.8, 0.9), (0.6, 0.99)],
    "capturable": [False, False, False],  # more needs a GPU: see the test of its own
    "centered": [False, True, True],
    "d": [1.0, 2.0, 1.5],
    "dampening": [0.0, 0.5, 0.2],
    "decoupled_weight_decay": [False, True, False],
    "eps": [1e-8, 1e-3, 1e-5],
    "etas": [(0.5, 1.2), (0.4, 1.5), (0.3, 1.1)],
    "foreach": [None, True, False],
    "fused": [None, True, False],
    "history_size": [100, 2, 1],
    "initial_accumulator_value": [0.0, 0.3, 0.1],
    "lambd": [1e-4, 0.1, 0.5],
    "line_search_fn": ["strong_wolfe", None, "strong_wolfe"],
    "lr": [0.01, 0.03, torch.tensor(0.02, dtype=torch.float64)],
    "lr_decay": [0.0, 0.1, 0.5],
    "max_eval": [2, 5, None],
    "max_iter": [4, 2, 6],
    "maximize": [False, True, False],
    "momentum": [0.0, 0.9, 0.5],
    "momentum_decay": [4e-3, 0.1, 0.5],
    "nesterov": [False, True, True],
    "ns_coefficients": [(3.4445, -4.775, 2.0315), (3.0, -3.2, 1.2), (2.0, -1.5, 0.5)],
    "ns_steps": [5, 2, 1],
    "rho": [0.9, 0.5, 0.8],
    "step_sizes": [(1e-6, 50.0), (1e-4, 0.02), (1e-3, 0.015)],
    "adjust_lr_fn": [None, "original", "match_rms_adamw"],
    "t0": [1e6, 2.0, 5.0],
    "tolerance_change": [1e-9, 1e-2, 1e-4],
    "tolerance_grad": [1e-7, 0.5, 2.0],
    "weight_decay": [0.0, 0.1, 0.3],
}
OWN_VALUES: dict[tuple[str, str], list[Any]] = {
    ("Adafactor", "eps"): [(None, 1e-3), (1e-3, 0.1), (1e-5, 0.5)],
    ("Muon", "eps"): [1e-7, 1.0, 10.0],
    ("Muon", "momentum"): [0.95, 0.5, 0.0],
    ("SparseAdam", "lr"): [0.01, 0.03, 0.02],
    ("LBFGS", "lr"): [0.5, 0.1, 1.0],
    # With True, torch computes the rate in single precision: test_rules.py.
    ("ASGD", "foreach"): [None, False, False],
}
# What else an option needs to matter, or to be permitted.
WITH: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("SGD", "dampening"): [{"momentum": 0.9}] * M,
    ("SGD", "nesterov"): [{"momentum": 0.9}, {"momentum": 0.8}, {"momentum": 0.5}],
    **{
        (name, "decoupled_weight_decay"): [{"weight_decay": 0.1}] * M
        for name in ("Adam", "NAdam", "RAdam")
    },
    ("LBFGS", "history_size"): [{"max_iter": 6}] * M,  # so that there is a history
}
RATES = [0.01, 0.03, 0.02]


def options(cls: type[optim.Optimizer]) -> list[str]:
    return [name for name in inspect.signature(cls).parameters if name != "params"]


def values_of(name: str, option: str) -> list[Any]:
    return OWN_VALUES.get((name, option)) or VALUES[option]


def configs_for(name: str, *chosen: str) -> list[dict[str, Any]]:
    short = {"max_iter": 4} if name == "LBFGS" else {}
    configs: list[dict[str, Any]] = [{"lr": rate, **short} for rate in RATES]
    for option in chosen:
        extra = WITH.get((name, option), [{}] * M)
        for config, needed, value in zip(configs, extra, values_of(name, option), strict=True):
            config.update({**config, **needed, option: value})
    return configs


CASES = [
    (name, option)
    for name, cls in CLASSES.items()
    for option in options(cls)
    if option != "differentiable"  # refused, see the test of its own
]

# Many options at once, for states and freezing.
COMBINED: dict[str, list[tuple[str, ...]]] = {
    "Adadelta": [("lr", "rho", "weight_decay", "maximize")],
    "Adafactor": [("beta2_decay", "d", "eps", "weight_decay"), ("foreach",)],
    "Adagrad": [("lr_decay", "weight_decay", "initial_accumulator_value"), ("fused",)],
    "Adam": [("betas", "amsgrad", "weight_decay", "eps"), ("fused",), ("lr",)],
    "AdamW": [("betas", "amsgrad", "weight_decay", "maximize"), ("foreach",)],
    "Adamax": [("betas", "eps", "weight_decay"), ("foreach",)],
    "ASGD": [("lambd", "alpha", "t0", "weight_decay"), ("foreach",)],
    "LBFGS": [("line_search_fn", "max_iter", "history_size")],
    "Muon": [("momentum", "nesterov", "weight_decay", "ns_steps")],
    "NAdam": [("betas", "momentum_decay", "decoupled_weight_decay"), ("foreach",)],
    "RAdam": [("betas", "decoupled_weight_decay", "weight_decay"), ("maximize",)],
    "RMSprop": [("alpha", "momentum", "centered", "weight_decay"), ("foreach",)],
    "Rprop": [("etas", "step_sizes"), ("maximize",)],
    "SGD": [("momentum", "weight_decay"), ("nesterov",), ("fused",)],
    "SparseAdam": [("betas", "eps", "maximize")],
}


class Bag(nn.Module):
    """Parameters and nothing else: a matrix, and a vector where the class takes one."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(24, 7, dtype=dtype))
        if name not in ("Muon", "SparseAdam"):
            self.vector = nn.Parameter(torch.randn(37, dtype=dtype))

    def forward(self) -> Tensor:
        return self.matrix.sum()


class Case:
    """A bundle and its models' lone copies, whose gradients are the same function of parameters."""

    def __init__(self, name: str, dtype: torch.dtype, configs: list[dict[str, Any]]) -> None:
        torch.manual_seed(0)
        self.name, self.cls, self.dtype = name, CLASSES[name], dtype
        # One set of numbers for both precisions.
        models = [Bag(name, torch.float32).to(dtype) for _ in range(M)]
        self.alone = copy.deepcopy(models)
        self.bundle = ModelBatch(
            models, optimizer_cls=self.cls, optimizer_kwargs=configs, fallback="silent"
        )
        assert self.bundle.optimizer is not None
        self.optimizer: Any = self.bundle.optimizer
        self.stocks = self.stock_optimizers(configs)
        generator = torch.Generator().manual_seed(3)
        self.noise = [
            {
                key: torch.randn(M, *parameter.shape, generator=generator).to(dtype)
                for key, parameter in self.alone[0].named_parameters()
            }
            for _ in range(16)
        ]

    def stock_optimizers(self, configs: list[dict[str, Any]]) -> list[optim.Optimizer]:
        return [
            self.cls(model.parameters(), **copy.deepcopy(config))
            for model, config in zip(self.alone, configs, strict=True)
        ]

    def gradient(self, parameter: Tensor, noise: Tensor) -> Tensor:
        """Of `parameter.square().sum() / 2 + (noise * parameter).sum()`, one or all models."""
        grad = parameter.detach() + noise
        if self.name != "SparseAdam":
            return grad
        # Rows 1 and 3 alone have a gradient.
        keep = torch.zeros(24, 1, dtype=grad.dtype)
        keep[[1, 3]] = 1
        return (grad * keep).to_sparse(grad.dim() - 1)

    def step(self, k: int) -> None:
        noise = self.noise[k]
        if isinstance(self.optimizer, LockstepLBFGS):
            self.bundle.step(lambda: self.evaluate(dict(self.bundle.named_parameters()), noise))
            return
        self.optimizer.zero_grad()
        for key, parameter in self.bundle.named_parameters():
            parameter.grad = self.gradient(parameter, noise[key])
        self.optimizer.step()

    def step_alone(self, k: int, which: Any = range(M)) -> None:
        for i in which:
            named = dict(self.alone[i].named_parameters())
            noise = {key: value[i] for key, value in self.noise[k].items()}
            if self.name == "LBFGS":
                self.stocks[i].step(lambda named=named, noise=noise: self.evaluate(named, noise))
                continue
            for key, parameter in named.items():
                parameter.grad = self.gradient(parameter, noise[key])
            self.stocks[i].step()

    def evaluate(self, named: dict[str, Tensor], noise: dict[str, Tensor]) -> Tensor:
        """The losses, `[M]` or one, and the gradients of all parameters."""
        losses: Any = 0
        for key, parameter in named.items():
            p, extra = parameter.detach(), noise[key]
            parameter.grad = self.gradient(p, extra)
            terms = p * p / 2 + extra * p
            losses = losses + (terms.flatten(1).sum(1) if p.dim() > self.dims(key) else terms.sum())
        return losses

    def dims(self, key: str) -> int:
        return self.alone[0].get_parameter(key).dim()

    def worst(self, models: Any, reference: Any) -> float:
        """The largest difference relative to the largest number of a model."""
        errors = []
        for a, b in zip(models, reference, strict=True):
            p = torch.cat([t.detach().double().flatten() for t in a.parameters()])
            q = torch.cat([t.detach().double().flatten() for t in b.parameters()])
            errors.append(float((p - q).abs().max() / q.abs().max()))
        return max(errors)

    def assert_equals_alone(self) -> None:
        assert self.worst(self.bundle.models, self.alone) <= 1e-12


def check(name: str, configs: list[dict[str, Any]]) -> None:
    double, single = (Case(name, dtype, configs) for dtype in (torch.float64, torch.float32))
    start = copy.deepcopy(double.alone)
    for case in (double, single):
        for k in range(10):
            case.step(k)
            case.step_alone(k)
    for i in range(M):
        assert double.worst([double.bundle[i]], [start[i]]) > 1e-6, f"model {i} was not trained"
    double.assert_equals_alone()
    ours = single.worst(single.bundle.models, double.alone)
    torchs = single.worst(single.alone, double.alone)
    assert ours <= 2 * torchs + torch.finfo(torch.float32).eps


# torch 2.15 says so wherever it makes a sparse tensor itself.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")


@pytest.mark.parametrize(("name", "option"), CASES)
def test_option_equals_alone(name: str, option: str) -> None:
    check(name, configs_for(name, option))


@pytest.mark.parametrize(("name", "chosen"), [(n, c) for n in COMBINED for c in COMBINED[n]])
def test_many_options_equal_alone(name: str, chosen: tuple[str, ...]) -> None:
    check(name, configs_for(name, *chosen))


def refused_by_torch(name: str, configs: list[dict[str, Any]]) -> bool:
    try:
        for config in configs:
            parameter = nn.Parameter(torch.ones(2, 2))
            stock = CLASSES[name]([parameter], **config)
            parameter.grad = torch.ones(2, 2)
            stock.step()
    except (AssertionError, RuntimeError, ValueError):
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CLASSES if name not in ("LBFGS", "SparseAdam")])
def test_every_pair_of_options_equals_alone(name: str) -> None:
    names = [option for option in options(CLASSES[name]) if option != "differentiable"]
    count = 0
    for pair in itertools.combinations(names, 2):
        configs = configs_for(name, *pair)
        if not refused_by_torch(name, configs):
            check(name, configs)
            count += 1
    assert count > len(names)


def test_the_values_differ_between_the_models() -> None:
    for name, option in CASES:
        values = values_of(name, option)
        assert len(values) == M
        assert option == "capturable" or any(value != values[0] for value in values)


@pytest.mark.parametrize("name", [n for n in CLASSES if "differentiable" in options(CLASSES[n])])
def test_differentiable_is_refused(name: str) -> None:
    configs = [{}, {"differentiable": True}, {"differentiable": False}]
    with pytest.raises(ModelBatchError, match=r"model 1: .*differentiable"):
        Case(name, torch.float64, configs)


@pytest.mark.parametrize("name", [n for n in CLASSES if "capturable" in options(CLASSES[n])])
def test_capturable_on_the_cpu(name: str) -> None:
    """Torch refuses it there. An operator of ours needs nothing for it, so it just works."""
    configs = [{"lr": rate, "capturable": True} for rate in RATES]
    case = Case(name, torch.float64, configs)
    with pytest.raises(AssertionError, match="capturable=True"):
        case.step_alone(0)
    if isinstance(case.optimizer, ViewOptimizer):
        with pytest.raises(AssertionError, match="capturable=True"):
            case.step(0)
        return
    case.stocks = case.stock_optimizers([{"lr": rate} for rate in RATES])
    for k in range(3):
        case.step(k)
        case.step_alone(k)
    case.assert_equals_alone()


def train_with_a_pause(case: Case, alone: bool) -> None:
    """Five steps; model 1 is frozen in two of them, so that the counts of steps differ."""
    for k in range(5):
        frozen = k in (2, 3)
        (case.bundle.freeze if frozen else case.bundle.unfreeze)(1)
        if alone:
            case.step_alone(k, (0, 2) if frozen else range(M))
        else:
            case.step(k)


def load_again(case: Case) -> None:
    """Loading casts some states to the parameter's dtype, in torch too: both sides must have."""
    for i in range(M):
        case.optimizer.load_model_state_dict(i, case.optimizer.model_state_dict(i))


STATE_CASES = [(name, chosen) for name, all_chosen in COMBINED.items() for chosen in all_chosen]


@pytest.mark.parametrize(("name", "chosen"), STATE_CASES)
def test_a_models_state_goes_to_plain_torch(name: str, chosen: tuple[str, ...]) -> None:
    case = Case(name, torch.float64, configs_for(name, *chosen))
    train_with_a_pause(case, alone=False)
    # Without any option: all of them come with the state.
    case.stocks = case.stock_optimizers([{}] * M)
    for i, stock in enumerate(case.stocks):
        case.alone[i].load_state_dict(case.bundle[i].state_dict())
        stock.load_state_dict(case.optimizer.model_state_dict(i))
    load_again(case)
    for k in range(5, 10):
        case.step(k)
        case.step_alone(k)
    case.assert_equals_alone()


@pytest.mark.parametrize(("name", "chosen"), STATE_CASES)
def test_a_state_of_plain_torch_goes_to_a_model(name: str, chosen: tuple[str, ...]) -> None:
    configs = configs_for(name, *chosen)
    trained = Case(name, torch.float64, configs)
    train_with_a_pause(trained, alone=True)
    # A bundle with other options and a history of its own, all of which the states replace.
    case = Case(name, torch.float64, [{}] * M)
    case.step(0)
    case.alone, case.stocks = trained.alone, trained.stocks
    for i, stock in enumerate(case.stocks):
        case.bundle[i].load_state_dict(case.alone[i].state_dict())
        saved = copy.deepcopy(stock.state_dict())
        case.optimizer.load_model_state_dict(i, saved)
        stock.load_state_dict(copy.deepcopy(saved))
    for k in range(5, 10):
        case.step(k)
        case.step_alone(k)
    case.assert_equals_alone()


@pytest.mark.parametrize(("name", "chosen"), STATE_CASES)
def test_a_pause_equals_a_pause_alone(name: str, chosen: tuple[str, ...]) -> None:
    case = Case(name, torch.float64, configs_for(name, *chosen))
    train_with_a_pause(case, alone=False)
    train_with_a_pause(case, alone=True)
    for k in range(5, 8):
        case.step(k)
        case.step_alone(k)
    case.assert_equals_alone()
