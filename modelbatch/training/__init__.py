"""Training loops over epochs and batches, and the curves that come of them."""

from .epoch import train_one_epoch as train_one_epoch
from .fit import fit as fit
from .history import Best as Best, History as History
from .metrics import accuracy as accuracy
