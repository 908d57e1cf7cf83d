"""Checkpoints of whole bundles, and files of single models."""

from .global_random import GlobalRandomState as GlobalRandomState
from .info import checkpoint_info as checkpoint_info
from .load import load_all as load_all
from .one_model import load_model as load_model, save_model as save_model
from .save import save_all as save_all
