"""Run as a script: saves in a loop, is killed at random moments, and checks what it left.

Usage: saver.py <directory> <rounds> <seed>
"""

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modelbatch import ModelBatch


class Number:
    def __init__(self, value: int = -1) -> None:
        self.value = torch.full((100,), value)

    def state_dict(self) -> dict[str, Any]:
        return {"number": int(self.value[0]), "tensor": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["tensor"]
        assert (self.value == state["number"]).all()


def build() -> ModelBatch:
    models = [nn.Linear(20, 20) for _ in range(6)]
    return ModelBatch(models, lr_list=[0.1] * 6, optimizer_cls=torch.optim.SGD)


@torch.no_grad()
def mark(mb: ModelBatch, number: int) -> None:
    """Writes one number into everything."""
    for parameter in mb.parameters():
        parameter.fill_(number)
    for group in mb.optimizer.param_groups:
        group["lr"] = float(number)


def marked(mb: ModelBatch, number: Number) -> int:
    """The number that is in everything."""
    found = {float(value) for p in mb.parameters() for value in p.detach().unique()}
    found |= {group["lr"] for group in mb.optimizer.param_groups}
    found |= {float(value) for value in number.value}
    assert len(found) == 1, f"parts of different checkpoints: {found}"
    return int(found.pop())


def save_for_ever(directory: str, start: int, pipe: int) -> None:
    mb, number = build(), start
    while True:
        number += 1
        mark(mb, number)
        per_model = number % 2 == 0
        mb.save_all(directory, per_model=per_model, states={"number": Number(number)})
        os.write(pipe, number.to_bytes(8, "little"))


def main(directory: str, rounds: int, seed: int) -> None:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    mb, last, unfinished = build(), 0, 0
    mark(mb, last)
    mb.save_all(directory, states={"number": Number(last)})
    for _ in range(rounds):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read_end)
            save_for_ever(directory, last, write_end)
        os.close(write_end)
        os.read(read_end, 8)  # it has saved once
        number = Number()
        mb.load_all(directory, states={"number": number})  # while it is being saved to
        marked(mb, number)
        time.sleep(draw.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        finished = [last + 1]
        while data := os.read(read_end, 8):
            finished.append(int.from_bytes(data, "little"))
        os.close(read_end)
        unfinished += any(path.name.startswith(".save-") for path in Path(directory).iterdir())
        mb.load_all(directory, states={"number": number})
        last = marked(mb, number)
        # A save that was reported is there; one that was under way may be.
        assert last in (finished[-1], finished[-1] + 1), (last, finished)
    mark(mb, last + 1)
    mb.save_all(directory)
    names = sorted(path.name for path in Path(directory).iterdir())
    assert names == ["bundle.json", "optimizer.safetensors", "stacked.safetensors"], names
    sys.stdout.write(f"{rounds} killed, {unfinished} in the middle of a save\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
