"""Clipping the gradients of every model by its own limit."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch.optim import Optimizer

from ...optim.clip import clip_grad_norm_, clip_grad_value_
from ...optim.factory import per_model_limits
from .errors import BundleConfigurationError

if TYPE_CHECKING:
    from ...batch import ModelBatch

__all__ = ["Clipping"]


class Clipping(LightningModule):
    """The part of `BundleModule` that clips; see there."""

    bundle: "ModelBatch"
    gradient_clip_val: float | Sequence[float] | None
    gradient_clip_algorithm: str | None

    def __init__(self) -> None:
        super().__init__()
        self._limited: tuple[Optimizer, str] | None = None  # for the step that is under way

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: Any = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the gradients of every model by their own norm, or by value.

        Args:
            optimizer: what is about to step.
            gradient_clip_val: of the Trainer.
            gradient_clip_algorithm: of the Trainer.

        Raises:
            BundleConfigurationError: the module has limits of its own beside.
        """
        if self.gradient_clip_val is not None:
            if gradient_clip_val is not None:
                raise BundleConfigurationError(
                    f"Trainer(gradient_clip_val={gradient_clip_val!r}) and"
                    f" {type(self).__name__}(gradient_clip_val=...) are both given; use one of them"
                )
            gradient_clip_val = self.gradient_clip_val
            gradient_clip_algorithm = self.gradient_clip_algorithm or "norm"
        self.clip_gradients(
            optimizer,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm,
        )

    def clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: Any = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As `LightningModule.clip_gradients`, for every model alone.

        In automatic optimization the limits take effect within the step that follows, after
        unscaling; `bundle.optimizer.last_grad_norms` then has the norms `[M]` before clipping.

        Args:
            optimizer: what is about to step.
            gradient_clip_val: one limit for all models, or M of them; by default the Trainer's.
            gradient_clip_algorithm: `"norm"` or `"value"`; by default the Trainer's, or `"norm"`.

        Raises:
            BundleConfigurationError: another algorithm, a bad limit, or the Trainer or the
                optimizer clips too.
        """
        trainer = self.trainer
        value, algorithm = gradient_clip_val, gradient_clip_algorithm
        if value is None:
            value = trainer.gradient_clip_val
        elif trainer.gradient_clip_val is not None and trainer.gradient_clip_val != value:
            raise BundleConfigurationError(
                f"You have set `Trainer(gradient_clip_val={trainer.gradient_clip_val!r})` and have"
                f" passed `clip_gradients(gradient_clip_val={value!r})`. Please use only one of"
                " them."
            )
        algorithm = algorithm or trainer.gradient_clip_algorithm or "norm"
        if not GradClipAlgorithmType.supported_type(str(getattr(algorithm, "value", algorithm))):
            raise BundleConfigurationError(
                f"gradient_clip_algorithm {algorithm!r} is invalid. Allowed algorithms:"
                f" {GradClipAlgorithmType.supported_types()}."
            )
        by_norm = GradClipAlgorithmType(algorithm) == GradClipAlgorithmType.NORM
        if value is None or (isinstance(value, int | float) and value <= 0):
            return
        name = "clip_grad_norm" if by_norm else "clip_grad_value"
        limits = per_model_limits("gradient_clip_val", value, len(self.bundle))
        raw: Any = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        if any(
            getattr(raw, own, None) is not None for own in ("clip_grad_norm", "clip_grad_value")
        ):
            raise BundleConfigurationError(
                "the gradients are clipped by the optimizer already (OptimizerFactory("
                "clip_grad_norm=...) or clip_grad_value=); use that or gradient_clip_val"
            )
        if self.automatic_optimization and hasattr(raw, name):
            self._limited = raw, name
            setattr(raw, name, limits)
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scaler.unscale_(raw)
        assert limits is not None
        (clip_grad_norm_ if by_norm else clip_grad_value_)(raw, limits)

    def _forget_limits(self) -> None:
        if self._limited is not None:
            optimizer, name = self._limited
            setattr(optimizer, name, None)
            self._limited = None
