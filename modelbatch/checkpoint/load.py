"""Loading a checkpoint into a bundle: everything is read and checked before anything changes."""

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bundle import Bundle
from ..errors import CheckpointError, ModelBatchError
from ..optim import BundleGradScaler, PerModelLRScheduler
from ..random import Streams
from .encoding import Decoder
from .format import MANIFEST, OPTIMIZER, RANDOM, STACKED, STATES
from .optimizer import class_name
from .optimizer_change import OptimizerChange
from .reading import StoredFiles, read
from .resize import resize as resize_to
from .save import extra_state_owners
from .tensors import TensorChange

__all__ = ["load_all"]

_Undo = Callable[[], None]


def load_all(
    bundle: Bundle,
    directory: str | os.PathLike[str],
    *,
    indices: Sequence[int] | None = None,
    states: Mapping[str, Any] | None = None,
    strict: bool = True,
    resize: bool = False,
) -> None:
    """See `ModelBatch.load_all`."""
    if resize and indices is not None:
        raise CheckpointError("resize=True takes all models of the checkpoint, so no indices=")
    files = (STACKED, OPTIMIZER, RANDOM, STATES)
    checkpoint = read(Path(directory), files, check_all=strict)
    with _read_errors(checkpoint):
        saved = checkpoint.manifest
        if resize and [model["id"] for model in saved["models"]] != bundle.model_ids:
            # what does not depend on the number of models is checked before that changes
            _Change(bundle, checkpoint, [0] * len(bundle), {}, strict)
            resize_to(bundle, saved)
        change = _Change(bundle, checkpoint, indices, states or {}, strict)
    change.apply()


