"""The forward of a model as instructions, by torch.fx."""

import operator
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..stack import Stack
from ..structure import is_library_hook
from .encoding import Op
from .layers import CALLS, CONCRETE, FUNCTIONS, IN_PLACE, LAYERS, METHODS, Layer, call_row
from .program import Builder, Refusal, Value

__all__ = ["trace"]


class _Parameter:
    """A parameter that the forward hands to a function itself."""

    def __init__(self, name: str):
        self.name = name


class _Proxy(fx.Proxy):
    """A proxy for which `+=` stays what it is; torch.fx makes a sum of it."""

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Traces a forward of one argument; the others keep their defaults.

    torch.fx patches `nn.Module` while it traces, for other threads as well: what these call goes
    on as if nothing were.
    """

    def __init__(self, keyword: str | None):
        super().__init__()
        self._keyword = keyword
        self._thread = threading.get_ident()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        x = self.create_proxy("placeholder", "x", (), {})
        root, keyword = self.root, self._keyword

        def call() -> Any:
            return root_fn(root, x) if keyword is None else root_fn(root, **{keyword: x})

        return call, []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in LAYERS or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def trace(stack: Stack, builder: Builder, keyword: str | None) -> Value:
    """Adds the instructions of model 0's forward to a builder.

    Args:
        stack: of the bundle. That the code of its modules may be traced has been checked.
        builder: for the shape of the input.
        keyword: the name of the argument that the input is given as; None for the first.

    Returns:
        The output.

    Raises:
        Refusal: something is not in the vocabulary.
    """
    reader = _Reader(stack, builder)
    root = stack.models[0]
    if type(root) in LAYERS:  # traced itself, it would be taken apart
        return reader.layer("", builder.input)
    try:
        graph = _Tracer(keyword).trace(root)
    except Refusal:
        raise
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refusal(f"the forward cannot be traced: {text}") from error
    return reader.read(graph)


class _Reader:
    """Goes through a graph of torch.fx."""

    def __init__(self, stack: Stack, builder: Builder):
        self.builder = builder
        names = stack.structure.module_names
        self.modules = dict(zip(names, stack.modules[0]))
        self.index = {name: i for i, name in enumerate(names)}
        self.per_model = stack.structure.per_model
        self.places = {
            place: number for number, slot in enumerate(stack.slots) for place in slot.places
        }
        self.slot_of = {slot.name: number for number, slot in enumerate(stack.slots)}
        handled = {i for i, m in enumerate(stack.modules[0]) if type(m) in LAYERS}
        for index, name in self.per_model:
            if index not in handled:
                raise Refusal(f"'{name}' of '{names[index]}' differs between models")

    def read(self, graph: fx.Graph) -> Value:
        env: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            args = fx.map_arg(node.args, env.__getitem__)
            kwargs = fx.map_arg(node.kwargs, env.__getitem__)
            if node.op == "placeholder":
                env[node] = self.builder.input
            elif node.op == "output":
                return self._output(args[0])
            elif node.op == "get_attr":
                env[node] = _Parameter(str(node.target))
            elif node.op == "call_module":
                env[node] = self._call_module(node, args, kwargs)
            elif node.op == "call_method":
                env[node] = self._method(str(node.target), args, kwargs)
            else:
                if node.target in IN_PLACE or kwargs.get("inplace"):
                    self._check_in_place(node)
                env[node] = self._function(node.target, args, kwargs)
        raise Refusal("the forward returns nothing")

    def _output(self, result: Any) -> Value:
        if not isinstance(result, Value):
            raise Refusal("the forward returns something else than one tensor")
        return result

    def _call_module(self, node: fx.Node, args: Any, kwargs: Any) -> Value:
        name = str(node.target)
        given = [*args, *kwargs.values()]
        if len(given) != 1 or not isinstance(given[0], Value):
            raise Refusal(f"'{name}' gets something else than one tensor")
        if getattr(self.modules.get(name), "inplace", False):
            self._check_in_place(node)
        return self.layer(name, given[0])

    def layer(self, name: str, x: Value) -> Value:
        """A module of the vocabulary."""
        module = self.modules.get(name)
        row = LAYERS.get(type(module))  # type: ignore[arg-type]
        if module is None or row is None:
            kind = type(module).__name__
            raise Refusal(f"nn.{kind} '{name}' is not in the engine's vocabulary")
        if any(is_library_hook(hook) for hook in module._forward_pre_hooks.values()):
            raise Refusal(f"the weight of '{name}' is computed by a hook")
        index = self.index[name]
        tensors = (*module._parameters, *module._buffers)
        places = {a: self.places[index, a] for a in tensors if (index, a) in self.places}

        def numbers(attribute: str) -> Any:
            own = self.per_model.get((index, attribute))
            return getattr(module, attribute) if own is None else own.values

        return row(self.builder, Layer(module, name, places, numbers), x)

    def _method(self, name: str, args: Any, kwargs: Any) -> Any:
        concrete, row = CONCRETE.get(name), METHODS.get(name)
        if concrete is not None and args and isinstance(args[0], Value):
            return concrete(*args, **kwargs)
        if row is None:
            raise Refusal(f"the method '{name}' is not in the engine's vocabulary")
        return call_row(row, self.builder, args, kwargs, name)

    def _function(self, function: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(function, "__name__", str(function))
        if function is getattr:
            return self._method(args[1], args[:1], {}) if args[1] in CONCRETE else self._no(name)
        if function is F.linear:
            return self._linear(*args, **kwargs)
        leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, Value | _Parameter)]
        if not leaves and function in CALLS:
            return function(*args, **kwargs)
        row = FUNCTIONS.get(function)
        if row is None:
            return self._no(name)
        return call_row(row, self.builder, args, kwargs, name)

    def _no(self, name: str) -> Any:
        raise Refusal(f"the function '{name}' is not in the engine's vocabulary")

    def _linear(self, input: Any, weight: Any, bias: Any = None) -> Value:
        slots = []
        for tensor in (weight, bias):
            if tensor is not None and not isinstance(tensor, _Parameter):
                raise Refusal("F.linear with a weight that is no parameter")
            slots.append(-1 if tensor is None else self.slot_of.get(tensor.name, -1))
        if not isinstance(input, Value) or slots[0] < 0 or (bias is not None and slots[1] < 0):
            raise Refusal("F.linear of something else than a result and parameters")
        shape = self._shape_of(weight.name)
        if len(input.shape) < 2 or input.shape[-1] != shape[1]:
            raise Refusal(f"F.linear of an input of shape {input.shape}")
        shape = (*input.shape[:-1], shape[0])
        return self.builder.emit(Op.LINEAR, input, shape, weight=slots[0], bias=slots[1])

    def _shape_of(self, name: str) -> tuple[int, ...]:
        owner, _, attribute = name.rpartition(".")
        parameter = self.modules[owner]._parameters[attribute]
        assert parameter is not None
        return tuple(parameter.shape)

    # ---- in place

    def _check_in_place(self, node: fx.Node) -> None:
        """What an operation writes to must not be read by anything else."""
        source: Any = node.args[0] if node.args else next(iter(node.kwargs.values()))
        while isinstance(source, fx.Node):
            if source.op in ("placeholder", "get_attr"):
                raise Refusal("an operation that writes to an input or parameter")
            if len(source.users) > 1:
                raise Refusal("an operation that writes to what something else reads")
            if not self._may_be_a_view(source):
                return
            source = source.args[0] if source.args else None

    def _may_be_a_view(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.modules.get(str(node.target))
            views = isinstance(module, nn.Identity | nn.Flatten | nn.Dropout)
            return views or bool(getattr(module, "inplace", False))
        return node.target in _VIEWS or node.target in IN_PLACE or bool(node.kwargs.get("inplace"))


_VIEWS = frozenset(
    {
        *("flatten", "reshape", "view", "squeeze", "unsqueeze", "contiguous"),
        *(torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, F.dropout),
    }
)
