"""A sweep that kills its own process: python sweep_program.py DIRECTORY EPOCH_TO_DIE_IN WHEN."""

import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

import torch
from sweep.sweep_case import build, data

from modelbatch.sweep import MedianPruner, SweepResult, run_sweep

CONFIGS = [
    {"lr": 0.004 * 1.6**i, "width": 4 if i % 3 == 0 else 6, "dropout": 0.05 * (i % 3)}
    for i in range(14)
]


class Deadly(MedianPruner):
    """Counts the epochs of the whole sweep that are new, and dies in one of them."""

    def __init__(self, directory: str, dies_in: int) -> None:
        super().__init__(warmup_epochs=1)
        self.file, self.dies_in = os.path.join(directory, "count"), dies_in

    def prune(self, epoch: int, values: Mapping[int, float]) -> list[int]:
        answer = super().prune(epoch, values)
        with open(self.file, "a") as file:
            file.write(".")
        if os.path.getsize(self.file) == self.dies_in:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer


def run(directory: str | None, pruner: Any, **kwargs: Any) -> SweepResult:
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))  # must not matter
    x, y = data()
    settings: dict[str, Any] = {"epochs": 5, "batch_size": 8, "bundle_size": 4, "progress": False}
    return run_sweep(
        build,
        CONFIGS,
        (x, y),
        (x[:10], y[:10]),
        pruner=pruner,
        directory=directory,
        **(settings | kwargs),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], Deadly(sys.argv[1], int(sys.argv[2])), checkpoint_every=int(sys.argv[3]))
