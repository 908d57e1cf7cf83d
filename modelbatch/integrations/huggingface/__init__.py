"""Bundles in the Trainer of Hugging Face's transformers.

    from modelbatch.integrations.huggingface import BundledTrainer

Needs the extra `hf`: `pip install "modelbatch[hf]"`.
"""

try:
    import accelerate as _accelerate  # noqa: F401 - Trainer needs it, and says so much later
    import transformers as _transformers  # noqa: F401
except ImportError as _error:
    raise ImportError(
        "modelbatch.integrations.huggingface needs transformers and accelerate: "
        'pip install "modelbatch[hf]"'
    ) from _error

from .bundle import PreTrainedBundle
from .callbacks import BundleCallback
from .masks import keep_masks_that_differ
from .trainer import BundledTrainer, HFTrainerMixin

keep_masks_that_differ()

__all__ = ["BundleCallback", "BundledTrainer", "HFTrainerMixin", "PreTrainedBundle"]
