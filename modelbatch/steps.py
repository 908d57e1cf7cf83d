"""Training steps of a bundle."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .bundle import Bundle
from .errors import ModelBatchError
from .optim import BundleGradScaler, LockstepLBFGS, PerModelOptimizer


class Steps(Bundle):
    """The part of `ModelBatch` that trains; see there."""

    _latest_losses: Tensor | None

    def compute_loss(
        self, outputs: Any, targets: Any, loss_fn: Callable[..., Tensor], *, sample_weight: Any
    ) -> Tensor:
        """See `ModelBatch.compute_loss`."""
        raise NotImplementedError

    def _forward_of(self, x: Any) -> Any:
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients; their memory is kept for the next backward."""
        parameters = self._stack.parameters()
        held = [(p, p.grad) for p in parameters if p.grad is not None]
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none)
        for parameter, grad in held:
            if not set_to_none:
                grad.detach_().zero_()
                continue
            parameter.grad = None
            own = 0
            if isinstance(self._optimizer, PerModelOptimizer):
                own = self._optimizer.kept_slices(parameter, grad)
            self._grad_memory.keep(parameter, grad, own)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of `mb.optimizer`.

        Args:
            closure: clears gradients, runs forward and backward for all models and returns their
                losses `[M]` (LBFGS needs it).

        Raises:
            ModelBatchError: if the bundle has no optimizer.
        """
        if self._optimizer is None:
            raise ModelBatchError(
                "this bundle has no optimizer; give ModelBatch lr_list= and optimizer_cls="
            )
        if closure is None:
            return self._optimizer.step()
        return self._optimizer.step(self._closure_of_the_searching(closure))

    def _closure_of_the_searching(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """During a line search, models that have finished theirs are as good as frozen."""
        optimizer = self._optimizer
        if not isinstance(optimizer, LockstepLBFGS):
            return closure

        def evaluate() -> Any:
            active, tensor = self._active, self._active_tensor
            searching = list(optimizer.evaluating)
            if not all(searching):
                self._active = [a and b for a, b in zip(active, searching)]
                self._active_tensor = self.active
            try:
                return closure()
            finally:
                self._active, self._active_tensor = active, tensor

        return evaluate

    def train_step(
        self,
        x: Any,
        y: Any,
        *,
        loss_fn: Callable[..., Tensor] = F.cross_entropy,
        sample_weight: Any = None,
        amp_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Clear gradients, forward, loss, backward and optimizer step for all models.

        Args:
            x: a tensor, a tuple of positional or a dict of keyword arguments.
            y: targets, see `compute_loss`.
            loss_fn: see `compute_loss`.
            sample_weight: see `compute_loss`.
            amp_dtype: `torch.bfloat16` or `torch.float16`: run forward and loss under
                `torch.autocast`. float16 needs scaled gradients: unless the bundle has a
                `grad_scaler`, it gets a `BundleGradScaler`.

        Returns:
            The losses `[M]`, detached.

        Raises:
            ModelBatchError: if the bundle has no optimizer, `amp_dtype` is none of these, or see
                `compute_loss`; parameters, buffers, gradients and random streams are then as
                before.
        """
        if self._optimizer is None:
            self.step()
        with self._autocast(amp_dtype):
            outputs = self._forward_of(x)
            try:
                total = self.compute_loss(outputs, y, loss_fn, sample_weight=sample_weight)
            except BaseException:
                self._forward.undo_last()
                raise
        self.zero_grad()
        scaler = self._grad_scaler
        if scaler is None:
            total.backward()
            self.step()
        else:
            assert self._optimizer is not None
            scaler.scale(total).backward()
            scaler.step(self._optimizer)
            scaler.update()
        assert self._latest_losses is not None
        return self._latest_losses

    def _autocast(self, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
        if dtype is None:
            return contextlib.nullcontext()
        if dtype not in (torch.bfloat16, torch.float16):
            raise ModelBatchError(
                f"amp_dtype must be torch.bfloat16, torch.float16 or None, got {dtype}"
            )
        if dtype == torch.float16 and self._grad_scaler is None:
            if isinstance(self._optimizer, LockstepLBFGS):
                raise ModelBatchError(
                    "LBFGS cannot scale gradients, so it cannot train in float16; use bfloat16"
                )
            self._grad_scaler = BundleGradScaler()
        return torch.autocast(self._streams.device.type, dtype=dtype)
