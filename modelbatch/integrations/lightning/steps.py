"""The steps of a BundleModule, each for all models at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...loss import combine
from ...training.batches import Reader
from ...training.stepper import losses_of, weights_of
from .logging import Logging
from .optimization import Optimization
from .recording import mean_of

__all__ = ["Steps"]


class Steps(Optimization, Logging):
    """The part of `BundleModule` that computes; see there."""

    loss_fn: Callable[..., Tensor]
    metric_fns: dict[str, Callable[..., Tensor]]
    _reader: Reader

    def __init__(self) -> None:
        super().__init__()
        self._modes: dict[nn.Module, bool] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """All models' outputs: the model's own structure, every tensor `[M, ...]`."""
        return self.bundle(*args, **kwargs)

    def unpack_batch(self, batch: Any) -> Any:
        """What a batch means: `(x, y)`, `(x, y, sample_weight)` or a `RoutedBatch`.

        Override it where a loader yields something else. A tuple `x` stands for positional, a dict
        for keyword arguments of the models.

        Args:
            batch: of a loader.
        """
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Forward and loss of all models.

        Returns:
            `{"loss": what is optimized, "losses": the losses [M], detached}`.
        """
        own = self._reader(self.unpack_batch(batch))
        with weights_of(self.bundle, own) as weights:
            if weights is not None:
                self._used_now = [count > 0 for count in weights.used]
                if not any(self._used_now):
                    return self._nobody()
            losses, _ = losses_of(self.bundle, own, self.loss_fn)
            loss = combine(losses, self.bundle._active_tensor, "mean")
        self._record("train_loss", losses, own.count, prog_bar=True, mean=loss.detach())
        return {"loss": loss, "losses": losses.detach()}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Losses and metrics of all models.

        Returns:
            `{"loss": their mean, "losses": [M], name: [M], ...}`.
        """
        return self._evaluation_step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """As `validation_step`."""
        return self._evaluation_step(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """The outputs of all models for `batch`, the inputs alone or `(x, y)`.

        Returns:
            The model's own structure, every tensor `[M, B, ...]`: batches are joined along dim 1.
        """
        batch = self.unpack_batch(batch)
        if callable(getattr(batch, "arguments", None)):
            batch = batch.arguments(self.bundle)[0]
        elif isinstance(batch, list | tuple) and len(batch) in (1, 2, 3):
            batch = batch[0]
        return self.bundle._forward_of(tuple(batch) if isinstance(batch, list) else batch)

    def _nobody(self) -> dict[str, Tensor]:
        """What a batch gives in which no model has a sample: a loss without any gradient."""
        dtype = next((p.dtype for p in self.bundle.parameters()), torch.get_default_dtype())
        losses = torch.zeros(len(self.bundle), dtype=dtype, device=self.device, requires_grad=True)
        self.bundle._latest_losses = losses.detach()
        return {"loss": combine(losses, None, "mean"), "losses": losses.detach()}

    def _evaluation_step(self, batch: Any, stage: str) -> dict[str, Tensor]:
        bundle = self.bundle
        own = Reader(bundle)(self.unpack_batch(batch))  # a router is for training
        with weights_of(bundle, own):
            outputs = bundle._forward_of(own.x)
            functions = {"loss": self.loss_fn, **self.metric_fns}
            values = {
                name: bundle._losses(outputs, own.y, function, own.weight).detach()
                for name, function in functions.items()
            }
        for name, numbers in values.items():
            self._record(f"{stage}_{name}", numbers, own.count, prog_bar=name == "loss")
        losses = values.pop("loss")
        return {"loss": mean_of(losses, None), "losses": losses, **values}

    # ---- train and eval mode

    # Lightning restores train and eval mode module by module, which would miss the models' own.
    def _evaluate(self) -> None:
        self._modes = {module: module.training for module in self._all_modules()}
        self.eval()

    def _train_again(self) -> None:
        for module, training in self._modes.items():
            module.training = training
        self._modes = {}

    def _all_modules(self) -> list[nn.Module]:
        own = [module for modules in self.bundle._stack.modules for module in modules]
        return [*self.modules(), *own]

    def on_validation_model_eval(self) -> None:
        """Puts the models into eval mode."""
        self._evaluate()

    on_test_model_eval = on_predict_model_eval = on_validation_model_eval

    def on_validation_model_train(self) -> None:
        """Puts every module into the mode in which the validation found it."""
        self._train_again()

    on_test_model_train = on_predict_model_train = on_validation_model_train
