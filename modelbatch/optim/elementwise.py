"""Torch's elementwise update rules, computed for all models at once on the stacked tensors.

Adadelta, Adamax, ASGD, NAdam, RAdam and Rprop treat every element by itself, and Adafactor all but
a few norms. So the same sequence of operations that torch applies to each parameter of each model
is applied to the stacked parameters here, with a column `[M, 1, ...]` where torch has one number.
The coefficients are computed in double precision, as torch computes them from Python floats.

The first step of a parameter is left to torch's own class, which creates the states; afterwards
`optimizer.state` holds views of the stacked ones.
"""

import math
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .elementwise_rules import RULES
from .gradients import GradientViews

__all__ = ["ElementwiseStep"]

_PAIRS = {
    "betas": ("beta1", "beta2"),
    "eps": ("eps1", "eps2"),  # where there are two
    "etas": ("etaminus", "etaplus"),
    "step_sizes": ("smallest", "largest"),
}


class _Stack:
    """The stacked states of the parameters that step together."""

    def __init__(self, entries: list[int], scalars: dict[str, Tensor]) -> None:
        self.entries = entries  # P numbers of stacked parameters
        self.scalars = scalars  # [P, M] each
        self.tensors: list[list[Tensor]] = []  # P lists of [M, *shape]


class ElementwiseStep:
    """The steps of one optimizer after its first, as far as they can be computed for all models.

    Args:
        optimizer: the bundle's optimizer.
        optimizer_cls: its torch class, one of those in `RULES`.
        views: the models' parameters and gradients.
    """

    def __init__(
        self, optimizer: Optimizer, optimizer_cls: type[Optimizer], views: GradientViews
    ) -> None:
        self._optimizer = optimizer
        self._optimizer_cls = optimizer_cls
        self._views = views
        self._rule = RULES[optimizer_cls]
        self._read = itemgetter(*self._rule.options, "maximize")
        self._stack: _Stack | None = None
        self._key: Any = None
        self._values: list[tuple[Any, ...]] | None = None
        self._options: dict[str, Tensor] = {}

    @staticmethod
    def suits(optimizer_cls: type[Optimizer], stacked: Sequence[Tensor]) -> bool:
        """Whether the class is one of these, and computes in the parameters' own precision."""
        dtypes = {parameter.dtype for parameter in stacked}
        return optimizer_cls in RULES and dtypes in (set(), {torch.float32}, {torch.float64})

    def forget(self) -> None:
        """Collect the states anew at the next step."""
        self._stack = None

    @torch.no_grad()
    def step(self, groups: list[dict[str, Any]]) -> bool:
        """One step of all active models, from the stacked gradients.

        Args:
            groups: the parameter groups.

        Returns:
            Whether it was done; if not, nothing has changed and torch's own step is due.
        """
        options = self._read_options(groups)
        if options is None or not self._collect(groups):
            return False
        stack = self._stack
        assert stack is not None
        flags = self._views.active_flags()
        rows = None if all(flags) else torch.tensor([i for i, flag in enumerate(flags) if flag])
        if rows is not None and len(rows) == 0:
            return True
        names, columns = self._coefficients(stack.scalars, options, rows)
        columns = columns.to(self._views.stacked[stack.entries[0]])
        flips = bool(options["maximize"].any())
        for k, (entry, states) in enumerate(zip(stack.entries, stack.tensors, strict=True)):
            parameter = self._views.stacked[entry]
            grad = parameter.grad
            assert grad is not None
            own = columns[k].reshape(len(names), -1, *[1] * (parameter.dim() - 1))
            c = dict(zip(names, own.unbind(0), strict=True))
            tensors = [parameter.detach(), *states]
            if rows is None:
                self._rule.update(tensors[0], grad * c["sign"] if flips else grad, states, c)
                continue
            # The other models' memory is not touched.
            place = rows.to(parameter.device)
            grad = grad[place]
            parts = [tensor[place] for tensor in tensors]
            self._rule.update(parts[0], grad * c["sign"] if flips else grad, parts[1:], c)
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.index_copy_(0, place, part)
        return True

    def _coefficients(
        self, stored: dict[str, Tensor], options: dict[str, Tensor], rows: Tensor | None
    ) -> tuple[list[str], Tensor]:
        """Advances the scalar states of these models; names and values `[P, len(names), M]`."""
        scalars = stored
        if rows is not None:
            options = {name: values[rows] for name, values in options.items()}
            scalars = {name: values[:, rows.to(values.device)] for name, values in stored.items()}
        scalars["step"].add_(1)
        double = {name: v.to("cpu", torch.float64, copy=True) for name, v in scalars.items()}
        self._rule.advance(options, double, scalars)
        if rows is not None:
            for name, values in stored.items():
                values[:, rows.to(values.device)] = scalars[name]
        coefficients = {
            **self._rule.coefficients(options, double),
            "sign": 1 - 2 * options["maximize"],
        }
        shape = scalars["step"].shape
        columns = [values.expand(shape) for values in coefficients.values()]
        return list(coefficients), torch.stack(columns, 1)

    def _read_options(self, groups: list[dict[str, Any]]) -> dict[str, Tensor] | None:
        """The options as they are now; None where torch would compute otherwise with them."""
        values = [self._read(group) for group in groups]
        rates = [row[0] for row in values if isinstance(row[0], Tensor)]
        # A tensor equal to the float that was there may not be equal to it in double precision,
        # and it may have another value at the next step and still be the same.
        if not rates and values == self._values:
            return self._options
        # With a rate in single precision torch computes the coefficients in single precision too.
        dtype = self._views.stacked[0].dtype
        if any(torch.promote_types(rate.dtype, dtype) != rate.dtype for rate in rates):
            return None
        if _any_tensor(row[1:] if isinstance(row[0], Tensor) else row for row in values):
            return None
        self._values = values
        self._options = {}
        for name, column in zip((*self._rule.options, "maximize"), zip(*values), strict=True):
            if isinstance(column[0], (tuple, list)):
                for which, own in enumerate(_PAIRS[name]):
                    self._options[own] = _numbers([pair[which] for pair in column])
            else:
                self._options[name] = _numbers(column)
        return self._options

    def _collect(self, groups: list[dict[str, Any]]) -> bool:
        """Stacks the states of all parameters with gradients; False where one cannot be."""
        if any(group.get("capturable") for group in groups):
            return False
        if not self._rule.same_in_foreach and any(group["foreach"] for group in groups):
            return False
        state, stacked = self._optimizer.state, self._views.stacked
        grads = [parameter.grad for parameter in stacked]
        entries = [k for k, grad in enumerate(grads) if grad is not None]
        kinds = [(stacked[k].dtype, stacked[k].device) for k in entries]
        key = (entries, kinds, id(state), len(state))
        if not self.suits(self._optimizer_cls, stacked) or any(
            grad.is_sparse or grad.dtype != parameter.dtype
            for grad, parameter in zip(grads, stacked, strict=True)
            if grad is not None
        ):
            return False
        if self._stack is not None and self._key == key:
            return True
        self._stack = None
        rule = self._rule
        params = [self._views.rows[k] for k in entries]
        names = [rule.tensors_of(row[0]) for row in params]
        for row, own in zip(params, names, strict=True):
            expected = {*rule.scalars, *own}
            if any(state.get(param, {}).keys() != expected for param in row):
                return False
            if any(state[p][name].to(p) is not state[p][name] for p in row for name in own):
                return False  # the parameters were moved, but not their states
        if not entries:
            return False
        scalars: dict[str, Tensor] = {}
        for name in rule.scalars:
            values = [[state[param][name] for param in row] for row in params]
            if len({(v.dtype, v.device, v.shape) for row in values for v in row}) != 1:
                return False
            scalars[name] = torch.stack([torch.stack(row) for row in values])
        stack = _Stack(entries, scalars)
        for p, (row, own) in enumerate(zip(params, names, strict=True)):
            tensors = [torch.stack([state[param][name] for param in row]) for name in own]
            stack.tensors.append(tensors)
            pieces = [tensor.unbind(0) for tensor in (*(v[p] for v in scalars.values()), *tensors)]
            for param, *values in zip(row, *pieces, strict=True):
                state[param].update(zip((*rule.scalars, *own), values, strict=True))
        self._stack, self._key = stack, key
        return True


def _any_tensor(values: Iterable[Any]) -> bool:
    return any(
        isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and _any_tensor(value))
        for value in values
    )


def _numbers(values: Sequence[Any]) -> Tensor:
    numbers = [math.nan if value is None else float(value) for value in values]
    return torch.tensor(numbers, dtype=torch.float64)
