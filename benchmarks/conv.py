"""Training steps of convolutional bundles against separate models, without an optimizer.

Each round runs every variant once, in turn, and the table shows medians over rounds of the time
divided by that of the separate models in the same round: a neighbour on the machine then disturbs
all alike.

    python benchmarks/conv.py --network resnet8 --models 8 32 --rounds 9
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from modelbatch.memory import keep_freed_memory
from modelbatch.ops.conv import convolution
from modelbatch.ops.norm import batch_norm_train


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Block(nn.Module):
    def __init__(self, channels, out_channels, stride):
        super().__init__()
        self.stride, self.extra = stride, out_channels - channels
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + shortcut(x, self.stride, self.extra))


class ResNet8(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((-2, -1)))


def shortcut(x, stride, extra):
    """Subsamples and adds channels of zeros: a shortcut without parameters."""
    if stride == 1 and extra == 0:
        return x
    x = x[..., ::stride, ::stride]
    return F.pad(x, (0, 0, 0, 0, extra // 2, extra - extra // 2))


# ---- the same networks on stacked tensors -------------------------------------------------------


class Stacked:
    """Parameters and buffers ``[M, ...]`` of models ``begin`` to ``end``."""

    def __init__(self, models):
        self.num_models = len(models)
        self.params = {
            name: torch.stack([dict(m.named_parameters())[name].detach() for m in models])
            for name, _ in models[0].named_parameters()
        }
        for parameter in self.params.values():
            parameter.requires_grad_()
        self.buffers = {
            name: torch.stack([dict(m.named_buffers())[name] for m in models])
            for name, _ in models[0].named_buffers()
        }
        self.eps = torch.full([self.num_models], 1e-5, dtype=torch.float64)

    def conv(self, x, name, stride=1, padding=0):
        weight, bias = self.params[f"{name}.weight"], self.params.get(f"{name}.bias")
        return convolution(x, weight, bias, stride, padding)

    def norm(self, x, name):
        weight, bias = self.params[f"{name}.weight"], self.params[f"{name}.bias"]
        y, mean, var = batch_norm_train(x, weight, bias, self.eps)
        count = y[0, :, 0].numel()
        self.buffers[f"{name}.running_mean"].lerp_(mean, 0.1)
        self.buffers[f"{name}.running_var"].lerp_(var * (count / (count - 1)), 0.1)
        self.buffers[f"{name}.num_batches_tracked"] += 1
        return y

    def linear(self, x, name):
        weight, bias = self.params[f"{name}.weight"], self.params[f"{name}.bias"]
        return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))

    def zero_grad(self):
        for parameter in self.params.values():
            parameter.grad = None


def folded(function, x, *args):
    """Applies a function without parameters to all models' samples as one batch."""
    return function(x.flatten(0, 1), *args).unflatten(0, x.shape[:2])


def stacked_lenet(net, x, relu):
    x = folded(F.max_pool2d, relu(net.conv(x, "conv1", 1, 2)), 2)
    x = folded(F.max_pool2d, relu(net.conv(x, "conv2")), 2).flatten(2)
    return net.linear(relu(net.linear(relu(net.linear(x, "fc1")), "fc2")), "fc3")


def stacked_resnet8(net, x, relu):
    x = relu(net.norm(net.conv(x, "conv1", 1, 1), "bn1"))
    for index, (stride, extra) in enumerate([(1, 0), (2, 16), (2, 32)]):
        name = f"blocks.{index}"
        y = relu(net.norm(net.conv(x, f"{name}.conv1", stride, 1), f"{name}.bn1"))
        y = net.norm(net.conv(y, f"{name}.conv2", 1, 1), f"{name}.bn2")
        x = relu(y + folded(shortcut, x, stride, extra))
    return net.linear(folded(torch.mean, x, (-2, -1)), "fc")


NETWORKS = {
    "lenet": (LeNet, stacked_lenet, (1, 28, 28)),
    "resnet8": (ResNet8, stacked_resnet8, (3, 32, 32)),
}


def separate_step(models, x, target):
    losses = []
    for model in models:
        model.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses)


def stacked_step(forward, nets, x, target, relu):
    losses = []
    for net in nets:
        net.zero_grad()
        logits = forward(net, x, relu)
        labels = target.repeat(net.num_models)
        loss = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
        loss = loss.view(net.num_models, -1).mean(1)
        loss.sum().backward()
        losses.append(loss.detach())
    return torch.cat(losses)


def make_variants(network, num_models, batch, chunks):
    build, forward, shape = NETWORKS[network]
    models = [build().train() for _ in range(num_models)]
    x, target = torch.randn(batch, *shape), torch.randint(10, (batch,))
    channels_last = x.contiguous(memory_format=torch.channels_last)
    relu, relu_ = F.relu, F.relu_

    def stacks(size):
        return [Stacked(models[i : i + size]) for i in range(0, num_models, size)]

    variants = {"separate": lambda: separate_step(models, x, target)}
    if network != "lenet":
        import copy

        last = [copy.deepcopy(m).to(memory_format=torch.channels_last) for m in models]
        variants["separate, channels_last"] = lambda: separate_step(last, channels_last, target)
    for size in [num_models, *(c for c in chunks if c < num_models)]:
        nets = stacks(size)
        name = "stacked" if size == num_models else f"stacked, chunks of {size}"
        variants[name] = lambda n=nets: stacked_step(forward, n, x, target, relu)
        variants[f"{name}, in-place relu"] = lambda n=nets: stacked_step(
            forward, n, x, target, relu_
        )
        if network != "lenet":
            variants[f"{name}, channels_last"] = lambda n=nets: stacked_step(
                forward, n, channels_last, target, relu
            )
            variants[f"{name}, channels_last, in-place relu"] = lambda n=nets: stacked_step(
                forward, n, channels_last, target, relu_
            )
    return variants


def measure(variants, rounds, clock):
    times = {name: [] for name in variants}
    reference = None
    for round_index in range(rounds + 2):
        for name, step in variants.items():
            begin = clock()
            losses = step()
            elapsed = clock() - begin
            if reference is None:
                reference = losses
            torch.testing.assert_close(losses, reference, rtol=1e-4, atol=1e-5)
            if round_index >= 2:
                times[name].append(elapsed)
    base = times["separate"]
    return {
        name: {
            "ms": round(1e3 * statistics.median(series), 2),
            "ratio": round(statistics.median(t / b for t, b in zip(series, base, strict=True)), 3),
        }
        for name, series in times.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=sorted(NETWORKS), nargs="+", default=sorted(NETWORKS))
    parser.add_argument("--models", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--chunks", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--keep-memory", action="store_true", help="let malloc keep freed memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file; none is written without it")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="one thread and its processor time: comparable on a machine that others use too",
    )
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.cpu_time:
        torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    if options.keep_memory:
        keep_freed_memory()
    results = []
    for network in options.network:
        for num_models in options.models:
            variants = make_variants(network, num_models, options.batch, options.chunks)
            table = measure(variants, options.rounds, clock)
            results.append({"network": network, "models": num_models, "variants": table})
            print(f"{network}, {num_models} models, batch {options.batch}")
            for name, row in table.items():
                print(f"  {name:48s} {row['ms']:9.2f} ms   {row['ratio']:6.3f} of separate")
            sys.stdout.flush()
    record = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "keep_memory": options.keep_memory,
        "clock": "processor time" if options.cpu_time else "wall time",
        "batch": options.batch,
        "results": results,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
