"""What a torch function call inside a bundle's forward becomes.

The user's forward runs once, under `torch.vmap` machinery, with every parameter and buffer standing
for all models. A torch function mode sees each torch function before vmap does. Most calls pass
through; where this library knows better (random numbers, convolutions, linear layers, attention,
normalisation, numbers that differ between models), a rule works on the physical `[M, ...]` tensors
directly. Rules register themselves in `RULES` by the torch function they replace.
"""

import contextlib
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch._C._functorch as functorch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..attributes import PerModelFloat
from ..errors import BatchingError
from ..random import Streams
from ..weights import SampleWeights
from .functions import FACTORIES, READS, computes, name_of

Rule = Callable[["Call", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

RULES: dict[Any, Rule] = {}
"""Rules of a batched forward."""
RANDOM_RULES: dict[Any, Rule] = {}
"""Rules that also hold while models run one by one: random numbers come from their streams."""
WEIGHED_RULES: dict[Any, Rule] = {}
"""Rules that hold while models run one by one if their samples do not all count alike."""


def register(
    *functions: Any, random: bool = False, weighed: bool = False
) -> Callable[[Rule], Rule]:
    """Register a rule for torch functions."""

    def add(rule: Rule) -> Rule:
        for function in functions:
            RULES[function] = rule
            if random:
                RANDOM_RULES[function] = rule
            if weighed:
                WEIGHED_RULES[function] = rule
        return rule

    return add


class NeedsBatchedFactories(Exception):
    """An unbatched tensor made in the forward would have to become different for each model."""


class NeedsOwnSamples(Exception):
    """What an operation does with sample weights is known only where models run one by one."""


class Refused(BatchingError):
    """A refusal that running the models one by one would not cure."""


class _Lowered:
    """The innermost functorch level out of the way; it is always the models' vmap level."""

    __slots__ = ("level",)

    def __enter__(self) -> None:
        self.level = functorch.pop_dynamic_layer_stack()

    def __exit__(self, *exc_info: Any) -> None:
        functorch.push_dynamic_layer_stack(self.level)


class Call(TorchFunctionMode):
    """One forward call of a bundle, active while the user's code runs.

    Attributes:
        num_models: models in this call (1 while the models run one by one).
        level: the vmap level that carries the models, None while they run one by one.
        streams: the models' random streams.
        grad_memory: keeps the memory of stacked gradients between steps, see `GradMemory`.
        per_model_numbers: whether some plain numbers differ between models.
        batched_factories: make `torch.zeros` and its like per model, so that they can be filled.
        record: called with (function name, path) for `explain()`.
        weights: what the samples of the batch count for, None where all count alike.
        weighed: whether any operation has asked for them.
        loops: names of functions that had to be looped over models in this call.
        strict: originals (by id) that must not be reached around the module attributes, and what
            they are called.
    """

    def __init__(
        self,
        num_models: int,
        level: int | None,
        streams: Streams,
        *,
        device: torch.device,
        grad_memory: Any = None,
        per_model_numbers: bool = False,
        batched_factories: bool = False,
        record: Callable[[str, str], None] | None = None,
        strict: dict[int, str] | None = None,
        weights: SampleWeights | None = None,
    ):
        super().__init__()
        self.num_models = num_models
        self.level = level
        self.streams = streams
        self.device = device
        self.grad_memory = grad_memory
        self.per_model_numbers = per_model_numbers
        self.batched_factories = batched_factories
        self.record = record
        self.strict = strict
        self.weights = weights
        self.weighed = False
        self.loops: dict[str, str] = {}
        self.rules = RULES if level is not None else self._rules_of_one_model()
        self.careful = per_model_numbers or batched_factories or record is not None or bool(strict)
        self.tracing = False

    def _rules_of_one_model(self) -> dict[Any, Rule]:
        rules = {} if self.streams.kind == "torch" else RANDOM_RULES
        return rules if self.weights is None else {**rules, **WEIGHED_RULES}

    def trace(self) -> None:
        """Prepare for being traced into a graph below autograd.

        Such a graph forgets `torch.no_grad`, so what is computed under it is detached instead.
        """
        self.tracing = self.careful = True

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        rule = self.rules.get(func)
        if not self.careful:
            if rule is None:
                try:
                    return func(*args, **kwargs) if kwargs else func(*args)
                except RuntimeError as error:
                    return self.loop_over(func, args, kwargs or {}, error)
            if self.level is not None and functorch.maybe_current_level() == self.level:
                result = rule(self, func, args, kwargs or {})
                if result is not NotImplemented:
                    return result
                return self._default(func, args, kwargs or {})
        return self._handle(rule, func, args, kwargs or {})

    def _handle(
        self, rule: Rule | None, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = self._handle_careful(rule, func, args, kwargs)
        if self.tracing and not torch.is_grad_enabled() and not name_of(func).endswith("_"):
            result = tree_map(_detach, result)
        return result

    def _handle_careful(
        self, rule: Rule | None, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.level is not None and functorch.maybe_current_level() != self.level:
            if func in RANDOM_RULES:
                raise BatchingError(
                    f"{name_of(func)} draws random numbers inside a nested torch.func transform"
                )
            return func(*args, **kwargs)
        if self.strict:
            self._check_originals(args, kwargs)
        if self.per_model_numbers and rule not in _KNOW_PER_MODEL_NUMBERS:
            leaves, _ = tree_flatten((args, kwargs))
            if any(isinstance(leaf, PerModelFloat) for leaf in leaves):
                return self._by_value(func, args, kwargs)
        if rule is not None:
            result = rule(self, func, args, kwargs)
            if result is not NotImplemented:
                looped = name_of(func) in self.loops
                if self.record is not None and rule is not enter and not looped:
                    self.record(name_of(func), "modelbatch rule")
                return result
        return self._default(func, args, kwargs)

    def _default(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            result = func(*args, **kwargs)
        except RuntimeError as error:
            return self.loop_over(func, args, kwargs, error)
        made = self.batched_factories and func in FACTORIES and isinstance(result, Tensor)
        if made and not self.is_batched(result):
            expanded = result.expand(self.num_models, *result.shape)
            return self.wrap(expanded.clone(memory_format=torch.contiguous_format))
        if self.record is not None and computes(func):
            self.record(name_of(func), "torch rule")
        return result

    def _check_originals(self, args: Any, kwargs: Any) -> None:
        assert self.strict is not None
        for leaf in tree_flatten((args, kwargs))[0]:
            if isinstance(leaf, Tensor) and id(leaf) in self.strict:
                one = self.level is None
                why = "its gradient would be lost" if one else "it would be used for all models"
                raise Refused(
                    f"the forward reaches {self.strict[id(leaf)]} through a reference outside of "
                    f"its attribute, so {why}; read it from its module instead"
                )

    @property
    def sample_weight(self) -> Tensor | None:
        """What the samples count for, float64 `[M, B]`; None where all count alike."""
        return None if self.weights is None else self.weights.expanded()

    def sample_weight_of(self, batch_size: int) -> Tensor | None:
        """`sample_weight` for an operation over a batch of this size.

        Raises:
            NeedsOwnSamples: the operation's batch is not the batch of the weights.
        """
        if self.weights is None:
            return None
        self.weighed = True
        if batch_size != self.weights.batch_size:
            raise NeedsOwnSamples(
                f"its batch of {batch_size} is not the batch of {self.weights.batch_size} samples "
                "that have weights"
            )
        return self.weights.expanded()

    # ---- between the user's view of one model and the physical tensors of all

    def is_batched(self, value: Any) -> bool:
        """Whether a tensor differs between models."""
        if self.level is None:
            return isinstance(value, Tensor)
        return (
            isinstance(value, Tensor)
            and functorch.is_batchedtensor(value)
            and functorch.maybe_get_level(value) == self.level
        )

    def unwrap(self, value: Tensor) -> tuple[Tensor, bool]:
        """The physical tensor and whether its dim 0 is the model axis."""
        if self.level is None:
            return value.unsqueeze(0), True
        if not self.is_batched(value):
            return value, False
        dim = functorch.maybe_get_bdim(value)
        physical = functorch.get_unwrapped(value)
        return (physical if dim == 0 else physical.movedim(dim, 0)), True

    def physical(self, value: Tensor) -> Tensor:
        """The tensor as `[M, ...]`; an unbatched one is expanded without a copy."""
        tensor, batched = self.unwrap(value)
        return tensor if batched else tensor.expand(self.num_models, *tensor.shape)

    def wrap(self, tensor: Tensor) -> Tensor:
        """The user's view of a physical `[M, ...]` tensor."""
        if self.level is None:
            return tensor.squeeze(0)
        return functorch._add_batch_dim(tensor, 0, self.level)

    def lowered(self) -> Any:
        """A context in which the models' vmap level is out of the way, for physical tensors."""
        if self.level is None:
            return contextlib.nullcontext()
        return _Lowered()

    def column(self, values: Any, like_dim: int, dtype: torch.dtype) -> Any:
        """A number for each model as `[M, 1, ...]`, of `like_dim` dimensions."""
        if isinstance(values, PerModelFloat):
            vector = torch.tensor(values.values, dtype=dtype, device=self.device)
            return vector.view(-1, *([1] * (like_dim - 1)))
        return values

    # ---- computing model by model, inside one function

    def loop_over(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: RuntimeError
    ) -> Any:
        """Compute a function model by model after vmap refused it.

        Raises:
            the original error, where the function is not the cause or cannot be looped over.
        """
        name = name_of(func)
        message = str(error)
        about_vmap = "vmap" in message or "atching rule" in message or "BatchedTensor" in message
        in_place = name.endswith("_") or name == "__setitem__" or "out" in kwargs
        if self.level is None or not about_vmap or in_place or func in READS:
            raise error
        if functorch.maybe_current_level() != self.level:
            raise error
        leaves, _ = tree_flatten((args, kwargs))
        if not any(self.is_batched(leaf) for leaf in leaves):
            raise error
        try:
            result = self.for_each_model(func, args, kwargs)
        except (RuntimeError, TypeError, BatchingError):
            raise error from None
        self.loops[name] = message.splitlines()[0]
        if self.record is not None:
            self.record(name, "loop over models")
        return result

    def for_each_model(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `func` once for each model and stack the results.

        Raises:
            BatchingError: if the results are no tensors of one shape.
        """
        if self.level is None:
            return func(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        columns: list[Any] = []
        for leaf in leaves:
            if self.is_batched(leaf):
                columns.append(self.unwrap(leaf)[0].unbind(0))
            elif isinstance(leaf, PerModelFloat):
                columns.append(leaf.values)
            else:
                columns.append((leaf,) * self.num_models)
        results = []
        with self.lowered():
            for row in zip(*columns):
                one_args, one_kwargs = tree_unflatten(list(row), spec)
                results.append(func(*one_args, **one_kwargs))
        return self.stack(results)

    def stack(self, results: list[Any]) -> Any:
        """Stack M equal structures of tensors into one batched structure.

        Raises:
            BatchingError: if they cannot be stacked.
        """
        flat = [tree_flatten(result) for result in results]
        spec = flat[0][1]
        if any(other != spec for _, other in flat):
            raise BatchingError("the models return different structures")
        stacked = []
        for column in zip(*(leaves for leaves, _ in flat)):
            if not isinstance(column[0], Tensor):
                if any(value is not column[0] and value != column[0] for value in column):
                    raise BatchingError(f"the models return different values: {column}")
                stacked.append(column[0])
            elif any(t.shape != column[0].shape for t in column):
                shapes = sorted({tuple(t.shape) for t in column})
                raise BatchingError(f"the models return different shapes: {shapes}")
            else:
                stacked.append(self.wrap(torch.stack(column)))
        return tree_unflatten(stacked, spec)

    def _by_value(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function whose plain numbers differ between models.

        Models with equal numbers are computed together under a vmap of their own.
        """
        leaves, spec = tree_flatten((args, kwargs))
        numbers = [leaf for leaf in leaves if isinstance(leaf, PerModelFloat)]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, key in enumerate(zip(*(number.values for number in numbers))):
            groups.setdefault(key, []).append(i)
        order: list[int] = []
        pieces: list[list[Tensor]] = []
        out_spec: Any = None
        for key, members in groups.items():
            index = torch.tensor(members, device=self.device)
            values = iter(key)
            batched = [self.is_batched(leaf) for leaf in leaves]
            inputs = [
                next(values)
                if isinstance(leaf, PerModelFloat)
                else (self.unwrap(leaf)[0].index_select(0, index) if is_batched else leaf)
                for leaf, is_batched in zip(leaves, batched)
            ]
            dims = tuple(0 if is_batched else None for is_batched in batched)
            result = self._group(func, inputs, dims, spec, len(members))
            flat, out_spec = tree_flatten(result)
            if not all(isinstance(leaf, Tensor) for leaf in flat):
                raise BatchingError(f"{name_of(func)} returns something other than tensors")
            pieces.append(flat)
            order.extend(members)
        back = torch.empty(len(order), dtype=torch.int64)
        back[torch.tensor(order)] = torch.arange(len(order))
        back = back.to(self.device)
        stacked = [self.wrap(torch.cat(column).index_select(0, back)) for column in zip(*pieces)]
        if self.record is not None:
            self.record(name_of(func), f"modelbatch rule ({len(groups)} groups of equal numbers)")
        return tree_unflatten(stacked, out_spec)

    def _group(self, func: Any, inputs: list[Any], dims: Any, spec: Any, count: int) -> Any:
        def run(*row: Any) -> Any:
            one_args, one_kwargs = tree_unflatten(list(row), spec)
            return func(*one_args, **one_kwargs)

        if count == 1 or not any(d == 0 for d in dims):
            row = [t[0] if d == 0 else t for t, d in zip(inputs, dims)]
            result = run(*row)
            return tree_map(lambda t: t.expand(count, *t.shape), result)
        return torch.vmap(run, in_dims=dims)(*inputs)


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) and value.is_floating_point() else value


_KNOW_PER_MODEL_NUMBERS: set[Rule | None] = set()


def handles_per_model_numbers(rule: Rule) -> Rule:
    """Say that a rule reads `PerModelFloat` arguments by itself."""
    _KNOW_PER_MODEL_NUMBERS.add(rule)
    return rule


# ---- Python functions of torch that call other torch functions

_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
_entered: dict[Any, Any] = {}


def _never(*_: Any, **__: Any) -> bool:
    return False


def _without_check(func: types.FunctionType) -> types.FunctionType:
    """A copy of a torch.nn.functional function that does not ask for overrides again.

    A mode that calls the original would only meet itself; the copy runs the body, whose inner
    torch calls then reach the mode one by one.
    """
    names = {**func.__globals__, **dict.fromkeys(_CHECKS, _never)}
    copy = types.FunctionType(
        func.__code__, names, func.__name__, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def enter(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the body of a composite function with the rules in force."""
    body = _entered.get(func)
    if body is None:
        body = _entered[func] = _without_check(func)
    with call:
        return body(*args, **kwargs)


handles_per_model_numbers(enter)


def enter_all(functions: Iterable[Any]) -> None:
    """Register `enter` for composite functions that draw random numbers or call other rules."""
    for function in functions:
        RULES[function] = RANDOM_RULES[function] = enter
