"""Adafactor's update, computed for all models at once on the stacked tensors.

Adafactor treats every element by itself, but for a few norms. So the sequence of operations that
torch applies to each parameter of each model is applied to the stacked parameters here, with a
column `[M, 1, ...]` where torch has one number. The coefficients are computed in double precision,
as torch computes them from Python floats.

The first step of a parameter is left to torch's own class, which creates the states; afterwards
`optimizer.state` holds views of the stacked ones.
"""

import math
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adafactor, Optimizer

from .gradients import GradientViews

__all__ = ["AdafactorStep"]

# The options that enter the arithmetic, and what they are called here.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "lr": ("lr",),
    "beta2_decay": ("beta2_decay",),
    "eps": ("eps1", "eps2"),
    "d": ("d",),
    "weight_decay": ("weight_decay",),
    "maximize": ("maximize",),
}
_read = itemgetter(*_OPTIONS)


def _states_of(param: Tensor) -> tuple[str, ...]:
    """The states of one model's parameter besides the number of steps."""
    return ("variance",) if param.dim() < 2 else ("row_var", "col_var")


class _Stack:
    """The stacked states of the parameters that step together."""

    def __init__(self, entries: list[int], step: Tensor) -> None:
        self.entries = entries  # P numbers of stacked parameters
        self.step = step  # [P, M]
        self.tensors: list[list[Tensor]] = []  # P lists of [M, *shape]


class AdafactorStep:
    """The steps of a bundle's Adafactor after its first, where all models can take them at once.

    Args:
        optimizer: the bundle's optimizer.
        views: the models' parameters and gradients.
    """

    def __init__(self, optimizer: Optimizer, views: GradientViews) -> None:
        self._optimizer = optimizer
        self._views = views
        self._stack: _Stack | None = None
        self._key: Any = None
        self._values: list[tuple[Any, ...]] | None = None
        self._options: dict[str, Tensor] = {}

    @staticmethod
    def suits(optimizer_cls: type[Optimizer], stacked: Sequence[Tensor]) -> bool:
        """Whether the class is Adafactor, and computes in the parameters' own precision."""
        dtypes = {parameter.dtype for parameter in stacked}
        return optimizer_cls is Adafactor and dtypes in (set(), {torch.float32}, {torch.float64})

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
        if options is None or not self._collect():
            return False
        stack = self._stack
        assert stack is not None
        flags = self._views.active_flags()
        rows = None if all(flags) else torch.tensor([i for i, flag in enumerate(flags) if flag])
        if rows is not None and len(rows) == 0:
            return True
        names, columns = _coefficients(stack.step, options, rows)
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
                _update(tensors[0], grad * c["sign"] if flips else grad, states, c)
                continue
            # The other models' memory is not touched.
            place = rows.to(parameter.device)
            grad = grad[place]
            parts = [tensor[place] for tensor in tensors]
            _update(parts[0], grad * c["sign"] if flips else grad, parts[1:], c)
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.index_copy_(0, place, part)
        return True

    def _read_options(self, groups: list[dict[str, Any]]) -> dict[str, Tensor] | None:
        """The options as they are now; None where torch would compute otherwise with them."""
        values = [_read(group) for group in groups]
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
        for names, column in zip(_OPTIONS.values(), zip(*values), strict=True):
            parts = zip(*column) if len(names) > 1 else (column,)
            self._options.update(zip(names, map(_numbers, parts), strict=True))
        return self._options

    def _collect(self) -> bool:
        """Stacks the states of all parameters with gradients; False where one cannot be."""
        state, stacked = self._optimizer.state, self._views.stacked
        grads = [parameter.grad for parameter in stacked]
        entries = [k for k, grad in enumerate(grads) if grad is not None]
        kinds = [(stacked[k].dtype, stacked[k].device) for k in entries]
        key = (entries, kinds, id(state), len(state))
        if not self.suits(Adafactor, stacked) or any(
            grad.is_sparse or grad.dtype != parameter.dtype
            for grad, parameter in zip(grads, stacked, strict=True)
            if grad is not None
        ):
            return False
        if self._stack is not None and self._key == key:
            return True
        self._stack = None
        params = [self._views.rows[k] for k in entries]
        names = [_states_of(row[0]) for row in params]
        for row, own in zip(params, names, strict=True):
            if any(state.get(param, {}).keys() != {"step", *own} for param in row):
                return False
            if any(state[p][name].to(p) is not state[p][name] for p in row for name in own):
                return False  # the parameters were moved, but not their states
        if not entries:
            return False
        steps = [[state[param]["step"] for param in row] for row in params]
        if len({(v.dtype, v.device, v.shape) for row in steps for v in row}) != 1:
            return False
        stack = _Stack(entries, torch.stack([torch.stack(row) for row in steps]))
        for p, (row, own) in enumerate(zip(params, names, strict=True)):
            tensors = [torch.stack([state[param][name] for param in row]) for name in own]
            stack.tensors.append(tensors)
            pieces = [tensor.unbind(0) for tensor in (stack.step[p], *tensors)]
            for param, *values in zip(row, *pieces, strict=True):
                state[param].update(zip(("step", *own), values, strict=True))
        self._stack, self._key = stack, key
        return True


