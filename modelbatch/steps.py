"""Training steps of a bundle."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .bundle import Bundle
from .engine import Engine
from .engine.several import several_steps
from .errors import ModelBatchError
from .optim import BundleGradScaler, LockstepLBFGS, PerModelOptimizer
from .pytree import flatten
from .weights import SampleWeights, shared_tensors


class Steps(Bundle):
    """The part of `ModelBatch` that trains; see there."""

    shared_input: bool
    _latest_losses: Tensor | None
    _compiler: Any
    _engine: Engine
    _without_samples: frozenset[int] = frozenset()
    """The models that had no sample in the last `train_step`."""

    def compute_loss(
        self, outputs: Any, targets: Any, loss_fn: Callable[..., Tensor], *, sample_weight: Any
    ) -> Tensor:
        """See `ModelBatch.compute_loss`."""
        raise NotImplementedError

    def _forward_of(self, x: Any) -> Any:
        raise NotImplementedError

    def _compiled_step(
        self, x: Any, y: Any, loss_fn: Callable[..., Tensor], sample_weight: Any
    ) -> Tensor | None:
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
            if self.num_models == 1:  # a single model runs as it does alone, which asks for none
                continue
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

    @contextlib.contextmanager
    def sample_weights(self, sample_weight: Any) -> Iterator[None]:
        """Within it, forwards compute for every model with its own samples of the batch.

        Batch normalisation takes its statistics from samples of weight other than 0, each counted
        by its weight, and what samples of weight 0 hold reaches nothing. A model without any sample
        rests as if frozen: its buffers, its random stream and, in a `step` within the context, its
        parameters and optimizer state stay as they are. `train_step` and `evaluate` do all this by
        themselves; the loss is given its weights separately:

            with mb.sample_weights(w):
                outputs = mb(x)
                mb.compute_loss(outputs, y, sample_weight=w).backward()
                mb.step()

        Args:
            sample_weight: `[M, B]`, or `[B]` for all models; finite and not negative. A weight
                counts samples: 2 is the sample twice. None: all samples count alike.

        Raises:
            ModelBatchError: bad weights.
        """
        with self._weighing(sample_weight, ()):
            yield

    @contextlib.contextmanager
    def _weighing(
        self, sample_weight: Any, shared: Sequence[Tensor]
    ) -> Iterator[SampleWeights | None]:
        """`sample_weights`; the tensors that all models share are looked at in one go with them."""
        forward = self._forward
        if sample_weight is None:
            outer, forward.weights = forward.weights, None
            try:
                yield None
            finally:
                forward.weights = outer
            return
        weights = SampleWeights(sample_weight, self.num_models, self._streams.device, shared)
        outer, active, tensor = forward.weights, self._active, self._active_tensor
        during = [flag and count > 0 for flag, count in zip(active, weights.used)]
        weights.resting = {i for i, flag in enumerate(during) if not flag}
        forward.weights = weights
        if during != active:
            self._active = list(during)
            self._active_tensor = self.active
        try:
            yield weights
        finally:
            forward.weights = outer
            if during != active:
                now, self._active, self._active_tensor = self._active, active, tensor
                # what was frozen or unfrozen meanwhile stays so
                for value in (False, True):
                    self._set_active(
                        [i for i, old in enumerate(during) if now[i] is value is not old], value
                    )

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

        Small networks of common layers take the whole step in one call, see `enable_engine`: the
        gradients then never exist as tensors, and every `.grad` is None afterwards.

        Args:
            x: a tensor, a tuple of positional or a dict of keyword arguments.
            y: targets, see `compute_loss`.
            loss_fn: see `compute_loss`.
            sample_weight: see `compute_loss`. The weights reach batch normalisation too, so that
                each model trains as it would alone on its own samples; what samples of weight 0
                hold reaches nothing. A model without any sample in this batch does not step: its
                loss is 0, and nothing of it changes.
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
        if self._without_samples:
            self._without_samples = frozenset()
        if amp_dtype is None:
            losses = self._engine.step(self, x, y, loss_fn, sample_weight)
            if losses is not None:
                return losses
        losses = self._general_step(x, y, loss_fn, sample_weight, amp_dtype)
        self._engine.general_path_done(self)
        return losses

    def _general_step(
        self,
        x: Any,
        y: Any,
        loss_fn: Callable[..., Tensor],
        sample_weight: Any,
        amp_dtype: torch.dtype | None,
    ) -> Tensor:
        if sample_weight is None:
            return self._train_step(x, y, loss_fn, None, amp_dtype)
        shared = shared_tensors(flatten(x)[0], not self.shared_input)
        with self._weighing(sample_weight, shared) as weights:
            assert weights is not None
            if not any(self._active) and not all(weights.used):
                return self._rest()
            losses = self._train_step(x, y, loss_fn, weights.given, amp_dtype)
            self._without_samples = frozenset(i for i, n in enumerate(weights.used) if n == 0)
            return losses

    def train_steps(
        self,
        x: Any,
        y: Any,
        *,
        loss_fn: Callable[..., Tensor] = F.cross_entropy,
        sample_weight: Any = None,
        lr: Any = None,
    ) -> Tensor:
        """K training steps: bit for bit what K calls of `train_step` do, in less time.

        Where the engine takes the steps, it does so model by model: the parameters and the
        optimizer's state of a model are in the caches for K steps.

        Args:
            x: as for `train_step`, with a leading axis of K steps on every tensor: `[K, B, ...]`,
                or `[K, M, B, ...]` where each model has its own.
            y: targets, likewise.
            loss_fn: see `compute_loss`.
            sample_weight: `[K, B]` or `[K, M, B]`.
            lr: learning rates for these steps, `[K]` for all models or `[K, M]`, in the place of
                those in the optimizer's groups, which stay as they are.

        Returns:
            The losses `[K, M]`, detached.

        Raises:
            ModelBatchError: tensors of different K, bad learning rates, or see `train_step`. Steps
                before one that fails may have been done.
        """
        if self._optimizer is None:
            self.step()
        return several_steps(self, x, y, loss_fn, sample_weight, lr)

    def enable_engine(self, enabled: bool = True) -> "Steps":
        """Let `train_step` use the engine, or not; it does by default.

        Args:
            enabled: False sends every step through torch's operators, one after another.

        Returns:
            The bundle.
        """
        self._engine.enabled = enabled
        self._engine.forget()
        return self

    def _rest(self) -> Tensor:
        """The step of a batch in which no model that trains has a sample."""
        self.zero_grad()
        dtype = next((p.dtype for p in self.parameters()), torch.get_default_dtype())
        self._latest_losses = torch.zeros(self.num_models, dtype=dtype, device=self._streams.device)
        self._without_samples = frozenset(range(self.num_models))
        return self._latest_losses

    def _train_step(
        self,
        x: Any,
        y: Any,
        loss_fn: Callable[..., Tensor],
        sample_weight: Any,
        amp_dtype: torch.dtype | None,
    ) -> Tensor:
        if self._compiler is not None and amp_dtype is None:
            losses = self._compiled_step(x, y, loss_fn, sample_weight)
            if losses is not None:
                return losses
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
        if self._compiler is not None:
            self._compiler.whole_step.general_path_done()
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
