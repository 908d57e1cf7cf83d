"""Validation between epochs."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ModelBatchError
from ..evaluation import _set_modes
from .batches import Reader, length_of
from .stepper import add_metrics, weights_of
from .totals import Totals

if TYPE_CHECKING:
    from .loop import Loop

__all__ = ["check_metrics", "validate"]

_RESERVED = ("loss", "lr", "active")


def check_metrics(
    metric_fns: Mapping[str, Callable[..., Tensor]] | None,
) -> dict[str, Callable[..., Tensor]]:
    """The metrics as a dict.

    Raises:
        ModelBatchError: no mapping from names to functions, or a name that has another meaning.
    """
    if metric_fns is None:
        return {}
    if not isinstance(metric_fns, Mapping):
        raise ModelBatchError(
            f"metric_fns must be a dict of functions by name, got {type(metric_fns).__name__}"
        )
    for name, function in metric_fns.items():
        if name in _RESERVED or not isinstance(name, str):
            raise ModelBatchError(f"a metric must not be called {name!r}")
        if not callable(function):
            raise ModelBatchError(f"'{name}' must be callable, got {type(function).__name__}")
    return dict(metric_fns)


def validate(loop: "Loop", loader: Iterable[Any]) -> dict[str, Tensor]:
    """Losses and metrics of every model, in eval mode and without gradients.

    Returns:
        `"val_loss"` and `"val_<metric>"`, `[M]` each: means over the samples of the loader.

    Raises:
        ModelBatchError: the loader yields nothing.
    """
    mb, event = loop.mb, loop.event
    modes = [module.training for module in mb._stack.modules[0]]
    latest = mb._latest_losses
    read = Reader(mb)
    totals = Totals()
    number = -1
    event.num_batches = length_of(loader)
    _set_modes(mb, [False] * len(modes))
    try:
        for number, item in enumerate(loader):
            batch = read(item)
            with torch.no_grad(), weights_of(mb, batch), mb._autocast(loop.amp_dtype):
                outputs = mb._forward_of(batch.x)
                losses = mb._losses(outputs, batch.y, loop.loss_fn, batch.weight)
                totals.add("loss", losses, batch)
                values = add_metrics(mb, loop.metric_fns, outputs, batch, totals)
                totals.add_count(batch)
            if len(loop.pack):
                event.batch, event.losses, event.batch_size = number, losses, batch.size
                event.metrics = {f"val_{name}": value for name, value in values.items()}
                loop.tell("on_validation_step")
            loop.interrupts.check()
    except Exception as error:
        if loop.interrupts.count:  # the workers of a loader get the Ctrl-C as well
            raise KeyboardInterrupt from error
        raise
    finally:
        _set_modes(mb, modes)
        mb._latest_losses = latest
        event.num_batches = length_of(loop.loader)
    if number < 0:
        raise ModelBatchError(
            f"the validation loader yielded no batch in epoch {loop.position.epoch}: can it be "
            "iterated again?"
        )
    return totals.means("val_")
