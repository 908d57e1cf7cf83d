"""Bundles as trials of Ray Tune: one actor and one device train many models at once."""

try:
    import ray.tune as _tune  # noqa: F401
except ImportError as error:
    raise ImportError(
        'modelbatch.integrations.ray needs Ray Tune: pip install "modelbatch[ray]"'
    ) from error

from .pbt import BundlePBT as BundlePBT
from .results import bundle_results as bundle_results
from .rungs import RungBoard as RungBoard
from .searcher import BundleSearcher as BundleSearcher
from .trainable import BundleTrainable as BundleTrainable
