"""Optuna studies whose trials train together in bundles."""

try:
    import optuna as _optuna  # noqa: F401
except ImportError as _error:
    raise ImportError(
        'modelbatch.integrations.optuna needs Optuna: pip install "modelbatch[optuna]"'
    ) from _error

from .constraints import ConstraintSpec as ConstraintSpec
from .legacy import ModelBatchStudy as ModelBatchStudy
from .sweep import OptunaSweep as OptunaSweep
