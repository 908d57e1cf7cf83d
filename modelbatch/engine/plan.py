"""Whether the engine takes a training step, and how: made once, then looked up."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..inputs import _Marked
from ..optim import FusedOptimizer
from .encoding import RULES
from .guards import Watch
from .losses import read_loss
from .program import Builder, LossSpec, Program, Refusal
from .purity import check_code
from .tracing import trace

if TYPE_CHECKING:
    from ..steps import Steps

__all__ = [
    "Arguments",
    "NoPlan",
    "Plan",
    "argument",
    "arguments",
    "check_bundle",
    "check_input",
    "compile_forward",
    "make_plan",
]

# Beyond these a thread's part of a step leaves its caches, and torch's own kernels win.
_MAX_PARAMETERS = 1 << 21
_MAX_ACTIVATIONS = 1 << 20
_DTYPES = (torch.float32, torch.float64)
_METHODS = (
    *("train_step", "zero_grad", "step", "compute_loss", "forward", "_forward_of", "_train_step"),
    *("__call__", "_call_impl"),
)


@dataclass(slots=True)
class Arguments:
    """One input and one target, without the markers.

    Attributes:
        x: `[B, ...]`, or `[M, B, ...]` if `own_x`.
        y: likewise.
        keyword: the argument's name where the input is a dict.
    """

    x: Tensor
    own_x: bool
    keyword: str | None
    y: Tensor
    own_y: bool


def argument(mb: "Steps", given: Any) -> tuple[Tensor, bool, str | None] | None:
    """The one tensor that an input or target is, whether it has the models' axis, and its name."""
    keyword, own = None, not mb.shared_input
    if type(given) is not Tensor:
        if isinstance(given, tuple) and len(given) == 1:
            (given,) = given
        elif isinstance(given, Mapping) and len(given) == 1:
            ((keyword, given),) = given.items()
        if isinstance(given, _Marked):
            own, given = given.has_model_axis, given.value
        if type(given) is not Tensor:
            return None
    if own and (given.dim() == 0 or given.shape[0] != mb._stack.num_models):
        return None
    return given, own, keyword


def arguments(mb: "Steps", x: Any, y: Any) -> Arguments | None:
    """What `train_step` was given, as far as it is one tensor each."""
    found_x = argument(mb, x)
    found_y = argument(mb, y) if type(y) is Tensor or isinstance(y, _Marked) else None
    if found_x is None or found_y is None:
        return None
    return Arguments(*found_x, *found_y[:2])


class NoPlan:
    """Why the general path takes the steps with some arguments."""

    def __init__(self, mb: "Steps", reason: str):
        self.reason = reason
        self._made_for = self._state(mb)

    def holds(self, mb: "Steps") -> bool:
        """Whether nothing has happened that could make the engine take them."""
        return all(a is b for a, b in zip(self._state(mb), self._made_for))

    def _state(self, mb: "Steps") -> tuple[Any, ...]:
        stack = mb._stack
        return mb._optimizer, stack, stack.structure.per_model, stack.models[0].training


class Plan:
    """A program with the tensors that it works on.

    Args:
        mb: the bundle.
        program: the network.
        watch: what it was made from.
    """

    def __init__(self, mb: "Steps", program: Program, watch: Watch):
        stack = mb._stack
        optimizer = mb._optimizer
        assert isinstance(optimizer, FusedOptimizer)
        self.optimizer = optimizer
        self.program, self.watch = program, watch
        self.params = [stack.tensor(stack.slots[slot]) for slot in program.params]
        self.buffers = [stack.tensor(stack.slots[slot]) for slot in program.buffers]
        learning = {id(p) for p in self.params[: program.num_learning]}
        self.pattern = [id(entry.stacked) in learning for entry in optimizer._entries]
        self.written = [*self.params[: program.num_learning], *self.buffers]
        self.rule = RULES[optimizer._rule.name]
        self._call: Any = None
        self.states: list[Tensor] = []

    def holds(self, mb: "Steps") -> bool:
        """Whether the plan still describes the bundle."""
        watch = self.watch
        return mb._optimizer is self.optimizer and mb._stack is watch.stack and watch.holds()

    def ready(self) -> bool:
        """Bring options and states of the optimizer up to date; whether one call can take them."""
        optimizer = self.optimizer
        call = optimizer.one_call(self.pattern)
        if call is None:
            return False
        if call is not self._call:
            groups = optimizer.__dict__["param_groups"]
            needs = [optimizer._rule.needed(group) for group in groups]
            needed = [any(flags) for flags in zip(*needs, strict=True)]
            self.states = [
                state for kind, flag in zip(call.states, needed) if flag for state in kind
            ]
            self._call = call
        return True

    @property
    def step(self) -> Tensor:
        """The optimizer's count of steps, float32 `[M]`."""
        step: Tensor = self._call.step
        return step


