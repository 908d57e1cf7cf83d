"""What callbacks add to a training step: M small MLPs, Adam, every callback at every step.

python benchmarks/callbacks.py --rounds 40
"""

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from bundle import mlp
from harness import compare, save, show
from torch import Tensor, nn

from modelbatch import ModelBatch
from modelbatch.callbacks import Callback, CallbackPack, Event, MetricsLogger, NaNCallback

WIDTHS = (20, 16, 16, 4)
BATCH = 32


def trainer(
    nets: list[nn.Module], x: Tensor, y: Tensor, callbacks: list[Callback] | None
) -> Callable[[], object]:
    """A loop's one step: `train_step` and the event after it; None for the step alone."""
    rates = [1e-4 * (i + 1) / len(nets) for i in range(len(nets))]
    bundle = ModelBatch(copy.deepcopy(nets), lr_list=rates, optimizer_cls=torch.optim.Adam)
    if callbacks is None:
        return lambda: bundle.train_step(x, y)
    pack = CallbackPack(callbacks)
    event = Event(bundle, bundle.optimizer, batch_size=len(x))
    pack.on_train_start(event)

    def step() -> None:
        event.losses = bundle.train_step(x, y)
        event.step += 1
        pack.on_train_step(event)

    return step


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, WIDTHS[0]), torch.randint(WIDTHS[-1], (BATCH,))
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as directory:
        # rows are written 32 at a time, so a turn has a multiple of 32 steps
        for count, repeat in ((32, 64), (256, 32), (1024, 32)):
            nets = [mlp(*WIDTHS) for _ in range(count)]
            folder = Path(directory) / str(count)
            packs: dict[str, list[Callback] | None] = {
                "train_step": None,
                "with an empty CallbackPack": [],
                "with NaNCallback": [NaNCallback()],
                "with NaNCallback(reset), keep_every=1": [NaNCallback("reset", keep_every=1)],
                "with MetricsLogger CSV": [MetricsLogger(folder / "a.csv")],
                "with MetricsLogger JSONL": [MetricsLogger(folder / "b.jsonl")],
                "with NaNCallback + MetricsLogger": [
                    NaNCallback(),
                    MetricsLogger(folder / "c.csv"),
                ],
            }
            variants = {name: trainer(nets, x, y, own) for name, own in packs.items()}
            result = compare(variants, args.rounds, repeat)
            title = f"MLP {'-'.join(map(str, WIDTHS))}, B={BATCH}, Adam, M={count}"
            show(f"{title} (ratios to the first row)", result)
            results.append({"workload": title, "models": count, "variants": result})
    print(save("callbacks", results))


if __name__ == "__main__":
    main()
