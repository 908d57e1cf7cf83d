"""Builds the libraries ``modelbatch._C`` and, with a CUDA toolkit, ``modelbatch._C_cuda``.

Metadata lives in pyproject.toml; this file only compiles. Sources are found by their names, one
folder per op family under ``csrc/``:

* ``*.cpp``            C++17, once, into ``_C`` (torch's stable headers are C++);
* ``*_cpu.c``          C11, into ``_C``, once per instruction set (on x86-64 three, see ISA_FLAGS);
* other ``*.c``        C11, once, into ``_C``;
* ``*_cuda.cu`` and ``*_cuda_ops.cpp``   into ``_C_cuda``.

The objects have their own rules because torch's ``BuildExtension`` hands ``.c`` files to the C++
compiler, cannot compile one file several times, and does not look at headers. Only the stable ABI
of torch and the limited API of Python are used, so one build serves every torch from 2.10 and every
Python from 3.10 on.

Environment:
    USE_CUDA: ``0`` leaves ``_C_cuda`` out; ``1`` or unset builds it where a toolkit fits.
    FORCE_CUDA: ``1`` makes a missing or unfitting CUDA toolkit an error instead of a printed line.
    TORCH_CUDA_ARCH_LIST: GPU architectures, such as ``"8.0;9.0+PTX"``.
    DEBUG: ``1`` compiles with ``-O0 -g``.
    SANITIZE: ``1`` adds the address and undefined-behaviour sanitizers.
    MODELBATCH_WERROR: ``1`` makes compiler warnings errors.
    MAX_JOBS: how many files are compiled at once.
    CC, CXX: the compilers.
"""

import fcntl
import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if sys.version_info < (3, 10):  # noqa: UP036  (said here for a setup.py that is called directly)
    raise SystemExit("modelbatch: this Python is too old; use Python 3.10 or newer")

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit("modelbatch: setuptools is too old; run `pip install --upgrade setuptools`")

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 10)
ABI_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
CUDA_ARCHS = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]
# Floating-point semantics stay those of IEEE 754: NaN and infinity must survive every kernel. Only
# errno and the exception flags, which no kernel reads, are given up.
COMMON_FLAGS = ["-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
COMMON_FLAGS += ["-Wall", "-Wextra"]
# Extra flags of a family. A product and a sum may fuse wherever the processor can, except where the
# results must not depend on the processor.
SAME_EVERYWHERE = ("loss", "optim", "pointwise", "random")
FAMILY_FLAGS = {family: ["-ffp-contract=off"] for family in SAME_EVERYWHERE}
FAMILY_NVCC_FLAGS = {family: ["-fmad=false"] for family in SAME_EVERYWHERE}
DEFAULT_FAMILY_FLAGS = ["-ffp-contract=fast"]
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"),
        "-mprefer-vector-width=512",
    ],
}


def fail(message):
    """Ends the build with one line."""
    raise SystemExit(f"modelbatch: {message}")


def env_flag(name):
    """Whether the environment variable is set to something that means yes."""
    return os.environ.get(name, "").lower() not in ("", "0", "no", "off", "false")


@dataclass(frozen=True)
class Torch:
    """The installed torch, found without importing it: an import costs more than a whole check."""

    version: str
    cuda: str | None
    include: Path
    lib: Path


def find_torch():
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        fail("torch is not installed; run `pip install 'torch>=2.10'` first")
    folder = Path(spec.submodule_search_locations[0])
    values = runpy.run_path(str(folder / "version.py"))
    version = str(values["__version__"])
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < MIN_TORCH:
        fail(f"torch {version} is too old; run `pip install --upgrade 'torch>=2.10'`")
    return Torch(version, values.get("cuda"), folder / "include", folder / "lib")


def find_compiler(variable, candidates, language, package):
    command = os.environ.get(variable)
    if command:
        if shutil.which(shlex.split(command)[0]) is None:
            fail(f"{variable}={command} names no {language} compiler on PATH")
        return shlex.split(command)
    for candidate in candidates:
        if shutil.which(candidate):
            return [candidate]
    fail(f"no {language} compiler found; install one, for example `apt install {package}`")


