"""Train many small PyTorch models at once, each as if it were alone."""

from . import _extension as _extension  # registers the operators
from ._version import __version__ as __version__
from .batch import ModelBatch as ModelBatch
from .errors import (
    BatchingError as BatchingError,
)
from .errors import (
    CheckpointError as CheckpointError,
)
from .errors import (
    FallbackWarning as FallbackWarning,
)
from .errors import (
    ModelBatchError as ModelBatchError,
)
from .errors import (
    StructureMismatchError as StructureMismatchError,
)
from .inputs import per_model as per_model
from .inputs import shared as shared
