"""Whole training steps of MLPs with Adam: the engine against every other way to train M of them.

The others: separate models (torch's default and fused Adam), `torch.vmap` by hand with one fused
Adam, the whole step in one `torch.compile`, the whole step in one `jax.jit`, modelbatch 0.1.0, and
this package without its engine.

python benchmarks/bench_step.py --rounds 10
"""

import argparse
import copy
from collections.abc import Callable

import rivals
import torch
import torch.nn.functional as F
from bundle import mlp
from harness import compare, save, show
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state

from modelbatch import ModelBatch

Step = Callable[[], object]
STEPS = 8  # of train_steps


def rates_of(count: int) -> list[float]:
    """A learning rate for each model."""
    return [1e-3 * (i + 1) / count for i in range(count)]


def separate(nets: list[nn.Module], x: Tensor, y: Tensor, fused: bool) -> Step:
    """A loop over the models."""
    own = copy.deepcopy(nets)
    rates = rates_of(len(own))
    optimizers = [torch.optim.Adam(m.parameters(), lr=r, fused=fused) for m, r in zip(own, rates)]

    def step() -> None:
        for model, optimizer in zip(own, optimizers):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return step


def gradients_of(nets: list[nn.Module], x: Tensor, y: Tensor) -> tuple[dict, Callable]:
    """Stacked parameters, and `vmap(grad)` of the loss."""
    stacked, _ = stack_module_state(copy.deepcopy(nets))
    skeleton = copy.deepcopy(nets[0]).to("meta")

    def loss(own: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(skeleton, own, (x,)), y)

    return stacked, torch.vmap(grad_and_value(loss))


def by_hand(nets: list[nn.Module], x: Tensor, y: Tensor) -> Step:
    """`vmap(grad)` and one fused Adam, which knows one learning rate."""
    stacked, gradients = gradients_of(nets, x, y)
    optimizer = torch.optim.Adam(stacked.values(), fused=True)

    def step() -> None:
        found, _ = gradients({name: p.detach() for name, p in stacked.items()})
        for name, p in stacked.items():
            p.grad = found[name].contiguous()
        optimizer.step()

    return step


def compiled(nets: list[nn.Module], x: Tensor, y: Tensor) -> Step:
    """Gradients and Adam with M learning rates in one compiled function."""
    stacked, gradients = gradients_of(nets, x, y)
    params = {name: p.detach().clone() for name, p in stacked.items()}
    first = {name: torch.zeros_like(p) for name, p in params.items()}
    second = {name: torch.zeros_like(p) for name, p in params.items()}
    rates, count = torch.tensor(rates_of(len(nets))), torch.zeros(())

    def run() -> Tensor:
        found, losses = gradients(params)
        count.add_(1)
        for name, p in params.items():
            rate = rates.reshape(-1, *[1] * (p.dim() - 1)) / (1 - 0.9**count)
            m = first[name].lerp_(found[name], 0.1)
            v = second[name].mul_(0.999).addcmul_(found[name], found[name], value=0.001)
            p.sub_(rate * m / ((v / (1 - 0.999**count)).sqrt() + 1e-8))
        return losses

    step = torch.compile(run)

    def without_grad() -> Tensor:
        with torch.no_grad():
            return step()

    return without_grad


def in_jax(nets: list[nn.Module], x: Tensor, y: Tensor) -> Step:
    """Gradients and Adam with M learning rates in one compiled function, its buffers reused."""
    jax = rivals.jax()
    jnp = jax.numpy
    stacked, _ = stack_module_state(copy.deepcopy(nets))
    arrays = [jnp.asarray(p.detach().numpy()) for p in stacked.values()]
    data, target = jnp.asarray(x.numpy()), jnp.asarray(y.numpy())
    rates = jnp.asarray(rates_of(len(nets)))

    def loss(own: list) -> object:
        h = data
        for k in range(0, len(own), 2):
            h = h @ own[k].T + own[k + 1]
            h = jnp.maximum(h, 0) if k + 2 < len(own) else h
        return -jnp.take_along_axis(jax.nn.log_softmax(h), target[:, None], 1).mean()

    def train(p: list, m: list, v: list, t: object) -> tuple:
        losses, g = jax.vmap(jax.value_and_grad(loss))(p)
        t = t + 1
        m = [0.9 * a + 0.1 * b for a, b in zip(m, g)]
        v = [0.999 * a + 0.001 * b * b for a, b in zip(v, g)]
        scale = [rates.reshape(-1, *[1] * (a.ndim - 1)) / (1 - 0.9**t) for a in p]
        root = [jnp.sqrt(a / (1 - 0.999**t)) + 1e-8 for a in v]
        p = [a - s * b / r for a, s, b, r in zip(p, scale, m, root)]
        return p, m, v, t, losses

    run = jax.jit(train, donate_argnums=(0, 1, 2))
    zeros = [[jnp.zeros_like(a) for a in arrays] for _ in range(2)]
    held = [(arrays, *zeros, jnp.zeros(()))]

    def step() -> None:
        *state, losses = run(*held[0])
        held[0] = tuple(state)
        jax.block_until_ready(losses)

    return step


