"""The state of a fused optimizer: stacked tensors inside, one state per parameter outside."""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelBatchError
from .rules import Rule

__all__ = ["Entry", "StateViews", "merge_steps", "real"]

_STATE_DTYPE = {torch.float64: torch.float64, torch.complex128: torch.float64}


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, as torch's optimizers see it; others as is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


class Entry:
    """One stacked parameter with its stacked state.

    Args:
        stacked: `[M, *shape]`.
        rule: names the states.
        num_models: M.
    """

    __slots__ = ("stacked", "states", "step")

    def __init__(self, stacked: nn.Parameter, rule: Rule, num_models: int) -> None:
        self.stacked = stacked
        self.states: list[Tensor | None] = [None] * len(rule.states)  # [M, *shape] each
        #: Float32 `[M]`: steps done. Entries that always step together share one tensor.
        self.step = torch.zeros(num_models, dtype=torch.float32, device=stacked.device)

    @property
    def param(self) -> Tensor:
        """What the operator updates: the stacked parameter, `[M, *shape]`, as real numbers."""
        return real(self.stacked.detach()) if self.stacked.is_complex() else self.stacked

    def allocate(self, which: int, first: Sequence[float] | None) -> None:
        """Make state number `which`, zero or with one initial value per model."""
        dtype = _STATE_DTYPE.get(self.stacked.dtype, torch.float32)
        state = torch.zeros_like(self.param.detach(), dtype=dtype)
        if first is not None:
            for row, value in zip(state.unbind(0), first, strict=True):
                row.fill_(value)
        self.states[which] = state

    def follow(self) -> None:
        """Take note of a parameter that was moved or got another dtype, and move the state too."""
        device = self.stacked.device
        dtype = _STATE_DTYPE.get(self.stacked.dtype, torch.float32)
        self.step = self.step.to(device)
        like = self.param.detach()
        self.states = [
            None if state is None else torch.empty_like(like, dtype=dtype).copy_(state)
            for state in self.states
        ]


class StateViews(MutableMapping[Tensor, dict[str, Any]]):
    """What `optimizer.state` is: for every model's parameter its state in torch's own form.

    The tensors are views: writing into them changes the optimizer. A state that is set as a whole
    is copied. Parameters that have not been stepped have no state.

    Args:
        rule: the optimizer class's rule.
        entries: one per stacked parameter.
        params: the models' own parameters, `params[k][i]` being row i of entry k.
        groups: the models' options.
    """

    def __init__(
        self,
        rule: Rule,
        entries: list[Entry],
        params: Sequence[Sequence[nn.Parameter]],
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        self._rule = rule
        self._entries = entries
        self._groups = groups
        self._place: dict[Tensor, tuple[int, int]] = {
            param: (i, k) for k, rows in enumerate(params) for i, param in enumerate(rows)
        }

    def model_state(self, i: int, k: int) -> dict[str, Any] | None:
        """Views of the state of model i's parameter k; None where torch would have none."""
        entry, rule = self._entries[k], self._rule
        needed = rule.needed(self._groups[i])
        if not any(needed) or all(state is None for state in entry.states):
            return None
        if rule.first_state is None and entry.step[i] == 0:
            return None
        values: dict[str, Any] = {"step": entry.step[i]} if rule.counts else {}
        is_complex = entry.stacked.is_complex()
        for name, state, has in zip(rule.states, entry.states, needed, strict=True):
            if has and state is not None:
                values[name] = torch.view_as_complex(state[i]) if is_complex else state[i]
        return values

    def set_model_state(self, i: int, k: int, values: Mapping[str, Any] | None) -> None:
        """Take a state in torch's form for model i's parameter k; None clears it."""
        entry, rule = self._entries[k], self._rule
        values = values or {}
        step = float(values.get("step", 0))
        if not rule.counts:
            step = float(any(values.get(name) is not None for name in rule.states))
        if entry.step[i] != step:
            if sum(other.step is entry.step for other in self._entries) > 1:
                entry.step = entry.step.clone()  # this parameter's count is now its own
            entry.step[i] = step
        for which, name in enumerate(rule.states):
            value = values.get(name)
            if value is not None and entry.states[which] is None:
                entry.allocate(which, None)
            state = entry.states[which]
            if state is None:
                continue
            if value is not None:
                state[i].copy_(real(value))
            elif rule.first_state is not None:
                state[i].fill_(rule.first_state(self._groups[i]))
            else:
                state[i].zero_()

    def __getitem__(self, param: Tensor) -> dict[str, Any]:
        # Like the defaultdict of torch's optimizers, but what is put into a fresh dict is lost.
        return self.model_state(*self._place[param]) or {}

    def __setitem__(self, param: Tensor, values: Mapping[str, Any]) -> None:
        self.set_model_state(*self._find(param), values)

    def __delitem__(self, param: Tensor) -> None:
        self.set_model_state(*self._find(param), None)

    def __contains__(self, param: object) -> bool:
        place = self._place.get(param) if isinstance(param, Tensor) else None
        return place is not None and self.model_state(*place) is not None

    def __iter__(self) -> Iterator[Tensor]:
        return (param for param in self._place if param in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _find(self, param: Tensor) -> tuple[int, int]:
        place = self._place.get(param)
        if place is None:
            raise ModelBatchError("this tensor is no parameter of the bundle's models")
        return place


def merge_steps(entries: Sequence[Entry], stepping: Sequence[bool]) -> None:
    """Let entries that step together and have equal counts share one vector, and no others.

    Args:
        entries: all of them.
        stepping: which of them have a gradient in the steps to come.
    """
    distinct: list[Tensor] = []
    for entry, steps in zip(entries, stepping, strict=True):
        if not steps:
            entry.step = entry.step.clone()
            continue
        for other in distinct:
            if other is entry.step or torch.equal(other, entry.step):
                entry.step = other
                break
        else:
            distinct.append(entry.step)
