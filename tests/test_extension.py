"""The compiled library: loading it, its instruction sets, and ``python -m modelbatch``."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modelbatch import _C, _extension
from modelbatch._version import __version__

ROOT = Path(__file__).resolve().parent.parent


def run_python(*args, cwd=ROOT, **env):
    """Runs Python with this checkout's package, and MODELBATCH_ISA only as given."""
    inherited = {k: v for k, v in os.environ.items() if k != "MODELBATCH_ISA"}
    return subprocess.run(
        [sys.executable, *args],
        env={**inherited, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )


PRINT_ISA = "from modelbatch import _extension; print(_extension.isa())"


def test_library_is_built_for_the_limited_api():
    assert Path(_C.__file__).name.endswith(".abi3.so")


def test_isa_in_use_is_one_that_was_built():
    assert _extension.isa() in _extension.built_isas()
    assert _extension.built_isas()[0] == "baseline"


def test_baseline_can_be_chosen():
    done = run_python("-c", PRINT_ISA, MODELBATCH_ISA="baseline")
    assert done.stdout.strip() == "baseline", done.stderr


def test_empty_choice_means_the_best():
    done = run_python("-c", PRINT_ISA, MODELBATCH_ISA="")
    assert done.stdout == run_python("-c", PRINT_ISA).stdout
    assert done.stdout.strip() in _extension.built_isas()


@pytest.mark.parametrize("name", ["sse9", "AVX2"])
def test_unknown_isa_is_an_import_error(name):
    done = run_python("-c", "from modelbatch import _extension", MODELBATCH_ISA=name)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    expected = f"ImportError: MODELBATCH_ISA={name} is unknown; use baseline, avx2 or avx512"
    assert last == expected


def test_isa_beyond_the_machine_is_an_import_error():
    best = run_python("-c", PRINT_ISA).stdout.strip()
    if best == "avx512":
        pytest.skip("this machine supports every instruction set")
    done = run_python("-c", "from modelbatch import _extension", MODELBATCH_ISA="avx512")
    assert done.returncode != 0
    assert "ImportError: MODELBATCH_ISA=avx512: this" in done.stderr


def test_missing_library_says_how_to_build_it(tmp_path):
    package = tmp_path / "modelbatch"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_extension.py").write_text(Path(_extension.__file__).read_text())
    # An editable installation would still find the checkout's library.
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]; "
        "import modelbatch._extension"
    )
    done = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: modelbatch's compiled library is missing; build it with")


def test_cuda_library_is_loaded_or_its_absence_explained():
    assert _extension.has_cuda_library() == (_extension.why_no_cuda_library() is None)
    if torch.version.cuda is None:
        assert "CPU-only" in (_extension.why_no_cuda_library() or "")


def test_report_names_versions_and_what_is_missing():
    done = run_python("-m", "modelbatch")
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line[0] != " ")
    assert lines["modelbatch"] == __version__
    assert lines["torch"] == torch.__version__
    assert f"{run_python('-c', PRINT_ISA).stdout.strip()} in use" in done.stdout
    assert "CUDA device" in done.stdout
    assert "\x1b" not in done.stdout
    missing = [line.split()[0] for line in done.stdout.splitlines() if " missing " in line]
    assert ("pip install" in done.stdout) == bool(missing)


def test_every_schema_has_a_cpu_kernel():
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("modelbatch::")]
    assert "modelbatch::dropout" in names
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"), name


def test_sources_include_only_the_stable_headers_of_torch():
    """Any other header would tie the library to the torch that it was built with."""
    allowed = ("torch/csrc/stable/", "torch/headeronly/")
    allowed += tuple(f"torch/csrc/inductor/aoti_torch/{shims}" for shims in ("c/", "generated/c_"))
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".cpp", ".h", ".cu", ".c"}]
    assert sources
    for path in sources:
        for header in re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', path.read_text()):
            assert not header.startswith(("ATen/", "c10/")), f"{path.name} includes {header}"
            assert not header.startswith("torch/") or header.startswith(allowed), (
                f"{path.name} includes {header}"
            )
