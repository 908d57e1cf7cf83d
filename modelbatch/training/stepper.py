"""One optimizer step of all models, on one batch or on several that count as one."""

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..loss import combine
from ..optim import LockstepLBFGS
from ..pytree import flatten
from ..weights import SampleWeights, shared_tensors
from .batches import Batch, shares
from .totals import Totals

if TYPE_CHECKING:
    from ..batch import ModelBatch

__all__ = ["Stepper", "add_metrics"]

Functions = Mapping[str, Callable[..., Tensor]]


class Stepper:
    """Trains the bundle by one step for every group of batches.

    A group of one batch is what `mb.train_step` does. The gradient of a larger group is that of the
    mean over all its samples, as far as the loss is a mean over samples.

    Args:
        mb: the bundle.
        loss_fn: see `mb.compute_loss`.
        amp_dtype: see `mb.train_step`.
        metric_fns: to be summed up as well, on the outputs before the step.
    """

    def __init__(
        self,
        mb: "ModelBatch",
        loss_fn: Callable[..., Tensor],
        amp_dtype: torch.dtype | None,
        metric_fns: Functions,
    ):
        self.mb, self.loss_fn, self.amp_dtype, self.metric_fns = mb, loss_fn, amp_dtype, metric_fns
        self.searches = isinstance(mb.optimizer, LockstepLBFGS)
        self._used: list[bool] = []  # who had a sample in the group

    def __call__(self, group: list[Batch], totals: Totals, accumulates: bool = False) -> Tensor:
        """Step on a group; its losses and metrics are added to `totals`.

        Args:
            group: batches that count as one.
            totals: sums of the epoch.
            accumulates: the other groups are larger than this one; all are treated alike.

        Returns:
            The mean losses `[M]` over the group, detached.
        """
        if accumulates or len(group) > 1 or self.searches or self.metric_fns:
            return self._by_hand(group, totals)
        (batch,) = group
        losses = self.mb.train_step(
            batch.x,
            batch.y,
            loss_fn=self.loss_fn,
            sample_weight=batch.weight,
            amp_dtype=self.amp_dtype,
        )
        totals.add("loss", losses, batch)
        totals.add_count(batch)
        return losses

    def _by_hand(self, group: list[Batch], totals: Totals) -> Tensor:
        mb = self.mb
        self._used = [False] * len(mb)
        first: list[Tensor] = []

        def closure() -> Tensor:
            losses = self._backward(group, None if first else totals)
            first.append(losses)
            return losses

        if self.searches:
            weights = [batch.weight for batch in group if batch.weight is not None]
            if len(weights) == len(group):
                shape = (len(mb), -1)
                used = torch.cat([(w != 0).expand(*shape) for w in weights], 1).any(1)
                self._used = used.tolist()
            else:
                self._used = [True] * len(mb)
            with self._only_those_with_samples():
                mb.step(closure)
        else:
            closure()
            with self._only_those_with_samples():
                if any(mb._active):
                    self._step()
        mb._without_samples = frozenset(i for i, used in enumerate(self._used) if not used)
        mb._latest_losses = first[0]
        return first[0]

    def _step(self) -> None:
        mb, scaler = self.mb, self.mb.grad_scaler
        if scaler is None:
            mb.step()
        else:
            assert mb.optimizer is not None
            scaler.step(mb.optimizer)
            scaler.update()

    def _only_those_with_samples(self) -> contextlib.AbstractContextManager[Any]:
        """Lets a model rest that has no sample in the whole group."""
        if all(self._used):
            return contextlib.nullcontext()
        return self.mb.sample_weights(torch.tensor(self._used).unsqueeze(1))

    def _backward(self, group: list[Batch], totals: Totals | None) -> Tensor:
        """Gradients of the mean losses `[M]` over a group, which are returned."""
        parts: list[Any] = shares(group) if len(group) > 1 else [None]
        mean: Tensor | None = None
        for batch, share in zip(group, parts, strict=True):
            losses = self._backward_of(batch, share, totals, clear=mean is None)
            mean = losses if mean is None else mean + losses
        assert mean is not None
        return mean

    def _backward_of(self, batch: Batch, share: Any, totals: Totals | None, clear: bool) -> Tensor:
        """Adds the gradients of one batch; returns the losses `[M]` times its share."""
        mb, scaler = self.mb, self.mb.grad_scaler
        with weights_of(mb, batch) as weights:
            used = [True] * len(mb) if weights is None else [n > 0 for n in weights.used]
            self._used = [a or b for a, b in zip(self._used, used)]
            if not any(used):
                return self._nobody(batch, totals, clear)
            with mb._autocast(self.amp_dtype):
                losses, outputs = losses_of(mb, batch, self.loss_fn)
            if clear:
                mb.zero_grad()
            if isinstance(share, Tensor):
                share = share.to(losses.dtype)
            part = losses if share is None else losses * share
            if any(mb._active):
                total = combine(part, mb._active_tensor, "mean")
                (total if scaler is None else scaler.scale(total)).backward()
            if totals is not None:
                totals.add("loss", losses.detach(), batch)
                add_metrics(mb, self.metric_fns, outputs, batch, totals)
                totals.add_count(batch)
        return part.detach()

    def _nobody(self, batch: Batch, totals: Totals | None, clear: bool) -> Tensor:
        """What a batch gives in which no model has a sample."""
        mb = self.mb
        if clear:
            mb.zero_grad()
        dtype = next((p.dtype for p in mb.parameters()), torch.get_default_dtype())
        zeros = torch.zeros(len(mb), dtype=dtype, device=mb._streams.device)
        if totals is not None:
            for name in ("loss", *self.metric_fns):
                totals.add(name, zeros, batch)
            totals.add_count(batch)
        return zeros


def losses_of(mb: "ModelBatch", batch: Batch, loss_fn: Callable[..., Tensor]) -> tuple[Tensor, Any]:
    """The losses `[M]` of a batch, and the outputs; a loss that raises leaves no trace."""
    outputs = mb._forward_of(batch.x)
    try:
        losses = mb.compute_loss(
            outputs, batch.y, loss_fn, sample_weight=batch.weight, reduction="none"
        )
    except BaseException:
        mb._forward.undo_last()
        raise
    return losses, outputs


def weights_of(
    mb: "ModelBatch", batch: Batch
) -> contextlib.AbstractContextManager[SampleWeights | None]:
    """Lets the weights of a batch reach what computes with its samples."""
    return mb._weighing(batch.weight, shared_tensors(flatten(batch.x)[0], not mb.shared_input))


@torch.no_grad()
def add_metrics(
    mb: "ModelBatch", metric_fns: Functions, outputs: Any, batch: Batch, totals: Totals
) -> dict[str, Tensor]:
    """Add the metrics of a batch to `totals`, and return them."""
    values = {}
    for name, function in metric_fns.items():
        values[name] = mb._losses(outputs, batch.y, function, batch.weight)
        totals.add(name, values[name], batch)
    return values
