"""LBFGS for a bundle: every model its own line search, all evaluated by one closure call."""

import contextlib
import contextvars
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ..change import Change
from ..errors import ModelBatchError
from .base import PerModelOptimizer, unhooked_step
from .configs import stock_optimizer
from .gradients import GradientViews
from .joining import Joining

__all__ = ["LockstepLBFGS"]


class LockstepLBFGS(PerModelOptimizer):
    """M independent LBFGS optimizers that share the evaluations of their closure.

    `torch.optim.LBFGS` permits one parameter group, so there is one of it per model. All of them
    search at the same time: whenever every model that is still searching waits for its loss and
    gradient, one call of the closure computes them for all. A model takes part until its own
    search ends, so each has the history, the number of evaluations and the result that it would
    have had alone.

    Args:
        views: the models' parameters and gradients.
        optimizer_cls: `torch.optim.LBFGS` or a subclass of it.
        configs: M dicts of its options.

    Raises:
        ModelBatchError: torch refuses the parameters or options of a model.
    """

    def __init__(
        self, views: GradientViews, optimizer_cls: type[LBFGS], configs: list[dict[str, Any]]
    ) -> None:
        self._views = views
        self._optimizer_cls = optimizer_cls
        self._configs = configs
        self._evaluating: tuple[bool, ...] = (False,) * views.num_models
        self._optimizers = [
            stock_optimizer(optimizer_cls, params, config, i)
            for i, (params, config) in enumerate(zip(views.params, configs, strict=True))
        ]
        Optimizer.__init__(
            self,
            [optimizer.param_groups[0] for optimizer in self._optimizers],
            self._optimizers[0].defaults,
        )
        for optimizer in self._optimizers:
            self.state.update(optimizer.state)
        self._complete = True
        self._share_state()

    @property
    def evaluating(self) -> tuple[bool, ...]:
        """Which models wait for the closure call in progress; all False outside `step`.

        The others are frozen or have ended their search: nothing of theirs should change any more,
        neither batch statistics nor random streams.
        """
        return self._evaluating

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        """Runs one LBFGS step of every active model.

        Args:
            closure: clears the gradients, computes forward and backward of all models and returns
                their losses `[M]`. It is called in the calling thread, with gradients enabled,
                as often as the model with the longest search needs it.

        Returns:
            The losses `[M]` of the first evaluation, before any change.

        Raises:
            ModelBatchError: the closure returned no losses `[M]`, or a model's own LBFGS failed;
                the other models have ended their step then.
        """
        self._views.refresh()
        searches = [
            _Search(i, optimizer, self._views.params[i][0].device)
            for i, optimizer in enumerate(self._optimizers)
            if self._views.is_active(i)
        ]
        first: Tensor | None = None
        try:
            waiting = [search for search in searches if search.run()]
            while waiting or first is None:
                indices = {search.index for search in waiting}
                self._evaluating = tuple(i in indices for i in range(self._views.num_models))
                with torch.enable_grad():
                    losses = closure()
                self._check_losses(losses)
                first = losses if first is None else first
                self._views.refresh()
                values: list[float] = losses.detach().tolist()
                waiting = [search for search in waiting if search.run(values[search.index])]
        finally:
            self._evaluating = (False,) * self._views.num_models
            for search in searches:
                search.abandon()
            torch.autograd.graph.increment_version(self._views.stacked)
        failed = [search for search in searches if search.error is not None]
        if failed:
            raise ModelBatchError(
                "; ".join(f"model {s.index}: {s.name}: {s.error}" for s in failed)
            ) from failed[0].error
        return first

    def check_models_change(self, change: Change) -> None:  # noqa: D102 - inherited
        if any(self._evaluating):
            raise ModelBatchError("the models cannot change while LBFGS searches")
        super().check_models_change(change)

    def _change_state(
        self, change: Change, joining: Joining, left: Sequence[Sequence[nn.Parameter]]
    ) -> None:
        super()._change_state(change, joining, left)
        self._optimizers = change.pick(self._optimizers, joining.stocks.__getitem__)
        self._evaluating = (False,) * change.num_models
        self._share_state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share_state()

    def _share_state(self) -> None:
        """Lets the models' optimizers work on this one's groups and state, not on copies."""
        for optimizer, group in zip(self._optimizers, self.__dict__["param_groups"], strict=True):
            optimizer.param_groups = [group]
            optimizer.state = self.state

    def _check_losses(self, losses: Any) -> None:
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        if shape != (self._views.num_models,):
            raise ModelBatchError(
                f"the closure must return the losses of all models as a tensor of shape "
                f"({self._views.num_models},), got {shape}"
            )

    def _check_state(
        self, i: int, index: int, param: nn.Parameter, values: Mapping[str, Any]
    ) -> None:
        # LBFGS keeps its state at the first parameter: vectors over all parameters end to end.
        total = sum(2 * p.numel() if p.is_complex() else p.numel() for p in self._views.params[i])
        vectors = [(key, values.get(key)) for key in ("d", "prev_flat_grad")]
        for key in ("old_dirs", "old_stps"):
            vectors += [(key, vector) for vector in values.get(key) or ()]
        for key, vector in vectors:
            if isinstance(vector, Tensor) and vector.numel() != total:
                raise ModelBatchError(
                    f"model {i}: state {key!r} has {vector.numel()} elements, the model's "
                    f"parameters have {total}"
                )


class _AbandonedError(BaseException):
    """Unwinds a search whose evaluation will never come."""


class _Search:
    """One model's LBFGS step, suspended whenever it needs its loss and gradient.

    LBFGS calls its closure from deep within, so the step has a thread of its own to be suspended
    in. Only one thread ever runs: `run` hands the control over and waits until it comes back.
    """

    def __init__(self, index: int, optimizer: Optimizer, device: torch.device) -> None:
        self.index = index
        self.name = type(optimizer).__name__
        self.error: Exception | None = None
        self._optimizer = optimizer
        self._losses: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        self._needs_loss: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._thread_state = _capture_thread_state(device)
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._search,), daemon=True
        )

    def run(self, loss: float | None = None) -> bool:
        """Goes on with the loss asked for; returns whether another evaluation is needed."""
        if loss is None:
            self._thread.start()
        else:
            self._losses.put(loss)
        return self._needs_loss.get()

    def abandon(self) -> None:
        """Ends the thread, wherever it is."""
        if self._thread.is_alive():
            self._losses.put(None)
            self._thread.join()

    def _search(self) -> None:
        try:
            with self._thread_state():
                unhooked_step(type(self._optimizer))(self._optimizer, self._ask)
        except _AbandonedError:
            pass
        except Exception as error:
            self.error = error
        finally:
            self._needs_loss.put(False)

    def _ask(self) -> float:
        self._needs_loss.put(True)
        loss = self._losses.get()
        if loss is None:
            raise _AbandonedError
        return loss


def _capture_thread_state(
    device: torch.device,
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """What the calling thread has set for itself, as a context for another thread to enter."""
    casts = [
        (kind, torch.get_autocast_dtype(kind))
        for kind in {"cpu", device.type}
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    ]
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for kind, dtype in casts:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            yield

    return enter
