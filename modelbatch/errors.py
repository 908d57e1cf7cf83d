"""The errors that ModelBatch raises on purpose, and the warnings it gives."""


class ModelBatchError(ValueError):
    """Base of all errors raised by this library; the message names model, parameter and shapes."""


class StructureMismatchError(ModelBatchError):
    """The models of a bundle differ in something that one bundle cannot hold."""


class BatchingError(ModelBatchError):
    """An operation cannot be computed for all models at once."""


class CheckpointError(ModelBatchError):
    """A checkpoint cannot be read, or does not fit the bundle."""


class FallbackWarning(UserWarning):
    """An operation is computed model by model, because it cannot be batched."""
