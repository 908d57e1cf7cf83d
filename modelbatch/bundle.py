"""What a bundle holds: the models, their stacked tensors, and which of them train."""

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .change import Change
from .errors import ModelBatchError
from .held_objects import HeldObjects
from .membership import Membership
from .optim import FusedOptimizer, PerModelOptimizer, build_optimizer
from .optim.parameter_options import set_parameter_options
from .substitute import GradMemory


class Bundle(Membership):
    """The part of `ModelBatch` that holds the models; see there."""

    _grad_memory: GradMemory
    _active_tensor: Tensor | None
    _recipe: tuple[type[Optimizer], Sequence[dict[str, Any]], Mapping[str, list[float]]] | None

    @property
    def models(self) -> list[nn.Module]:
        """The user's own modules; their parameters and buffers are views into the bundle."""
        return list(self._stack.models)

    @property
    def num_models(self) -> int:
        """M, the number of models."""
        return self._stack.num_models

    def __len__(self) -> int:
        return self.num_models

    def __getitem__(self, i: int) -> nn.Module:
        return self._stack.models[i]

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer with one parameter group per model, None if none was asked for."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer | None) -> None:
        self._optimizer = optimizer

    @property
    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """The gradient scaler that `train_step` uses, None if there is none."""
        return self._grad_scaler

    @grad_scaler.setter
    def grad_scaler(self, grad_scaler: torch.amp.GradScaler | None) -> None:
        self._grad_scaler = grad_scaler

    @property
    def seeds(self) -> list[int]:
        """The seed of each model's random stream."""
        return list(self._streams.seeds)

    @property
    def active(self) -> Tensor:
        """Bool `[M]`: which models train."""
        return torch.tensor(self._active, dtype=torch.bool, device=self._streams.device)

    def _is_active(self) -> list[bool]:
        return self._active

    def freeze(self, models: int | Iterable[int]) -> None:
        """Stop training some models: nothing of theirs changes by one bit until `unfreeze`."""
        self._set_active(models, False)

    def unfreeze(self, models: int | Iterable[int]) -> None:
        """Let frozen models train again, from where they stood."""
        self._set_active(models, True)

    def _set_active(self, models: int | Iterable[int], value: bool) -> None:
        numbers = [models] if isinstance(models, int) else list(models)
        checked = [self._number(i) for i in numbers]
        for i in checked:
            self._active[i] = value
        self._active_tensor = None if all(self._active) else self.active

    def _number(self, i: int) -> int:
        if isinstance(i, bool) or not isinstance(i, int) or not -len(self) <= i < len(self):
            raise ModelBatchError(f"there is no model {i!r} in a bundle of {len(self)}")
        return i % len(self)

    def gradients(self, i: int) -> dict[str, Tensor | None]:
        """Model i's gradients as views, by parameter name; None where there is none."""
        i = self._number(i)
        return {name: None if p.grad is None else p.grad[i] for name, p in self.named_parameters()}

    def export(self, i: int) -> nn.Module:
        """An independent copy of model i that shares no memory with the bundle."""
        i = self._number(i)
        memo: dict[int, Any] = {}
        for slot in self._stack.slots:
            for index, attribute in slot.places:
                module = self._stack.modules[i][index]
                kind = module._parameters if slot.is_parameter else module._buffers
                tensor = kind[attribute]
                assert tensor is not None
                fresh = tensor.detach().clone()
                if slot.is_parameter:
                    fresh = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
                memo.setdefault(id(tensor), fresh)
        return copy.deepcopy(self._stack.models[i], memo)

    def train(self, mode: bool = True) -> "Bundle":
        """Set train or eval mode of all models, and take note of attributes changed since."""
        super().train(mode)
        for model in self._stack.models:
            model.train(mode)
        self.refresh()
        return self

    def refresh(self) -> None:
        """Look at all models again after attributes (a dropout `p`, say) were changed from outside.

        `train()` and `eval()` do this too.

        Raises:
            StructureMismatchError: if the models no longer fit one bundle.
            ModelBatchError: if a model's tensors no longer are views into the bundle.
        """
        self._stack.check_views()
        self._stack.refresh(self._ignored, self._forward.spread)
        self._forward.held = HeldObjects(self._stack.modules[0])

    # ---- nn.Module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Bundle":
        super()._apply(fn, recurse)
        for slot in self._stack.slots:
            self._stack.register(slot, self._stack.tensor(slot))
        self._stack.repoint_all()
        self._grad_memory.clear()
        if self._stack.slots:
            self._streams.to(self._stack.tensor(self._stack.slots[0]).device)
        if self._active_tensor is not None:
            self._active_tensor = self.active
        if isinstance(self._optimizer, FusedOptimizer):
            self._optimizer.tensors_moved()
        return self

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As `nn.Module.load_state_dict`, with stacked `[M, ...]` tensors; the views stay views."""
        result = super().load_state_dict(state_dict, strict, assign)
        if assign:
            for slot in self._stack.slots:
                self._stack.register(slot, self._stack.tensor(slot))
            self._stack.repoint_all()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> "Bundle":
        # nn.Parameter copies its data wherever it finds it, so the copied views must be renewed
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        optimizer, recipe = self._optimizer, self._recipe
        memo[id(optimizer)] = None  # an optimizer belongs to its parameters: it is made anew
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        new._stack.repoint_all()
        new._stack.watch_hooks()
        if optimizer is not None and recipe is not None:
            base = getattr(optimizer, "_base_options", None)
            own = getattr(optimizer, "parameter_options", None)
            new._build_optimizer(*recipe, new._grad_scaler, base, own)
            assert new._optimizer is not None
            new._optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return new

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module | nn.Parameter):
            raise ModelBatchError(
                f"cannot set '{name}': parameters and modules of a bundle come from its models"
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        model = repr(self._stack.models[0]).replace("\n", "\n  ")
        return f"{type(self).__name__}(\n  num_models={self.num_models}\n  model={model}\n)"

    # ---- the optimizer

    def _build_optimizer(
        self,
        optimizer_cls: type[Optimizer],
        configs: Sequence[dict[str, Any]],
        clips: Mapping[str, list[float]],
        grad_scaler: torch.amp.GradScaler | None = None,
        base: Mapping[str, Any] | None = None,
        parameter_options: Mapping[str, Mapping[str, float]] | None = None,
    ) -> Optimizer:
        optimizer = build_optimizer(
            dict(self.named_parameters()),
            self._stack.models,
            optimizer_cls,
            configs,
            active=self._is_active,
            fallback=self._forward.fallback,
        )
        if parameter_options:
            set_parameter_options(optimizer, parameter_options)
        for name, limits in clips.items():
            setattr(optimizer, name, limits)
        if isinstance(optimizer, PerModelOptimizer):
            optimizer._base_options = dict(base or {})
            optimizer._followers = self._followers
            self._followers.add(optimizer)
        self._recipe = (optimizer_cls, configs, clips)
        self._optimizer, self._grad_scaler = optimizer, grad_scaler
        return optimizer

    # ---- models that come and go, see `Membership`

    def _structure_changed(self, change: Change) -> None:
        self._active_tensor = None if all(self._active) else self.active
        self._grad_memory.clear()
        optimizer = self._optimizer
        if self._recipe is not None and isinstance(optimizer, PerModelOptimizer):
            clips = {
                name: limits for name in self._recipe[2] if (limits := getattr(optimizer, name))
            }
            self._recipe = (optimizer._optimizer_cls, optimizer._configs, clips)

    # ---- checkpoints

    def save_all(
        self,
        directory: str | os.PathLike[str],
        *,
        per_model: bool = False,
        states: Mapping[str, Any] | None = None,
    ) -> None:
        """Save everything that training goes on from: see the guide on checkpoints.

        A crash at any instant leaves the checkpoint that was there before, or the new one, whole.

        Args:
            directory: made if need be. A checkpoint in it is replaced; other files in it stay.
            per_model: write `model_0007/model.safetensors` for each model besides, which plain
                torch loads.
            states: further objects that have `state_dict()` and `load_state_dict()`, by names of
                your own: schedulers, loaders, callbacks. What they return may hold plain Python
                and numpy values, and tensors.

        Raises:
            CheckpointError: something cannot be saved, or the directory cannot be written. The
                checkpoint that was there is untouched.
        """
        from .checkpoint import save_all

        save_all(self, directory, per_model=per_model, states=states)

    def load_all(
        self,
        directory: str | os.PathLike[str],
        *,
        indices: Sequence[int] | None = None,
        states: Mapping[str, Any] | None = None,
        strict: bool = True,
        resize: bool = False,
    ) -> None:
        """Load what `save_all` saved: weights, optimizer, random streams and all else, in place.

        Nothing is unpickled. The bundle may be on another device and have another precision than
        the one that was saved.

        Args:
            directory: of the checkpoint.
            indices: for each of the bundle's models the one of the checkpoint that it becomes; by
                default they have equally many, in the same order.
            states: the objects to load what was saved under these names into. States in the
                checkpoint that are not named here are left alone.
            strict: demand that the checkpoint has whatever the bundle and `states` need, and no
                tensors beyond. Otherwise what is missing, or is of another optimizer class or kind
                of random stream, stays as it is in the bundle.
            resize: let the bundle have the models that the checkpoint has: those whose id (see
                `model_ids`) it lacks are removed, and those that it has beyond are made as copies
                of another one. What follows the bundle follows this too. A bundle with a model
                that the saved one never had is another bundle, and refused. If the checkpoint then
                does not fit for another reason, the bundle keeps its new size.

        Raises:
            CheckpointError: no checkpoint, a damaged one, or one that does not fit. The message
                names file and tensor, and the bundle and `states` are as before.
        """
        from .checkpoint import load_all

        load_all(self, directory, indices=indices, states=states, strict=strict, resize=resize)

    def save_model(self, i: int, path: str | os.PathLike[str]) -> None:
        """Save model i's state dict, for plain torch or other programs.

        Args:
            i: which model.
            path: safetensors if it ends so, and a file of `torch.save` otherwise. A file that is
                there is replaced in one step.

        Raises:
            CheckpointError: it cannot be written.
        """
        from .checkpoint import save_model

        save_model(self, i, path)

    def load_model(
        self,
        i: int,
        source: str | os.PathLike[str] | Mapping[str, Any],
        *,
        strict: bool = True,
    ) -> None:
        """Load a state dict of one model into model i; its optimizer state is left alone.

        Args:
            i: which model.
            source: a state dict, or the path of a safetensors file or of one that `torch.save`
                wrote. Of the latter only tensors and plain values are read (`weights_only=True`).
            strict: whether the names must be those of the model.

        Raises:
            CheckpointError: it cannot be read or does not fit; the model is then as before.
        """
        from .checkpoint import load_model

        load_model(self, i, source, strict=strict)

    # ---- named but not there yet

    def capture_cuda_graph(self, *args: Any, **kwargs: Any) -> None:
        """Not available yet."""
        raise NotImplementedError("capture_cuda_graph: CUDA graphs are not available yet")