@contextlib.contextmanager
def _read_errors(checkpoint: StoredFiles) -> Iterator[None]:
    """Names the checkpoint in every message, whatever its content led to."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.directory}: {error}") from error
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        path = checkpoint.path(MANIFEST)
        raise CheckpointError(f"{path} does not make sense: {error!r}") from error


class _Change:
    """All that will be put into the bundle, checked."""

    def __init__(
        self,
        bundle: Bundle,
        checkpoint: StoredFiles,
        indices: Sequence[int] | None,
        states: Mapping[str, Any],
        strict: bool,
    ) -> None:
        self._bundle = bundle
        self._directory = checkpoint.directory
        self._manifest = checkpoint.manifest
        self._strict = strict
        num_models = self._manifest["num_models"]
        self._order = _order(indices, num_models, len(bundle))
        self._picked = self._order != list(range(num_models))
        self._device = bundle._streams.device
        self._tensors = TensorChange(
            bundle, checkpoint.tensors[STACKED], self._manifest, self._order, strict
        )
        decoder = Decoder(checkpoint.tensors.get(STATES, {}), STATES, self._device)
        self._optimizer = self._prepare_optimizer(checkpoint)
        self._scaler, self._scaler_state = self._prepare_scaler(decoder)
        self._extra_state = self._prepare_extra_state(decoder)
        self._states = self._prepare_states(states, decoder)
        self._streams = self._prepare_streams(checkpoint.tensors.get(RANDOM, {}))
        models = self._manifest["models"]
        self._active = [bool(models[i]["active"]) for i in self._order]
        ids = [int(models[i]["id"]) for i in self._order]
        #: A model that the bundle takes twice cannot have its id twice.
        self._ids = ids if len({*ids}) == len(ids) else bundle.model_ids
        self._next_id = _next_id(self._manifest)
        self._training = bool(self._manifest["training"]["training"])
        self._other_mode = {*self._manifest["training"]["other_mode"]}

    # ---- reading and checking

    def _prepare_optimizer(self, checkpoint: StoredFiles) -> OptimizerChange | None:
        bundle, record = self._bundle, self._manifest["optimizer"]
        if bundle.optimizer is None:
            return None
        if record is None:
            if self._strict:
                raise CheckpointError("the bundle has an optimizer, the checkpoint has none")
            return None
        dtypes = self._tensors.dtypes
        decoder = Decoder(checkpoint.tensors[OPTIMIZER], OPTIMIZER, self._device)
        indices = self._order if self._picked else None
        try:
            return OptimizerChange(bundle, record, decoder, indices, dtypes)
        except CheckpointError:
            if self._strict:
                raise
            return None

    def _prepare_scaler(self, decoder: Decoder) -> tuple[torch.amp.GradScaler | None, Any]:
        """The scaler that the bundle will have, and the state that it will take."""
        own, record = self._bundle.grad_scaler, self._manifest["grad_scaler"]
        if record is None:
            if own is not None and own.is_enabled() and self._strict:
                raise CheckpointError("the bundle has a gradient scaler, the checkpoint has none")
            return own, None
        if own is None and self._bundle.optimizer is None:
            return None, None
        state = decoder.decode(record["state"])
        if own is None:
            kinds = {class_name(cls): cls for cls in (BundleGradScaler, torch.amp.GradScaler)}
            if record["class"] not in kinds:
                if self._strict:
                    raise CheckpointError(
                        f"the checkpoint has the state of a {record['class']}; set mb.grad_scaler "
                        "to one first"
                    )
                return None, None
            if record["class"] == class_name(BundleGradScaler):
                own = BundleGradScaler(enabled=bool(state))
            else:
                own = torch.amp.GradScaler(self._device.type, enabled=bool(state))
        if not state or not own.is_enabled():
            return own, None
        if self._picked:
            state = {
                key: [value[i] for i in self._order] if isinstance(value, list) else value
                for key, value in state.items()
            }
        lists = [value for value in state.values() if isinstance(value, list)]
        if lists and not isinstance(own, BundleGradScaler):
            raise CheckpointError(
                f"the checkpoint's gradient scaler has a scale per model, the bundle's is a "
                f"{type(own).__name__}"
            )
        return own, state

    def _prepare_extra_state(self, decoder: Decoder) -> list[tuple[Any, Any]]:
        record, owners = self._manifest["extra_state"], extra_state_owners(self._bundle)
        odd = sorted({*record} ^ {*owners})
        if odd and self._strict:
            raise CheckpointError(f"extra state of {odd} is in the checkpoint or the bundle only")
        return [
            (modules[index], decoder.decode(record[name][i]))
            for name, index in owners.items()
            if name in record
            for modules, i in zip(self._bundle._stack.modules, self._order)
        ]

    def _prepare_states(
        self, states: Mapping[str, Any], decoder: Decoder
    ) -> list[tuple[str, Any, Any]]:
        saved = self._manifest["states"]
        prepared = []
        for name, owner in states.items():
            if name not in saved:
                if self._strict:
                    raise CheckpointError(
                        f"states[{name!r}] is not in the checkpoint, which has {sorted(saved)}"
                    )
                continue
            if not callable(getattr(owner, "load_state_dict", None)):
                raise CheckpointError(
                    f"states[{name!r}]: a {type(owner).__name__} has no load_state_dict()"
                )
            state = decoder.decode(saved[name])
            if self._picked:
                if not isinstance(owner, PerModelLRScheduler):
                    raise CheckpointError(
                        f"states[{name!r}]: the state of a {type(owner).__name__} cannot be picked "
                        "by indices="
                    )
                state = {**state, "schedulers": [state["schedulers"][i] for i in self._order]}
            prepared.append((name, owner, state))
        return prepared

    def _prepare_streams(self, tensors: Mapping[str, Tensor]) -> Streams | None:
        record, own = self._manifest["random"], self._bundle._streams
        if record["kind"] != own.kind:
            if self._strict:
                raise CheckpointError(
                    f"the checkpoint's random streams are rng={record['kind']!r}, the bundle's "
                    f"are rng={own.kind!r}"
                )
            return None
        seeds = [self._manifest["models"][i]["seed"] for i in self._order]
        streams = Streams(own.kind, seeds, own.device)
        steps = [record["steps"][i] for i in self._order]
        streams.step = torch.tensor(steps, dtype=torch.int64, device=own.device)
        if own.kind == "torch":
            for which, name in enumerate(("cpu", own.device.type)[: len(streams.states[0])]):
                if name not in tensors:
                    continue  # it was saved on another device: the stream begins with its seed
                for mine, i in zip(streams.states, self._order):
                    mine[which] = tensors[name][i].clone()
        return streams

    # ---- changing

    def apply(self) -> None:
        """Changes the bundle; if something of the user's own fails, takes all of it back."""
        undo: list[_Undo] = []
        try:
            if self._optimizer is not None:
                undo.append(self._optimizer.apply())
            self._apply_scaler(undo)
            for name, owner, state in self._states:
                _load_state(undo, name, owner, state)
            for module, state in self._extra_state:
                before = copy.deepcopy(module.get_extra_state())
                undo.append(functools.partial(module.set_extra_state, before))
                module.set_extra_state(state)
        except BaseException as error:
            for step in reversed(undo):
                step()
            if isinstance(error, ModelBatchError) or not isinstance(error, Exception):
                raise
            raise CheckpointError(f"{self._directory}: {error}") from error
        # None of this can fail any more.
        self._tensors.apply()
        self._apply_streams()
        self._apply_modes()

    def _apply_scaler(self, undo: list[_Undo]) -> None:
        bundle, scaler = self._bundle, self._scaler
        own = bundle.grad_scaler
        if scaler is None:
            return
        before = copy.deepcopy(scaler.state_dict())
        try:
            if self._scaler_state is not None:
                scaler.load_state_dict(self._scaler_state)
        except Exception as error:
            raise CheckpointError(
                f"{self._directory}: the state of the gradient scaler: {error}"
            ) from error

        def put_back() -> None:
            if self._scaler_state is not None:
                scaler.load_state_dict(before)
            bundle.grad_scaler = own

        undo.append(put_back)
        bundle.grad_scaler = scaler

    def _apply_streams(self) -> None:
        if self._streams is not None:
            self._bundle._streams.become(self._streams)

    def _apply_modes(self) -> None:
        bundle = self._bundle
        bundle._active[:] = self._active
        bundle._ids, bundle._next_id = self._ids, max(self._next_id, bundle._next_id)
        bundle._active_tensor = None if all(self._active) else bundle.active
        names = bundle._stack.structure.module_names
        for modules in (bundle._stack.nodes, *bundle._stack.modules):
            for name, module in zip(names, modules):
                module.training = self._training != (name in self._other_mode)


