"""Fakes, derivatives, vmap and autocast of the operators in `modelbatch.ops.rnn`.

An LSTM, a GRU and an RNN differ in their arguments only, so each rule is written once, for a
`_Family`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modelbatch import _extension as _extension  # Registers the operators.
from modelbatch.ops.autograd import has_tangent, register_autograd
from modelbatch.ops.reference_rnn import (
    gru_backward_reference,
    gru_reference,
    lstm_backward_reference,
    lstm_reference,
    rnn_backward_reference,
    rnn_reference,
)

_library = torch.library.Library("modelbatch", "FRAGMENT")


@dataclass(frozen=True)
class _Family:
    """How the arguments of `name`, `name_backward` and `name_vjp` are laid out.

    Inputs: x, the initial states, w_ih, w_hh, b_ih, b_hh and, for an LSTM, w_hr. Outputs: y, the
    last states, and what only the backward reads. `name_vjp` is `name_backward` with the biases,
    which the kernels do not need, but the derivatives of the gradients do.
    """

    name: str
    reference: Callable[..., tuple[Tensor, ...]]
    backward_reference: Callable[..., list[Tensor | None]]
    states: int
    extras: int
    options: int

    @property
    def inputs(self) -> int:
        return self.states + 5 + (self.name == "lstm")

    @property
    def results(self) -> int:
        """Outputs with derivatives."""
        return 1 + self.states

    @property
    def bias(self) -> int:
        """Position of b_ih among the inputs; b_hh follows."""
        return self.states + 3

    def op(self, suffix: str = "") -> Any:
        return getattr(torch.ops.modelbatch, self.name + suffix).default

    def split(self, args: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
        """Arguments of `name_vjp`: gradients; inputs; y and extras; options and needs."""
        a = self.results
        b = a + self.inputs
        c = b + 1 + self.extras
        return list(args[:a]), list(args[a:b]), list(args[b:c]), list(args[c:])

    def without_biases(self, inputs: Sequence[Any]) -> list[Any]:
        return [*inputs[: self.bias], *inputs[self.bias + 2 :]]

    def per_input(self, gradients: Sequence[Any]) -> list[Any]:
        """Results of `name_backward` for each input: LSTM and RNN have one for both biases."""
        grads = list(gradients)
        if self.name != "gru":
            grads.insert(self.bias + 1, grads[self.bias])
        return grads

    def per_result(self, gradients: Sequence[Any]) -> list[Any]:
        """The opposite of `per_input`."""
        grads = list(gradients)
        if self.name != "gru":
            del grads[self.bias + 1]
        return grads


_FAMILIES = (
    _Family("lstm", lstm_reference, lstm_backward_reference, states=2, extras=2, options=2),
    _Family("gru", gru_reference, gru_backward_reference, states=1, extras=1, options=2),
    _Family("rnn", rnn_reference, rnn_backward_reference, states=1, extras=0, options=3),
)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _num_models(tensors: Sequence[Any]) -> Any:
    """M: the size of dim 0 that is not 1, if there is one."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.shape[0] != 1:
            return tensor.shape[0]
    return 1


def _define_vjp(family: _Family) -> None:
    """`name_vjp`: the schema of `name_backward` with the biases where the forward has them."""
    schema = str(family.op("_backward")._schema).replace(f"{family.name}_backward", "X", 1)
    schema = schema.replace("modelbatch::X", f"{family.name}_vjp")
    _library.define(schema.replace("Tensor w_hh,", "Tensor w_hh, Tensor? b_ih, Tensor? b_hh,", 1))

    def without_biases(*args: Any) -> Any:
        grads, inputs, outputs, rest = family.split(args)
        return family.op("_backward")(*grads, *family.without_biases(inputs), *outputs, *rest)

    for key in ("CPU", "CompositeExplicitAutograd"):
        _library.impl(f"{family.name}_vjp", without_biases, key)


# ---- fakes, and the kernels of devices that have none --------------------------------------------


