"""What the samples of a batch count for in each model, while a bundle computes with them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import ModelBatchError
from .inputs import _Marked


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device, without waiting where that is safe: not on the way to the CPU."""
    return tensor.to(device, non_blocking=torch.device(device).type != "cpu")


class SampleWeights:
    """Sample weights `[M, B]` or `[B]`, and what the host must know of them.

    A weight counts samples: a sample of weight 2 is in the model's batch twice, one of weight 0 is
    not in it at all. What the host must know is read in one transfer; none is needed for weights
    on the CPU.

    Args:
        weight: `[M, B]`, or `[B]` for all models; bool or real numbers, finite and not negative.
        num_models: M.
        device: where the bundle lives.
        shared: tensors `[B, ...]` that all models will get, to be looked at in the same transfer.

    Attributes:
        given: the weights on the device, as they were given.
        weight: the same in float64 as `[M, B]`, or `[1, B]` if all models have the same.
        batch_size: B.
        used: how many samples each model has, not counting those of weight 0.
        totals: the sum of each model's weights.
        whole: for each model whether all of its weights are whole numbers.
        resting: models that do not train with this batch, having no sample in it or being frozen.
        models: the number of each model.

    Raises:
        ModelBatchError: bad weights, naming the model.
    """

    def __init__(
        self, weight: Any, num_models: int, device: torch.device, shared: Sequence[Tensor] = ()
    ):
        value = _checked_shape(weight, num_models)
        self.num_models, self.batch_size = num_models, value.shape[-1]
        rows = value.detach().double().reshape(-1, self.batch_size)
        self.given = moved(value, device)
        self.weight = moved(rows, device)
        candidates = {id(leaf): leaf for leaf in shared if self._may_leak(leaf)}
        # what else is on the device is read with the weights if they are there too
        together = candidates if rows.device == self.weight.device else {}
        taking = rows != 0
        parts = [
            taking.sum(1),
            rows.sum(1),
            (rows == rows.round()).all(1),
            ((rows >= 0) & torch.isfinite(rows)).all(1),
            taking.any(0).all().reshape(1),
            *(self._leak(leaf).reshape(1) for leaf in together.values()),
        ]
        numbers = torch.cat([part.double() for part in parts]).tolist()
        each = len(rows)
        columns = [numbers[k * each : (k + 1) * each] for k in range(4)]
        if not all(columns[3]):
            bad = columns[3].index(0.0)
            owner = f" of model {bad}" if value.dim() > 1 else ""
            raise ModelBatchError(f"the sample weights{owner} must be finite and not negative")
        if each < num_models:
            columns = [column * num_models for column in columns]
        self.used = [int(count) for count in columns[0]]
        self.totals = columns[1]
        self.whole = [flag != 0 for flag in columns[2]]
        self.models: Sequence[int] = range(num_models)
        self.resting = {i for i, count in enumerate(self.used) if count == 0}
        self.every_row_used = numbers[4 * each] != 0
        # the leaves are held so that no other one takes over an id
        self._leaks = {
            key: (leaf, flag != 0)
            for (key, leaf), flag in zip(together.items(), numbers[4 * each + 1 :])
        }
        self._expanded: Tensor | None = None

    @property
    def per_model(self) -> bool:
        """Whether the models have weights of their own."""
        return self.weight.shape[0] == self.num_models and self.num_models > 1

    @property
    def all_rows_used(self) -> bool:
        """Whether no sample has weight 0 in any model."""
        return all(count == self.batch_size for count in self.used)

    def expanded(self) -> Tensor:
        """The weights as float64 `[M, B]`."""
        if self._expanded is None:
            self._expanded = self.weight.expand(self.num_models, self.batch_size).contiguous()
        return self._expanded

    def one_model(self, i: int) -> Tensor:
        """Model i's weights, float64 `[B]`."""
        return self.weight[i if len(self.weight) > 1 else 0]

    def alone(self, i: int) -> "OwnSamples":
        """The samples that model i would have if it were alone.

        Whole weights repeat a sample; with others, each sample keeps its weight.
        """
        weight, size = self.one_model(i), self.batch_size
        rows = torch.arange(size, device=weight.device)
        own: SampleWeights | None = None
        if self.whole[i]:
            if self.used[i] == size == self.totals[i]:
                return OwnSamples(None, rows, None)
            positions = rows.repeat_interleave(weight.long())
        else:
            positions = weight.nonzero().flatten()
            own = object.__new__(SampleWeights)
            own.weight = own._expanded = weight[positions].unsqueeze(0)
            own.num_models, own.batch_size, own.models = 1, len(positions), [i]
            own.used, own.totals, own.whole = [self.used[i]], [self.totals[i]], [False]
            own.every_row_used, own.resting, own._leaks = True, self.resting, {}
        if i in self.resting and len(positions) < 2:  # what it computes is thrown away
            positions, own = positions.new_zeros(2 if size else 0), None
        places = torch.searchsorted(positions, rows).clamp(max=max(len(positions) - 1, 0))
        return OwnSamples(positions, places, own)

    # ---- samples that take no part

    def is_batch(self, leaf: Any, has_axis: bool) -> bool:
        """Whether an argument has one entry per sample."""
        return (
            isinstance(leaf, Tensor)
            and leaf.layout is torch.strided
            and not leaf.is_nested
            and leaf.dim() > int(has_axis)
            and leaf.shape[int(has_axis)] == self.batch_size > 0
        )

    def fill(self, leaves: list[Any], batched: list[bool]) -> tuple[list[Any], list[bool]]:
        """Put a sample of weight in the place of each sample of weight 0, whatever that held.

        The forward may then compute what it likes of it: no NaN arises that a gradient of zero
        would be multiplied by. A tensor that all models share becomes one for each model only
        where some model would otherwise meet another model's NaN.
        """
        if self.all_rows_used:
            return leaves, batched
        filled, flags = list(leaves), list(batched)
        for position, (leaf, own) in enumerate(zip(leaves, batched)):
            if not self.is_batch(leaf, own):
                continue
            if not own and self._leaking(leaf):
                leaf, own = leaf.expand(self.num_models, *leaf.shape), True
            if own:
                filled[position], flags[position] = self._fill_own(leaf), True
            elif not self.every_row_used and any(self.used):
                used = (self.weight != 0).any(0)
                filled[position] = leaf[_first_in_place_of_unused(used)]
        return filled, flags

    def _fill_own(self, leaf: Tensor) -> Tensor:
        places = _first_in_place_of_unused(self.expanded() != 0)
        models = torch.arange(self.num_models, device=places.device).unsqueeze(1)
        result = leaf[models, places]
        if all(self.used):
            return result
        has_any = (self.expanded() != 0).any(1).reshape(-1, *[1] * (leaf.dim() - 1))
        return torch.where(has_any, result, torch.zeros((), dtype=leaf.dtype, device=leaf.device))

    def _may_leak(self, leaf: Any) -> bool:
        is_number = isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
        return self.per_model and is_number and self.is_batch(leaf, False)

    def _leak(self, leaf: Tensor) -> Tensor:
        """Whether a sample that only some models have is not finite."""
        taking = self.weight != 0
        some = taking.any(0) & ~taking.all(0)
        finite = torch.isfinite(leaf.detach()).reshape(self.batch_size, -1).all(1)
        return (some & ~finite).any()

    def _leaking(self, leaf: Tensor) -> bool:
        if not self._may_leak(leaf):
            return False
        known = self._leaks.get(id(leaf))
        if known is None:
            known = self._leaks[id(leaf)] = (leaf, bool(self._leak(leaf)))
        return known[1]


