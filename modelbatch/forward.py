"""One forward of all models: batched where possible, model by model where not.

`Forward.run` swaps the stacked tensors into the first model's modules and calls that model once,
inside torch's vmap machinery and under `substitute.Call`. What the forward writes (buffers in place
or by assignment, plain attributes) goes back to every model. If the batched run fails for a reason
of its own, nothing has changed, and the models run one by one with the same streams.
"""

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._C._functorch as functorch
from torch import Tensor
from torch._functorch import vmap as torch_vmap
from torch.utils._pytree import tree_flatten, tree_map

from .attributes import changed_attributes, restore_attributes
from .errors import FallbackWarning
from .explain import Report
from .fallback import FallbackWatch, cause, users_stacklevel
from .held_objects import HeldObjects
from .one_by_one import OneByOne
from .pytree import Spec, flatten, unflatten
from .random import Streams
from .snapshot import Snapshot
from .stack import Stack
from .substitute.autograd_state import no_saved_tensor_hooks
from .substitute.mode import Call, NeedsBatchedFactories, NeedsOwnSamples, Refused

_models_axis = functools.partial(torch_vmap.vmap_increment_nesting, randomness="different")
_IN_PLACE = re.compile(
    r"vmap: inplace|\(self, \*extra_args\) is not possible|match the broadcast shape"
)


def _expandable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_nested


