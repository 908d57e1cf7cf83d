"""Forward and loss of a bundle through `torch.compile`; whole steps are in `compiled_step`.

What a bundle does in one forward (rules, vmap, per-model numbers) is first traced into one plain
graph over the stacked tensors, with the random streams' positions as inputs; that graph is what
`torch.compile` gets. One graph is made for each train or eval mode and each shape of the inputs.
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import loss
from .compiled_step import CompiledStep
from .errors import BatchingError, FallbackWarning, ModelBatchError
from .fallback import users_stacklevel
from .pytree import Spec, unflatten
from .substitute import Call, NeedsBatchedFactories
from .traced import TracedForward, TracedStack, described, trace

if TYPE_CHECKING:
    from .batch import ModelBatch


class _Graph:
    """One compiled graph and how to put its results back together."""

    def __init__(self, run: Callable[..., Any], out_spec: Any, constants: list[Any], draws: int):
        self.run, self.out_spec, self.constants, self.draws = run, out_spec, constants, draws
        self.fresh = True

    def __call__(self, *args: Any) -> list[Any]:
        if self.fresh:
            # torch.compile reads .grad of its inputs, which warns for outputs of a model
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")
                tensors = iter(self.run(*args))
            self.fresh = False
        else:
            tensors = iter(self.run(*args))
        return [next(tensors) if c is _TENSOR else c for c in self.constants]


_TENSOR: Any = object()


class Compiled:
    """The compiled graphs of one bundle.

    Args:
        bundle: the bundle.
        options: keyword arguments of `torch.compile`.

    Raises:
        ModelBatchError: with `rng="torch"`.
    """

    def __init__(self, bundle: "ModelBatch", options: dict[str, Any]):
        if bundle._streams.kind != "philox":
            raise ModelBatchError(
                'enable_compile needs rng="philox": torch\'s own generators cannot be compiled'
            )
        self.bundle = bundle
        self.options = options
        self.graphs: dict[Any, _Graph | None] = {}
        self.whole_step = CompiledStep(bundle, options)

    def __getstate__(self) -> dict[str, Any]:
        # graphs belong to their bundle and cannot be copied, so a copy makes its own
        whole_step = CompiledStep(self.bundle, self.options)
        return {**self.__dict__, "graphs": {}, "whole_step": whole_step}

    def clear(self) -> None:
        """Make all graphs anew."""
        self.graphs.clear()
        self.whole_step.clear()

    def forward(
        self, values: list[Any], batched: list[bool], spec: Spec, active: Tensor | None
    ) -> Any:
        """As `Forward.run`, through a compiled graph where one can be made."""
        forward = self.bundle._forward
        modes = tuple(module.training for module in self.bundle._stack.modules[0])
        key = ("forward", modes, *self._key(values, batched, spec))
        if key not in self.graphs:
            self.graphs[key] = self._attempt(lambda: self._trace_forward(values, batched, spec))
        graph = self.graphs[key]
        if graph is None or forward.stack.has_user_hooks():
            return forward.run(values, batched, spec, active)

        def run(leaves: list[Any]) -> Any:
            return self._run_forward(graph, leaves)

        return forward.run(values, batched, spec, active, run)

    def _run_forward(self, graph: _Graph, values: list[Any]) -> Any:
        stack, streams = self.bundle._stack, self.bundle._streams
        tensors = [stack.tensor(slot) for slot in stack.slots]
        inputs = [value for value in values if isinstance(value, Tensor)]
        results = graph(tensors, inputs, streams.seed, streams.step)
        streams.op_index = graph.draws
        return unflatten(results, graph.out_spec)

    def losses(
        self,
        run: Callable[..., Tensor],
        loss_fn: Any,
        values: list[Any],
        batched: list[bool],
        spec: Spec,
    ) -> Tensor:
        """As `loss.per_model_losses`, through a compiled graph where one can be made."""
        weighted = run is not loss_fn
        key = ("loss", loss_fn, weighted, *self._key(values, batched, spec))
        if key not in self.graphs:
            self.graphs[key] = self._attempt(lambda: self._trace_loss(run, values, batched, spec))
        graph = self.graphs[key]
        if graph is None:
            return self.bundle._batched_losses(run, loss_fn, values, batched, spec)
        result: Tensor = graph([value for value in values if isinstance(value, Tensor)])[0]
        return result

    # ---- tracing

    def _key(self, values: list[Any], batched: list[bool], spec: Spec) -> tuple[Any, ...]:
        return described(values, batched, spec, self.bundle._streams.device)

    def _attempt(self, trace: Callable[[], _Graph]) -> _Graph | None:
        try:
            return trace()
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            if self.bundle._forward.fallback == "error":
                raise BatchingError(f"this bundle cannot be compiled: {first}") from error
            if self.bundle._forward.fallback == "warn":
                warnings.warn(
                    f"this bundle cannot be compiled, it runs without torch.compile: {first}",
                    FallbackWarning,
                    stacklevel=users_stacklevel(),
                )
            return None

    def _trace_forward(self, values: list[Any], batched: list[bool], spec: Spec) -> _Graph:
        bundle = self.bundle
        stack, streams = bundle._stack, bundle._streams
        if bundle._forward.tensor_attributes:
            raise BatchingError("the forward sets attributes of the modules")
        found: dict[str, Any] = {}

        def core(tensors: list[Tensor], inputs: list[Tensor], seed: Tensor, step: Tensor) -> Any:
            traced_streams = streams.traced(seed, step)
            forward = TracedForward(
                TracedStack(stack, tensors),  # type: ignore[arg-type]
                traced_streams,
                bundle._forward.fallback,
                None,
            )
            forward.warned = bundle._forward.warned
            forward.batched_factories = found.get("batched_factories", False)
            rest = iter(inputs)
            leaves = [next(rest) if isinstance(v, Tensor) else v for v in values]
            results, found["spec"] = forward.batched_leaves(leaves, batched, spec)
            found["draws"] = traced_streams.op_index
            found["constants"] = [_TENSOR if isinstance(r, Tensor) else r for r in results]
            return [r for r in results if isinstance(r, Tensor)]

        arguments = (
            [stack.tensor(slot) for slot in stack.slots],
            [
                value.detach().requires_grad_(value.requires_grad)
                for value in values
                if isinstance(value, Tensor)
            ],
            streams.seed,
            streams.step,
        )
        try:
            graph = trace(core)(*arguments)
        except NeedsBatchedFactories:
            found["batched_factories"] = True
            graph = trace(core)(*arguments)
        run = torch.compile(graph, **self.options)
        return _Graph(run, found["spec"], found["constants"], found["draws"])

    def _trace_loss(
        self, run: Callable[..., Tensor], values: list[Any], batched: list[bool], spec: Spec
    ) -> _Graph:
        bundle = self.bundle

        def make_call(num_models: int, level: int | None) -> Call:
            call = bundle._loss_call(num_models, level)
            call.trace()
            return call

        def core(inputs: list[Tensor]) -> list[Tensor]:
            rest = iter(inputs)
            leaves = [next(rest) if isinstance(v, Tensor) else v for v in values]
            return [loss.per_model_losses(run, leaves, batched, spec, bundle.num_models, make_call)]

        # leaves, because tracing looks at every input's .grad
        tensors = [
            value.detach().requires_grad_(value.requires_grad)
            for value in values
            if isinstance(value, Tensor)
        ]
        graph = trace(core)(tensors)
        return _Graph(torch.compile(graph, **self.options), None, [_TENSOR], 0)
