"""Which samples each model of a bundle sees, in which order and how many at a time."""

from .loader import PerModelLoader as PerModelLoader
from .masks import create_random_masks as create_random_masks
from .router import DataRouter as DataRouter, RoutedBatch as RoutedBatch
from .strategies import StratifiedDataRouter as StratifiedDataRouter
