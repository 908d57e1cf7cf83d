"""M models in one LightningModule (`pip install "modelbatch[lightning]"`)."""

from . import _available as _available  # first: says what to install
from .errors import BundleConfigurationError as BundleConfigurationError
from .module import BundleModule as BundleModule
from .pack import PackCallback as PackCallback
