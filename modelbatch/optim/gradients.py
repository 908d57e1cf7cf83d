"""The gradients of a bundle's models, as views into the stacked gradients."""

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..change import Change
from ..errors import ModelBatchError

__all__ = ["GradientViews"]


class _Entry:
    """One stacked parameter, the models' views of it, and the gradient that they show."""

    __slots__ = ("address", "grad", "kept", "params", "slices", "stacked")

    def __init__(self, stacked: nn.Parameter, params: list[nn.Parameter]) -> None:
        self.stacked = stacked  # [M, *shape]
        self.params = params  # M of [*shape]
        self.grad: Tensor | None = None  # the stacked gradient that params[i].grad show
        self.address = 0
        self.slices: tuple[Tensor, ...] = ()  # M of [*shape], of the gradient `kept`
        self.kept: weakref.ref[Tensor] | None = None


class GradientViews:
    """Makes the `.grad` of every model's parameters a view into the stacked gradient, on request.

    The gradients arrive in the stacked parameters. `refresh` shows them in the models' parameters,
    where torch's optimizers and tools look for them; nothing is shown before the first `refresh`
    or after a `clear`. Who works on the stacked gradients alone never calls `refresh`, and pays
    nothing for the views: `clear` then takes one assignment per stacked parameter. A gradient that
    a model's own backward left in its parameters is not the bundle's, and stays where it is until
    a `refresh` puts the bundle's in its place.

    Args:
        stacked: the stacked parameters, `[M, *shape]` each, under the names the models use.
        models: the M models whose parameters are views of them.
        active: returns M flags; the parameters of a model that is not active have no gradient,
            so that no torch optimizer touches them or their state.

    Raises:
        ModelBatchError: a model's parameters are not those of the stack.
    """

    def __init__(
        self,
        stacked: Mapping[str, nn.Parameter],
        models: Sequence[nn.Module],
        active: Callable[[], Sequence[bool]],
    ) -> None:
        if not models:
            raise ModelBatchError("an optimizer needs at least one model, got none")
        self.num_models = len(models)
        self._active = active
        self._excluded: Collection[int] = ()
        self._lost: frozenset[int] = frozenset()
        self._bound_active: tuple[bool, ...] = (True,) * self.num_models
        by_model = [dict(model.named_parameters()) for model in models]
        for i, named in enumerate(by_model):
            if named.keys() != stacked.keys():
                odd = sorted(named.keys() ^ stacked.keys())
                raise ModelBatchError(
                    f"model {i}: its parameters are not those of the stack, they differ in "
                    f"{', '.join(odd)}"
                )
            for name, param in named.items():
                _check_view(i, name, param, stacked[name], self.num_models)
        #: M lists of parameters, each as `models[i].parameters()` gives them.
        self.params = [list(named.values()) for named in by_model]
        self._entries = [
            _Entry(parameter, [named[name] for named in by_model])
            for name, parameter in stacked.items()
        ]
        self._entry_of = {id(entry.stacked): entry for entry in self._entries}
        #: Their names, which are those of the models' own parameters.
        self.names = list(stacked)
        #: The stacked parameters, `[M, *shape]` each.
        self.stacked: list[nn.Parameter] = [entry.stacked for entry in self._entries]
        #: For every stacked parameter the M models' own.
        self.rows: list[list[nn.Parameter]] = [entry.params for entry in self._entries]

    @property
    def gradients(self) -> list[Tensor]:
        """The stacked gradients there are at the moment, `[M, *shape]` each."""
        grads = (parameter.grad for parameter in self.stacked)
        return [grad for grad in grads if grad is not None]

    @property
    def shown(self) -> bool:
        """Whether any stacked gradient is shown in the models' parameters at the moment.

        What is shown is what the last `refresh` found: who changes stacked gradients or active
        models behind it calls `refresh` again.
        """
        return any(entry.grad is not None for entry in self._entries)

    def slices_of(self, stacked: Tensor, grad: Tensor) -> int:
        """How many views of a stacked gradient are kept for its next use."""
        entry = self._entry_of.get(id(stacked))
        if entry is None or entry.kept is None or entry.kept() is not grad:
            return 0
        return len(entry.slices)

    def is_active(self, i: int) -> bool:
        """Whether the last refresh gave model i its gradients."""
        return self._bound_active[i]

    def exclude(self, models: Collection[int]) -> None:
        """Takes the gradients away from these models until the next call."""
        self._excluded = models

    def active_flags(self) -> list[bool]:
        """M flags: which models may change, being active and neither excluded nor lost.

        Raises:
            ModelBatchError: the bundle gave another number of flags.
        """
        active = list(self._active())
        if len(active) != self.num_models:
            raise ModelBatchError(f"active() gave {len(active)} flags for {self.num_models} models")
        for i in self._lost:
            active[i] = False
        for i in self._excluded:
            active[i] = False
        return active

    @property
    def lost(self) -> frozenset[int]:
        """The models that no gradient scale can help; their gradients are not shown."""
        return self._lost

    def lose(self, models: Collection[int]) -> None:
        """Replaces the lost models; none takes part again until it is found or replaced."""
        self._lost = frozenset(models)

    def find_again(self) -> list[int]:
        """The lost models whose stacked gradients are finite now; they are lost no longer."""
        found = sorted(self._lost - set(self.nonfinite_models())) if self._lost else []
        self._lost -= set(found)
        return found

    @property
    def pattern(self) -> tuple[tuple[bool, ...], tuple[str | None, ...]]:
        """Which models and which stacked parameters have gradients, and the gradients' layouts."""
        layouts = tuple(
            None if entry.grad is None else "sparse" if entry.grad.is_sparse else "dense"
            for entry in self._entries
        )
        return self._bound_active, layouts

    @torch.no_grad()
    def refresh(self) -> None:
        """Makes every parameter's `.grad` show what the stacked gradients are now.

        Costs next to nothing while neither a stacked gradient nor the active models changed.
        """
        active = tuple(self.active_flags())
        everyone = active != self._bound_active
        self._bound_active = active
        all_active = all(active)
        for entry in self._entries:
            grad = entry.stacked.grad
            if grad is None:
                if entry.grad is not None:
                    _hide(entry)
                continue
            # A sparse gradient's slices are copies, not views, so they never stay current.
            stays = grad is entry.grad and not grad.is_sparse and entry.address == grad.data_ptr()
            if stays and not everyone:
                continue
            if not stays:
                grad = self._slice(entry, grad)
            if all_active:
                for param, piece in zip(entry.params, entry.slices, strict=True):
                    param.grad = piece
            else:
                for param, piece, flag in zip(entry.params, entry.slices, active, strict=True):
                    param.grad = piece if flag else None

    def clear(self, set_to_none: bool = True) -> None:
        """Removes (or zeroes) the stacked gradients, and with them what the models show of them.

        Args:
            set_to_none: remove them. Otherwise they are zeroed, and what was shown is shown anew,
                whatever became of the models' own `.grad`.
        """
        shown = False
        for entry in self._entries:
            grad = entry.stacked.grad
            if grad is not None:
                if set_to_none:
                    entry.stacked.grad = None
                elif grad.grad_fn is not None:
                    grad.detach_().zero_()
                else:
                    grad.requires_grad_(False).zero_()
            del grad  # before the memory's owners are counted
            if entry.grad is None:
                continue
            shown = True
            if set_to_none:
                _hide(entry)
            else:
                entry.grad = None
        if shown and not set_to_none:
            self.refresh()

    def models_changed(self, change: Change) -> None:
        """Follows a bundle whose models, and stacked parameters, have changed."""
        shown, removed = self.shown, set(change.removed)
        named = {slot: dict(model.named_parameters()) for slot, model in change.models.items()}
        for entry, name in zip(self._entries, self.names, strict=True):
            if entry.grad is not None:
                for i, param in enumerate(entry.params):
                    if i not in removed:  # these have a copy of their own by now
                        param.grad = None
            entry.grad, entry.slices, entry.kept = None, (), None
            fresh = {slot: own[name] for slot, own in named.items()}
            entry.params[:] = change.pick(list(entry.params), fresh.__getitem__)
        self.params[:] = change.pick(list(self.params), lambda slot: list(named[slot].values()))
        self.num_models = change.num_models
        self._lost = frozenset(change.renumber(self._lost))
        self._excluded = ()
        self._bound_active = (True,) * self.num_models
        if shown:
            self.refresh()

    def nonfinite_models(self) -> list[int]:
        """The models with an infinite or NaN gradient; copies one vector `[M]` to the host."""
        return self._nonfinite_rows(self.gradients)

    def diverged_models(self) -> list[int]:
        """The models with an infinite or NaN parameter; copies one vector `[M]` to the host."""
        return self._nonfinite_rows(self.stacked)

    @torch.no_grad()
    def _nonfinite_rows(self, tensors: Sequence[Tensor]) -> list[int]:
        bad: dict[torch.device, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.is_sparse:
                rows = tensor._indices()[0]
                finite = torch.isfinite(tensor._values()).flatten(1).all(1)
                flags = torch.zeros(self.num_models, dtype=torch.bool, device=tensor.device)
                flags[rows[~finite]] = True
            else:
                flags = torch.isfinite(tensor).reshape(self.num_models, -1).all(1).logical_not()
            bad.setdefault(tensor.device, []).append(flags)
        found = [torch.stack(flags).any(0).tolist() for flags in bad.values()]
        return [i for i in range(self.num_models) if any(flags[i] for flags in found)]

    def _slice(self, entry: _Entry, grad: Tensor) -> Tensor:
        """Cuts a gradient into one view per model, `entry.slices`."""
        if grad.is_sparse:
            entry.grad = grad
            entry.slices = tuple(grad.detach().select(0, i) for i in range(self.num_models))
            entry.kept = None
            return grad
        stacked = entry.stacked
        if grad.stride() != stacked.stride() and not (
            grad.is_contiguous() and stacked.is_contiguous()
        ):
            # torch's fused CPU kernels walk through memory, whatever the strides say.
            grad = torch.empty_like(stacked).copy_(grad)
            stacked.grad = grad
        address = grad.data_ptr()
        if entry.kept is None or entry.kept() is not grad or address != entry.address:
            entry.slices = grad.detach().unbind(0)
            entry.kept = weakref.ref(grad)
            entry.address = address
        entry.grad = grad
        return grad


def _hide(entry: _Entry) -> None:
    entry.grad = None
    for param in entry.params:
        param.grad = None
    # Slices hold the gradient's memory: they may stay only where somebody else holds it anyway,
    # as a bundle does that gives the same memory to the next backward.
    if entry.kept is None or entry.kept() is None:
        entry.slices, entry.kept = (), None


def _check_view(
    i: int, name: str, param: nn.Parameter, stacked: nn.Parameter, num_models: int
) -> None:
    if stacked.shape != (num_models, *param.shape):
        raise ModelBatchError(
            f"model {i}: parameter {name!r} of shape {tuple(param.shape)} does not fit the stacked "
            f"one of shape {tuple(stacked.shape)} for {num_models} models"
        )
    if param.numel() == 0 or param.device.type == "meta":
        return
    address = stacked.data_ptr() + i * stacked.stride(0) * stacked.element_size()
    if param.dtype != stacked.dtype or param.data_ptr() != address:
        raise ModelBatchError(f"model {i}: parameter {name!r} is not a view of the stacked one")
