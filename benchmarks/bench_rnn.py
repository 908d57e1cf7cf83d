"""Training steps of recurrent networks: a bundle against every other way to train M of them.

One layer reads [T, B, 16] and a linear layer classifies its last output; Adam, B = 32. The others:
separate `nn.LSTM` (torch's default and fused Adam), two processes of one thread with half of the
models each, cells written by hand under `torch.vmap`, the same under `torch.compile`, JAX with
`lax.scan`.

python benchmarks/bench_rnn.py --rounds 10
"""

import argparse
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import rivals
import torch
import torch.nn.functional as F
from harness import compare, save, show
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state

from modelbatch import ModelBatch

BATCH, INPUTS, CLASSES = 32, 16, 10
Step = Callable[[], object]


class Classifier(nn.Module):
    """A recurrent layer and a linear one on its last output."""

    def __init__(self, kind: str, inputs: int, hidden: int):
        super().__init__()
        self.rnn = getattr(nn, kind)(inputs, hidden)
        self.head = nn.Linear(hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][-1])


class ByHand(nn.Module):
    """The same with the steps written out, which `torch.vmap` can batch by itself."""

    def __init__(self, model: Classifier):
        super().__init__()
        self.rnn, self.head = model.rnn, model.head
        self.is_lstm = isinstance(model.rnn, nn.LSTM)

    def forward(self, x: Tensor) -> Tensor:
        rnn = self.rnn
        h = c = x.new_zeros(x.shape[1], rnn.hidden_size)
        inputs = F.linear(x, rnn.weight_ih_l0, rnn.bias_ih_l0)
        for projected in inputs.unbind():
            recurrent = F.linear(h, rnn.weight_hh_l0, rnn.bias_hh_l0)
            if self.is_lstm:
                i, f, g, o = (projected + recurrent).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                (pr, pz, pn), (hr, hz, hn) = projected.chunk(3, 1), recurrent.chunk(3, 1)
                r, z = (pr + hr).sigmoid(), (pz + hz).sigmoid()
                h = (1 - z) * (pn + r * hn).tanh() + z * h
        return self.head(h)


def separate(models: list[nn.Module], x: Tensor, y: Tensor, fused: bool) -> Step:
    """A loop over the models."""
    optimizers = [torch.optim.Adam(model.parameters(), fused=fused) for model in models]

    def step() -> None:
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return step


def bundle_step(models: list[nn.Module], x: Tensor, y: Tensor) -> Step:
    """A ModelBatch with a learning rate for each model."""
    rates = [1e-3 * (i + 1) / len(models) for i in range(len(models))]
    bundle = ModelBatch(models, lr_list=rates, optimizer_cls=torch.optim.Adam)
    return lambda: bundle.train_step(x, y)


def by_hand(models: list[nn.Module], x: Tensor, y: Tensor, compiled: bool) -> Step:
    """`vmap(grad)` of the written-out steps, and one fused Adam with one learning rate."""
    written = [ByHand(model) for model in models]
    stacked, _ = stack_module_state(written)
    params = {name: p.detach().clone().requires_grad_() for name, p in stacked.items()}
    optimizer = torch.optim.Adam(params.values(), fused=True)

    def loss(own: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(written[0], own, (x,)), y)

    gradients = torch.vmap(grad(loss))
    if compiled:
        gradients = torch.compile(gradients)

    def step() -> None:
        found = gradients({name: p.detach() for name, p in params.items()})
        for name, p in params.items():
            p.grad = found[name].contiguous()
        optimizer.step()

    return step


def in_jax(kind: str, hidden: int, steps: int, count: int, x: Tensor, y: Tensor) -> Step:
    """`vmap(grad)` of a `lax.scan`, and Adam, in one compiled function."""
    jax = rivals.jax()
    jnp, gates = jax.numpy, {"LSTM": 4, "GRU": 3}[kind]
    key, bound = jax.random.PRNGKey(0), hidden**-0.5
    shapes = {
        "w_ih": (INPUTS, gates * hidden),
        "w_hh": (hidden, gates * hidden),
        "b_ih": (gates * hidden,),
        "b_hh": (gates * hidden,),
        "w": (hidden, CLASSES),
        "b": (CLASSES,),
    }
    params = {
        name: jax.random.uniform(key, (count, *shape), minval=-bound, maxval=bound)
        for name, shape in shapes.items()
    }
    zeros = {name: jnp.zeros_like(p) for name, p in params.items()}
    data, target = jnp.asarray(x.numpy()), jnp.asarray(y.numpy())
    rates = jnp.linspace(1e-4, 1e-3, count)

    def cell(p: dict, state: tuple, projected: object) -> tuple:
        h, c = state
        recurrent = h @ p["w_hh"] + p["b_hh"]
        if kind == "LSTM":
            i, f, g, o = jnp.split(projected + recurrent, 4, 1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None
        (pr, pz, pn), (hr, hz, hn) = jnp.split(projected, 3, 1), jnp.split(recurrent, 3, 1)
        r, z = jax.nn.sigmoid(pr + hr), jax.nn.sigmoid(pz + hz)
        return ((1 - z) * jnp.tanh(pn + r * hn) + z * h, c), None

    def loss(p: dict) -> object:
        inputs = data @ p["w_ih"] + p["b_ih"]
        start = jnp.zeros((BATCH, hidden))
        (h, _), _ = jax.lax.scan(lambda s, step: cell(p, s, step), (start, start), inputs)
        logs = jax.nn.log_softmax(h @ p["w"] + p["b"])
        return -jnp.take_along_axis(logs, target[:, None], 1).mean()

    @jax.jit
    def train(state: tuple) -> tuple:
        p, m, v, t = state
        g, t = jax.vmap(jax.grad(loss))(p), t + 1
        m = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, m, g)
        v = jax.tree.map(lambda a, b: 0.999 * a + 0.001 * b * b, v, g)

        def update(p: object, m: object, v: object) -> object:
            rate = rates.reshape(-1, *[1] * (p.ndim - 1)) / (1 - 0.9**t)
            return p - rate * m / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8)

        return jax.tree.map(update, p, m, v), m, v, t

    held = [(params, zeros, zeros, jnp.zeros(()))]

    def step() -> None:
        held[0] = jax.block_until_ready(train(held[0]))

    return step