@dataclass
class OwnSamples:
    """The samples of one model, for a run of that model alone.

    Attributes:
        positions: their rows in the batch, int64 `[K]`; None for the batch as it is.
        places: for every row of the batch its place among them, any place if it is not; `[B]`.
        weights: their weights, where these are not all whole numbers.
    """

    positions: Tensor | None
    places: Tensor
    weights: SampleWeights | None

    def take(self, leaf: Any, is_batch: bool) -> Any:
        """Of an argument that has one entry per sample, the model's own."""
        return leaf[self.positions] if is_batch and self.positions is not None else leaf

    def put(self, leaf: Any) -> Any:
        """An output that has one entry for each own sample, with one for each of the batch."""
        if self.positions is None or not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return leaf
        return leaf[self.places] if leaf.shape[0] == len(self.positions) else leaf


def _first_in_place_of_unused(used: Tensor) -> Tensor:
    """Row numbers `[..., B]`, with that of the first used row for every unused one."""
    rows = torch.arange(used.shape[-1], device=used.device)
    first = used.to(torch.int8).argmax(-1, keepdim=True)
    return torch.where(used, rows, first)


def _checked_shape(weight: Any, num_models: int) -> Tensor:
    if isinstance(weight, _Marked):
        if weight.has_model_axis != (weight.value.dim() == 2):
            raise ModelBatchError(
                f"sample_weight has shape {tuple(weight.value.shape)}, which does not fit {weight}"
            )
        weight = weight.value
    if not isinstance(weight, Tensor):
        weight = torch.as_tensor(weight)
    fits = weight.dim() == 1 or (weight.dim() == 2 and weight.shape[0] == num_models)
    if not fits or weight.is_complex():
        raise ModelBatchError(
            f"sample_weight must be real of shape [B] or [{num_models}, B], got {weight.dtype} of "
            f"shape {tuple(weight.shape)}"
        )
    return weight


def shared_tensors(leaves: Iterable[Any], default_has_axis: bool) -> list[Tensor]:
    """Of arguments as the user gave them, the tensors that all models share."""
    found = []
    for leaf in leaves:
        has_axis = default_has_axis
        if isinstance(leaf, _Marked):
            has_axis, leaf = leaf.has_model_axis, leaf.value
        if isinstance(leaf, Tensor) and not has_axis:
            found.append(leaf)
    return found
