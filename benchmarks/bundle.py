"""Whole bundles against separate models and against hand-written `torch.vmap`.

python benchmarks/bundle.py --rounds 15
"""

import argparse
import copy
from itertools import pairwise

import torch
import torch.nn.functional as F
from conv import LeNet, ResNet8
from harness import compare, save, show
from torch import nn
from torch.func import functional_call, stack_module_state

from modelbatch import ModelBatch


def mlp(*widths: int) -> nn.Module:
    """A multilayer perceptron with ReLU."""
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def gradients(models: list[nn.Module], x: torch.Tensor, y: torch.Tensor, by_hand: bool) -> dict:
    """Forward, loss and backward, without an optimizer."""
    bundle = ModelBatch(copy.deepcopy(models))

    def separate() -> None:
        for model in models:
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()

    def together() -> None:
        bundle.zero_grad()
        bundle.compute_loss(bundle(x), y).backward()

    variants = {"separate models": separate, "ModelBatch": together}
    if by_hand:
        params, _ = stack_module_state(copy.deepcopy(models))  # type: ignore[arg-type]
        skeleton = copy.deepcopy(models[0]).to("meta")

        def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
            return F.cross_entropy(functional_call(skeleton, weights, (x,)), y)

        def vmap() -> None:
            for p in params.values():
                p.grad = None
            torch.vmap(loss)(params).sum().backward()

        variants = {"hand-written vmap": vmap, **variants}
    return variants


def steps(models: list[nn.Module], x: torch.Tensor, y: torch.Tensor) -> dict:
    """Whole training steps with Adam and M learning rates."""
    rates = [1e-4 * (i + 1) for i in range(len(models))]
    bundle = ModelBatch(copy.deepcopy(models), lr_list=rates, optimizer_cls=torch.optim.Adam)

    def alone(**options: bool) -> object:
        own = copy.deepcopy(models)
        optimizers = [torch.optim.Adam(m.parameters(), lr=r, **options) for m, r in zip(own, rates)]

        def run() -> None:
            for model, optimizer in zip(own, optimizers):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

        return run

    return {
        "separate models, Adam": alone(),
        "separate models, fused Adam": alone(fused=True),
        "ModelBatch": lambda: bundle.train_step(x, y),
    }


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["mlp", "cnn"])
    parser.add_argument("--output", default="bundle")
    args = parser.parse_args()
    torch.manual_seed(0)
    results = []

    def record(workload: str, models: int, variants: dict, rounds: int, repeat: int) -> None:
        result = compare(variants, rounds, repeat)
        show(f"{workload}, B=32, M={models}", result)
        results.append({"workload": workload, "batch": 32, "models": models, "variants": result})

    if args.only != "cnn":
        x, y = torch.randn(32, 20), torch.randint(4, (32,))
        for count in (32, 256):
            nets = [mlp(20, 16, 16, 4) for _ in range(count)]
            name = "MLP 20-16-16-4, forward + loss + backward"
            record(name, count, gradients(nets, x, y, by_hand=True), args.rounds, 20)
            record("MLP 20-16-16-4, Adam step", count, steps(nets, x, y), args.rounds, 5)
    if args.only != "mlp":
        for name, net, size in (("LeNet", LeNet, (1, 28, 28)), ("ResNet-8", ResNet8, (3, 32, 32))):
            x, y = torch.randn(32, *size), torch.randint(10, (32,))
            for count in (8, 32):
                nets = [net() for _ in range(count)]
                title = f"{name}, forward + loss + backward"
                record(title, count, gradients(nets, x, y, by_hand=False), args.rounds, 1)
    print(save(args.output, results))


if __name__ == "__main__":
    main()
