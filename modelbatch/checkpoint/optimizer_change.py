"""Putting the optimizer state of a checkpoint into a bundle's optimizer."""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bundle import Bundle
from ..errors import CheckpointError, ModelBatchError
from ..optim import FusedOptimizer, PerModelOptimizer, ViewOptimizer
from .encoding import Decoder
from .format import MANIFEST, OPTIMIZER
from .optimizer import LIMITS, kind_of, optimizer_class

__all__ = ["OptimizerChange"]


class OptimizerChange:
    """A saved optimizer state that fits the bundle's optimizer, and is to be put into it.

    Args:
        bundle: whose optimizer it is for.
        record: what `bundle.json` says about it.
        decoder: for its tensors.
        indices: the saved model for each of the bundle's.
        dtypes: of the saved parameters, by name.

    Raises:
        CheckpointError: it does not fit.
    """

    def __init__(
        self,
        bundle: Bundle,
        record: Mapping[str, Any],
        decoder: Decoder,
        indices: Sequence[int] | None,
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        assert bundle.optimizer is not None
        self._bundle = bundle
        self._optimizer = bundle.optimizer
        self._whole: dict[str, Any] | None = None
        own = optimizer_class(self._optimizer)
        if record["class"] != own:
            raise CheckpointError(
                f"{MANIFEST}: the checkpoint's optimizer is {record['class']}, the bundle's is "
                f"{own}"
            )
        if not isinstance(self._optimizer, PerModelOptimizer):
            if "state_dict" not in record or indices is not None:
                raise CheckpointError(
                    f"{own}: the optimizer of the checkpoint, or of the bundle, has no parts for "
                    "single models; build it with OptimizerFactory, or load without indices="
                )
            self._whole = decoder.decode(record["state_dict"])
            return
        if "state" not in record:
            raise CheckpointError(
                f"{own}: the checkpoint has the state of an optimizer without parts for single "
                "models"
            )
        self._saved_on = record["device"]
        self._same_kind = record["kind"] == kind_of(self._optimizer)
        self._dtypes = dtypes
        order = list(range(len(bundle))) if indices is None else list(indices)
        self._groups = [decoder.decode(record["groups"][i]) for i in order]
        self._limits = {name: decoder.decode(record[name]) for name in LIMITS}
        for name, limits in self._limits.items():
            if limits is not None:
                self._limits[name] = [limits[i] for i in order]
        self._lost = [j for j, i in enumerate(order) if i in record["lost"]]
        self._states = self._read_states(record["state"], decoder, order)

    def _read_states(
        self, record: Mapping[str, Any], decoder: Decoder, order: list[int]
    ) -> dict[Tensor, dict[str, Any]]:
        optimizer = self._optimizer
        assert isinstance(optimizer, PerModelOptimizer)
        names = [name for name, _ in self._bundle.named_parameters()]
        if {*names} != {*record}:
            odd = ", ".join(sorted({*names} ^ {*record}))
            raise CheckpointError(f"{MANIFEST}: the optimizers' parameters differ in {odd}")
        states: dict[Tensor, dict[str, Any]] = {}
        position = [{param: k for k, param in enumerate(own)} for own in optimizer._views.params]
        for name, row in zip(names, optimizer._views.rows, strict=True):
            by_key = {key: _values(entry, decoder) for key, entry in record[name].items()}
            for j, (param, i) in enumerate(zip(row, order, strict=True)):
                values = {key: own[i] for key, own in by_key.items() if i in own}
                if not values:
                    continue
                try:
                    optimizer._check_state(j, position[j][param], param, values)
                    if isinstance(optimizer, FusedOptimizer):
                        optimizer._check_names(j, position[j][param], self._groups[j], values)
                except ModelBatchError as error:
                    raise CheckpointError(f"{OPTIMIZER}: '{name}': {error}") from error
                states[param] = {
                    key: self._place(name, param, key, value, self._groups[j])
                    for key, value in values.items()
                }
        return states

    def _place(
        self, name: str, param: Tensor, key: str, value: Any, group: Mapping[str, Any]
    ) -> Any:
        """A state where, and in the dtype in which, a torch optimizer would load it."""
        if isinstance(value, list | tuple):
            return type(value)(self._place(name, param, key, item, group) for item in value)
        if not isinstance(value, Tensor) or isinstance(self._optimizer, FusedOptimizer):
            return value  # a fused optimizer copies it into a tensor of its own
        device = param.device
        if key == "step":
            if not (group.get("capturable") or group.get("fused")):
                device = torch.device("cpu")
        elif self._saved_on != "cpu" and value.device.type == "cpu":
            device = torch.device("cpu")  # it was there beside parameters that were not
        dtype = value.dtype
        if key != "step" and not (self._same_kind and self._dtypes[name] == param.dtype):
            for kind in (torch.is_floating_point, torch.is_complex):
                if kind(value) and kind(param):
                    dtype = param.dtype
        return value.to(device, dtype)

    def apply(self) -> Callable[[], None]:
        """Puts the state in place; returns what takes it back."""
        optimizer = self._optimizer
        if not isinstance(optimizer, PerModelOptimizer):
            assert self._whole is not None
            whole = copy.deepcopy(optimizer.state_dict())
            optimizer.load_state_dict(self._whole)
            return lambda: optimizer.load_state_dict(whole)
        groups: list[dict[str, Any]] = optimizer.__dict__["param_groups"]
        kept = [dict(group) for group in groups]
        limits = {name: getattr(optimizer, name, None) for name in LIMITS}
        recipe, lost = self._bundle._recipe, optimizer._views.lost
        put_back = _keep_state(optimizer)

        def undo() -> None:
            for group, before in zip(groups, kept):
                for option in [option for option in group if option not in before]:
                    del group[option]
                group.update((key, value) for key, value in before.items() if key != "params")
            _set_limits(optimizer, limits)
            self._bundle._recipe = recipe
            optimizer._views.lose(lost)
            put_back()

        try:
            for group, own in zip(groups, self._groups):
                group.update(_options(own, dict(group)))
            _set_limits(optimizer, self._limits)
            if recipe is not None:
                clips = {name: limits for name, limits in self._limits.items() if limits}
                self._bundle._recipe = (*recipe[:2], clips)
            optimizer._views.lose(self._lost)
            _set_state(optimizer, self._states)
        except BaseException:
            undo()
            raise
        return undo


def _values(entry: Mapping[str, Any], decoder: Decoder) -> dict[int, Any]:
    """One name of the state, by saved model."""
    if "each" in entry:
        return {i: decoder.decode(value) for i, value in entry["each"]}
    stacked = decoder.decode(entry["stacked"])
    return dict(zip(entry["models"], stacked.unbind(0), strict=True))


def _options(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Saved options, tensors being on the device of those that they replace."""
    return {
        option: value.to(own[option].device)
        if isinstance(value, Tensor) and isinstance(own.get(option), Tensor)
        else value
        for option, value in saved.items()
    }


def _set_limits(optimizer: PerModelOptimizer, limits: Mapping[str, Any]) -> None:
    for name, values in limits.items():
        if values is not None or hasattr(optimizer, name):
            setattr(optimizer, name, values)


def _set_state(optimizer: PerModelOptimizer, states: dict[Tensor, dict[str, Any]]) -> None:
    if isinstance(optimizer, FusedOptimizer):
        optimizer.state = states
        return
    # What torch's load_state_dict ends with, after casts that are not wanted here.
    mine = {param: _owned(values) for param, values in states.items()}
    content = {"state": defaultdict(dict, mine), "param_groups": optimizer.__dict__["param_groups"]}
    optimizer.__setstate__(content)
    _forget(optimizer)


def _owned(value: Any) -> Any:
    # Slices of a stacked tensor become tensors of their own.
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _owned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_owned(item) for item in value)
    return value


def _keep_state(optimizer: PerModelOptimizer) -> Callable[[], None]:
    """Returns what puts the present state back, which a new one leaves untouched."""
    if isinstance(optimizer, FusedOptimizer):
        entries, state = optimizer._entries, optimizer._state

        def put_back() -> None:
            optimizer._entries, optimizer._state = entries, state
            optimizer._forget_plan()

        return put_back
    before = optimizer.state

    def put_back_whole() -> None:
        groups = optimizer.__dict__["param_groups"]
        optimizer.__setstate__({"state": before, "param_groups": groups})
        _forget(optimizer)

    return put_back_whole


def _forget(optimizer: PerModelOptimizer) -> None:
    if isinstance(optimizer, ViewOptimizer):
        optimizer._forget()
