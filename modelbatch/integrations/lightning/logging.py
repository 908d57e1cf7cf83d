"""What a BundleModule logs: a few numbers for all models, and vectors now and then."""

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from ...errors import ModelBatchError
from ...training.batches import _size
from .recording import Means, is_loss, mean_of, spread

if TYPE_CHECKING:
    from ...batch import ModelBatch

__all__ = ["Logging"]


class Logging(LightningModule):
    """The part of `BundleModule` that logs; see there."""

    bundle: "ModelBatch"
    log_models: str
    _repeated: bool

    def __init__(self) -> None:
        super().__init__()
        self._means = Means()
        self.per_model_metrics: dict[str, Tensor] = {}
        self._batch: Any = None
        self._dataloader_idx: int | None = None
        self._on_progress_bar: set[str] = set()

    def log_per_model(
        self,
        name: str,
        values: Tensor,
        *,
        batch_size: int | Tensor | None = None,
        prog_bar: bool = False,
    ) -> None:
        """Log one number of each model, in a step of your own.

        In `training_step` the mean is logged at once, and `/best`, `/median`, `/worst` (`/max`,
        `/median`, `/min` of what is no loss) every `log_every_n_steps` steps; at the end of the
        epoch the same of the means over its batches, as `name_epoch`. In `validation_step` and
        `test_step` it is the means over all batches that are logged, at the end.

        Args:
            name: such as `"val_acc"`; what ends in `loss` is a loss, of which the lowest is best.
            values: `[M]`, means over the batch.
            batch_size: samples in the batch, one number or `[M]`; by default those of its first
                tensor.
            prog_bar: show the mean in the progress bar; of a validation, the best as well.

        Raises:
            ModelBatchError: `values` is not `[M]`, or this is no such step.
        """
        if not isinstance(values, Tensor) or values.shape != (len(self.bundle),):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ModelBatchError(
                f"log_per_model('{name}') takes one number for each of the {len(self.bundle)} "
                f"models, got {got}"
            )
        if batch_size is None:
            batch_size = _size(self.bundle, self._batch) or 1
        self._record(name, values.detach(), batch_size, prog_bar)

    def _record(
        self,
        name: str,
        values: Tensor,
        count: int | Tensor,
        prog_bar: bool = False,
        mean: Tensor | None = None,
    ) -> None:
        trainer = self._trainer
        if trainer is None or self._repeated:
            return
        values = values.detach()
        if trainer.predicting:
            raise ModelBatchError("nothing can be logged in predict_step; return it instead")
        if not trainer.training:
            if self._dataloader_idx is not None:
                name = f"{name}/dataloader_idx_{self._dataloader_idx}"
            if prog_bar:
                self._on_progress_bar.add(name)
            self._means.add("test" if trainer.testing else "val", name, values, count)
            return
        self._means.add("train", name, values, count)
        self.per_model_metrics[name] = values
        active = self.bundle._active_tensor
        mean = mean_of(values, active) if mean is None else mean
        options: dict[str, Any] = {"on_step": True, "on_epoch": False, "batch_size": 1}
        self.log(name, mean, prog_bar=prog_bar, **options)
        if self._due(1):
            self.log_dict(spread(name, values, active), **options)

    def _due(self, ahead: int = 0) -> bool:
        """Whether the optimizer step that is `ahead` of the last one is to be logged."""
        trainer: Any = self.trainer
        interval = trainer.log_every_n_steps
        return interval > 0 and (trainer.global_step + ahead) % interval == 0

    def _log_epoch(self, stage: str) -> dict[str, Tensor]:
        """Log the means of an epoch; returned are all numbers `[M]`."""
        # what a frozen model has reached counts, what it would lose in training does not
        active = self.bundle._active_tensor if stage == "train" else None
        results = self._means.means(stage)
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": 1}
        options["add_dataloader_idx"] = False
        for name, values in results.items():
            shown = f"{name}_epoch" if stage == "train" else name
            bar = name in self._on_progress_bar
            numbers = spread(shown, values, active)
            best, *others = numbers
            self.log(shown, mean_of(values, active), prog_bar=bar, **options)
            self.log(best, numbers[best], prog_bar=bar, **options)
            self.log_dict({other: numbers[other] for other in others}, **options)
        if stage != "train" and not self.trainer.sanity_checking:
            self.per_model_metrics.update(results)
        return results

    def best_model(self, monitor: str = "val_loss", mode: str | None = None) -> int:
        """Which model did best, by its slot in the bundle.

        Args:
            monitor: a key of `per_model_metrics`.
            mode: `"min"` or `"max"`; by default `"min"` for what ends in `loss`.

        Raises:
            ModelBatchError: there is no such number yet, or no model has a finite one.
        """
        known = self.per_model_metrics
        if monitor not in known:
            there = ", ".join(map(repr, known)) or "none"
            raise ModelBatchError(f"there is no {monitor!r} of the models yet; there is {there}")
        if mode not in (None, "min", "max"):
            raise ModelBatchError(f'mode must be "min" or "max", got {mode!r}')
        lowest = mode == "min" if mode is not None else is_loss(monitor)
        values = known[monitor].double() * (1 if lowest else -1)
        finite = torch.isfinite(values)
        if not finite.any():
            raise ModelBatchError(f"no model has a finite {monitor!r}")
        return int(torch.where(finite, values, torch.inf).argmin())
