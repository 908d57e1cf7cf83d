"""The optimizer of a bundle, as the hooks of a LightningModule are handed it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.pytorch.core.optimizer import LightningOptimizer

if TYPE_CHECKING:
    from .optimization import Optimization

__all__ = ["BundleLightningOptimizer", "wrap"]

_OWN = frozenset(
    {
        *("step", "optimizer", "toggle_model", "_to_lightning_optimizer"),
        *("_optimizer", "_strategy", "_on_before_step", "_on_after_step"),
    }
)


class BundleLightningOptimizer(LightningOptimizer):
    """Lightning's wrapper of an optimizer, for one with a parameter group per model.

    Lightning shows what the wrapper's class does not have. The optimizers of a bundle have
    properties, which would look at the wrapper instead of the optimizer.
    """

    def __getattribute__(self, name: str) -> Any:
        if name in _OWN or (name.startswith("__") and name.endswith("__")):
            return object.__getattribute__(self, name)
        return getattr(object.__getattribute__(self, "_optimizer"), name)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """A step of all models, see `LightningOptimizer.step`."""
        module: Optimization = self._strategy.lightning_module  # type: ignore[union-attr,assignment]
        with module._stepping():
            return LightningOptimizer.step(
                self, module._closure(self._optimizer, closure), **kwargs
            )


def wrap(wrapper: LightningOptimizer) -> None:
    """Make Lightning's wrapper one for a bundle."""
    own = type(wrapper)
    if not issubclass(own, BundleLightningOptimizer):
        wrapper.__class__ = type(own.__name__, (BundleLightningOptimizer, own), {})