class Forward(OneByOne):
    """Runs the forward of a bundle and keeps what it learns about it.

    Args:
        stack: the stacked tensors.
        streams: the models' random streams.
        fallback: `"warn"`, `"error"` or `"silent"`.
        grad_memory: see `substitute.dense.GradMemory`.
    """

    def __init__(self, stack: Stack, streams: Streams, fallback: str, grad_memory: Any):
        # batching rules that torch itself loads at its first vmap
        torch_vmap.lazy_load_decompositions()  # type: ignore[attr-defined]
        self.stack = stack
        self.streams = streams
        self.fallback = fallback
        self.grad_memory = grad_memory
        self.loop_reasons: dict[bool, str] = {}
        """Why the models run one by one, by training mode."""
        self.batched_factories = False
        self.warned: set[str] = set()
        self._slow: list[str] = []
        self.written: dict[bool, set[str]] = {}
        """Names of the buffers that a forward writes, by training mode."""
        self._checked: set[tuple[bool, bool]] = set()
        """(training mode, whether there is but one model) of the forwards that were looked at."""
        self.tensor_attributes: dict[tuple[int, str], tuple[Tensor, bool]] = {}
        """Plain attributes that the forward set to tensors, and whether these differ by model."""
        self.spread: set[tuple[int, str]] = set()
        self.held = HeldObjects(stack.modules[0])
        """Plain attributes that the forward keeps per model, as (module index, name)."""
        self.weights = None
        """What the samples of the batch count for, while they do not all count alike."""
        self._weighing: dict[Any, bool] = {}
        """By the modules' training modes, whether the forward asks for the samples' weights."""
        self._own_samples: set[Any] = set()
        """Modes in which only models that run one by one know what to do with weights."""
        self.record: Callable[[str, str], None] | None = None
        self._last: tuple[Snapshot, Any] | None = None

    # ---- entry

    def run(
        self,
        leaves: list[Any],
        batched: list[bool],
        spec: Spec,
        active: Tensor | None,
        compiled: Callable[[list[Any]], Any] | None = None,
    ) -> Any:
        """Call all models.

        Args:
            leaves: flattened (args, kwargs).
            batched: for each leaf whether its dim 0 is the model axis.
            spec: the structure of (args, kwargs).
            active: bool `[M]`, None if all are active; frozen models keep buffers and streams.
            compiled: computes the outputs from `leaves` instead of this class.

        Returns:
            The model's output structure, every tensor with a leading model axis.
        """
        training = self.stack.models[0].training
        if self.weights is not None:
            given = batched
            leaves, batched = self.weights.fill(leaves, batched)
            if batched != given or self._weighing.get(self._modes()) is not False:
                compiled = None
        checking = self._is_new(training)
        snapshot = self._snapshot(training, everything=checking or active is not None)
        streams = self.streams.snapshot()
        self.streams.op_index = 0
        try:
            if compiled is not None:
                out = compiled(leaves)
            elif self._is_one() or self._reason_to_loop(training) is not None:
                out = self._loop(leaves, batched, spec, checking)
            else:
                out = self._batched_or_loop(leaves, batched, spec, snapshot, streams, training)
        except BaseException:
            self._undo(snapshot, streams)
            raise
        self._finish(snapshot, active, training)
        self.streams.finish_call(streams, active)
        self._last = (snapshot, streams)
        return out

    def undo_last(self) -> None:
        """Put buffers and random streams back to before the last `run`."""
        if self._last is not None:
            self._undo(*self._last)
            self._last = None

    def forget_last(self) -> None:
        """There is no last `run` any more to be undone."""
        self._last = None

    def explain(self, report: Report, leaves: list[Any], batched: list[bool], spec: Spec) -> None:
        """Run once without any effect and note in `report` how each operation was computed."""
        training = self.stack.models[0].training
        snapshot, streams = self._snapshot(training, everything=True), self.streams.snapshot()
        kept = (self.tensor_attributes.copy(), self.spread.copy())
        held = [self.held.state(modules) for modules in self.stack.modules]
        plain = [[dict(m.__dict__) for m in modules] for modules in self.stack.modules]
        weights, self.weights = self.weights, None
        self.streams.op_index = 0
        self.record = report.add
        try:
            one = self._is_one()
            reason = None if one else self._reason_to_loop(training)
            if one:
                self._loop(leaves, batched, spec, checking=True)
            elif reason is None:
                try:
                    self._batched(leaves, batched, spec, training)
                except Refused:
                    raise
                except NeedsBatchedFactories:
                    self.batched_factories = True
                except Exception as error:
                    self.batched_factories |= _IN_PLACE.search(str(error)) is not None
                    if not self.batched_factories:
                        reason = self._explain_loop(error, leaves, batched, spec, training)
                if self.batched_factories:
                    report.operations.clear()
                    self._undo(snapshot, streams)
                    try:
                        self._batched(leaves, batched, spec, training)
                    except Exception as error:
                        reason = self._explain_loop(error, leaves, batched, spec, training)
            report.whole_forward = reason
            for name in self._slow:
                report.mark_slow(name)
        finally:
            self.record = None
            self.weights = weights
            self._undo(snapshot, streams)
            for state in held:
                self.held.restore(state)
            for modules, before in zip(self.stack.modules, plain):
                restore_attributes(before, modules)
            self.tensor_attributes, self.spread = kept

    def _explain_loop(
        self, error: Exception, leaves: list[Any], batched: list[bool], spec: Spec, training: bool
    ) -> str:
        record, self.record = self.record, None
        self._loop_after(error, leaves, batched, spec, training)
        self.record = record
        return self.loop_reasons[training]

    def _is_one(self) -> bool:
        """Whether there is but one model, which then runs by itself, for batching costs time."""
        return self.stack.num_models == 1 and self.weights is None

    def _is_new(self, training: bool) -> bool:
        return (training, self._is_one()) not in self._checked

    def _reason_to_loop(self, training: bool) -> str | None:
        if self.stack.has_user_hooks():
            self._report("forward hooks", "hooks see one model at a time")
            return "forward hooks"
        if self.weights is not None and self._modes() in self._own_samples:
            return "sample weights"
        return self.loop_reasons.get(training)

    def _modes(self) -> tuple[bool, ...]:
        return tuple(module.training for module in self.stack.modules[0])

    def _batched_or_loop(
        self,
        leaves: list[Any],
        batched: list[bool],
        spec: Spec,
        snapshot: "Snapshot",
        streams: Any,
        training: bool,
    ) -> Any:
        try:
            return self._batched(leaves, batched, spec, training)
        except Refused:
            raise
        except NeedsBatchedFactories:
            self.batched_factories = True
        except NeedsOwnSamples as error:
            self._undo(snapshot, streams)
            return self._loop_over_own_samples(error, leaves, batched, spec)
        except Exception as error:
            failure = error
            in_place = _IN_PLACE.search(str(error)) is not None
            retry = in_place and not self.batched_factories
            self.batched_factories |= retry
            if not retry:
                self._undo(snapshot, streams)
                return self._loop_after(failure, leaves, batched, spec, training)
        self._undo(snapshot, streams)
        try:
            return self._batched(leaves, batched, spec, training)
        except Refused:
            raise
        except NeedsOwnSamples as error:
            self._undo(snapshot, streams)
            return self._loop_over_own_samples(error, leaves, batched, spec)
        except Exception as error:
            self._undo(snapshot, streams)
            return self._loop_after(error, leaves, batched, spec, training)

    def _loop_over_own_samples(
        self, error: Exception, leaves: list[Any], batched: list[bool], spec: Spec
    ) -> Any:
        out = self._loop(leaves, batched, spec)
        self._own_samples.add(self._modes())
        self._report("a normalisation with sample weights", str(error), error)
        return out

    def _undo(self, snapshot: "Snapshot", streams: Any) -> None:
        snapshot.restore_all()
        self.streams.restore(streams)

    def _loop_after(
        self,
        error: Exception,
        leaves: list[Any],
        batched: list[bool],
        spec: Spec,
        training: bool,
    ) -> Any:
        """Run the models one by one; if that fails too, the call itself was wrong.

        Raises:
            BatchingError: with `fallback="error"`.
            the user's own error, as a separate model would raise it.
        """
        try:
            out = self._loop(leaves, batched, spec, checking=True)
        except Exception as own:
            raise own from None
        name, why = cause(error)
        self.loop_reasons[training] = name
        self._report(name, why, error)
        return out

    def _report(self, name: str, why: str, error: BaseException | None = None) -> None:
        text = (
            f"{name} cannot be batched ({why}); it is computed model by model for this bundle of "
            f"{self.stack.num_models}. mb.explain(...) tells more"
        )
        if self.fallback == "error":
            raise Refused(text) from error
        if name in self.warned:
            return
        self.warned.add(name)
        if self.fallback == "warn":
            warnings.warn(text, FallbackWarning, stacklevel=users_stacklevel())

    # ---- all models at once

    def _batched(self, leaves: list[Any], batched: list[bool], spec: Spec, training: bool) -> Any:
        checking = self._is_new(training) or self.record is not None
        modules = self.stack.modules
        before = self.held.state(modules[0])
        try:
            results, out_spec = self.batched_leaves(leaves, batched, spec, checking)
        except BaseException:
            self.held.restore(before)
            raise
        self.held.spread(before, modules)
        return unflatten(results, out_spec)

    def batched_leaves(
        self, leaves: list[Any], batched: list[bool], spec: Spec, checking: bool = False
    ) -> tuple[list[Any], Spec]:
        """The flattened outputs `[M, ...]` of one call of all models, and their structure."""
        stack = self.stack
        with FallbackWatch(checking) as watch, _models_axis(stack.num_models) as level:
            call = self._call(stack.num_models, level, self.streams, checking)
            if self.batched_factories:  # what a shared input becomes may be written to as well
                leaves = [
                    leaf.expand(stack.num_models, *leaf.shape)
                    if not own and _expandable(leaf)
                    else leaf
                    for leaf, own in zip(leaves, batched)
                ]
                batched = [own or _expandable(leaf) for leaf, own in zip(leaves, batched)]
            wrapped = [
                functorch._add_batch_dim(leaf, 0, level) if is_batched else leaf
                for leaf, is_batched in zip(leaves, batched)
            ]
            args, kwargs = unflatten(wrapped, spec)
            tensors = [
                functorch._add_batch_dim(stack.tensor(slot), 0, level) for slot in stack.slots
            ]
            with self._swapped(0, tensors, level) as attributes:
                with call, no_saved_tensor_hooks():
                    out = stack.models[0](*args, **kwargs)
                self._collect(call, tensors, attributes, level)
            if self.weights is not None:
                self._weighing[self._modes()] = call.weighed
            flat, out_spec = flatten(out)
            results = [self._leave(leaf, level) for leaf in flat]
        if checking:
            self._slow = [name for name, _ in watch.found]
        for name, why in (*call.loops.items(), *watch.found):
            self._report(name, why)
        return results, out_spec

    def _leave(self, leaf: Any, level: int) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return functorch._remove_batch_dim(leaf, level, self.stack.num_models, 0)

    def _call(self, num_models: int, level: int | None, streams: Streams, check: bool) -> Call:
        strict = None
        if check and level is not None:
            strict = self._originals(0, learning=False)
        return Call(
            num_models,
            level,
            streams,
            device=streams.device,
            grad_memory=self.grad_memory if level is not None else None,
            per_model_numbers=level is not None and bool(self.stack.structure.per_model),
            batched_factories=self.batched_factories and level is not None,
            record=self.record,
            strict=strict,
            weights=self.weights if level is not None else None,
        )

    def _collect(
        self,
        call: Call,
        tensors: Sequence[Tensor],
        attributes: Sequence[dict[str, Any]],
        level: int,
    ) -> None:
        """Bring what the forward assigned back to the stack and to every model."""
        stack, modules = self.stack, self.stack.modules[0]
        for slot, tensor in zip(list(stack.slots), tensors):
            if slot.is_parameter:
                continue
            index, attribute = slot.places[0]
            now = modules[index]._buffers.get(attribute)
            if now is not tensor and now is not None:
                with torch.no_grad():
                    stack.replace_buffer(slot, self._leave(now, level).detach())
        for index, attribute in self._new_buffers():
            filled = modules[index]._buffers[attribute]
            assert filled is not None
            stack.add_buffer(index, attribute, self._leave(filled, level))
        for index, name in changed_attributes(attributes, modules):
            self._spread(call, index, name, modules[index].__dict__[name])

    def _spread(self, call: Call, index: int, name: str, value: Any) -> None:
        """Give every model its own value of an attribute that the forward set."""
        stack = self.stack
        self.spread.add((index, name))
        leaves, _ = tree_flatten(value)
        if isinstance(value, Tensor):
            physical, has_axis = call.unwrap(value)
            self.tensor_attributes[index, name] = (physical.detach(), has_axis)
        else:
            self.tensor_attributes.pop((index, name), None)
        if not any(call.is_batched(leaf) for leaf in leaves):
            for modules in stack.modules:
                modules[index].__dict__[name] = value
            return
        split = {
            id(leaf): call.unwrap(leaf)[0].unbind(0) for leaf in leaves if call.is_batched(leaf)
        }
        for i, modules in enumerate(stack.modules):

            def pick(leaf: Any, i: int = i) -> Any:
                return split[id(leaf)][i] if id(leaf) in split else leaf

            modules[index].__dict__[name] = tree_map(pick, value)

    # ---- undo, and frozen models

    def _snapshot(self, training: bool, everything: bool) -> "Snapshot":
        names = None if everything else self.written.get(training, set())
        return Snapshot(self.stack, names)

    def _finish(self, snapshot: "Snapshot", active: Tensor | None, training: bool) -> None:
        if self._is_new(training) or active is not None:
            self._checked.add((training, self._is_one()))
            written = snapshot.written()
            self.written[training] = self.written.get(training, set()) | written
            if active is not None and written:
                snapshot.restore_rows(~active)
