"""The gradients of a bundle's models, as views into the stacked gradients."""

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

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
    """Keeps the `.grad` of every model's parameters a view into the stacked gradient.

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

    @property
    def stacked(self) -> list[nn.Parameter]:
        """The stacked parameters, `[M, *shape]` each."""
        return [entry.stacked for entry in self._entries]

    @property
    def gradients(self) -> list[Tensor]:
        """The stacked gradients that are shown at the moment, `[M, *shape]` each."""
        return [entry.grad for entry in self._entries if entry.grad is not None]

    def slices_of(self, stacked: Tensor, grad: Tensor) -> int:
        """How many views of a stacked gradient are kept for its next use."""
        for entry in self._entries:
            if entry.stacked is stacked:
                kept = entry.kept is not None and entry.kept() is grad
                return len(entry.slices) if kept else 0
        return 0

    def is_active(self, i: int) -> bool:
        """Whether the last refresh gave model i its gradients."""
        return self._bound_active[i]

    def exclude(self, models: Collection[int]) -> None:
        """Takes the gradients away from these models until the next call."""
        self._excluded = models

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
        active = tuple(self._active())
        if self._excluded:
            active = tuple(flag and i not in self._excluded for i, flag in enumerate(active))
        everyone = active != self._bound_active
        if everyone:
            if len(active) != self.num_models:
                raise ModelBatchError(
                    f"active() gave {len(active)} flags for {self.num_models} models"
                )
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
        """Removes (or zeroes) the stacked gradients, and with them the models'."""
        for entry in self._entries:
            grad = entry.stacked.grad
            if grad is not None:
                if set_to_none:
                    entry.stacked.grad = None
                elif grad.grad_fn is not None:
                    grad.detach_().zero_()
                else:
                    grad.requires_grad_(False).zero_()
            del grad
            if set_to_none:
                _hide(entry)
            else:
                entry.grad = None  # shown anew, whatever became of the models' own `.grad`
        if not set_to_none:
            self.refresh()

    @torch.no_grad()
    def nonfinite_models(self) -> list[int]:
        """The models with an infinite or NaN gradient; copies one vector `[M]` to the host."""
        bad = [False] * self.num_models
        flags: dict[torch.device, list[Tensor]] = {}
        for entry in self._entries:
            if entry.grad is None:
                continue
            if entry.grad.is_sparse:
                parts = [bool(torch.isfinite(piece._values()).all()) for piece in entry.slices]
                bad = [was or not finite for was, finite in zip(bad, parts, strict=True)]
            else:
                finite = torch.isfinite(entry.grad.reshape(self.num_models, -1)).all(1)
                flags.setdefault(finite.device, []).append(finite)
        for finites in flags.values():
            found = torch.stack(finites).all(0).logical_not().tolist()
            bad = [was or now for was, now in zip(bad, found, strict=True)]
        return [i for i, flag in enumerate(bad) if flag]

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
