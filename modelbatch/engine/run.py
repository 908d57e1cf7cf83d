"""The engine of a bundle: takes training steps where it can, and says why not where it cannot."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ModelBatchError
from ..ops.engine import train_steps_
from ..weights import SampleWeights
from . import encoding as codes
from .guards import obstacle
from .losses import options_of
from .plan import Arguments, NoPlan, Plan, arguments, make_plan
from .program import Refusal

if TYPE_CHECKING:
    from ..steps import Steps

__all__ = ["Engine"]

# Plans are kept for so many combinations of shapes and losses.
_MAX_PLANS = 16


class Engine:
    """What a bundle knows of the engine.

    Attributes:
        enabled: False sends every step the general way.
        reason: why the last step was not the engine's; None if it was.
        stop_nonfinite: a model whose numbers are no longer finite rests for the rest of a call.
        wants_norms: have the engine compute the norms of the gradients.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.reason: str | None = "no step so far"
        self.stop_nonfinite = False
        self.wants_norms = True
        self._plans: dict[Any, Plan | NoPlan] = {}
        self._refused: Any = None  # the plan that the operator refused in this step
        self._calls: tuple[Tensor, Tensor, Tensor] | None = None
        self._row = -1

    def __reduce__(self) -> Any:
        # plans hold the tensors of their bundle, so a copy makes its own
        return Engine, (self.enabled,)

    def forget(self) -> None:
        """Make all plans anew."""
        self._plans.clear()

    # ---- what the last step was like

    @property
    def status(self) -> Tensor | None:
        """Uint8 `[M]`: what the engine saw in its last step; None after one of the general path."""
        return None if self._calls is None else self._calls[1][self._row]

    @property
    def call_status(self) -> Tensor | None:
        """Uint8 `[K, M]`: the same of all steps of the last call."""
        return None if self._calls is None else self._calls[1]

    def nothing(self) -> None:
        """The step that begins is not the engine's."""
        self._calls = None

    def show(self, mb: "Steps", k: int) -> None:
        """Let losses, norms and status of step k of the last call be those of the last step."""
        if self._calls is None:
            return
        losses, _, norms = self._calls
        self._row = k
        mb._latest_losses = losses[k]
        if norms.numel():
            mb._optimizer.last_grad_norms = norms[k]  # type: ignore[union-attr]

    # ---- steps

    def step(
        self, mb: "Steps", x: Any, y: Any, loss_fn: Callable[..., Tensor], sample_weight: Any
    ) -> Tensor | None:
        """One training step; None if the general path is to take it, and nothing has changed then.

        Raises:
            ModelBatchError: bad sample weights.
        """
        self._calls = None
        given = self._given(mb, x, y)
        plan = None if given is None else self._plan(mb, given, loss_fn, sample_weight is not None)
        if plan is None or given is None:
            return None
        weights = None if sample_weight is None else [sample_weight]
        losses = self._run(mb, plan, given, given.x.unsqueeze(0), given.y.unsqueeze(0), weights)
        return None if losses is None else mb._latest_losses

    def steps(
        self,
        mb: "Steps",
        first: tuple[Any, Any],
        x: Tensor,
        y: Tensor,
        loss_fn: Callable[..., Tensor],
        sample_weights: list[Any] | None,
        lr: Tensor | None = None,
    ) -> Tensor | None:
        """K steps in one call.

        Args:
            mb: the bundle.
            first: x and y of the first step, as for `step`; all have the same form.
            x: the inputs of all steps, `[K, ...]`.
            y: the targets of all steps.
            loss_fn: the loss.
            sample_weights: those of every step, as for `step`; None without.
            lr: float64 `[K, M]`, or None.

        Returns:
            The losses `[K, M]`, or None.

        Raises:
            ModelBatchError: bad sample weights.
        """
        self._calls = None
        given = self._given(mb, *first)
        weighted = sample_weights is not None
        plan = None if given is None else self._plan(mb, given, loss_fn, weighted)
        if plan is None or given is None:
            return None
        return self._run(mb, plan, given, x, y, sample_weights, lr)

    def takes(
        self, mb: "Steps", x: Any, y: Any, loss_fn: Callable[..., Tensor], weighted: bool
    ) -> bool:
        """Whether a step with such arguments would be the engine's; changes nothing."""
        given = self._given(mb, x, y)
        return given is not None and self._plan(mb, given, loss_fn, weighted) is not None

    def general_path_done(self, mb: "Steps") -> None:
        """The general path has taken a step: one that the operator refused is not tried again."""
        if self._refused is None:
            return
        for key, plan in self._plans.items():
            if plan is self._refused:
                self._plans[key] = NoPlan(mb, self.reason or "")
        self._refused = None

    # ---- finding a plan

    def _given(self, mb: "Steps", x: Any, y: Any) -> Arguments | None:
        self._refused = None
        if not self.enabled:
            self.reason = "the engine is switched off"
            return None
        given = arguments(mb, x, y)
        if given is None:
            self.reason = "more than one input or target, or none that is a plain tensor"
        return given

    def _plan(
        self, mb: "Steps", given: Arguments, loss_fn: Callable[..., Tensor], weighted: bool
    ) -> Plan | None:
        x, y = given.x, given.y
        try:
            key = (
                *(x.shape, x.dtype, given.own_x, given.keyword, x.requires_grad),
                *(y.shape, y.dtype, given.own_y, y.requires_grad, loss_fn, weighted),
            )
            plan = self._plans.get(key)
        except TypeError:
            self.reason = "the loss cannot be hashed"
            return None
        if plan is None or not plan.holds(mb):
            plan = self._make(mb, key, given, loss_fn, weighted)
        if isinstance(plan, NoPlan):
            self.reason = plan.reason
            return None
        self.reason = obstacle(mb)
        if self.reason is None and plan.watch.hooked():
            self.reason = "hooks on the parameters"
        return plan if self.reason is None else None

    def _make(
        self,
        mb: "Steps",
        key: Any,
        given: Arguments,
        loss_fn: Callable[..., Tensor],
        weighted: bool,
    ) -> Plan | NoPlan:
        plan: Plan | NoPlan
        try:
            options_of(loss_fn)
        except Refusal as refusal:
            # not kept: it may be a new function at every step
            return NoPlan(mb, str(refusal))
        try:
            plan = make_plan(mb, given, loss_fn, weighted)
        except Refusal as refusal:
            plan = NoPlan(mb, str(refusal))
        self._plans.pop(key, None)
        while len(self._plans) >= _MAX_PLANS:
            del self._plans[next(iter(self._plans))]
        self._plans[key] = plan
        return plan

    # ---- one call of the operator

    def _run(
        self,
        mb: "Steps",
        plan: Plan,
        given: Arguments,
        x: Tensor,
        y: Tensor,
        sample_weights: list[Any] | None,
        lr: Tensor | None = None,
    ) -> Tensor | None:
        try:
            if not plan.ready():
                self.reason = "parameters that have taken different numbers of steps"
                return None
        except ModelBatchError as error:
            self.reason = str(error)
            return None
        optimizer, program, streams = plan.optimizer, plan.program, mb._streams
        flags = codes.OWN_INPUT * given.own_x | codes.OWN_TARGET * given.own_y
        weight: Tensor | None = None
        made: list[SampleWeights] = []
        if sample_weights is not None:
            made = [SampleWeights(w, mb._stack.num_models, streams.device) for w in sample_weights]
            if not _weights_suit(mb, plan, made):
                self.reason = "a batch without samples"
                return None
            weight = _stacked(made)
            flags |= codes.OWN_WEIGHT * (weight.dim() == 3)
        if self.stop_nonfinite:
            flags |= codes.STOP_NONFINITE
        clip_norm = clip_value = None
        if optimizer.clip_grad_norm is not None or optimizer.clip_grad_value is not None:
            clip_norm, clip_value = optimizer.clip_limits()
        if self.wants_norms or clip_norm is not None:
            flags |= codes.GRAD_NORM
        active, draws = mb._active_tensor, program.draws
        try:
            calls = train_steps_(
                plan.params,
                plan.buffers,
                plan.states,
                plan.step,
                x if x.is_contiguous() else x.contiguous(),
                y if y.is_contiguous() else y.contiguous(),
                weight,
                program.code,
                program.numbers,
                optimizer._table.matrix,
                lr,
                active,
                clip_norm,
                clip_value,
                streams.seed if draws else None,
                streams.step if draws else None,
                plan.rule,
                flags,
            )
        except RuntimeError as error:
            self.reason = "the operator refused: " + str(error).splitlines()[0]
            self._refused = plan
            return None
        losses, status, norms = self._calls = calls
        self._row = -1
        if draws:
            if active is None and weight is None and not self.stop_nonfinite:
                streams.step = streams.step + len(losses)
            else:
                streams.step = streams.step + (status & codes.STATUS_RESTED).eq(0).sum(0)
        self._clear(mb, optimizer)
        if norms.numel():
            optimizer.last_grad_norms = norms[-1]
        if made:
            mb._without_samples = frozenset(i for i, n in enumerate(made[-1].used) if n == 0)
        mb.__dict__["_latest_losses"] = losses[-1]  # nn.Module's own way takes microseconds
        return losses

    def _clear(self, mb: "Steps", optimizer: Any) -> None:
        """Leave the gradients as the next step would find them: there are none."""
        if "step" in optimizer.__dict__:  # a scheduler of torch asks whether it was called
            optimizer._opt_called = True
        for parameter in optimizer._views.stacked:
            if parameter.grad is not None:
                mb.zero_grad()
                break
        optimizer.last_grad_norms = optimizer.last_inv_scale = None


def _weights_suit(mb: "Steps", plan: Plan, made: list[SampleWeights]) -> bool:
    """Whether no step is a special case of the general path."""
    active = mb._active
    for weights in made:
        training = [flag and n > 0 for flag, n in zip(active, weights.used)]
        if not any(training) and not all(weights.used):
            return False
        single = (
            flag and used == 1 and total <= 1
            for flag, used, total in zip(training, weights.used, weights.totals)
        )
        if plan.program.batch_norm and any(single):
            return False
    return True


def _stacked(made: list[SampleWeights]) -> Tensor:
    """The weights of all steps, float64 `[K, B]` or `[K, M, B]`."""
    if any(len(weights.weight) > 1 for weights in made):
        return torch.stack([weights.expanded() for weights in made])
    return torch.cat([weights.weight for weights in made])
