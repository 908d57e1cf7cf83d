"""Loads the compiled libraries, which register the operators of ``torch.ops.modelbatch``.

``_C`` holds the CPU kernels and every schema and must be there. ``_C_cuda`` adds the CUDA kernels;
it is loaded only where torch itself was built with CUDA. Nothing else in the package touches the
libraries.
"""

import importlib.util
import warnings

import torch

try:
    from modelbatch import _C
except ImportError as error:
    if importlib.util.find_spec("modelbatch._C") is None:
        raise ImportError(
            "modelbatch's compiled library is missing; build it with `pip install .`, or in a "
            "checkout with `python setup.py build_ext --inplace`"
        ) from error
    raise

_cuda_error: str | None = None
_cuda_loaded = False


def _load_cuda_library() -> None:
    global _cuda_error, _cuda_loaded
    if torch.version.cuda is None:
        _cuda_error = f"torch {torch.__version__} is a CPU-only build"
    elif importlib.util.find_spec("modelbatch._C_cuda") is None:
        _cuda_error = "the CUDA library was not built (run `make cuda` in a checkout; needs nvcc)"
    else:
        try:
            importlib.import_module("modelbatch._C_cuda")
        except ImportError as error:
            _cuda_error = f"the CUDA library could not be loaded: {error}"
            warnings.warn(
                f"modelbatch: {_cuda_error}; its operators run on the CPU only", stacklevel=2
            )
        else:
            _cuda_loaded = True


_load_cuda_library()


def isa() -> str:
    """Returns the instruction set whose CPU kernels are in use.

    Returns:
        ``"baseline"``, ``"avx2"`` or ``"avx512"``: the best that the machine supports, or the one
        that the environment variable ``MODELBATCH_ISA`` named when the package was imported.
    """
    return _C.isa()


def built_isas() -> list[str]:
    """Returns the instruction sets that this build has CPU kernels for."""
    return _C.built_isas()


def format_rows(values: torch.Tensor) -> list[str]:
    """Writes the rows of a matrix as text: numbers with at most nine digits, and commas.

    Args:
        values: float32 `[R, C]` on the CPU.

    Returns:
        R lines; reading their numbers gives the same bits. NaN is `nan`, infinity `inf`.
    """
    values = values.detach().contiguous()
    assert values.dtype is torch.float32 and values.device.type == "cpu" and values.dim() == 2
    return _C.format_rows(values.data_ptr(), *values.shape)


def has_cuda_library() -> bool:
    """Returns whether the CUDA kernels are loaded."""
    return _cuda_loaded


def why_no_cuda_library() -> str | None:
    """Returns why the CUDA kernels are not loaded, or None if they are."""
    return _cuda_error
