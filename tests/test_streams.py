"""The models' random streams: reproducible, independent of the bundle, and equal to torch's."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelbatch import ModelBatch


class Draws(nn.Module):
    """Applies a random function to its input; has a parameter, as every model does."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x * self.scale)


def fill(name: str, *args: float) -> Callable[[Tensor], Tensor]:
    return lambda x: getattr(torch.empty(x.shape[1:]), name)(*args) + 0 * x


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout inplace": lambda x: F.dropout(x * 1, 0.3, inplace=True),
    "dropout1d": lambda x: F.dropout1d(x[:, :, :, 0], 0.3),
    "dropout2d": lambda x: F.dropout2d(x, 0.3),
    "dropout3d": lambda x: F.dropout3d(x[:, :, None], 0.3),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.3, training=True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, 0.3, training=True),
    "rrelu": lambda x: F.rrelu(x, 0.1, 0.3, training=True),
    "torch.dropout": lambda x: torch.dropout(x, 0.3, True),
    "rand": lambda x: torch.rand(3, 4) + 0 * x.sum(),
    "rand size": lambda x: torch.rand((3, 4), dtype=torch.float64) + 0 * x.sum(),
    "randn": lambda x: torch.randn(5) + 0 * x.sum(),
    "rand_like": lambda x: torch.rand_like(x),
    "randn_like": lambda x: torch.randn_like(x) * x,
    "randint": lambda x: torch.randint(3, 9, (4, 5)),
    "randint_like": lambda x: torch.randint_like(x, 10),
    "randperm": lambda x: torch.randperm(7),
    "bernoulli": lambda x: torch.bernoulli(torch.sigmoid(x)),
    "bernoulli_": lambda x: torch.zeros_like(x).bernoulli_(0.4),
    "normal tensor": lambda x: torch.normal(x, 2.0),
    "normal size": lambda x: torch.normal(1.0, 2.0, size=(3, 3)) + 0 * x.sum(),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x, dim=-1),
    "multinomial": lambda x: torch.multinomial(torch.softmax(x[:, 0, 0], -1), 2),
    "poisson": lambda x: torch.poisson(x.abs()),
    "uniform_": fill("uniform_", -1.0, 1.0),
    "normal_": fill("normal_", 1.0, 2.0),
    "exponential_": fill("exponential_", 2.0),
    "log_normal_": fill("log_normal_"),
    "cauchy_": fill("cauchy_"),
    "geometric_": fill("geometric_", 0.3),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.4),
}


def bundle_of(function: Callable[[Tensor], Any], seeds: list[int], rng: str) -> ModelBatch:
    return ModelBatch([Draws(function) for _ in seeds], seeds=seeds, rng=rng, fallback="error")


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(6, 4, 5, 3)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_streams_equal_separate_runs(name: str, x: Tensor) -> None:
    seeds = [11, 5, 7]
    bundle = bundle_of(FUNCTIONS[name], seeds, "torch")
    before = torch.get_rng_state()
    outputs = [bundle(x) for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state())
    for i, seed in enumerate(seeds):
        model = Draws(FUNCTIONS[name])
        torch.manual_seed(seed)
        for out in outputs:
            torch.testing.assert_close(out[i], model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_philox_streams_depend_on_the_seed_alone(name: str, x: Tensor) -> None:
    def run(seeds: list[int]) -> list[Tensor]:
        bundle = bundle_of(FUNCTIONS[name], seeds, "philox")
        return [bundle(x) for _ in range(2)]

    before = torch.get_rng_state()
    first, second = run([11, 5, 7])
    assert torch.equal(before, torch.get_rng_state())
    assert first.shape == torch.stack([Draws(FUNCTIONS[name])(x)] * 3).shape
    assert first.dtype == Draws(FUNCTIONS[name])(x).dtype
    assert not torch.equal(first, second)  # new numbers in every call
    assert not torch.equal(first[0], first[1])
    again, _ = run([11, 5, 7])
    assert torch.equal(first, again)
    swapped = run([7, 11])
    for a, b in zip((first, second), swapped):
        torch.testing.assert_close(a[2], b[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(a[0], b[1], rtol=1e-6, atol=1e-6)


def moments(name: str, count: int = 40_000) -> Tensor:
    torch.manual_seed(1)
    x = torch.zeros(count // 20, 4, 5, 1)
    return bundle_of(FUNCTIONS[name], [3], "philox")(x)[0].double().flatten()


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("rand_like", 0.5, 12**-0.5),
        ("normal tensor", 0.0, 2.0),
        ("uniform_", 0.0, 3**-0.5),
        ("normal_", 1.0, 2.0),
        ("exponential_", 0.5, 0.5),
        ("geometric_", 1 / 0.3, 0.7**0.5 / 0.3),
        ("bernoulli", 0.5, 0.5),
        ("bernoulli_", 0.4, 0.24**0.5),
    ],
)
def test_distributions(name: str, mean: float, std: float) -> None:
    function = FUNCTIONS[name]
    if name.endswith("_") and name != "bernoulli_":  # these fill a tensor without the batch axis
        bundle = ModelBatch([Draws(function) for _ in range(2000)], seeds=range(2000))
        sample = bundle(torch.zeros(1, 4, 5, 1)).double().flatten()
    else:
        sample = moments(name)
    # five standard errors of a mean
    assert abs(sample.mean().item() - mean) < 5 * std / sample.numel() ** 0.5
    assert sample.std().item() == pytest.approx(std, rel=0.05)


def test_default_seeds_follow_torchs_seed_without_drawing_from_it() -> None:
    def build(count: int) -> ModelBatch:
        return ModelBatch([nn.Linear(1, 1) for _ in range(count)])

    torch.manual_seed(3)
    state = torch.get_rng_state()
    models = [nn.Linear(1, 1) for _ in range(4)]
    torch.set_rng_state(state)
    four = ModelBatch(models).seeds
    assert torch.equal(state, torch.get_rng_state())
    assert four[:2] == build(2).seeds
    assert len(set(four)) == 4
    torch.manual_seed(4)
    assert build(2).seeds != four[:2]


def test_streams_stand_still_without_draws_and_for_frozen_models(x: Tensor) -> None:
    for rng in ("philox", "torch"):
        bundle = ModelBatch(
            [nn.Sequential(nn.Dropout(0.5)) for _ in range(2)], seeds=[1, 2], rng=rng
        )
        free = copy.deepcopy(bundle)
        bundle.eval()
        bundle(x)
        bundle.train()
        assert torch.equal(bundle(x), free(x))
        bundle.freeze(1)
        bundle(x)
        bundle.unfreeze(1)
        free(x)
        after, straight = bundle(x), free(x)
        assert torch.equal(after[0], straight[0])  # two calls ahead in both
        assert not torch.equal(after[1], straight[1])


def test_backward_uses_the_mask_of_its_forward(x: Tensor) -> None:
    bundle = bundle_of(lambda t: F.dropout(t, 0.5), [1, 2], "philox")
    inputs = x.clone().requires_grad_()
    first = bundle(inputs)
    bundle(inputs)
    (grad,) = torch.autograd.grad(first.sum(), inputs)
    expected = ((first != 0).float() * 2).sum(0)
    torch.testing.assert_close(grad[x != 0], expected[x != 0])


def test_from_factory_with_torch_streams_is_one_script_per_model(x: Tensor) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))

    bundle = ModelBatch.from_factory(build, 2, seeds=[5, 6], rng="torch")
    out = bundle(x)
    for i, seed in enumerate([5, 6]):
        torch.manual_seed(seed)
        torch.testing.assert_close(out[i], build()(x))
