"""What is raised where a bundle is given to Lightning in a way that cannot work."""

from lightning.fabric.utilities.exceptions import MisconfigurationException

from ...errors import ModelBatchError

__all__ = ["BundleConfigurationError"]


class BundleConfigurationError(ModelBatchError, MisconfigurationException):
    """A setting of the Trainer or of the module that does not fit a bundle."""
