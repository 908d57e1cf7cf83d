"""The programs under examples/, run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(
    script: str, *flags: str, options: tuple[str, ...] = ("-W", "error::UserWarning")
) -> "subprocess.CompletedProcess[str]":
    """Run an example; `options` are the interpreter's."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    settings = {"PYTHONPATH": path, "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    # On a busy machine the threads of such small networks mostly wait for each other.
    settings["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        [sys.executable, *options, str(ROOT / "examples" / script), *flags],
        env={**os.environ, **settings},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