def make_plan(
    mb: "Steps", given: Arguments, loss_fn: Callable[..., Tensor], weighted: bool
) -> Plan:
    """The plan of a step with such arguments.

    Raises:
        Refusal: why the general path takes it.
    """
    check_bundle(mb)
    x_shape, y_shape = (
        tuple(t.shape[1:] if own else t.shape)
        for t, own in ((given.x, given.own_x), (given.y, given.own_y))
    )
    dtype = _dtype(mb)
    check_input(given.x, dtype)
    if given.y.requires_grad or type(given.y) is not Tensor or given.y.device.type != "cpu":
        raise Refusal("targets that are no plain tensor on the CPU")

    def loss_of(outputs: tuple[int, ...]) -> LossSpec:
        return read_loss(loss_fn, outputs, y_shape, dtype, given.y.dtype, weighted)

    program, watch = compile_forward(mb, given.x.dtype, x_shape, given.keyword, loss_of, loss_fn)
    return Plan(mb, program, watch)


def compile_forward(
    mb: "Steps",
    dtype: torch.dtype,
    shape: tuple[int, ...],
    keyword: str | None,
    loss_of: Callable[[tuple[int, ...]], LossSpec],
    loss_fn: Any,
) -> tuple[Program, Watch]:
    """The program of the bundle's forward on inputs of one model's shape.

    Raises:
        Refusal: it has none.
    """
    stack = mb._stack
    if not shape or not math.prod(shape):
        raise Refusal("an empty input, or one without a batch")
    names = check_code(stack.modules[0])
    builder = Builder(shape, stack.num_models, dtype == torch.int64)
    output = trace(stack, builder, keyword)
    loss = loss_of(output.shape)
    if builder.draws and mb._streams.kind != "philox":
        raise Refusal('dropout with rng="torch"')
    number_of = {id(stack.tensor(slot)): k for k, slot in enumerate(stack.slots)}
    optimizer = mb._optimizer
    assert isinstance(optimizer, FusedOptimizer)
    learning = [number_of[id(e.stacked)] for e in optimizer._entries if e.stacked.requires_grad]
    program = builder.build(output, loss, learning, [slot.name for slot in stack.slots])
    tensors = [stack.tensor(stack.slots[slot]) for slot in program.params]
    _check_sizes(tensors, program, shape[0])
    watch = Watch(stack, program.params, program.num_learning, program.buffers, names, loss_fn)
    return program, watch


def check_bundle(mb: "Steps") -> None:
    """Refuse bundles and optimizers that the engine never takes.

    Raises:
        Refusal: why.
    """
    if mb._streams.device.type != "cpu":
        raise Refusal("the bundle is not on the CPU")
    optimizer = mb._optimizer
    if not isinstance(optimizer, FusedOptimizer) or optimizer._rule.name not in RULES:
        name = "none" if optimizer is None else type(optimizer).__name__
        raise Refusal(f"the optimizer {name} is not in the engine's vocabulary")
    classes: tuple[Any, Any] = type(mb), type(optimizer)
    if not _is_stock(*classes):
        raise Refusal("the bundle's or the optimizer's class has methods of its own")
    if any(name in mb.__dict__ for name in _METHODS):
        raise Refusal("the bundle has methods of its own")
    if mb._forward.fallback == "error" and mb._forward.batched_factories:
        raise Refusal("the forward writes to its inputs")


def check_input(x: Any, dtype: torch.dtype) -> None:
    """Refuse what can be no input of a program.

    Raises:
        Refusal: why.
    """
    plain = type(x) is Tensor and x.device.type == "cpu" and x.layout is torch.strided
    if not plain or x.requires_grad:
        raise Refusal("an input that is no plain tensor on the CPU, or requires gradients")
    if x.dtype not in (dtype, torch.int64):
        raise Refusal(f"an input of {x.dtype} for models of {dtype}")


def _dtype(mb: "Steps") -> torch.dtype:
    dtypes = {p.dtype for p in mb._stack.parameters()}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        raise Refusal("the parameters are not all float32 or all float64")
    return dtypes.pop()


def _check_sizes(params: list[Tensor], program: Program, batch: int) -> None:
    for tensor in params:
        if not tensor.is_contiguous() or type(tensor) is not torch.nn.Parameter:
            raise Refusal("parameters that are not contiguous")
    size = sum(tensor[0].numel() for tensor in params)
    if size > _MAX_PARAMETERS:
        raise Refusal(f"models of {size} parameters are too large for the engine")
    if program.activations * batch > _MAX_ACTIVATIONS:
        raise Refusal("activations that are too large for the engine")


@functools.cache
def _is_stock(bundle_class: Any, optimizer_class: Any) -> bool:
    """Whether the classes compute a step with the library's own methods."""
    from ..batch import ModelBatch

    own = all(
        getattr(bundle_class, name, None) is getattr(ModelBatch, name, None) for name in _METHODS
    )
    return own and optimizer_class.step is FusedOptimizer.step