def _make_fakes(family: _Family) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(*args: Any) -> tuple[Tensor, ...]:
        inputs = args[: family.inputs]
        x, h0 = inputs[:2]
        w_hh = inputs[family.bias - 1]
        models, wide = _num_models(inputs), _wide(x.dtype)
        y = x.new_empty([models, x.shape[1], w_hh.shape[2]])
        states = [x.new_empty([models, *s.shape[1:]]) for s in inputs[1 : family.results]]
        if family.name == "rnn":
            return (y, *states)
        hidden = inputs[2].shape[2] if family.name == "lstm" else h0.shape[2]
        gates = x.new_empty([models, x.shape[1], 4 * hidden], dtype=wide)
        if family.name == "gru":
            return (y, *states, gates)
        return (y, *states, gates, x.new_empty([models, x.shape[1], hidden], dtype=wide))

    def backward(*args: Any) -> tuple[Tensor, ...]:
        inputs = args[family.results :]
        x, w_ih = inputs[0], inputs[family.bias - 2]
        need_x, need_state, need_weight = args[-3:]
        models = _num_models([t for t in args if isinstance(t, Tensor)])

        def like(tensor: Tensor | None, needed: bool) -> Tensor:
            if tensor is None or not needed:
                return x.new_empty([0])
            return x.new_empty([models, *tensor.shape[1:]])

        bias = w_ih[:, :, 0] if w_ih.shape[2] else w_ih.new_empty(w_ih.shape[:2])
        biases = [like(bias, need_weight) for _ in range(2 if family.name == "gru" else 1)]
        return (
            like(x, need_x),
            *(like(s, need_state) for s in inputs[1 : family.results]),
            *(like(w, need_weight) for w in inputs[family.results : family.bias]),
            *biases,
            *([like(inputs[family.bias], need_weight)] if family.name == "lstm" else []),
        )

    return forward, backward


def _gradients(family: _Family, grads: Sequence[Any], inputs: Sequence[Any], options: Any) -> Any:
    """Results of `name_backward`, all of them and differentiable, by the reference."""
    x, w_ih = inputs[0], inputs[family.bias - 2]
    models = _num_models([*grads, *inputs])
    variables = [
        x.new_zeros([1, w_ih.shape[1]])
        if t is None and family.bias <= position < family.bias + 2
        else t
        for position, t in enumerate(inputs)
    ]
    present = [t.expand(models, *t.shape[1:]) for t in variables if t is not None]

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        full = [None if t is None else next(rest) for t in variables]
        return family.reference(*full, *options)[: family.results]

    results, vjp = torch.func.vjp(outputs, *present)  # type: ignore[misc]
    cotangents = tuple(
        torch.zeros_like(result) if grad is None else grad.expand(result.shape)
        for result, grad in zip(results, grads, strict=True)
    )
    found = iter(vjp(cotangents))
    return family.per_result([None if t is None else next(found) for t in variables])


def _make_composites(family: _Family) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return tuple(t.contiguous() for t in family.reference(*args))

    def backward(*args: Any) -> tuple[Tensor, ...]:
        x = args[family.results]
        need_x, need_state, need_weight = args[-3:]
        found = family.backward_reference(*args[:-3])
        needs = [need_x, *[need_state] * family.states, *[need_weight] * len(found)]
        return tuple(
            x.new_empty([0]) if t is None or not need else t.to(x.dtype).contiguous()
            for t, need in zip(found, needs, strict=False)
        )

    return forward, backward


# ---- autograd ------------------------------------------------------------------------------------


def _summed(gradient: Tensor | None, argument: Tensor | None) -> Tensor | None:
    """The gradient of an argument that all models may share."""
    if gradient is None or argument is None or argument.shape[0] == gradient.shape[0]:
        return gradient
    return gradient.sum(0, keepdim=True)


def _register_autograd(family: _Family) -> None:
    results, count = family.results, family.inputs

    def setup_context(ctx: Any, args: tuple[Any, ...], output: Any) -> None:
        inputs = args[:count]
        ctx.options = args[count:]
        y, extras = output[0], output[results:]
        ctx.save_for_backward(*inputs, y, *extras)
        ctx.mark_non_differentiable(*extras)
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = [None] * len(ctx.options)
        if all(grad is None for grad in grads[:results]):
            return (*[None] * count, *nothing)
        inputs, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        wanted = ctx.needs_input_grad[:count]
        needs = (wanted[0], any(wanted[1:results]), any(wanted[results:]))
        if torch.is_grad_enabled():  # these gradients may have to be differentiated themselves
            op, arguments = family.op("_vjp"), inputs
        else:
            op, arguments = family.op("_backward"), family.without_biases(inputs)
        found = op(*grads[:results], *arguments, *saved, *ctx.options, *needs)
        per_input = [
            _summed(gradient, argument) if want else None
            for gradient, argument, want in zip(
                family.per_input(found), inputs, wanted, strict=True
            )
        ]
        return (*per_input, *nothing)

    register_autograd(
        family.name, backward, setup_context=setup_context, forward_mode=family.reference
    )


