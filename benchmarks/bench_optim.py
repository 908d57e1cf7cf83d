"""The optimizer step of all models: the operator, `optimizer.step()` and whole training steps.

torch's fused Adam with ONE learning rate on the same stacked tensors is what the operator and the
step are compared with, although it does less: it cannot give every model its own.

python benchmarks/bench_optim.py --rounds 15
"""

import argparse
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bundle import mlp
from harness import compare, save, show
from rivals import modelbatch_010
from torch import Tensor, nn

from modelbatch import ModelBatch

BYTES_PER_PARAMETER = 28  # float32 Adam reads p, g, m, v and writes p, m, v


def rates_of(num_models: int) -> list[float]:
    """A learning rate for each model."""
    return [1e-3 * (i + 1) / num_models for i in range(num_models)]


def bundle_with_gradients(nets: list[nn.Module]) -> ModelBatch:
    """A bundle with Adam whose gradients are there and whose states exist."""
    bundle = ModelBatch(
        copy.deepcopy(nets), lr_list=rates_of(len(nets)), optimizer_cls=torch.optim.Adam
    )
    for param in bundle.parameters():
        param.grad = torch.randn_like(param)
    bundle.step()
    return bundle


def our_operator(bundle: ModelBatch) -> Callable[[], None]:
    """The registered operator on what `optimizer.step()` hands it."""
    params = [p.detach() for p in bundle.parameters()]
    grads = [p.grad for p in bundle.parameters()]
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    count = bundle.num_models
    step = torch.zeros(count)
    constants = [0.9, 0.999, 1e-8, 0.0, 0.0, 0.0, 0.0]
    rows = [torch.full((count,), value, dtype=torch.float64) for value in constants]
    hyper = torch.stack([torch.tensor(rates_of(count), dtype=torch.float64), *rows])
    operator = torch.ops.modelbatch.adam_step_.default

    def run() -> None:
        operator(params, grads, *moments, [], step, hyper, None, None, None, None, None)

    return run


def torch_operator(stacked: list[Tensor]) -> Callable[[], None]:
    """torch's fused kernel with one learning rate, without its optimizer's Python."""
    params = [p.detach().clone() for p in stacked]
    grads = [torch.randn_like(p) for p in params]
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    steps = [torch.zeros(()) for _ in params]

    def run() -> None:
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            params, grads, *moments, [], steps, lr=1e-3, beta1=0.9, beta2=0.999,
            weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip

    return run


def torch_optimizer(stacked: list[Tensor], groups: bool) -> Callable[[], object]:
    """`torch.optim.Adam(fused=True)`: one learning rate, or a group of views for each model."""
    params = [p.detach().clone() for p in stacked]
    for param in params:
        param.grad = torch.randn_like(param)
    if not groups:
        return torch.optim.Adam(params, lr=1e-3, fused=True).step
    options = []
    for i, lr in enumerate(rates_of(params[0].shape[0])):
        own = [p[i] for p in params]
        for view, param in zip(own, params):
            assert param.grad is not None
            view.grad = param.grad[i]
        options.append({"params": own, "lr": lr})
    return torch.optim.Adam(options, fused=True).step


def optimizer_steps(nets: list[nn.Module]) -> dict:
    """Everything that updates the same stacked parameters."""
    bundle = bundle_with_gradients(nets)
    stacked = list(bundle.parameters())
    assert bundle.optimizer is not None
    variants: dict[str, Callable[[], object]] = {
        "torch fused Adam, one lr: kernel": torch_operator(stacked),
        "modelbatch::adam_step_, M lrs": our_operator(bundle),
        "torch fused Adam, one lr: step()": torch_optimizer(stacked, groups=False),
        "ModelBatch optimizer.step(), M lrs": bundle.optimizer.step,
    }
    return variants


def grouped_steps(nets: list[nn.Module]) -> dict:
    """Torch's only way to M learning rates: a parameter group for each model.

    Compared by itself, because it takes so long that it would leave the others cold caches.
    """
    bundle = bundle_with_gradients(nets)
    assert bundle.optimizer is not None
    return {
        "ModelBatch optimizer.step(), M lrs": bundle.optimizer.step,
        "torch fused Adam, M groups: step()": torch_optimizer(
            list(bundle.parameters()), groups=True
        ),
    }


