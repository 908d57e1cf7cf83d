"""Which of the tensors handed to a bundle carry the model axis."""

from typing import Any

from torch import Tensor

from .errors import ModelBatchError


class _Marked:
    """A tensor whose model axis differs from what `shared_input` says for the rest."""

    __slots__ = ("has_model_axis", "value")

    def __init__(self, value: Any, has_model_axis: bool):
        if not isinstance(value, Tensor):
            raise ModelBatchError(
                f"shared() and per_model() wrap a tensor, got {type(value).__name__}"
            )
        self.value, self.has_model_axis = value, has_model_axis

    def __repr__(self) -> str:
        return f"{'per_model' if self.has_model_axis else 'shared'}({self.value!r})"


def shared(tensor: Tensor) -> Any:
    """Mark one argument of a `shared_input=False` bundle as the same for every model.

    Args:
        tensor: `[B, ...]`, without a model axis.

    Raises:
        ModelBatchError: if it is not a tensor.
    """
    return _Marked(tensor, False)


def per_model(tensor: Tensor) -> Any:
    """Mark one argument of a `shared_input=True` bundle as different for every model.

    Args:
        tensor: `[M, B, ...]`, with the model axis first.

    Raises:
        ModelBatchError: if it is not a tensor.
    """
    return _Marked(tensor, True)


def resolve(
    leaves: list[Any], default_has_model_axis: bool, num_models: int, what: str
) -> tuple[list[Any], list[bool]]:
    """Unwrap the markers and say of every leaf whether dim 0 is the model axis.

    Raises:
        ModelBatchError: if a tensor that should carry the model axis has another leading size.
    """
    values: list[Any] = []
    batched: list[bool] = []
    for position, leaf in enumerate(leaves):
        has_axis = default_has_model_axis
        if isinstance(leaf, _Marked):
            has_axis, leaf = leaf.has_model_axis, leaf.value
        if not isinstance(leaf, Tensor):
            values.append(leaf)
            batched.append(False)
            continue
        if has_axis and (leaf.dim() == 0 or leaf.shape[0] != num_models):
            raise ModelBatchError(
                f"{what} {position} has shape {tuple(leaf.shape)}, but its first axis must be the "
                f"model axis of size {num_models}; wrap it in modelbatch.shared(...) if all "
                "models get the same tensor"
            )
        values.append(leaf)
        batched.append(has_axis)
    return values, batched