def _register_autograd_of_vjp(family: _Family) -> None:
    """Derivatives of the gradients, which are functions of the forward's inputs.

    What the forward saved counts as computed from these inputs: derivatives pass through them.
    """
    first, outputs_at = family.results, family.results + family.inputs

    def setup_context(ctx: Any, args: tuple[Any, ...], output: Any) -> None:
        rest = family.split(args)[3]
        tensors = args[:outputs_at]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*args[first : -len(rest)])
        ctx.rest, ctx.options, ctx.needs = rest, rest[:-3], rest[-3:]
        ctx.num_other = len(args) - outputs_at
        ctx.set_materialize_grads(False)

    def wanted(needs: Sequence[bool], found: Sequence[Any]) -> list[Any]:
        each = [needs[0], *[needs[1]] * family.states]
        each += [needs[2]] * (len(found) - len(each))
        return [
            t if need and t is not None else found[0].new_empty([0])
            for t, need in zip(found, each, strict=True)
        ]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        present = [position for position, t in enumerate(tensors) if t is not None]

        def gradients(*variables: Tensor) -> tuple[Tensor, ...]:
            full = list(tensors)
            for position, tensor in zip(present, variables, strict=True):
                full[position] = tensor
            found = _gradients(family, full[:first], full[first:], ctx.options)
            return tuple(wanted(ctx.needs, found))

        variables = [tensors[position] for position in present]
        results, vjp = torch.func.vjp(gradients, *variables)  # type: ignore[misc]
        cotangents = tuple(
            torch.zeros_like(result) if grad is None else grad
            for result, grad in zip(results, grads, strict=True)
        )
        found: list[Tensor | None] = [None] * outputs_at
        for position, gradient in zip(present, vjp(cotangents), strict=True):
            found[position] = gradient
        return (*found, *[None] * ctx.num_other)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        # only the gradients that came in have tangents, and the operator is linear in them
        return family.op("_vjp")(*tangents[:first], *ctx.saved_tensors, *ctx.rest)

    def forward_mode(*args: Any) -> Any:
        grads, inputs, outputs, rest = family.split(args)
        if not has_tangent(*inputs, *outputs):
            return NotImplemented
        # the outputs have tangents, too, so they are of the reference and not of a kernel
        found = family.backward_reference(
            *grads, *family.without_biases(inputs), *outputs, *rest[:-3]
        )
        return tuple(wanted(rest[-3:], found))

    register_autograd(
        f"{family.name}_vjp",
        backward,
        setup_context=setup_context,
        jvp=jvp,
        forward_mode=forward_mode,
    )


# ---- vmap: the outer axis joins the model axis ---------------------------------------------------


def _joined(tensor: Tensor, dim: int | None, size: int, models: int) -> Tensor:
    """``[V * M, ...]``; ``[1, ...]`` if neither the outer axis nor the models differ."""
    if dim is None:
        if tensor.shape[0] == 1:
            return tensor
        return tensor.expand(size, *tensor.shape).flatten(0, 1)
    tensor = tensor.movedim(dim, 0)
    if tensor.shape[1] != models:
        tensor = tensor.expand(size, models, *tensor.shape[2:])
    return tensor.flatten(0, 1)


def _make_vmap(op: Any) -> Callable[..., Any]:
    def vmap(
        info: Any, in_dims: Sequence[int | None], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size = info.batch_size
        pairs = list(zip(args, in_dims, strict=True))
        models = _num_models(
            [t if dim is None else t.movedim(dim, 0)[0] for t, dim in pairs if _is_tensor(t)]
        )
        results = op(*(_joined(t, dim, size, models) if _is_tensor(t) else t for t, dim in pairs))
        # a gradient that is not needed has the shape [0]
        split = tuple(
            t.unflatten(0, (size, models)) if t.dim() > 1 else t.new_empty([size, 0])
            for t in results
        )
        return split, (0,) * len(split)

    return vmap


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


# ---- autocast: tensors are cast as torch casts those of its fastest kernels ----------------------


def _make_autocast_kernel(op: Any, device_type: str, key: torch._C.DispatchKey) -> Any:
    keys = torch._C.DispatchKeySet(key)

    def cast(value: Any) -> Any:
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.device.type == device_type
            and value.dtype != torch.float64
        ):
            return value.to(torch.get_autocast_dtype(device_type))
        return value

    def autocast(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*(cast(arg) for arg in args))

    return autocast


# ---- registration --------------------------------------------------------------------------------


def _register(family: _Family) -> None:
    name = family.name
    _define_vjp(family)
    fake, backward_fake = _make_fakes(family)
    torch.library.register_fake(f"modelbatch::{name}", fake)
    torch.library.register_fake(f"modelbatch::{name}_backward", backward_fake)
    composite, backward_composite = _make_composites(family)
    _library.impl(name, composite, "CompositeExplicitAutograd")
    _library.impl(f"{name}_backward", backward_composite, "CompositeExplicitAutograd")
    _register_autograd(family)
    _register_autograd_of_vjp(family)
    for suffix in ("", "_backward", "_vjp"):
        torch.library.register_vmap(f"modelbatch::{name}{suffix}", _make_vmap(family.op(suffix)))
    for device_type, key in (
        ("cpu", torch._C.DispatchKey.AutocastCPU),
        ("cuda", torch._C.DispatchKey.AutocastCUDA),
    ):
        kernel = _make_autocast_kernel(family.op(), device_type, key)
        _library.impl(name, kernel, f"Autocast{device_type.upper()}")


for _one in _FAMILIES:
    _register(_one)