def _serve(connection: Connection, kind: str, hidden: int, steps: int, count: int) -> None:
    torch.set_num_threads(1)
    models, x, y = workload(kind, hidden, steps, count)
    step = separate(models, x, y, fused=True)
    while connection.recv():
        step()
        connection.send(True)


@contextmanager
def two_processes(kind: str, hidden: int, steps: int, count: int) -> Iterator[Step]:
    """Half of the models in each of two processes with one thread and fused Adam."""
    context = multiprocessing.get_context("spawn")
    connections = []
    workers = []
    for _ in range(2):
        ours, theirs = context.Pipe()
        arguments = (theirs, kind, hidden, steps, count // 2)
        worker = context.Process(target=_serve, args=arguments, daemon=True)
        worker.start()
        workers.append(worker)
        connections.append(ours)

    def step() -> None:
        for connection in connections:
            connection.send(True)
        for connection in connections:
            connection.recv()

    try:
        yield step
    finally:
        for connection in connections:
            connection.send(False)
        for worker in workers:
            worker.join()


def workload(
    kind: str, hidden: int, steps: int, count: int, inputs: int = INPUTS
) -> tuple[list[nn.Module], Tensor, Tensor]:
    """M classifiers, and a batch that all of them read."""
    torch.manual_seed(0)
    models: list[nn.Module] = [Classifier(kind, inputs, hidden) for _ in range(count)]
    return models, torch.randn(steps, BATCH, inputs), torch.randint(CLASSES, (BATCH,))


def against_all(kind: str, hidden: int, steps: int, count: int, rounds: int, quick: bool) -> dict:
    """Every way there is."""

    def fresh() -> tuple[list[nn.Module], Tensor, Tensor]:
        return workload(kind, hidden, steps, count)

    with two_processes(kind, hidden, steps, count) as processes:
        variants: dict[str, Step] = {
            "separate models": separate(*fresh(), fused=False),
            "separate models, fused Adam": separate(*fresh(), fused=True),
            "two processes, fused Adam": processes,
            "ModelBatch": bundle_step(*fresh()),
        }
        if not quick:
            _, x, y = fresh()
            variants["cells by hand, vmap"] = by_hand(*fresh(), compiled=False)
            variants["cells by hand, vmap, compiled"] = by_hand(*fresh(), compiled=True)
            variants["JAX, lax.scan"] = in_jax(kind, hidden, steps, count, x, y)
        return compare(variants, rounds)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="without vmap, compile and JAX")
    args = parser.parse_args()
    results: list[dict] = []

    def note(title: str, result: dict, **what: object) -> None:
        show(f"{title} (ratios to the first row)", result)
        results.append({"workload": title, **what, "variants": result})

    for kind in ("LSTM", "GRU"):
        for hidden, steps in ((32, 32), (64, 64)):
            result = against_all(kind, hidden, steps, 32, args.rounds, args.quick)
            title = f"{kind}, I={INPUTS}, H={hidden}, T={steps}, B={BATCH}, M=32"
            note(title, result, kind=kind, hidden=hidden, steps=steps, models=32)
    for kind in ("LSTM", "GRU"):
        for hidden, inputs, count in ((128, 128, 2), (256, 256, 2), (256, 256, 8), (32, 16, 2)):
            variants = {
                "separate models": separate(*workload(kind, hidden, 32, count, inputs), False),
                "separate models, fused Adam": separate(
                    *workload(kind, hidden, 32, count, inputs), True
                ),
                "ModelBatch": bundle_step(*workload(kind, hidden, 32, count, inputs)),
            }
            title = f"{kind}, I={inputs}, H={hidden}, T=32, B={BATCH}, M={count}"
            result = compare(variants, args.rounds)
            note(title, result, kind=kind, hidden=hidden, steps=32, models=count)
    print(save("rnn", results))


if __name__ == "__main__":
    main()
