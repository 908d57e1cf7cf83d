"""One model of a bundle goes on from where another one is."""

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..batch import ModelBatch

__all__ = ["copy_training"]


@torch.no_grad()
def copy_training(mb: "ModelBatch", scheduler: Any, source: int, target: int) -> None:
    """Give a model the weights, buffers, optimizer state and step counts of another one.

    Options and schedule stay the model's own; the schedule is brought to where it is after as many
    steps as that of the other has taken.

    Args:
        mb: the bundle, with an optimizer.
        scheduler: its schedules, None for none.
        source: slot of the model to copy.
        target: slot of a fresh model.
    """
    for slot in mb._stack.slots:
        rows = mb._stack.tensor(slot)
        rows.detach()[target].copy_(rows.detach()[source])
        torch.autograd.graph.increment_version(rows)
    optimizer: Any = mb.optimizer
    state = optimizer.model_state_dict(source)
    own = optimizer.model_state_dict(target)["param_groups"]
    optimizer.load_model_state_dict(target, {"state": state["state"], "param_groups": own})
    if scheduler is not None:
        _advance(scheduler, source, target)


def _advance(scheduler: Any, source: int, target: int) -> None:
    own, other = scheduler.schedulers[target], scheduler.schedulers[source]
    if scheduler._takes_metrics[target]:  # how far it is depends on what was seen, not on a number
        base = own.optimizer.param_groups[0]["lr"]
        own.load_state_dict(other.state_dict())
        own.optimizer.param_groups[0]["lr"] = base
        return
    while own.last_epoch < other.last_epoch:
        own.step()