def find_cuda(torch):
    """The CUDA toolkit to build with, or None after saying why there is none."""

    def without(reason):
        if env_flag("FORCE_CUDA"):
            fail(f"FORCE_CUDA is set, but {reason}")
        print(f"modelbatch: building without CUDA: {reason}", flush=True)

    if os.environ.get("USE_CUDA", "1") == "0":
        return None
    if torch.cuda is None:
        return without(f"torch {torch.version} is a CPU-only build")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    on_path = shutil.which("nvcc")
    homes.append(str(Path(on_path).resolve().parent.parent) if on_path else "/usr/local/cuda")
    home = next((Path(h) for h in homes if h and (Path(h) / "bin" / "nvcc").exists()), None)
    if home is None:
        return without("nvcc was not found (set CUDA_HOME to the CUDA toolkit)")
    text = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+)\.(\d+)", text.stdout)
    if found is None or found[1] != torch.cuda.split(".")[0]:
        version = ".".join(found.groups()) if found else "of unknown version"
        return without(
            f"the toolkit at {home} is {version}, but torch was built with CUDA {torch.cuda}"
        )
    return home


def cuda_arch_flags():
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    flags = []
    for arch in text.replace(";", " ").split() or CUDA_ARCHS:
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if match is None:
            fail(f"TORCH_CUDA_ARCH_LIST: cannot read {arch!r}; write for example '8.0;9.0+PTX'")
        number = "".join(match.groups()[:3])
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


@dataclass(frozen=True)
class Object:
    """One object file: the source, where it goes and the command that makes it."""

    source: Path
    output: Path
    command: list


def read_dependencies(depfile):
    text = depfile.read_text().replace("\\\n", " ")
    return [Path(word) for word in text.split(":", 1)[1].split()]


