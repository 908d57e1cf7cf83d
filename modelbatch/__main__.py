"""``python -m modelbatch``: what is installed, what is in use and what is missing."""

import importlib.metadata
import platform
from collections.abc import Iterator

import torch

from modelbatch import _extension
from modelbatch._version import __version__

# Distribution, extra that installs it, what it is for.
_OPTIONAL = (
    ("transformers", "hf", "Hugging Face Trainer"),
    ("lightning", "lightning", "Lightning"),
    ("optuna", "optuna", "Optuna sweeps"),
    ("ray", "ray", "Ray Tune"),
    ("wandb", "wandb", "Weights & Biases"),
    ("tensorboard", "tensorboard", "TensorBoard"),
    ("matplotlib", "plot", "plots"),
)


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_device() -> str:
    if not torch.cuda.is_available():
        return "none found"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names)


def report() -> Iterator[str]:
    """Yields the lines of the report."""
    yield f"modelbatch    {__version__}"
    yield f"torch         {torch.__version__}"
    yield f"Python        {platform.python_version()}"
    yield f"CPU kernels   {_extension.isa()} in use; built: {', '.join(_extension.built_isas())}"
    yield f"CPU threads   {torch.get_num_threads()}"
    yield f"CUDA kernels  {_extension.why_no_cuda_library() or 'loaded'}"
    yield f"CUDA device   {_cuda_device()}"
    yield "optional packages:"
    missing = []
    for distribution, extra, purpose in _OPTIONAL:
        version = _installed_version(distribution)
        if version is None:
            missing.append(extra)
        yield f"  {distribution:<13} {version or 'missing':<12} {purpose}"
    if missing:
        yield f"install what is missing with: pip install 'modelbatch[{','.join(missing)}]'"


def main() -> None:
    """Prints the report."""
    for line in report():
        print(line)


if __name__ == "__main__":
    main()
