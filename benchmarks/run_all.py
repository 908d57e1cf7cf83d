"""Run every benchmark; results go to `benchmarks/results/` as JSON."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PROGRAMS = (
    ["bundle.py"],
    ["bench_optim.py"],
    ["callbacks.py"],
    ["bench_one_model.py"],
    ["bench_rnn.py"],
    ["bench_step.py"],
    ["bench_sweep.py"],
    ["bench_frameworks.py"],
    ["conv.py", "--output", str(HERE / "results" / "conv.json")],
    ["conv.py", "--keep-memory", "--output", str(HERE / "results" / "conv_keep_memory.json")],
)


def main() -> None:
    """One after another, so that they do not disturb each other."""
    for program, *options in PROGRAMS:
        print(f"== {program} {' '.join(options)}", flush=True)
        subprocess.run([sys.executable, str(HERE / program), *options], check=True)


if __name__ == "__main__":
    main()
