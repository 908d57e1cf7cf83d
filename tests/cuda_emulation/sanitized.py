"""Runs emulated kernels in a process of its own, with the sanitizers' runtime loaded first.

``python sanitized.py LIBRARY`` runs every case in two orders and prints a digest of each order's
results; ``python sanitized.py LIBRARY FUNCTION`` calls one function of selftest.cu.
"""

import hashlib
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cuda_emulation import loss_cases, optim_cases, pointwise_cases, random_cases, rnn_cases
from cuda_emulation.emulator import ORDERS, Emulator, exact

# The sanitizers see the same accesses in every order, nearly.
SANITIZED_ORDERS = ORDERS[1:3]
FAMILIES = [random_cases, loss_cases, pointwise_cases, optim_cases, rnn_cases]


def digest(emulator: Emulator, order: tuple[str, int]) -> str:
    found = hashlib.sha256()
    with emulator.order(*order):
        for family in FAMILIES:
            for name, result in family.all_cases(emulator).items():
                found.update(name.encode() + result.tobytes())
    return found.hexdigest()


def main() -> None:
    emulator = Emulator(Path(sys.argv[1]))
    if len(sys.argv) > 2:
        y = exact(np.ones(96, np.float32))
        emulator(sys.argv[2], y, 96)
        return
    for order in SANITIZED_ORDERS:
        print(order[0], order[1], digest(emulator, order), flush=True)


if __name__ == "__main__":
    main()
