"""What a step that may be compiled as a whole is given, and what stands against that."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .engine.guards import obstacle
from .engine.plan import _METHODS, _is_stock
from .inputs import resolve
from .optim import FusedOptimizer
from .pytree import Spec, flatten, flatten_call
from .traced import described, loss_identity

if TYPE_CHECKING:
    from .batch import ModelBatch

__all__ = ["Batch", "Obstacle", "check_step", "read_batch", "step_key"]


class Obstacle(Exception):
    """Why a step is not taken as a whole."""


@dataclass
class Batch:
    """What a step is given, resolved.

    Attributes:
        inputs: the flattened (args, kwargs) of the forward.
        batched_inputs: whether each of them has a model axis.
        spec: the structure of (args, kwargs).
        others: the flattened targets, and then sample weights.
        batched_others: whether each of them has a model axis.
        trees: targets, and then sample weights, as they were given.
        form: the structure of the targets.
    """

    inputs: list[Any]
    batched_inputs: list[bool]
    spec: Spec
    others: list[Any]
    batched_others: list[bool]
    trees: tuple[Any, ...]
    form: Spec

    def tensors(self) -> list[Tensor]:
        """All tensors, which are the inputs of the graph."""
        return [v for v in (*self.inputs, *self.others) if isinstance(v, Tensor)]


def check_step(bundle: "ModelBatch", loss_fn: Any, weighted: bool) -> None:
    """Refuse steps that are not of the kind that is compiled as a whole.

    Args:
        bundle: the bundle.
        loss_fn: the loss.
        weighted: the step has sample weights, and the bundle computes with them.

    Raises:
        Obstacle: why.
    """
    forward, optimizer = bundle._forward, bundle._optimizer
    if not isinstance(optimizer, FusedOptimizer):
        raise Obstacle(f"the optimizer {type(optimizer).__name__} is not one operator")
    own_methods = any(name in bundle.__dict__ for name in _METHODS)
    classes: tuple[Any, Any] = type(bundle), type(optimizer)
    if own_methods or not _is_stock(*classes):
        raise Obstacle("the bundle's or the optimizer's class has methods of its own")
    weights = forward.weights
    if weights is not None and not weighted:
        raise Obstacle("within sample_weights")
    forward.weights = None
    try:
        against = obstacle(bundle)
    finally:
        forward.weights = weights
    if against is not None:
        raise Obstacle(against)
    modes = forward._modes()
    if weighted and forward._weighing.get(modes) is not False:
        raise Obstacle("a forward that computes with the sample weights, or may do so")
    training = bundle._stack.models[0].training
    if training in forward.loop_reasons or loss_fn in bundle._looped_losses:
        raise Obstacle("models or losses are computed one by one")
    if forward.tensor_attributes:
        raise Obstacle("the forward sets attributes of the modules")
    parameters = bundle._stack.parameters()
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters):
        raise Obstacle("hooks on the parameters")
    if any(p.is_complex() for p in parameters):
        raise Obstacle("complex parameters")


def read_batch(
    bundle: "ModelBatch", x: tuple[tuple[Any, ...], dict[str, Any]], y: Any, sample_weight: Any
) -> Batch:
    """Resolve what a step is given.

    Args:
        bundle: the bundle.
        x: the arguments of the forward.
        y: the targets.
        sample_weight: as given, or None.

    Raises:
        Obstacle: no graph takes such tensors.
        ModelBatchError: wrong arguments.
    """
    num_models, has_axis = bundle._stack.num_models, not bundle.shared_input
    leaves, spec = flatten_call(*x)
    inputs, batched = resolve(leaves, has_axis, num_models, "input")
    if bundle._forward.weights is not None:
        inputs, batched = bundle._forward.weights.fill(inputs, batched)
    leaves, form = flatten(y)
    others, own = resolve(leaves, has_axis, num_models, "target")
    trees: tuple[Any, ...] = (y,)
    if sample_weight is not None:
        per_model = isinstance(sample_weight, Tensor) and sample_weight.dim() > 1
        more, more_own = resolve(flatten(sample_weight)[0], per_model, num_models, "sample_weight")
        trees, others, own = (y, sample_weight), others + more, own + more_own
    batch = Batch(inputs, batched, spec, others, own, trees, form)
    for tensor in batch.tensors():
        if tensor.requires_grad or tensor.layout is not torch.strided or tensor.is_nested:
            raise Obstacle("inputs or targets that require gradients or are not dense")
    return batch


def step_key(bundle: "ModelBatch", batch: Batch, loss_fn: Any) -> Any:
    """What decides which graph a step needs, to be hashed.

    Raises:
        Obstacle: the loss cannot be hashed.
    """
    device = bundle._streams.device
    try:
        return (
            bundle._forward._modes(),
            loss_identity(loss_fn),
            len(batch.trees),
            tuple(p.requires_grad for p in bundle._stack.parameters()),
            described(batch.inputs, batch.batched_inputs, batch.spec, device),
            described(batch.others, batch.batched_others, batch.form, device),
        )
    except TypeError:
        raise Obstacle("the loss cannot be hashed") from None
