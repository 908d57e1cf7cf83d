"""Measuring variants of one workload side by side.

All variants run in one process, in turns; what is reported is the median over rounds of the time
divided by that of the first variant in the same round, so that a neighbour on the machine disturbs
all alike.
"""

import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import modelbatch

RESULTS = Path(__file__).parent / "results"


def compare(variants: dict[str, Callable[[], object]], rounds: int, repeat: int = 1) -> dict:
    """Median milliseconds and median ratio to the first variant, by name.

    Args:
        variants: what to run, by name; the first one is the reference.
        rounds: how often each variant takes its turn.
        repeat: calls in one turn.
    """
    for run in variants.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            for _ in range(repeat):
                run()
            times[name].append((time.perf_counter() - start) / repeat * 1e3)
    reference = times[next(iter(variants))]
    return {
        name: {
            "ms": round(statistics.median(taken), 4),
            "ms_min": round(min(taken), 4),
            "ratio": round(statistics.median(t / r for t, r in zip(taken, reference)), 4),
        }
        for name, taken in times.items()
    }


def machine() -> dict:
    """What a number depends on."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else ""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": model,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "modelbatch": modelbatch.__version__,
    }


def save(name: str, results: list[dict]) -> Path:
    """Write `results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**machine(), "results": results}, indent=2) + "\n")
    return path


def show(title: str, result: dict) -> None:
    """Print one comparison."""
    print(title)
    for name, row in result.items():
        print(f"  {name:<34} {row['ms']:>10.3f} ms   ratio {row['ratio']:.3f}", flush=True)
