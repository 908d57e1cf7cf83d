"""Models of a bundle that run one after another, each its own modules."""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import BatchingError
from .pytree import Spec, flatten, unflatten
from .random import Streams, torch_rng
from .stack import Stack
from .structure import Slot
from .substitute.autograd_state import replayed_checkpoints
from .substitute.mode import Call, Refused
from .swap import swapped
from .weights import OwnSamples, SampleWeights


class OneByOne:
    """The part of `Forward` that does not batch; see there."""

    stack: Stack
    streams: Streams
    weights: SampleWeights | None
    tensor_attributes: Mapping[tuple[int, str], tuple[Tensor, bool]]

    def _swapped(
        self, i: int, tensors: Sequence[Tensor], level: int | None
    ) -> contextlib.AbstractContextManager[list[dict[str, Any]]]:
        return swapped(self.stack, i, tensors, level, self.tensor_attributes)

    def _loop(self, leaves: list[Any], batched: list[bool], spec: Spec) -> Any:
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
        op_index = 0
        for i in range(stack.num_models):
            own = None if self.weights is None else self.weights.alone(i)
            args, kwargs = unflatten(self._own_arguments(i, columns, own), spec)
            tensors = [
                slices[i] if slot.is_parameter else self._own_buffer(i, slot)
                for slot, slices in zip(stack.slots, unbound)
            ]
            streams = self.streams.fork(i) if self.streams.kind == "philox" else self.streams
            own_weights = None if own is None else own.weights
            resume = functools.partial(self._resume, i, tensors, streams, own_weights)
            with self._swapped(i, tensors, None), replayed_checkpoints(resume):
                with self._random_mode(streams, own_weights), self._torch_state(i):
                    out = self._alone(i, args, kwargs)
                self._collect_assigned(i, tensors, assigned)
            op_index = max(op_index, streams.op_index)
            flat, out_spec = flatten(out)
            flat = flat if own is None else [own.put(leaf) for leaf in flat]
            first_spec = first_spec or out_spec
            flat_results.append(flat)
        self.streams.op_index = op_index
        with torch.no_grad():
            for position, values in assigned.items():
                stack.replace_buffer(stack.slots[position], torch.stack(values))
        return unflatten(_stack_rows(flat_results), first_spec)

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
        self, streams: Streams, weights: SampleWeights | None
    ) -> contextlib.AbstractContextManager[Any]:
        """What makes one model draw from its stream; torch's own generators need nothing."""
        if streams.kind == "torch" and weights is None:
            return contextlib.nullcontext()
        return Call(1, None, streams, device=streams.device, weights=weights)

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

    def _own_buffer(self, i: int, slot: Slot) -> Tensor:
        index, attribute = slot.places[0]
        buffer = self.stack.modules[i][index]._buffers[attribute]
        assert buffer is not None
        return buffer

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

    @contextlib.contextmanager
    def _torch_state(self, i: int) -> Iterator[None]:
        if self.streams.kind == "torch":
            with torch_rng(self.streams.device), self.streams.as_model(i):
                yield
        else:
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
        results.append(torch.stack(column) if len(column) > 1 else column[0].unsqueeze(0))
    return results


def _rows(tensor: Tensor) -> tuple[Tensor, ...]:
    """`[M, ...]` as M tensors. One model's gradient is a view then, and no copy."""
    return tensor.unbind(0) if tensor.shape[0] > 1 else (tensor.squeeze(0),)
