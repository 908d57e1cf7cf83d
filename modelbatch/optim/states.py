"""The state of a fused optimizer: stacked tensors inside, one state per parameter outside."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ModelBatchError
from .parameter_options import OwnNumbers
from .rules import Rule

__all__ = ["Entry", "StateViews", "merge_numbers", "real"]

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

    __slots__ = ("numbers", "options", "stacked", "states")

    def __init__(self, stacked: nn.Parameter, rule: Rule, num_models: int) -> None:
        self.stacked = stacked
        #: Options of this parameter alone, see `ParameterOptions`.
        self.options: OwnNumbers = ()
        self.states: list[Tensor | None] = [None] * len(rule.states)  # [M, *shape] each
        device = stacked.device
        is_wide = self._may_be_wide() and torch.get_default_dtype() == torch.float64
        scalar_dtype = torch.float64 if is_wide else torch.float32
        #: The steps done, float32 `[M]`, and the rule's scalars, `[M]` each, which mean nothing
        #: before the first step. Entries that always step together share one list.
        self.numbers = [
            torch.zeros(num_models, dtype=torch.float32, device=device),
            *(torch.zeros(num_models, dtype=scalar_dtype, device=device) for _ in rule.scalars),
        ]

    @property
    def param(self) -> Tensor:
        """What the operator updates: the stacked parameter, `[M, *shape]`, as real numbers."""
        return real(self.stacked.detach()) if self.stacked.is_complex() else self.stacked

    def _may_be_wide(self) -> bool:
        # The CUDA operators take scalars in float32 only.
        param = self.stacked
        return param.dtype in _STATE_DTYPE and param.device.type == "cpu"

    def widen(self) -> None:
        """Keep the scalars in float64 from now on, if the parameter's dtype is as wide."""
        step, *scalars = self.numbers
        if self._may_be_wide() and any(scalar.dtype != torch.float64 for scalar in scalars):
            self.numbers = [step.clone(), *(scalar.double() for scalar in scalars)]

    def allocate(self, which: int, first: Sequence[float] | None) -> None:
        """Make state number `which`, zero or with one initial value per model."""
        dtype = _STATE_DTYPE.get(self.stacked.dtype, torch.float32)
        state = torch.zeros_like(self.param.detach(), dtype=dtype)
        if first is not None:
            for row, value in zip(state.unbind(0), first, strict=True):
                row.fill_(value)
        self.states[which] = state

    def models_changed(
        self, change: Change, first: Sequence[float] | None, numbers: list[Tensor]
    ) -> None:
        """Carry the states over to the models after a change.

        Args:
            change: what has changed.
            first: the initial values of all models' states, None for zero.
            numbers: this entry's numbers after it, which entries that share them share again.
        """
        fill: Any = 0 if first is None else list(first)
        self.states = [None if state is None else change.rows(state, fill) for state in self.states]
        self.numbers = numbers

    def follow(self) -> None:
        """Take note of a parameter that was moved or got another dtype, and move the state too."""
        device = self.stacked.device
        dtype = _STATE_DTYPE.get(self.stacked.dtype, torch.float32)
        if self.numbers[0].device != device:
            if not self._may_be_wide():
                self.numbers = [number.float() for number in self.numbers]
            self.numbers = [number.to(device) for number in self.numbers]
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
        changed: called after a state was set or cleared, when entries may no longer share numbers.
    """

    def __init__(
        self,
        rule: Rule,
        entries: list[Entry],
        params: Sequence[Sequence[nn.Parameter]],
        groups: Sequence[Mapping[str, Any]],
        changed: Callable[[], None],
    ) -> None:
        self._rule = rule
        self._entries = entries
        self._groups = groups
        self._changed = changed
        self.place(params)

    def place(self, params: Sequence[Sequence[nn.Parameter]]) -> None:
        """Know where the models' parameters are, `params[k][i]` being row i of entry k."""
        self._place: dict[Tensor, tuple[int, int]] = {
            param: (i, k) for k, rows in enumerate(params) for i, param in enumerate(rows)
        }

    def follow(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Read the models' options from other groups from now on."""
        self._groups = groups

    def model_state(self, i: int, k: int) -> dict[str, Any] | None:
        """Views of the state of model i's parameter k; None where torch would have none."""
        entry, rule = self._entries[k], self._rule
        needed = rule.needed(self._groups[i])
        if not any(needed) or all(state is None for state in entry.states):
            return None
        step, *scalars = entry.numbers
        if rule.first_state is None and step[i] == 0:
            return None
        values: dict[str, Any] = {"step": step[i]} if rule.counts else {}
        values.update((name, s[i]) for name, s in zip(rule.scalars, scalars, strict=True))
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
        scalars = [values.get(name, 0.0) for name in rule.scalars]
        if any(isinstance(s, Tensor) and s.dtype == torch.float64 for s in scalars):
            entry.widen()
        numbers = [step, *(float(scalar) for scalar in scalars)]
        if any(own[i] != new for own, new in zip(entry.numbers, numbers, strict=True)):
            if sum(other.numbers is entry.numbers for other in self._entries) > 1:
                entry.numbers = [own.clone() for own in entry.numbers]  # no longer shared
            for own, new in zip(entry.numbers, numbers, strict=True):
                own[i] = new
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
        self._changed()

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


def merge_numbers(entries: Sequence[Entry], stepping: Sequence[bool]) -> None:
    """Let entries that step together and have equal numbers share them, and no others.

    One call of the operator counts the steps of all its entries, so entries with options of their
    own have numbers of their own.

    Args:
        entries: all of them.
        stepping: which of them have a gradient in the steps to come.
    """
    by_options: dict[OwnNumbers, list[list[Tensor]]] = {}
    for entry, steps in zip(entries, stepping, strict=True):
        if not steps:
            entry.numbers = [own.clone() for own in entry.numbers]
            continue
        distinct = by_options.setdefault(entry.options, [])
        for others in distinct:
            if others is entry.numbers or all(map(_same, others, entry.numbers)):
                entry.numbers = others
                break
        else:
            distinct.append(entry.numbers)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
