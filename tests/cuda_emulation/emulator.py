"""Builds the emulated CUDA kernels into a shared library and calls them through ctypes.

Neither torch nor pytest is imported here: the sanitized run loads this module too.
"""

import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# Name and seed of the orders in which blocks and threads run.
ORDERS = [("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2)]
ORDER_NUMBERS = {"forward": 0, "reverse": 1, "shuffled": 2}

# As nvcc compiles: no fusing of products and sums (-fmad=false for the families that need it),
# and vectors are read through pointers to scalars.
FLAGS = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ffp-contract=off"]
FLAGS += ["-fno-strict-aliasing", "-fvisibility=default"]
INCLUDES = [f"-I{HERE / 'include'}", f"-I{ROOT / 'csrc'}"]
SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiler() -> list[str] | None:
    """The C++ compiler's command, or None."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    return command if shutil.which(command[0]) else None


def sanitizer_runtime() -> str | None:
    """The library to load before the interpreter, or None where the compiler has none."""
    command = [*(compiler() or ["g++"]), "-print-file-name=libasan.so"]
    done = subprocess.run(command, capture_output=True, text=True)
    name = done.stdout.strip()
    return name if done.returncode == 0 and Path(name).is_absolute() else None


def build(sanitize: bool = False) -> Path:
    """The library of all kernels, compiled anew if a source has changed."""
    # Little optimisation: compiling takes longer than running.
    flags = [*FLAGS, "-O1", *(SANITIZE if sanitize else []), *INCLUDES]
    sources = [HERE / "scheduler.cpp", HERE / "selftest.cu"]
    sources += sorted((ROOT / "csrc").rglob("*_cuda.cu"))
    return compile_library("sanitize" if sanitize else "kernels", sources, flags, [])


def build_operators(kernels: Path, torch_folder: Path) -> Path:
    """The library that registers the emulated operators, linked to that of the kernels."""
    flags = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-O0", "-fvisibility=hidden"]
    flags += ["-include", str(HERE / "operators.h"), *INCLUDES]
    flags += ["-isystem", str(torch_folder / "include"), f"-I{sysconfig.get_path('include')}"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
    csrc = ROOT / "csrc"
    sources = [csrc / "library.cpp", csrc / "common" / "dispatch.cpp", csrc / "common" / "isa.c"]
    sources.append(csrc / "text" / "decimal.c")
    sources += sorted(csrc.rglob("*_cuda_ops.cpp"))
    sources.remove(csrc / "library_cuda_ops.cpp")  # no operators, but a Python module
    libraries = [str(kernels), f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    return compile_library("operators", sources, flags, libraries)


def compile_library(name: str, sources: list[Path], flags: list[str], libraries: list[str]) -> Path:
    """``build/cuda_emulation/<name>/<digest of all that it is made of>.so``."""
    command = compiler()
    if command is None:
        raise RuntimeError("no C++ compiler; set CXX")
    flags = [*flags, *(["-Werror"] if os.environ.get("MODELBATCH_WERROR") else [])]
    version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    digest = hashlib.sha256(repr((command, flags, libraries, version)).encode())
    for path in sorted([*(ROOT / "csrc").rglob("*"), *HERE.rglob("*"), *sources]):
        if path.suffix == ".h" or path in sources:
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    folder = ROOT / "build" / "cuda_emulation" / name
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{digest.hexdigest()[:16]}.so"
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Two runs of one checkout take turns.
        if library.exists():
            return library
        for old in folder.glob("*.so"):
            old.unlink()

        def compile_one(source: Path) -> str:
            output = folder / f"{source.name}.o"
            run([*command, "-x", "c++", *flags, "-c", str(source), "-o", str(output)])
            return str(output)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        unfinished = library.with_suffix(".tmp")
        sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
        run([*command, "-shared", *sanitizers, *objects, "-o", str(unfinished), *libraries])
        unfinished.rename(library)
    return library


def run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}")


class EmulationError(RuntimeError):
    """A launch failed; the text says what its threads did."""


class Emulator:
    """The functions of the library that :func:`build` made."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.mb_emulation_error.restype = ctypes.c_char_p
        self.library.mb_emulation_launches.restype = ctypes.c_int64

    @contextmanager
    def order(self, name: str, seed: int = 0) -> Iterator[None]:
        """Inside, blocks and threads run ``forward``, ``reverse`` or ``shuffled`` by the seed."""
        self.library.mb_emulation_order(ORDER_NUMBERS[name], ctypes.c_uint64(seed))
        try:
            yield
        finally:
            self.library.mb_emulation_order(0, ctypes.c_uint64(0))

    @property
    def launches(self) -> int:
        """How many kernels have been launched so far."""
        return self.library.mb_emulation_launches()

    def __call__(self, function: str, *arguments: Any) -> None:
        """Calls a launcher. Arrays go as pointers, whole numbers as int64_t."""
        status = getattr(self.library, function)(*map(as_argument, arguments))
        if status != 0:
            text = self.library.mb_emulation_error().decode()
            raise EmulationError(f"{function} returned {status}: {text}")


def as_argument(argument: Any) -> Any:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, np.ndarray):
        return ctypes.c_void_p(argument.ctypes.data)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return argument


_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]


class _Memory:
    """Memory of exactly one array, so that the sanitizer knows its ends."""

    def __init__(self, nbytes: int) -> None:
        self.address = _libc.malloc(nbytes)

    def __del__(self) -> None:
        _libc.free(self.address)


def exact(array: Any) -> np.ndarray:
    """A copy of the array, C-contiguous, in memory of its own with nothing behind its end."""
    array = np.ascontiguousarray(array)
    memory = _Memory(array.nbytes)
    raw = (ctypes.c_char * array.nbytes).from_address(memory.address)
    raw._memory = memory  # type: ignore[attr-defined]  # freed with the last view
    copy = np.frombuffer(raw, dtype=array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
