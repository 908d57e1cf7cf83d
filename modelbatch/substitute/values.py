"""Python values of tensors: `if mask.all():`, `x.max().item()`, `int(lengths.sum())`.

torch.vmap refuses them, since the models may differ. Where all models have the same value the
forward can go on with it, for all of them. Where they differ they are computed one by one.
"""

from collections.abc import Callable
from typing import Any

from .functions import READS
from .mode import Call, register

__all__: list[str] = []


@register(*READS)
def read(
    call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The value that all models have; what torch says of vmap where they do not."""
    if kwargs or len(args) != 1 or call.level is None or call.tracing:
        return NotImplemented  # a graph would keep the value for other batches
    tensor = args[0]
    if not call.is_batched(tensor):
        return NotImplemented
    physical, _ = call.unwrap(tensor)
    with call.lowered():
        values = [func(own) for own in physical.detach().cpu().unbind(0)]  # one wait for a GPU
    first = repr(values[0])  # tells 0.0 from -0.0, and takes NaN for NaN
    return values[0] if all(repr(own) == first for own in values) else NotImplemented
