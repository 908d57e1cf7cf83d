"""Whole training steps of a bundle as one graph of `torch.compile`."""

import logging
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .errors import BatchingError, FallbackWarning
from .fallback import users_stacklevel
from .optim import FusedOptimizer
from .step_batch import Batch, Obstacle, check_step, read_batch, step_key
from .step_graph import StepGraphs, trace_gradients, trace_step

if TYPE_CHECKING:
    from .batch import ModelBatch

__all__ = ["CompiledStep"]

_LOG = logging.getLogger("modelbatch")

# Each takes seconds to compile: who needs more of them would wait longer than training takes.
_MAX_GRAPHS = 16


class CompiledStep:
    """The compiled training steps of one bundle.

    Args:
        bundle: the bundle.
        options: keyword arguments of `torch.compile`.

    Attributes:
        reason: why the last step was not taken; None if it was.
        seconds: what compiling has cost so far.
        graphs: how many graphs were compiled.
    """

    def __init__(self, bundle: "ModelBatch", options: dict[str, Any]):
        self.bundle, self.options = bundle, options
        self.reason: str | None = None
        self.seconds, self.graphs = 0.0, 0
        self._entries: dict[Any, StepGraphs | str] = {}
        self._made = 0
        self._everybody = torch.empty(0, dtype=torch.bool)
        self._failed: tuple[Any, Exception] | None = None

    def clear(self) -> None:
        """Make all graphs anew."""
        self._entries.clear()
        self._made = 0

    def explained(self, path: str) -> str:
        """How a step runs.

        Args:
            path: how it would run if it were not compiled; the engine comes first.
        """
        if path.startswith("engine"):
            return path
        _, _, why = path.partition("; not the engine: ")
        return self._described() + (f"; not the engine: {why}" if why else "")

    def _described(self) -> str:
        if self.reason is not None:
            return f"compiled forward and loss, not the whole step: {self.reason}"
        if not self.graphs:
            return "compiled step (to be compiled when it is first taken)"
        plural = "s" if self.graphs > 1 else ""
        return f"compiled step ({self.seconds:.1f} s to compile, {self.graphs} graph{plural})"

    # ---- steps

    def step(
        self,
        x: tuple[tuple[Any, ...], dict[str, Any]],
        y: Any,
        loss_fn: Callable[..., Tensor],
        sample_weight: Any,
    ) -> Tensor | None:
        """One training step; None if the general path is to take it, and nothing has changed then.

        Args:
            x: the arguments of the forward.
            y: the targets.
            loss_fn: the loss.
            sample_weight: the weights that the bundle is computing with, or None.

        Raises:
            BatchingError: it cannot be compiled, with `fallback="error"`.
            ModelBatchError: wrong arguments.
        """
        self._failed = None
        try:
            check_step(self.bundle, loss_fn, sample_weight is not None)
            batch = read_batch(self.bundle, x, y, sample_weight)
            key = step_key(self.bundle, batch, loss_fn)
            entry = self._entry(key, batch, loss_fn)
            losses = self._run(key, entry, batch)
        except Obstacle as found:
            self.reason = str(found)
            return None
        self.reason = None
        return losses

    def general_path_done(self) -> None:
        """The general path has taken a step: if this one could not, that was not the data's fault.

        What failed is not tried again.
        """
        if self._failed is None:
            return
        key, error = self._failed
        self._failed = None
        self._entries[key] = self.reason or ""
        if self.bundle._forward.fallback == "warn":
            warnings.warn(
                f"the training step of this bundle cannot be compiled as a whole: {_first(error)}",
                FallbackWarning,
                stacklevel=users_stacklevel(),
            )

    def _fail(self, key: Any, error: Exception) -> Obstacle:
        if self.bundle._forward.fallback == "error":
            raise BatchingError(
                f"the training step of this bundle cannot be compiled: {_first(error)}"
            ) from error
        self._failed = key, error
        return Obstacle(_first(error))

    # ---- graphs

    def _entry(self, key: Any, batch: Batch, loss_fn: Callable[..., Tensor]) -> StepGraphs:
        entry = self._entries.get(key)
        if isinstance(entry, str):
            raise Obstacle(entry)
        if entry is not None and entry.watch.holds():
            return entry
        if self._made >= _MAX_GRAPHS:
            raise Obstacle(f"{_MAX_GRAPHS} graphs have been compiled, which is the limit")
        self._made += 1
        start = time.perf_counter()
        try:
            gradients = trace_gradients(self.bundle, batch, loss_fn)
        except Exception as error:
            raise self._fail(key, error) from error
        entry = self._entries[key] = StepGraphs(self.bundle, gradients, loss_fn)
        self.seconds += time.perf_counter() - start
        return entry

    # ---- one call of the graph

    def _run(self, key: Any, entry: StepGraphs, batch: Batch) -> Tensor:
        bundle = self.bundle
        stack, streams, optimizer = bundle._stack, bundle._streams, bundle._optimizer
        assert isinstance(optimizer, FusedOptimizer)
        tensors = [stack.tensor(slot) for slot in stack.slots]
        learning = {id(tensors[k]) for k in entry.gradients.learning}
        call = optimizer.one_call([id(e.stacked) in learning for e in optimizer._entries])
        if call is None:
            raise Obstacle("parameters that have taken different numbers of steps")
        max_norm, max_value = optimizer.clip_limits()
        arguments = [
            *(tensors, batch.tensors(), streams.seed, streams.step, self._active()),
            *(call.states, call.step, optimizer._table.matrix, max_norm, max_value),
        ]
        lists = [[state] if isinstance(state, Tensor) else state for state in call.states]
        kinds = tuple(tuple(state.dtype for state in states) for states in lists)
        variant = (optimizer._rule.name, kinds, max_norm is None, max_value is None)
        run = entry.runs.get(variant)
        parameters = [entry.stacked for entry in call.entries]
        if run is None:
            number = {id(tensor): k for k, tensor in enumerate(tensors)}
            order = [number[id(parameter)] for parameter in parameters]
            results = self._first_run(key, entry, variant, arguments, order)
        else:
            with torch.no_grad():
                results = run(*arguments)
        losses, streams.step, norms, *gradients = results
        if len({gradient.data_ptr() for gradient in gradients}) < len(gradients):
            # one tensor that is the gradient of several parameters, as in a sum of two
            gradients = [gradient.clone() for gradient in gradients]
        optimizer.zero_grad()
        optimizer.last_grad_norms = norms
        if "step" in optimizer.__dict__:  # a scheduler of torch asks whether it was called
            optimizer.__dict__["_opt_called"] = True
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        # below autograd nobody has told it that saved tensors changed
        increment_version(
            [*optimizer._views.stacked, *(tensors[k] for k in entry.gradients.written)]
        )
        bundle._forward.forget_last()
        bundle._latest_losses = losses
        return losses

    def _active(self) -> Tensor:
        """Which models are active, bool `[M]`."""
        active: Tensor | None = self.bundle._active_tensor
        if active is not None:
            return active
        streams = self.bundle._streams
        if len(self._everybody) != len(streams.seed) or self._everybody.device != streams.device:
            self._everybody = torch.ones_like(streams.seed, dtype=torch.bool)
        return self._everybody

    def _first_run(
        self,
        key: Any,
        entry: StepGraphs,
        variant: Any,
        arguments: list[Any],
        order: list[int],
    ) -> list[Tensor]:
        start = time.perf_counter()
        written = [arguments[0][k] for k in entry.gradients.written]
        kept = [tensor.clone() for tensor in written]
        try:
            graph = trace_step(self.bundle, entry.gradients, arguments, order)
            run = torch.compile(graph, **self.options)
            with torch.no_grad():
                results: list[Tensor] = run(*arguments)
        except Exception as error:
            # The optimizer comes last and checks before it writes; buffers may have been written.
            for tensor, old in zip(written, kept):
                tensor.copy_(old)
            raise self._fail(key, error) from error
        entry.runs[variant] = run
        self.graphs += 1
        self.seconds += time.perf_counter() - start
        _LOG.info(
            "compiled the training step of %d models: graph %d, %.1f s in all so far",
            len(self.bundle),
            self.graphs,
            self.seconds,
        )
        return results


def _first(error: Exception) -> str:
    """What an error says first: one line, or two where the first only announces the next."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])