class Build(build_ext):
    """Compiles changed objects in parallel and links what they changed."""

    def build_extension(self, ext):
        os.chdir(ROOT)  # Relative source names keep this machine's paths out of the libraries.
        build = Path("build")
        build.mkdir(exist_ok=True)
        with open(build / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # Two builds of one checkout take turns.
            self._build_library(ext, build)

    def _build_library(self, ext, build):
        torch = find_torch()
        is_cuda = ext.name.endswith("_cuda")
        variant = (
            "sanitize" if env_flag("SANITIZE") else "debug" if env_flag("DEBUG") else "release"
        )
        folder = build / variant
        objects = self._cuda_objects(folder, torch) if is_cuda else self._cpu_objects(folder, torch)
        self._compile(objects, torch)
        libraries = ["-ltorch_cpu", "-lc10"]
        if is_cuda:
            # The static runtime goes with any torch: only the driver has to be new enough.
            libraries += ["-ltorch_cuda", f"-L{self.cuda_home / 'lib64'}", "-lcudart_static"]
            libraries += ["-lrt", "-lpthread", "-ldl"]
        output = Path(self.get_ext_fullpath(ext.name))
        link = [*self.cxx, "-shared", *(str(o.output) for o in objects), "-o", str(output)]
        link += [f"-L{torch.lib}", "-Wl,--as-needed", *self._mode_flags(), *libraries]
        newest = max(o.output.stat().st_mtime_ns for o in objects)
        stamp = folder / f"{ext.name}.link"
        key = shlex.join(link)
        fresh = output.exists() and stamp.exists() and stamp.read_text() == key
        if not (fresh and output.stat().st_mtime_ns > newest):
            output.parent.mkdir(parents=True, exist_ok=True)
            output.unlink(missing_ok=True)
            self._run(link)
            stamp.write_text(key)

    def _mode_flags(self):
        if env_flag("SANITIZE"):
            return ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        return ["-O0", "-g"] if env_flag("DEBUG") else ["-O3"]

    def _cpu_objects(self, folder, torch):
        self.cc = find_compiler("CC", ("gcc", "cc", "clang"), "C", "gcc")
        self.cxx = find_compiler("CXX", ("g++", "c++", "clang++"), "C++", "g++")
        headers = Path(sysconfig.get_path("include"))
        if not (headers / "Python.h").exists():
            fail(
                f"{headers}/Python.h is missing; install it, for example `apt install python3-dev`"
            )
        flags = [*COMMON_FLAGS, *self._mode_flags(), *ABI_FLAGS, "-Icsrc"]
        # Error messages quote torch's headers; where they lie on this machine is nobody's business.
        flags += [f"-ffile-prefix-map={torch.include}=."]
        flags += ["-Werror"] if env_flag("MODELBATCH_WERROR") else []
        cxx = [*self.cxx, "-std=c++17", *flags, "-isystem", str(torch.include), f"-I{headers}"]
        objects = []
        for source in sorted(Path("csrc").rglob("*.cpp")):
            if not source.name.endswith("_cuda_ops.cpp"):
                objects.append(self._object(folder, source, "", cxx))
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        for source in sorted(Path("csrc").rglob("*.c")):
            per_isa = source.name.endswith("_cpu.c")
            for isa in (ISA_FLAGS if x86 else ["baseline"]) if per_isa else [""]:
                isa_flags = [f"-DMB_ISA={isa}", *ISA_FLAGS[isa]] if isa else []
                family = FAMILY_FLAGS.get(source.parts[1], DEFAULT_FAMILY_FLAGS)
                cc = [*self.cc, "-std=c11", *flags, *family, *isa_flags]
                objects.append(self._object(folder, source, isa, cc))
        return objects

    def _cuda_objects(self, folder, torch):
        include = self.cuda_home / "include"
        flags = [*self._mode_flags(), *ABI_FLAGS, "-DUSE_CUDA", "-Icsrc"]
        flags += ["-isystem", str(torch.include)]
        host = [*COMMON_FLAGS, "-isystem", str(include), f"-ffile-prefix-map={torch.include}=."]
        host += ["-Werror"] if env_flag("MODELBATCH_WERROR") else []
        cxx = [*self.cxx, "-std=c++17", *flags, *host, f"-I{sysconfig.get_path('include')}"]
        # No -Wextra: it complains about code that nvcc itself generates.
        nvcc = [str(self.cuda_home / "bin" / "nvcc"), "-std=c++17", *flags, *cuda_arch_flags()]
        nvcc += ["-ccbin", self.cxx[0], "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
        objects = []
        for source in sorted(Path("csrc").rglob("*_cuda_ops.cpp")):
            objects.append(self._object(folder, source, "", cxx))
        for source in sorted(Path("csrc").rglob("*_cuda.cu")):
            family = FAMILY_NVCC_FLAGS.get(source.parts[1], [])
            objects.append(self._object(folder, source, "", [*nvcc, *family]))
        return objects

    def _object(self, folder, source, isa, command):
        parts = [*source.relative_to("csrc").parts[:-1], source.name, *([isa] if isa else []), "o"]
        output = folder / ".".join(parts)
        depfile = output.with_suffix(".d")
        command = [*command, "-MMD", "-MF", str(depfile), "-c", str(source), "-o", str(output)]
        return Object(source, output, command)

    def _compile(self, objects, torch):
        stale = [o for o in objects if self._is_stale(o, torch)]
        if not stale:
            return
        stale[0].output.parent.mkdir(parents=True, exist_ok=True)
        jobs = int(os.environ.get("MAX_JOBS") or min(os.cpu_count() or 1, 8))

        def compile_one(item):
            item.output.unlink(missing_ok=True)
            self._run(item.command)
            item.output.with_suffix(".key").write_text(self._key(item, torch))

        with ThreadPoolExecutor(jobs) as pool:
            for _ in pool.map(compile_one, stale):
                pass

    def _key(self, item, torch):
        return f"torch {torch.version}\n{shlex.join(item.command)}\n"

    def _is_stale(self, item, torch):
        key, depfile = item.output.with_suffix(".key"), item.output.with_suffix(".d")
        if not (item.output.exists() and key.exists() and depfile.exists()):
            return True
        if key.read_text() != self._key(item, torch):
            return True
        made = item.output.stat().st_mtime_ns
        needs = read_dependencies(depfile)
        return any(not path.exists() or path.stat().st_mtime_ns > made for path in needs)

    def _run(self, command):
        if not self.quiet_commands:
            print(shlex.join(command), flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.stdout:
            print(done.stdout, end="", flush=True)
        if done.returncode != 0:
            fail(f"this command failed with exit status {done.returncode}: {shlex.join(command)}")

    @property
    def quiet_commands(self):
        return not (self.verbose > 1 or env_flag("VERBOSE"))

    def run(self):
        torch = find_torch()
        self.cuda_home = find_cuda(torch)
        has_cuda_sources = any((ROOT / "csrc").rglob("*_cuda.cu"))
        if self.cuda_home is None or not has_cuda_sources:
            self.extensions = [e for e in self.extensions if not e.name.endswith("_cuda")]
        super().run()


def extension(name):
    return Extension(name, sources=[], py_limited_api=True)


if __name__ == "__main__":
    setup(
        ext_modules=[extension("modelbatch._C"), extension("modelbatch._C_cuda")],
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