def _coefficients(
    step: Tensor, options: dict[str, Tensor], rows: Tensor | None
) -> tuple[list[str], Tensor]:
    """Counts the step of these models; names and values `[P, len(names), M]` of coefficients."""
    if rows is None:
        done = step.add_(1)
    else:
        options = {name: values[rows] for name, values in options.items()}
        place = rows.to(step.device)
        done = step[:, place] + 1
        step[:, place] = done
    done = done.to("cpu", torch.float64)
    slowest = 1 / done.sqrt()
    coefficients = {
        "blend": done ** options["beta2_decay"],
        "rate": torch.where(slowest < options["lr"], slowest, options["lr"]),
        "eps1": options["eps1"],
        "eps2": options["eps2"],
        "threshold": options["d"],
        "shrink": 1 - options["lr"] * options["weight_decay"],
        "sign": 1 - 2 * options["maximize"],
    }
    columns = [values.expand(done.shape) for values in coefficients.values()]
    return list(coefficients), torch.stack(columns, 1)


def _update(p: Tensor, grad: Tensor, state: Sequence[Tensor], c: dict[str, Tensor]) -> None:
    """Updates a stacked parameter and its states in place.

    Args:
        p: `[M, *shape]`.
        grad: `[M, *shape]`.
        state: the stacked states that `_states_of` names.
        c: the coefficients, `[M, 1, ...]` each.
    """
    # Not given, it is the precision of the parameter.
    eps = torch.where(c["eps1"].isnan(), torch.finfo(p.dtype).eps, c["eps1"])
    scale = _root_mean_square(p)
    # As Python's max: a NaN is not above anything.
    rate = torch.where(scale > c["eps2"], scale, c["eps2"]).mul_(c["rate"])
    if (c["shrink"] != 1).any():
        p.mul_(c["shrink"])
    if p.dim() > 2:
        row_var, col_var = state
        for var, dim in ((row_var, -1), (col_var, -2)):
            mean = torch.linalg.vector_norm(grad, dim=dim, keepdim=True).square_()
            var.lerp_(mean.div_(grad.size(dim)), c["blend"])
        smallest = torch.maximum(row_var.mean(dim=-2, keepdim=True), eps)
        estimate = (row_var * col_var).div_(smallest)
    else:
        (estimate,) = state
        estimate.lerp_(grad * grad, c["blend"])
    update = torch.maximum(estimate, eps * eps).rsqrt_().mul_(grad)
    excess = _root_mean_square(update) / c["threshold"]
    p.sub_(update.mul_(rate / torch.where(excess > 1, excess, 1.0)))


def _root_mean_square(tensor: Tensor) -> Tensor:
    """Of every model's elements, `[M, 1, ...]`."""
    flat = tensor.reshape(tensor.shape[0], -1)
    norm = torch.linalg.vector_norm(flat, dim=1) / flat.shape[1] ** 0.5
    return norm.reshape(-1, *[1] * (tensor.dim() - 1))


def _any_tensor(values: Iterable[Any]) -> bool:
    return any(
        isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and _any_tensor(value))
        for value in values
    )


def _numbers(values: Sequence[Any]) -> Tensor:
    numbers = [math.nan if value is None else float(value) for value in values]
    return torch.tensor(numbers, dtype=torch.float64)
