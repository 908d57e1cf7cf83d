"""What Trainer logs while a bundle trains."""

import math
from typing import Any

import torch
from torch import Tensor

from .bundle import PreTrainedBundle
from .metrics import model_key

_Base: Any = object  # Trainer comes after the mixin

__all__ = ["LogMixin"]


class LogMixin(_Base):
    """The part of `HFTrainerMixin` that keeps the models' losses and logs them."""

    model: PreTrainedBundle
    per_model_logs: bool
    grad_norms: Tensor | None
    losses_of_step: Tensor | None = None
    """The models' losses `[M]` of the optimizer step at hand, over all its batches."""
    _since_log: Tensor | None = None
    _before: Tensor | None = None
    _log_step: int | None = None
    _rates: tuple[float, ...] = ()

    def _start_logs(self) -> None:
        self.losses_of_step = self._since_log = self._before = self._log_step = None
        self._stepped = True

    def _note_step(self, losses: Tensor) -> None:
        """Take the losses `[M]` of one batch, divided as the gradients are."""
        fresh = self._stepped or self.losses_of_step is None
        self.losses_of_step = losses if fresh else self.losses_of_step + losses  # type: ignore[operator]
        self._stepped = bool(self.accelerator.sync_gradients)
        if self._since_log is None:
            self._since_log = torch.zeros_like(losses, dtype=torch.float64)
            self._before = torch.zeros_like(self._since_log)
            self._log_step = self.state.global_step
        if self.args.logging_nan_inf_filter:
            # as Trainer: a loss that is no number counts as the average of those before
            steps = 1 + self.state.global_step - (self._log_step or 0)
            losses = torch.where(torch.isfinite(losses), losses, self._since_log / steps)
        self._since_log = self._since_log + losses

    def _get_learning_rate(self) -> float:
        """That of the first model; Trainer asks before the schedule goes on."""
        self._rates = tuple(float(rate) for rate in self.lr_scheduler.get_last_lr())
        return self._rates[0]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Trainer, with the losses, gradient norms and learning rates of all models."""
        if self._since_log is not None and self._before is not None:
            if "loss" in logs:
                steps = self.state.global_step - (self._log_step or 0)
                self._log_models(logs, (self._since_log / max(steps, 1)).tolist(), "loss")
                self._log_rest(logs)
                self._before = self._before + self._since_log
                self._since_log = torch.zeros_like(self._since_log)
                self._log_step = self.state.global_step
            elif "train_loss" in logs:
                steps = self.state.global_step - self._initial_global_step
                total = (self._before + self._since_log) / max(steps, 0.001)
                self._log_models(logs, total.tolist(), "train_loss")
        super().log(logs, start_time)

    def _log_models(self, logs: dict[str, float], values: list[float], name: str) -> None:
        finite = [value for value in values if math.isfinite(value)]
        logs[f"{name}_best"] = min(finite) if finite else float("nan")
        if self.per_model_logs:
            for model_id, value in zip(self.model.model_ids, values, strict=True):
                logs[f"{model_key(model_id)}_{name}"] = value

    def _log_rest(self, logs: dict[str, float]) -> None:
        if not self.per_model_logs:
            return
        ids = self.model.model_ids
        if self.grad_norms is not None:
            for model_id, norm in zip(ids, self.grad_norms.tolist(), strict=True):
                logs[f"{model_key(model_id)}_grad_norm"] = norm
        rates = self._rates
        if len(rates) == len(ids) and len(set(rates)) > 1:
            for model_id, rate in zip(ids, rates):
                logs[f"{model_key(model_id)}_learning_rate"] = rate
