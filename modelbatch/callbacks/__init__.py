"""Callbacks: what is done besides the steps while a bundle trains."""

from .base import Callback as Callback, Event as Event
from .best_model import BestModel as BestModel
from .checkpoint import Checkpoint as Checkpoint
from .early_stopping import EarlyStopping as EarlyStopping
from .metrics_logger import MetricsLogger as MetricsLogger
from .nan import NaNCallback as NaNCallback
from .pack import CallbackPack as CallbackPack, freeze as freeze
from .progress import ProgressBar as ProgressBar
from .tensorboard import TensorBoardCallback as TensorBoardCallback
from .wandb import WandbCallback as WandbCallback