def earlier(nets: list[nn.Module], x: Tensor, y: Tensor) -> Step:
    """modelbatch 0.1.0."""
    old = rivals.modelbatch_010()
    bundle = old.ModelBatch(copy.deepcopy(nets), shared_input=True)
    configs = [{"lr": rate} for rate in rates_of(len(nets))]
    optimizer = old.OptimizerFactory(torch.optim.Adam).create_optimizer(bundle, configs)

    def step() -> None:
        optimizer.zero_grad()
        bundle.compute_loss(bundle(x), y, F.cross_entropy).backward()
        optimizer.step()

    return step


def bundle_of(nets: list[nn.Module], engine: bool = True) -> ModelBatch:
    """A ModelBatch with a learning rate for each model."""
    rates = rates_of(len(nets))
    bundle = ModelBatch(copy.deepcopy(nets), lr_list=rates, optimizer_cls=torch.optim.Adam)
    bundle.enable_engine(engine)
    return bundle


def bundle_step(nets: list[nn.Module], x: Tensor, y: Tensor, engine: bool = True) -> Step:
    """`train_step`."""
    bundle = bundle_of(nets, engine)
    return lambda: bundle.train_step(x, y)


def several(nets: list[nn.Module], x: Tensor, y: Tensor) -> Step:
    """`train_steps` of eight batches."""
    bundle = bundle_of(nets)
    xs, ys = torch.stack([x] * STEPS), torch.stack([y] * STEPS)
    return lambda: bundle.train_steps(xs, ys)


def against(ours: Step, other: Step, rounds: int, calls: int, others: int, steps: int = 1) -> dict:
    """Two ways in turns of several calls each; the numbers are those of one training step.

    Args:
        ours: the reference.
        other: the other way.
        rounds: turns of each.
        calls: of ours in one turn.
        others: calls of the other in one turn.
        steps: that one call of the other takes.
    """

    def many(run: Step, count: int) -> Step:
        def turn() -> None:
            for _ in range(count):
                run()

        return turn

    pair = compare({"ours": many(ours, calls), "other": many(other, others)}, rounds)
    for name, count in (("ours", calls), ("other", others * steps)):
        for key in ("ms", "ms_min"):
            pair[name][key] = round(pair[name][key] / count, 5)
    pair["other"]["ratio"] = round(pair["other"]["ratio"] * calls / (others * steps), 4)
    return pair


WAYS: dict[str, Callable[[list[nn.Module], Tensor, Tensor], Step]] = {
    "separate models": lambda *a: separate(*a, fused=False),
    "separate models, fused Adam": lambda *a: separate(*a, fused=True),
    "vmap by hand, fused Adam": by_hand,
    "whole step in torch.compile": compiled,
    "whole step in jax.jit": in_jax,
    "modelbatch 0.1.0": earlier,
    "ModelBatch without engine": lambda *a: bundle_step(*a, engine=False),
    "ModelBatch": bundle_step,
}
SMALL, LARGE = (20, 16, 16, 4), (784, 128, 10)
CASES = (
    # widths, models, batch, calls in one turn of the fast ways
    (SMALL, 1, 32, 50),
    (SMALL, 32, 32, 50),
    (SMALL, 256, 32, 10),
    (SMALL, 1024, 32, 3),
    (SMALL, 4096, 32, 1),
    (LARGE, 1, 32, 20),
    (LARGE, 32, 32, 3),
    (LARGE, 32, 128, 1),
    (LARGE, 256, 32, 1),
)
SLOW_FROM = 1024  # models; above that a loop or 0.1.0 takes too long to be worth it


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    results: list[dict] = []
    for widths, count, batch, repeat in CASES:
        torch.manual_seed(0)
        nets = [mlp(*widths) for _ in range(count)]
        x, y = torch.randn(batch, widths[0]), torch.randint(widths[-1], (batch,))
        names = [
            name
            for name in WAYS
            if count <= SLOW_FROM or not ("separate" in name or "0.1.0" in name)
        ]
        result = {}
        # Each against our step alone: what ran before decides whose numbers are in the caches.
        ours = bundle_step(nets, x, y)
        for name in names:
            if name == "ModelBatch":
                continue
            rival = WAYS[name](nets, x, y)
            slow = "separate" in name or "0.1.0" in name
            pair = against(ours, rival, args.rounds, repeat, 1 if slow else repeat)
            result[name], result["ModelBatch"] = pair["other"], pair["ours"]
            del rival
        together = several(nets, x, y)
        pair = against(ours, together, args.rounds, repeat, repeat, STEPS)
        result["ModelBatch, train_steps of 8, per step"] = pair["other"]
        title = f"MLP {'-'.join(map(str, widths))}, B={batch}, Adam, M={count}"
        show(f"{title} (ratios to ModelBatch)", result)
        results.append({"workload": title, "models": count, "batch": batch, "variants": result})
    print(save("step", results))


if __name__ == "__main__":
    main()
