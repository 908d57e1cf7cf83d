"""The parameter groups of a fused optimizer, and the matrix of numbers that they amount to."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelBatchError
from .rules import Rule, as_number, option_of, read_option

__all__ = ["HyperTable", "ModelGroup"]

_MISSING = object()


class ModelGroup(dict[str, Any]):
    """Model i's parameter group: a dict that tells the table of numbers what was written.

    Reading `group["params"]` first brings the gradients of the model's own parameters up to date.

    Args:
        options: the group, complete.
        index: i.
        changed: collects (i, option) of every write.
        show_gradients: called before `group["params"]` is read.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        index: int,
        changed: set[tuple[int, str]],
        show_gradients: Callable[[], None],
    ) -> None:
        super().__init__(options)
        self._index = index
        self._changed = changed
        self._show_gradients = show_gradients

    def move(
        self, index: int, changed: set[tuple[int, str]], show_gradients: Callable[[], None]
    ) -> None:
        """Be the group of another slot, or of none."""
        self._index, self._changed, self._show_gradients = index, changed, show_gradients

    def __getitem__(self, option: str) -> Any:
        if option == "params":
            self._show_gradients()
        return super().__getitem__(option)

    def get(self, option: str, default: Any = None) -> Any:  # noqa: D102 - inherited
        return super().get(option, default) if option != "params" else self[option]

    def __setitem__(self, option: str, value: Any) -> None:
        super().__setitem__(option, value)
        self._changed.add((self._index, option))

    def __delitem__(self, option: str) -> None:
        super().__delitem__(option)
        self._changed.add((self._index, option))

    def setdefault(self, option: str, default: Any = None) -> Any:  # noqa: D102 - inherited
        if option not in self:
            self[option] = default
        return self[option]

    def update(self, *args: Any, **kwargs: Any) -> None:  # noqa: D102 - inherited
        for option, value in dict(*args, **kwargs).items():
            self[option] = value

    def __ior__(self, other: Any) -> "ModelGroup":  # type: ignore[override,misc]
        self.update(other)
        return self

    def pop(self, option: str, default: Any = _MISSING) -> Any:  # noqa: D102 - inherited
        if option not in self and default is not _MISSING:
            return default
        value = self[option]
        del self[option]
        return value

    def __reduce__(self) -> Any:
        # A copy belongs to no optimizer.
        return dict, (dict(self),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)


class HyperTable:
    """The hyper-parameters of all models as one float64 matrix `[K, M]` on their device.

    Only what was written since the last step is packed again. Values that can change without
    being written, tensors and lists, are read at every step.

    Args:
        rule: names the rows.
        num_models: M.
    """

    def __init__(self, rule: Rule, num_models: int) -> None:
        self._rule = rule
        self._rows: dict[str, list[int]] = {}
        for k, row in enumerate(rule.rows):
            self._rows.setdefault(option_of(row)[0], []).append(k)
        self._resize(num_models)
        #: (model, option) pairs written since the last `refresh`; groups add to it.
        self.changed: set[tuple[int, str]] = set()

    def _resize(self, num_models: int) -> None:
        self._host = torch.zeros(len(self._rule.rows), num_models, dtype=torch.float64)
        self._numbers = self._host.numpy()
        self._matrix = self._host
        self._unwatched: dict[tuple[int, str], Any] = {}
        self._rates: list[float] | None = None

    def models_changed(self, groups: list[dict[str, Any]]) -> None:
        """Pack the numbers of other models at the next refresh."""
        self._resize(len(groups))
        self.changed.clear()
        self.fill(groups)

    @property
    def matrix(self) -> Tensor:
        """Float64 `[K, M]`, as of the last refresh."""
        return self._matrix

    def learning_rates(self, groups: list[dict[str, Any]]) -> list[float]:
        """M learning rates; the same list again while nothing was written. It is not to be changed.

        Looking through M groups at every step would take as long as many an update.
        """
        if self.changed or self._unwatched:
            return [as_number(dict.get(group, "lr")) for group in groups]
        if self._rates is None:
            self._rates = self._host[self._rows["lr"][0]].tolist()
        return self._rates

    def to(self, device: torch.device) -> None:
        """Keep the matrix on a device."""
        if device.type == "cpu":
            self._matrix = self._host
        elif self._matrix.device != device:
            self._matrix = self._host.to(device)

    def fill(self, groups: list[dict[str, Any]]) -> None:
        """Pack all options of all models."""
        for i in range(len(groups)):
            self.changed.update((i, option) for option in self._rows)

    def refresh(self, groups: list[dict[str, Any]]) -> bool:
        """Pack what has changed.

        Returns:
            Whether an option was written that decides which states a model needs.

        Raises:
            ModelBatchError: a value is no number; the message names model and option.
        """
        if not self.changed and not self._unwatched:
            return False
        deciding, self._rates = False, None
        cpu = self._host.device
        on_device: list[tuple[int, int, Tensor]] = []
        for i, option in self.changed | self._unwatched.keys():
            deciding = deciding or option in self._rule.deciding
            rows = self._rows.get(option)
            if rows is None:
                continue
            self._unwatched.pop((i, option), None)
            value = groups[i].get(option)
            if isinstance(value, (Tensor, list)) or (
                isinstance(value, tuple) and any(isinstance(v, Tensor) for v in value)
            ):
                self._unwatched[i, option] = value
            for k in rows:
                try:
                    number = read_option(self._rule, groups[i], self._rule.rows[k])
                    if isinstance(number, Tensor) and number.device == self._matrix.device != cpu:
                        on_device.append((k, i, number))
                    else:
                        self._numbers[k, i] = as_number(number)
                except (TypeError, ValueError, KeyError, IndexError, RuntimeError) as error:
                    kind = "a number" if len(rows) == 1 else f"{len(rows)} numbers"
                    raise ModelBatchError(
                        f"model {i}: option {option!r} must be {kind}, got {value!r}"
                    ) from error
        self.changed.clear()
        if self._matrix is not self._host:
            self._matrix.copy_(self._host, non_blocking=True)
            for k, i, tensor in on_device:
                self._matrix[k, i].copy_(tensor.detach().reshape(()))
        return deciding
