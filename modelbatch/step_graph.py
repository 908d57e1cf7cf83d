"""One graph for forward, loss, backward and optimizer step of all models.

It is traced in two parts. The first computes losses, gradients and buffers; only then is it known
which parameters get a gradient, and so which states the optimizer has. The second appends the
optimizer's operator, which writes parameters and states in place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import loss
from .engine.guards import Watch
from .errors import BatchingError
from .inputs import resolve
from .optim import FusedOptimizer
from .optim.clip import clip_factor, grad_stats
from .pytree import flatten, unflatten
from .random import Streams
from .step_batch import Batch
from .substitute import Call, NeedsBatchedFactories
from .traced import TracedForward, TracedStack, trace

if TYPE_CHECKING:
    from .batch import ModelBatch

__all__ = ["GradientGraph", "StepGraphs", "trace_gradients", "trace_step"]


@dataclass
class GradientGraph:
    """Losses and gradients as a graph.

    Attributes:
        run: `(tensors, batch, seed, position, active) -> (losses, position, *gradients)`. It writes
            the buffers of active models.
        learning: the slots whose gradients these are.
        written: the slots of the buffers that it writes.
    """

    run: Callable[..., Any]
    learning: list[int]
    written: list[int]


class StepGraphs:
    """What steps with some arguments and one loss need.

    Args:
        bundle: the bundle.
        gradients: losses and gradients as a graph.
        loss_fn: the loss.
    """

    def __init__(self, bundle: "ModelBatch", gradients: GradientGraph, loss_fn: Any):
        stack = bundle._stack
        self.gradients = gradients
        fixed = [
            k
            for k, slot in enumerate(stack.slots)
            if slot.is_parameter and k not in gradients.learning
        ]
        buffers = [k for k, slot in enumerate(stack.slots) if not slot.is_parameter]
        params = [*gradients.learning, *fixed]
        self.watch = Watch(stack, params, len(gradients.learning), buffers, [], loss_fn)
        # parameters that require gradients and get none are not frozen, which `Watch` looks for
        self.watch.frozen = []
        self.runs: dict[Any, Callable[..., Any]] = {}


def trace_gradients(
    bundle: "ModelBatch", batch: Batch, loss_fn: Callable[..., Tensor]
) -> GradientGraph:
    """Trace forward, loss and backward.

    Raises:
        Exception: something in the models or the loss cannot be traced.
    """
    stack, streams = bundle._stack, bundle._streams
    run_loss = loss.loss_for_weights(loss_fn, len(batch.trees) > 1)
    found: dict[str, Any] = {"learning": [], "written": []}
    may_learn = [
        k
        for k, slot in enumerate(stack.slots)
        if slot.is_parameter and stack.tensor(slot).requires_grad
    ]

    def core(
        tensors: list[Tensor], given: list[Tensor], seed: Tensor, position: Tensor, active: Tensor
    ) -> list[Tensor]:
        rest = iter(given)
        inputs, others = (
            [next(rest) if isinstance(v, Tensor) else v for v in values]
            for values in (batch.inputs, batch.others)
        )
        # what the forward writes to is a copy, so that frozen models keep their buffers
        work = [t.detach() if s.is_parameter else t.clone() for s, t in zip(stack.slots, tensors)]
        for k in may_learn:
            work[k].requires_grad_()
        versions = [t._version for t in work]
        traced = streams.traced(seed, position)
        with torch.enable_grad():
            outputs = _outputs(bundle, work, traced, batch, inputs, found)
            draws = traced.op_index > 0
            traced.op_index = 0
            losses = _losses(bundle, run_loss, traced, outputs, others, batch)
            if traced.op_index:
                raise BatchingError("the loss draws random numbers")
            gradients = torch.autograd.grad(
                losses, [work[k] for k in may_learn], active.to(losses.dtype), allow_unused=True
            )
        with torch.no_grad():
            for k, (slot, old) in enumerate(zip(stack.slots, tensors)):
                if not slot.is_parameter and work[k]._version != versions[k]:
                    found["written"].append(k)
                    keep = active.view(-1, *[1] * (old.dim() - 1))
                    old.copy_(torch.where(keep, work[k], old))
        learned = [(k, g) for k, g in zip(may_learn, gradients) if g is not None]
        found["learning"] = [k for k, _ in learned]
        after = position + active.to(torch.int64) if draws else position.clone()
        return [losses.detach(), after, *(g for _, g in learned)]

    arguments = (
        [stack.tensor(slot).detach() for slot in stack.slots],
        batch.tensors(),
        streams.seed,
        streams.step,
        bundle.active,
    )
    try:
        graph = trace(core)(*arguments)
    except NeedsBatchedFactories:
        found.update(batched_factories=True, written=[])
        graph = trace(core)(*arguments)
    return GradientGraph(graph, found["learning"], found["written"])


def _outputs(
    bundle: "ModelBatch",
    tensors: list[Tensor],
    streams: Streams,
    batch: Batch,
    inputs: list[Any],
    found: dict[str, Any],
) -> Any:
    forward = TracedForward(
        TracedStack(bundle._stack, tensors),  # type: ignore[arg-type]
        streams,
        bundle._forward.fallback,
        None,
    )
    forward.warned = bundle._forward.warned
    forward.batched_factories = found.get("batched_factories", False)
    return unflatten(*forward.batched_leaves(inputs, batch.batched_inputs, batch.spec))


def _losses(
    bundle: "ModelBatch",
    run: Callable[..., Tensor],
    streams: Streams,
    outputs: Any,
    others: list[Any],
    batch: Batch,
) -> Tensor:
    num_models = bundle._stack.num_models

    def make_call(models: int, level: int | None) -> Call:
        call = Call(models, level, streams, device=streams.device)
        call.trace()
        return call

    leaves, batched = resolve(flatten(outputs)[0], True, num_models, "output")
    _, spec = flatten((outputs, *batch.trees))
    return loss.per_model_losses(
        run, leaves + others, batched + batch.batched_others, spec, num_models, make_call
    )


def trace_step(
    bundle: "ModelBatch",
    gradients: GradientGraph,
    example: list[Any],
    order: list[int],
) -> Callable[..., Any]:
    """Append the optimizer to a graph of gradients.

    Args:
        bundle: the bundle.
        gradients: what computes losses and gradients.
        example: the arguments of the result: those of `gradients`, then the optimizer's states,
            counts of steps, options `[K, M]` and limits of clipping by norm and by value.
        order: the slots of the optimizer's parameters, in its order.

    Returns:
        The graph: `(*example) -> (losses, position, norms or None, *gradients)`, the gradients as
        they were before clipping, in the order of `order`.
    """
    optimizer = bundle._optimizer
    assert isinstance(optimizer, FusedOptimizer)
    operator, num_models = optimizer._rule.operator, bundle._stack.num_models
    place = [gradients.learning.index(k) for k in order]

    def whole(
        tensors: list[Tensor],
        given: list[Tensor],
        seed: Tensor,
        position: Tensor,
        active: Tensor,
        states: list[Any],
        count: Tensor,
        hyper: Tensor,
        max_norm: Tensor | None,
        max_value: Tensor | None,
    ) -> list[Tensor | None]:
        losses, after, *found = gradients.run(tensors, given, seed, position, active)
        grads = [found[k].contiguous() for k in place]
        norms = factor = None
        if max_norm is not None:
            squares = grad_stats(grads, num_models)[0]
            norms, factor = clip_factor(squares, max_norm, dtype=torch.float64)
        params = [tensors[k] for k in order]
        operator(params, grads, *states, count, hyper, active, None, None, factor, max_value)
        return [losses, after, norms, *grads]

    with torch.no_grad():
        graph: Callable[..., Any] = trace(whole)(*example)
    return graph
