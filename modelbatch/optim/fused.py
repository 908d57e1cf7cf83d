"""The optimizer whose step updates all models by one operator."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _global_optimizer_post_hooks as _GLOBAL_POST_HOOKS,
    _global_optimizer_pre_hooks as _GLOBAL_PRE_HOOKS,
)

from ..change import Change
from .base import mixed_class
from .clip import clip_factor, grad_stats
from .configs import stock_optimizer
from .gradients import GradientViews
from .groups import HyperTable, ModelGroup
from .joining import Joining
from .loading import LoadingOptimizer
from .parameter_options import ParameterOptions
from .rules import RULES, Rule
from .states import Entry, StateViews, merge_numbers, real

__all__ = ["FusedOptimizer", "build_fused_optimizer"]

_DTYPES = frozenset(
    {
        *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
        *(torch.complex64, torch.complex128),
    }
)


def suits(optimizer_cls: type[Optimizer], views: GradientViews) -> bool:
    """Whether an operator computes this class for these parameters."""
    from .. import _extension

    return optimizer_cls in RULES and all(
        param.dtype in _DTYPES
        and (
            param.device.type == "cpu"
            or (param.device.type == "cuda" and _extension.has_cuda_library())
        )
        for param in views.stacked
    )


def build_fused_optimizer(
    views: GradientViews, optimizer_cls: type[Optimizer], configs: list[dict[str, Any]]
) -> "FusedOptimizer":
    """Builds the fused optimizer of a class in `RULES`; see `FusedOptimizer`."""
    own: type[FusedOptimizer] = mixed_class(
        FusedOptimizer,
        optimizer_cls,  # type: ignore[arg-type]
    )
    return own(views, optimizer_cls, configs)


class _Call:
    """One call of the operator: entries with one dtype, the same numbers and the same options."""

    __slots__ = ("entries", "options", "params", "states", "step")

    def __init__(self, entries: list[Entry], rule: Rule) -> None:
        self.entries = entries
        self.params = [entry.param for entry in entries]
        self.options = entries[0].options
        self.step, *scalars = entries[0].numbers
        lists = [
            [state for entry in entries if (state := entry.states[which]) is not None]
            for which in range(len(rule.states))
        ]
        self.states: list[Any] = [*lists, *scalars]


class FusedOptimizer(LoadingOptimizer):
    """Mixin that steps M models of a torch optimizer class by one operator.

    The states are stacked `[M, *shape]` tensors, and vectors of step counts and what else has one
    number per model; every option is such a vector too. `param_groups`, `state` and state dicts
    have torch's form, with M groups.

    The gradients stay as backward left them: unscaling and clipping happen on the way to the
    update.

    Args:
        views: the models' parameters and gradients.
        optimizer_cls: a class in `RULES`.
        configs: M dicts of its options.

    Raises:
        ModelBatchError: torch refuses the parameters or options of a model.
    """

    # GradScaler then leaves unscaling and skipping to `step`, which does both per model.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        views: GradientViews,
        optimizer_cls: type[Optimizer],
        configs: list[dict[str, Any]],
    ) -> None:
        self._views = views
        self._optimizer_cls = optimizer_cls
        self._configs = configs
        self._rule = RULES[optimizer_cls]
        self._table = HyperTable(self._rule, views.num_models)
        stocks = [
            stock_optimizer(optimizer_cls, params, config, i)
            for i, (params, config) in enumerate(zip(views.params, configs, strict=True))
        ]
        self._entries = [Entry(p, self._rule, views.num_models) for p in views.stacked]
        self._pattern: list[bool] | None = None  # which entries had a gradient in the last step
        self._calls: list[_Call] = []
        self._active_flags: list[bool] = []
        self._active: Tensor | None = None
        self.clip_grad_norm: Sequence[float] | None = None
        self.clip_grad_value: Sequence[float] | None = None
        self.last_grad_norms = None
        self._own_options = ParameterOptions()
        self._limits_key: Any = None
        self._limits_tensor: Tensor
        Optimizer.__init__(self, [dict(s.param_groups[0]) for s in stocks], stocks[0].defaults)
        self._complete = True
        self._reset_state()

    # ---- groups and state, as torch shows them

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """M parameter groups, one per model, in model order."""
        return self.__dict__["param_groups"]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        views, table = self._views, self._table
        self.__dict__["param_groups"] = [
            ModelGroup(group, i, table.changed, views.refresh) for i, group in enumerate(groups)
        ]
        table.fill(groups)
        if self._complete:
            self._state.follow(self.__dict__["param_groups"])
            self._forget_plan()

    @property  # type: ignore[override]
    def state(self) -> StateViews:
        """Every parameter's state in torch's own form, as views."""
        return self._state

    @state.setter
    def state(self, state: Mapping[Tensor, Mapping[str, Any]]) -> None:
        if not self._complete:
            return
        self._reset_state()
        for param, values in state.items():
            self._state[param] = dict(values)

    def _reset_state(self) -> None:
        num_models = self._views.num_models
        self._entries = [Entry(p, self._rule, num_models) for p in self._views.stacked]
        shared: dict[Any, list[Tensor]] = {}
        groups = self.__dict__["param_groups"]
        first = self._first_states(groups)
        for name, entry in zip(self._views.names, self._entries, strict=True):
            entry.options = self._own_options.numbers(self._rule, name)
            kind = (entry.numbers[0].device, entry.numbers[-1].dtype, entry.options)
            entry.numbers = shared.setdefault(kind, entry.numbers)
            if first is not None:
                entry.allocate(0, first)
        self._state = StateViews(
            self._rule, self._entries, self._views.rows, groups, self._forget_plan
        )
        self._forget_plan()

    def _forget_plan(self) -> None:
        self._pattern = None

    @property
    def parameter_options(self) -> Mapping[str, Mapping[str, float]]:
        """Options of single parameters, by name, which hold for all models; see the factory."""
        return self._own_options.by_name

    @parameter_options.setter
    def parameter_options(self, options: Mapping[str, Mapping[str, float]]) -> None:
        self._own_options = ParameterOptions.checked(self._rule, self._views.names, options)
        self._reset_state()

    def _first_states(self, groups: list[dict[str, Any]]) -> list[float] | None:
        first_state = self._rule.first_state
        return None if first_state is None else [first_state(group) for group in groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:  # noqa: D102 - inherited
        i = len(self.__dict__["param_groups"])
        super().add_param_group(param_group)
        group = ModelGroup(param_group, i, self._table.changed, self._views.refresh)
        self.__dict__["param_groups"][i] = group
        self._table.changed.update((i, option) for option in group)

    # ---- models that come and go

    def _changed_groups(self, change: Change, joining: Joining) -> list[dict[str, Any]]:
        changed, show = self._table.changed, self._views.refresh
        groups: list[ModelGroup] = self.__dict__["param_groups"]
        for old in change.removed:
            groups[old].move(0, set(), lambda: None)
        new = change.pick(
            list(groups), lambda slot: ModelGroup(joining.groups[slot], slot, changed, show)
        )
        for slot, group in enumerate(new):
            group.move(slot, changed, show)
        return list(new)

    def _change_state(
        self, change: Change, joining: Joining, left: Sequence[Sequence[nn.Parameter]]
    ) -> None:
        groups = self.__dict__["param_groups"]
        first = self._first_states(groups)
        shared: dict[int, list[Tensor]] = {}
        for entry in self._entries:
            if id(entry.numbers) not in shared:
                shared[id(entry.numbers)] = [change.rows(own) for own in entry.numbers]
        for entry in self._entries:
            entry.models_changed(change, first, shared[id(entry.numbers)])
        self._table.models_changed(groups)
        self._state.place(self._views.rows)
        self._active_flags, self._limits_key, self._calls = [], None, []
        self._forget_plan()

    # ---- the step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every active model with its own options.

        Args:
            closure: computes the gradients of all models anew and returns the loss.

        Returns:
            What the closure returned, or None without one.

        Raises:
            ModelBatchError: an option is no number; nothing has been changed then.
        """
        watched = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        profiled = torch._C._autograd._profiler_enabled()
        if watched or profiled or _GLOBAL_PRE_HOOKS or _GLOBAL_POST_HOOKS:
            return self._watched_step(closure)
        return self._plain_step(closure)

    # torch wraps the step of every class that does not say so: hooks, and an entry in the profile
    # that costs as much as the update of a small bundle even where nobody profiles.
    step.hooked = True  # type: ignore[attr-defined]

    def _plain_step(self, closure: Callable[[], Any] | None = None) -> Any:
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        with torch.no_grad():
            self._update()
        return result

    _watched_step = Optimizer.profile_hook_step(_plain_step)

    def _update(self) -> None:
        groups = self.__dict__["param_groups"]
        grads = [entry.stacked.grad for entry in self._entries]
        pattern = [grad is not None for grad in grads]
        if self._table.refresh(groups) or pattern != self._pattern:
            self._plan(pattern)
        if not self._calls:
            return
        nonfinite = self._nonfinite() if "found_inf" in self.__dict__ or self._views.lost else None
        if self._views.active_flags() != self._active_flags:
            self._read_active()
        by_call = [self._gradients(call) for call in self._calls]
        scaling: tuple[Tensor | None, ...] = (None, None, None)
        self.last_grad_norms = self.last_inv_scale = None
        scaled = self.__dict__.get("grad_scale") is not None
        if scaled or self.clip_grad_norm is not None or self.clip_grad_value is not None:
            scaling = self._scaling([grad for grads in by_call for grad in grads])
        active, operator = self._active, self._rule.operator
        for call, own in zip(self._calls, by_call, strict=True):
            matrix = self._own_options.matrix(self._table.matrix, call.options)
            operator(call.params, own, *call.states, call.step, matrix, active, nonfinite, *scaling)
        # The operator writes below autograd, which must learn that saved parameters changed.
        torch.autograd.graph.increment_version(self._views.stacked)

    def one_call(self, pattern: list[bool]) -> _Call | None:
        """What a whole step by one operator needs to know of this optimizer.

        Brings options up to date and makes missing states, as a step does.

        Args:
            pattern: which of the stacked parameters take part.

        Returns:
            The parameters, states and steps; None if one call cannot take them all.

        Raises:
            ModelBatchError: an option is no number.
        """
        if self._table.refresh(self.__dict__["param_groups"]) or pattern != self._pattern:
            with torch.no_grad():
                self._plan(pattern)
        single = len(self._calls) == 1 and not self._calls[0].options
        return self._calls[0] if single else None

    def clip_limits(self) -> tuple[Tensor | None, Tensor | None]:
        """The models' limits of norm and value, float64 `[M]`; None without."""
        device = self._views.stacked[0].device
        norm, value = self.clip_grad_norm, self.clip_grad_value
        return (
            None if norm is None else self._limits(norm, device),
            None if value is None else self._limits(value, device),
        )

    def _gradients(self, call: _Call) -> list[Tensor]:
        grads = []
        for entry in call.entries:
            grad = entry.stacked.grad
            assert grad is not None
            if grad.is_sparse:
                grad = self._dense(grad)
            if grad.dtype != entry.stacked.dtype:
                grad = grad.to(entry.stacked.dtype)
            grads.append(real(grad) if grad.is_complex() else grad)
        return grads

    def _dense(self, grad: Tensor) -> Tensor:
        check = self._rule.check_sparse
        if check is None:
            raise RuntimeError(f"{self._optimizer_cls.__name__} does not support sparse gradients")
        for i, group in enumerate(self.__dict__["param_groups"]):
            try:
                check(group)
            except RuntimeError as error:
                raise RuntimeError(f"model {i}: {error}") from None
        return grad.to_dense()

    def _plan(self, pattern: list[bool]) -> None:
        """Makes missing states and groups the entries into calls."""
        groups = self.__dict__["param_groups"]
        needs = [self._rule.needed(group) for group in groups]
        device = self._views.stacked[0].device if self._views.stacked else torch.device("cpu")
        self._table.to(device)
        needed = [any(flags) for flags in zip(*needs, strict=True)]
        first = self._first_states(groups)
        for entry, steps in zip(self._entries, pattern, strict=True):
            for which, flag in enumerate(needed):
                if steps and flag and entry.states[which] is None:
                    entry.allocate(which, first)
        merge_numbers(self._entries, pattern)
        together: dict[Any, list[Entry]] = {}
        for entry, steps in zip(self._entries, pattern, strict=True):
            if steps:
                param = entry.stacked
                key = (param.device, param.dtype.to_real(), id(entry.numbers))
                together.setdefault(key, []).append(entry)
        self._calls = [_Call(entries, self._rule) for entries in together.values()]
        self._pattern = pattern

    def _read_active(self) -> None:
        self._active_flags = list(self._views.active_flags())
        self._active = None
        if not all(self._active_flags):
            device = self._views.stacked[0].device
            self._active = torch.tensor(self._active_flags, dtype=torch.bool, device=device)

    def _nonfinite(self) -> Tensor | None:
        """Which models a gradient scaler makes sit out this step, bool `[M]`."""
        found: Tensor | None = self.__dict__.get("found_inf")
        device = self._views.stacked[0].device
        if isinstance(found, Tensor) and found.dim() > 0:
            self._views.lose(())
            return found.to(device) != 0
        skipped = self._models_to_skip()
        if not skipped:
            return None
        flags = [i in skipped for i in range(self._views.num_models)]
        return torch.tensor(flags, dtype=torch.bool, device=device)

    def _scaling(self, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
        """What to do to the models' gradients on their way to the update."""
        num_models, device = self._views.num_models, grads[0].device
        scale: Tensor | None = self.__dict__.get("grad_scale")
        inv_scale = factor = limit = None
        if scale is not None:
            # The reciprocal in double precision, as GradScaler takes it.
            inv_scale = scale.double().reciprocal().float().to(device).expand(num_models)
            inv_scale = inv_scale.contiguous()
            self.last_inv_scale = inv_scale
        if self.clip_grad_norm is not None:
            squares, _ = grad_stats(grads, num_models)
            limits = self._limits(self.clip_grad_norm, device)
            norms, factor = clip_factor(squares, limits, inv_scale, dtype=torch.float64)
            self.last_grad_norms = norms
        if self.clip_grad_value is not None:
            limit = self._limits(self.clip_grad_value, device)
        return inv_scale, factor, limit

    def _limits(self, values: Sequence[float], device: torch.device) -> Tensor:
        """The M limits of a clip on their device, copied there once."""
        key = (tuple(values), device)
        if key != self._limits_key:
            limits = torch.tensor(key[0], dtype=torch.float64, device=device)
            self._limits_key, self._limits_tensor = key, limits
        return self._limits_tensor

    def learning_rates(self) -> list[float]:
        """The models' learning rates; a list that is not to be changed."""
        return self._table.learning_rates(self.__dict__["param_groups"])

    def tensors_moved(self) -> None:
        """Follows parameters that were moved to another device or dtype."""
        for entry in self._entries:
            entry.follow()
        self._pattern, self._active_flags = None, []
