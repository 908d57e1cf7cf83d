"""Earlier and other programs that the benchmarks compare with, fetched from PyPI on first use."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

RIVALS = Path(__file__).parent.parent / "build" / "rivals"


def modelbatch_010() -> ModuleType:
    """The earlier package `modelbatch` 0.1.0, importable beside this one.

    Its modules import each other relatively, so it may have another name here.
    """
    name = "modelbatch_010"
    if name in sys.modules:
        return sys.modules[name]
    folder = RIVALS / name / "modelbatch"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        command += ["--target", str(RIVALS / name), "modelbatch==0.1.0"]
        subprocess.run(command, check=True)
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def jax() -> ModuleType:
    """JAX for the CPU."""
    folder = RIVALS / "jax"
    if not folder.exists():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--target",
            str(folder),
            "jax",
        ]
        subprocess.run(command, check=True)
    sys.path.append(str(folder))
    return importlib.import_module("jax")