def training_steps(nets: list[nn.Module], x: Tensor, y: Tensor) -> dict:
    """Forward, loss, backward and Adam of all models."""
    rates = rates_of(len(nets))
    bundle = ModelBatch(copy.deepcopy(nets), lr_list=rates, optimizer_cls=torch.optim.Adam)

    def alone(**options: bool) -> Callable[[], None]:
        own = copy.deepcopy(nets)
        optimizers = [torch.optim.Adam(m.parameters(), lr=r, **options) for m, r in zip(own, rates)]

        def run() -> None:
            for model, optimizer in zip(own, optimizers):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

        return run

    earlier = modelbatch_010()
    old = earlier.ModelBatch(copy.deepcopy(nets), shared_input=True)
    factory = earlier.OptimizerFactory(torch.optim.Adam)
    old_optimizer = factory.create_optimizer(old, [{"lr": lr} for lr in rates])

    def earlier_step() -> None:
        old_optimizer.zero_grad()
        old.compute_loss(old(x), y, F.cross_entropy).backward()
        old_optimizer.step()

    return {
        "ModelBatch.train_step": lambda: bundle.train_step(x, y),
        "separate models, Adam": alone(),
        "separate models, fused Adam": alone(fused=True),
        "modelbatch 0.1.0": earlier_step,
    }


def copy_bandwidth() -> float:
    """GB/s, read and written bytes counted, of copying 256 MB."""
    source = torch.randn(2**26)
    target = torch.empty_like(source)
    result = compare({"copy": lambda: target.copy_(source)}, rounds=15)
    return 2 * source.numel() * 4 / result["copy"]["ms"] / 1e6


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = round(copy_bandwidth(), 1)
    print(f"copy: {bandwidth} GB/s")
    results: list[dict] = [{"workload": "copy", "gb_per_s": bandwidth}]
    for widths, count, repeat in (
        ((20, 16, 16, 4), 32, 100),
        ((20, 16, 16, 4), 256, 50),
        ((20, 16, 16, 4), 1024, 10),
        ((784, 128, 10), 32, 2),
        ((784, 128, 10), 256, 1),
    ):
        nets = [mlp(*widths) for _ in range(count)]
        workload = f"MLP {'-'.join(map(str, widths))}, Adam update"
        result = compare(optimizer_steps(nets), args.rounds, repeat)
        parameters = count * sum(p.numel() for p in nets[0].parameters())
        for row in result.values():
            row["gb_per_s"] = round(parameters * BYTES_PER_PARAMETER / row["ms"] / 1e6, 1)
        show(f"{workload}, M={count} (ratios to the first row)", result)
        results.append({"workload": workload, "models": count, "variants": result})
        if widths[0] == 20:
            result = compare(grouped_steps(nets), args.rounds, max(repeat // 10, 1))
            show(f"{workload}, M={count}", result)
            results.append({"workload": workload, "models": count, "variants": result})
    # With one parameter of one element nearly all of a step is Python.
    nets = [nn.Linear(1, 1, bias=False) for _ in range(1024)]
    bundle = bundle_with_gradients(nets)
    assert bundle.optimizer is not None
    result = compare({"ModelBatch optimizer.step()": bundle.optimizer.step}, args.rounds, 100)
    show("1 parameter, Adam update, M=1024", result)
    results.append({"workload": "1 parameter, Adam update", "models": 1024, "variants": result})
    x, y = torch.randn(32, 20), torch.randint(4, (32,))
    for count, repeat in ((32, 10), (256, 3)):
        nets = [mlp(20, 16, 16, 4) for _ in range(count)]
        result = compare(training_steps(nets, x, y), args.rounds, repeat)
        show(f"MLP 20-16-16-4, B=32, whole Adam step, M={count}", result)
        results.append(
            {
                "workload": "MLP 20-16-16-4, whole Adam step",
                "batch": 32,
                "models": count,
                "variants": result,
            }
        )
    print(save("optim", results))


if __name__ == "__main__":
    main()
