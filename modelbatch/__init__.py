"""Train many small PyTorch models at once, each as if it were alone."""

from . import _extension as _extension  # registers the operators
from ._version import __version__ as __version__
from .batch import ModelBatch as ModelBatch
from .callbacks import (
    BestModel as BestModel,
    Callback as Callback,
    CallbackPack as CallbackPack,
    Checkpoint as Checkpoint,
    EarlyStopping as EarlyStopping,
    Event as Event,
    MetricsLogger as MetricsLogger,
    NaNCallback as NaNCallback,
    ProgressBar as ProgressBar,
    TensorBoardCallback as TensorBoardCallback,
    WandbCallback as WandbCallback,
)
from .data import (
    DataRouter as DataRouter,
    PerModelLoader as PerModelLoader,
    RoutedBatch as RoutedBatch,
    StratifiedDataRouter as StratifiedDataRouter,
    create_random_masks as create_random_masks,
)
from .errors import (
    BatchingError as BatchingError,
    CheckpointError as CheckpointError,
    FallbackWarning as FallbackWarning,
    ModelBatchError as ModelBatchError,
    StructureMismatchError as StructureMismatchError,
)
from .inputs import per_model as per_model, shared as shared
from .optim import (
    BundleGradScaler as BundleGradScaler,
    OptimizerFactory as OptimizerFactory,
    create_adam_configs as create_adam_configs,
    create_lr_sweep_configs as create_lr_sweep_configs,
    create_sgd_configs as create_sgd_configs,
)
from .training import (
    History as History,
    accuracy as accuracy,
    fit as fit,
    train_one_epoch as train_one_epoch,
)
