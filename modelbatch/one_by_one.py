"""Models of a bundle that run one after another, each its own modules."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .attributes import changed_attributes
from .errors import BatchingError
from .pytree import Spec, flatten, unflatten
from .random import Streams, torch_rng
from .stack import Stack
from .structure import tensor_at
from .substitute.autograd_state import replayed_checkpoints
from .substitute.mode import Call, Refused
from .swap import swapped
from .weights import OwnSamples, SampleWeights

_NOTHING = contextlib.nullcontext()


class OneByOne:
    """The part of `Forward` that does not batch; see there."""

    stack: Stack
    streams: Streams
    weights: SampleWeights | None
    record: Callable[[str, str], None] | None
    tensor_attributes: dict[tuple[int, str], tuple[Tensor, bool]]
    spread: set[tuple[int, str]]

    def _swapped(
        self, i: int, tensors: Sequence[Tensor], level: int | None
    ) -> contextlib.AbstractContextManager[list[dict[str, Any]]]:
        return swapped(self.stack, i, tensors, level, self.tensor_attributes)

    def _loop(
        self, leaves: list[Any], batched: list[bool], spec: Spec, checking: bool = False
    ) -> Any:
        """Call each model's own modules with its slice of the stacked tensors."""
        stack = self.stack
        unbound = [_rows(stack.tensor(slot)) for slot in stack.slots]
        columns = [
            _rows(leaf) if is_batched else (leaf,) * stack.num_models
            for leaf, is_batched in zip(leaves, batched)
        ]
        flat_results: list[list[Any]] = []
        out_spec: Any = None
        first_spec: Any = None
        assigned: dict[int, list[Tensor]] = {}
        attributes: set[tuple[int, str]] = set()
        op_index = 0
        for i in range(stack.num_models):
            own = None if self.weights is None else self.weights.alone(i)
            args, kwargs = unflatten(self._own_arguments(i, columns, own), spec)
            tensors = [
                slices[i] if slot.is_parameter else tensor_at(stack.modules[i], slot)
                for slot, slices in zip(stack.slots, unbound)
            ]
            streams = self._streams_of(i)
            own_weights = None if own is None else own.weights
            resume = functools.partial(self._resume, i, tensors, streams, own_weights)
            strict = self._originals(i, learning=True) if checking else None
            with self._swapped(i, tensors, None) as before, replayed_checkpoints(resume):
                with self._random_mode(streams, own_weights, strict), self._torch_state(i):
                    out = self._alone(i, args, kwargs)
                self._collect_assigned(i, tensors, assigned)
                attributes.update(changed_attributes(before, stack.modules[i]))
            op_index = max(op_index, streams.op_index)
            flat, out_spec = flatten(out)
            flat = flat if own is None else [own.put(leaf) for leaf in flat]
            first_spec = first_spec or out_spec
            flat_results.append(flat)
        self.streams.op_index = op_index
        with torch.no_grad():
            for position, values in assigned.items():
                stack.replace_buffer(stack.slots[position], torch.stack(values))
            for index, attribute in self._new_buffers():
                own_buffers = [modules[index]._buffers.get(attribute) for modules in stack.modules]
                filled = [value.detach() for value in own_buffers if value is not None]
                if len(filled) == stack.num_models:
                    stack.add_buffer(index, attribute, _stacked(filled))
            self._collect_attributes(attributes)
        return unflatten(_stack_rows(flat_results), first_spec)

    def _streams_of(self, i: int) -> Streams:
        many = self.stack.num_models > 1
        return self.streams.fork(i) if many and self.streams.kind == "philox" else self.streams

    def _originals(self, i: int, learning: bool) -> dict[int, str]:
        """What model i's own tensors are called, by id: all, or parameters that need a gradient."""
        named = [(slot, tensor_at(self.stack.modules[i], slot)) for slot in self.stack.slots]
        return {
            id(original): f"'{slot.name}' of model {i}"
            for slot, original in named
            if not learning or (slot.is_parameter and original.requires_grad)
        }

    def _own_arguments(self, i: int, columns: list[Any], own: OwnSamples | None) -> list[Any]:
        leaves = [column[i] for column in columns]
        if own is None or self.weights is None:
            return leaves
        return [own.take(leaf, self.weights.is_batch(leaf, False)) for leaf in leaves]

    def _alone(self, i: int, args: Any, kwargs: Any) -> Any:
        try:
            return self.stack.models[i](*args, **kwargs)
        except ValueError as error:
            if self.weights is None or "more than 1 value per channel" not in str(error):
                raise
            raise Refused(f"model {i}: {error}") from error

    def _random_mode(
        self,
        streams: Streams,
        weights: SampleWeights | None,
        strict: dict[int, str] | None = None,
    ) -> contextlib.AbstractContextManager[Any]:
        """What makes one model draw from its stream; torch's own generators need nothing."""
        plain = weights is None and strict is None and self.record is None
        if plain and streams.kind == "torch":
            return _NOTHING
        device = streams.device
        return Call(
            *(1, None, streams), device=device, weights=weights, strict=strict, record=self.record
        )

    def _resume(
        self,
        i: int,
        tensors: Sequence[Tensor],
        streams: Streams,
        weights: SampleWeights | None,
    ) -> Callable[[], contextlib.AbstractContextManager[Any]]:
        """Remember where model i's forward is, to run a part of it again in the backward."""
        here = copy.copy(streams)

        @contextlib.contextmanager
        def again() -> Iterator[None]:
            with self._swapped(i, tensors, None), self._random_mode(copy.copy(here), weights):
                yield

        return again

    def _collect_assigned(
        self, i: int, tensors: Sequence[Tensor], assigned: dict[int, list[Tensor]]
    ) -> None:
        modules = self.stack.modules[i]
        for position, (slot, tensor) in enumerate(zip(self.stack.slots, tensors)):
            if slot.is_parameter:
                continue
            index, attribute = slot.places[0]
            now = modules[index]._buffers[attribute]
            if now is not tensor or position in assigned:
                rows = assigned.setdefault(position, list(self.stack.tensor(slot).unbind(0)))
                assert now is not None
                rows[i] = now.detach()

    def _new_buffers(self) -> list[tuple[int, str]]:
        """Buffers that model 0 has and the stack has not: they were None until a forward."""
        held = [
            (index, attribute)
            for index, module in enumerate(self.stack.modules[0])
            for attribute, value in module._buffers.items()
            if value is not None
        ]
        known = {place for slot in self.stack.slots for place in slot.places} if held else ()
        return [place for place in held if place not in known]

    def _collect_attributes(self, names: set[tuple[int, str]]) -> None:
        """Note what the models have set, for the day when they are computed together."""
        for place in names:
            index, name = place
            self.spread.add(place)
            values = [modules[index].__dict__.get(name) for modules in self.stack.modules]
            tensors = [value.detach() for value in values if isinstance(value, Tensor)]
            if len(tensors) == len(values) and len({(t.shape, t.dtype) for t in tensors}) == 1:
                self.tensor_attributes[place] = (_stacked(tensors), True)
            else:
                self.tensor_attributes.pop(place, None)

    def _torch_state(self, i: int) -> contextlib.AbstractContextManager[None]:
        return _as_model(self.streams, i) if self.streams.kind == "torch" else _NOTHING


@contextlib.contextmanager
def _as_model(streams: Streams, i: int) -> Iterator[None]:
    """Torch's own generators where model i left them."""
    with torch_rng(streams.device), streams.as_model(i):
        yield


def _stack_rows(rows: list[list[Any]]) -> list[Any]:
    """Stack the flattened outputs of single models."""
    results: list[Any] = []
    for column in zip(*rows):
        if not isinstance(column[0], Tensor):
            results.append(column[0])
            continue
        if any(t.shape != column[0].shape for t in column):
            shapes = [tuple(t.shape) for t in column]
            raise BatchingError(f"the models' outputs have different shapes: {shapes}")
        results.append(_stacked(column))
    return results


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """`[M, ...]`; of one tensor a view."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def _rows(tensor: Tensor) -> tuple[Tensor, ...]:
    """`[M, ...]` as M tensors. One model's gradient is a view then, and no copy."""
    return tensor.unbind(0) if tensor.shape[0] > 1 else (tensor.squeeze(0),)