def _load_state(undo: list[_Undo], name: str, owner: Any, state: Any) -> None:
    try:
        before = copy.deepcopy(owner.state_dict())
        undo.append(lambda: owner.load_state_dict(before))
        owner.load_state_dict(state)
    except Exception as error:
        raise CheckpointError(f"states[{name!r}] cannot be loaded: {error}") from error


def _next_id(manifest: Mapping[str, Any]) -> int:
    """The id that the saved bundle would have given to its next model."""
    least = 1 + max(int(model["id"]) for model in manifest["models"])
    saved = manifest.get("next_id", least)
    if not isinstance(saved, int) or saved < least:
        raise ValueError(f"next_id is {saved!r}")
    return saved


def _order(indices: Sequence[int] | None, saved: int, num_models: int) -> list[int]:
    """The saved model for each model of the bundle."""
    if indices is None:
        if saved != num_models:
            raise CheckpointError(
                f"the checkpoint has {saved} models, the bundle {num_models}; choose {num_models} "
                "of them with indices="
            )
        return list(range(saved))
    numbers = indices.tolist() if isinstance(indices, Tensor) else list(indices)
    if len(numbers) != num_models:
        raise CheckpointError(f"indices has {len(numbers)} entries for {num_models} models")
    for i in numbers:
        if isinstance(i, bool) or not isinstance(i, int) or not -saved <= i < saved:
            raise CheckpointError(f"there is no model {i!r} in a checkpoint of {saved}")
    return [i % saved for i in numbers]
