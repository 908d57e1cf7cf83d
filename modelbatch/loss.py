"""The loss of every model, and the one scalar that trains them all."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch._C._functorch as functorch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.vmap import vmap_increment_nesting

from .errors import ModelBatchError
from .pytree import Spec, flatten, unflatten
from .substitute.mode import Call

LossFn = Callable[..., Tensor]


class _MeanForTheEye(torch.autograd.Function):
    """Mean of the losses of active, finite models, with the gradient of each model's own loss.

    The number of models never scales a gradient, and a model whose loss is not finite does not
    spoil the printed mean of the others.
    """

    @staticmethod
    def forward(ctx: Any, losses: Tensor, active: Tensor | None, mean: bool) -> Tensor:
        ctx.save_for_backward(active)
        # For `scaled` alone, so the user may write to the values. They do not refer to this node.
        ctx.losses, ctx.mean = losses, mean
        if mean and active is None and losses.shape[0] == 1:
            loss = losses.squeeze(0)
            return loss + (loss - loss)  # the number itself, or NaN
        counted = torch.isfinite(losses)
        if active is not None:
            counted = counted & active
        total = torch.where(counted, losses, torch.zeros_like(losses)).sum()
        if not mean:
            return total
        # with no finite loss at all the mean is as undefined as it looks
        return total / counted.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (active,) = ctx.saved_tensors
        grad = grads[0].expand(ctx.losses.shape)
        if active is not None:
            grad = torch.where(active, grad, torch.zeros_like(grad))
        return grad, None, None


def combine(losses: Tensor, active: Tensor | None, reduction: str) -> Tensor:
    """Reduce `[M]` losses to what `compute_loss` returns."""
    if reduction == "none":
        return losses
    result: Tensor = _MeanForTheEye.apply(losses, active, reduction == "mean")
    return result


def scaled(total: Tensor, scales: Callable[[Tensor], Tensor]) -> Tensor | None:
    """A total of losses whose gradient is that of `total`, multiplied by a scale for each model.

    Args:
        total: a scalar that was computed from nothing but results of `combine`, most often such a
            result itself or a fraction of it.
        scales: returns `[M]` scales for losses `[M]`.

    Returns:
        The scalar, computed from the losses behind `total`, so that no scale meets another model's
        gradient; None if `total` depends on something else or has no gradient.
    """
    nodes = _combined(total.grad_fn)
    if not nodes:
        return None
    weights: tuple[Tensor | None, ...] = (None,)
    if total.grad_fn is not nodes[0]:
        edges = [torch.autograd.graph.GradientEdge(node, 0) for node in nodes]
        weights = torch.autograd.grad(total, edges, retain_graph=True)
    result = None
    for node, weight in zip(nodes, weights, strict=True):
        (active,) = node.saved_tensors
        scaled_losses = node.losses * scales(node.losses)
        part = combine(scaled_losses, active, "mean" if node.mean else "sum")
        part = part if weight is None else part * weight
        result = part if result is None else result + part
    return result


def _combined(root: Any) -> list[Any]:
    """The nodes of `combine` at all ends of a graph; none if it has ends of another kind."""
    found: list[Any] = []
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, _MeanForTheEye._backward_cls):
            found.append(node)
            continue
        following = [] if node is None else [n for n, _ in node.next_functions if n is not None]
        if not following:
            return []
        waiting += [n for n in following if n not in seen]
        seen.update(following)
    return found


def loss_for_weights(loss_fn: LossFn, weighted: bool) -> LossFn:
    """The loss function to run: the user's own, or one that weighs samples.

    Raises:
        ModelBatchError: if `loss_fn` cannot be called.
    """
    if not callable(loss_fn):
        raise ModelBatchError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    return _weighted(loss_fn) if weighted else loss_fn


def _weighted(loss_fn: LossFn) -> LossFn:
    """A loss of (outputs, targets, weights) equal to the loss on the weighted samples alone.

    With 0/1 weights it is the loss on the samples of weight 1. A model without any weight in the
    batch has loss 0 and no gradient. What outputs and targets of samples of weight 0 hold reaches
    nothing.
    """
    unreduced = _unreduced(loss_fn)

    def weighted(outputs: Any, targets: Any, weights: Tensor) -> Tensor:
        taking = weights != 0
        outputs, targets = _zero_unused(outputs, taking), _zero_unused(targets, taking)
        losses, share = unreduced(outputs, targets, weights)
        w = weights.to(losses.dtype)
        w = w.reshape(w.shape + (1,) * (losses.dim() - w.dim()))
        # select, never multiply: a masked sample may be NaN
        total = torch.where(w != 0, losses * w, torch.zeros_like(losses)).sum()
        if share is None:
            count = w.expand_as(losses).sum()
        else:
            count = torch.where(w != 0, share * w, torch.zeros_like(share)).sum()
        return torch.where(count != 0, total / torch.where(count != 0, count, 1.0), 0.0 * count)

    return weighted


def _zero_unused(tree: Any, taking: Tensor) -> Any:
    """Zeros in the place of samples of weight 0: a valid target everywhere, and a finite output."""
    leaves, spec = flatten(tree)

    def select(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != taking.shape[0]:
            return leaf
        mask = taking.reshape(taking.shape + (1,) * (leaf.dim() - 1))
        return torch.where(mask, leaf, torch.zeros((), dtype=leaf.dtype, device=leaf.device))

    return unflatten([select(leaf) for leaf in leaves], spec)


_CLASS_LOSSES = (F.cross_entropy, F.nll_loss)


def _unreduced(
    loss_fn: LossFn,
) -> Callable[[Any, Any, Tensor], tuple[Tensor, Tensor | None]]:
    """A function that returns per-sample losses and, if not all ones, what each counts for."""
    if isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss) and loss_fn.reduction == "mean":
        options: dict[str, Any] = {"weight": loss_fn.weight, "ignore_index": loss_fn.ignore_index}
        if isinstance(loss_fn, nn.CrossEntropyLoss):
            options["label_smoothing"] = loss_fn.label_smoothing
            return _class_loss(F.cross_entropy, options)
        return _class_loss(F.nll_loss, options)
    if loss_fn in _CLASS_LOSSES:
        return _class_loss(loss_fn, {})
    if isinstance(loss_fn, nn.Module) and getattr(loss_fn, "reduction", None) == "mean":
        module = copy.copy(loss_fn)
        module.reduction = "none"  # type: ignore[assignment]
        return lambda o, t, w: (_per_sample(module(o, t), w), None)
    if not isinstance(loss_fn, nn.Module) and "reduction" in _parameters(loss_fn):
        return lambda o, t, w: (_per_sample(loss_fn(o, t, reduction="none"), w), None)
    return lambda o, t, w: (_one_by_one(loss_fn, o, t, w), None)


def _parameters(function: LossFn) -> Any:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _per_sample(losses: Tensor, weights: Tensor) -> Tensor:
    if losses.shape[: weights.dim()] != weights.shape:
        raise ModelBatchError(
            f"sample_weight has shape {tuple(weights.shape)} for one model, but the losses of its "
            f"samples have shape {tuple(losses.shape)}"
        )
    return losses


def _class_loss(
    function: LossFn, options: dict[str, Any]
) -> Callable[[Any, Any, Tensor], tuple[Tensor, Tensor | None]]:
    """Cross entropy and its kin: torch's mean divides by the weights of the targets' classes."""

    def unreduced(outputs: Any, targets: Any, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        losses = _per_sample(function(outputs, targets, reduction="none", **options), weights)
        if targets.is_floating_point():  # class probabilities: every sample counts for one
            return losses, None
        kept = targets != options.get("ignore_index", -100)
        share = kept.to(losses.dtype)
        class_weight = options.get("weight")
        if class_weight is not None:
            share = share * class_weight[torch.where(kept, targets, 0)]
        return losses, share

    return unreduced


def _one_by_one(loss_fn: LossFn, outputs: Any, targets: Any, weights: Tensor) -> Tensor:
    """Losses of single samples of a loss that only knows whole batches."""
    out_leaves, out_spec = flatten(outputs)
    target_leaves, target_spec = flatten(targets)
    count = weights.shape[0]

    def sample(leaf: Any, i: int) -> Any:
        has_batch = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == count
        return leaf[i : i + 1] if has_batch else leaf

    losses = [
        loss_fn(
            unflatten([sample(leaf, i) for leaf in out_leaves], out_spec),
            unflatten([sample(leaf, i) for leaf in target_leaves], target_spec),
        )
        for i in range(count)
    ]
    return torch.stack([loss.reshape(()) for loss in losses])


def per_model_losses(
    loss_fn: LossFn,
    leaves: list[Any],
    batched: list[bool],
    spec: Spec,
    num_models: int,
    make_call: Callable[[int, int | None], Call],
) -> Tensor:
    """The loss of every model as `[M]`.

    Args:
        loss_fn: called with one model's (outputs, targets[, weights]); returns one number.
        leaves: those arguments, flattened.
        batched: whether dim 0 of each leaf is the model axis.
        spec: their structure.
        num_models: M.
        make_call: the mode for (models in the call, vmap level).

    Raises:
        ModelBatchError: if the loss is not one number per model.
    """
    with vmap_increment_nesting(num_models, "different") as level:
        inside = [
            functorch._add_batch_dim(leaf, 0, level) if is_batched else leaf
            for leaf, is_batched in zip(leaves, batched)
        ]
        with make_call(num_models, level):
            loss = check_loss(loss_fn(*unflatten(inside, spec)))
        losses: Tensor = functorch._remove_batch_dim(loss, level, num_models, 0)
    return losses


def losses_one_by_one(
    loss_fn: LossFn,
    leaves: list[Any],
    batched: list[bool],
    spec: Spec,
    num_models: int,
) -> Tensor:
    """`per_model_losses` for a loss that cannot be batched.

    Raises:
        ModelBatchError: naming the model whose loss fails.
    """
    columns = [
        leaf.unbind(0) if is_batched else (leaf,) * num_models
        for leaf, is_batched in zip(leaves, batched)
    ]
    losses = []
    for i in range(num_models):
        try:
            loss = loss_fn(*unflatten([column[i] for column in columns], spec))
        except ModelBatchError:
            raise
        except Exception as error:
            raise ModelBatchError(f"the loss of model {i} failed: {error}") from error
        losses.append(check_loss(loss))
    return torch.stack(losses)


def check_loss(loss: Any) -> Tensor:
    """One number for one model.

    Raises:
        ModelBatchError: naming what the loss function returned instead.
    """
    if not isinstance(loss, Tensor):
        raise ModelBatchError(f"loss_fn must return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ModelBatchError(
            f"loss_fn must return one number for each model, got shape {tuple(loss.shape)}; "
            'use a reduction such as reduction="mean"'
        )
    loss = loss.reshape(())
    return loss if loss.is_floating_point() else loss.to(torch.get_default_dtype())
