"""What every optimizer of a bundle shares: one group and one state per model."""

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..change import Change, Followers
from ..errors import ModelBatchError
from .configs import stock_optimizer
from .gradients import GradientViews
from .joining import LIMITS, Joining

__all__ = ["PerModelOptimizer", "mixed_class", "unhooked_step"]


def unhooked_step(optimizer_cls: type[Optimizer]) -> Callable[..., Any]:
    """The class's own step without the hook runner that torch wraps around it.

    torch wraps the step of every class that was ever instantiated. The bundle's own step is
    wrapped too, so calling the wrapped one from there would run all hooks twice. What is around
    the hook runner, as `torch.compile` puts it around some classes' steps, goes with it.
    """
    step: Any = optimizer_cls.step
    while getattr(step, "hooked", False):
        step = step.__wrapped__
    return step


@cache
def mixed_class(mixin: Any, optimizer_cls: Any) -> Any:
    """A subclass of a mixin and a torch optimizer class, which calls itself by the latter's name.

    One and the same for the same two, so that optimizers of a kind have one class.
    """
    own = {
        "__module__": optimizer_cls.__module__,
        "__qualname__": optimizer_cls.__qualname__,
        "__doc__": optimizer_cls.__doc__,
    }
    return type(optimizer_cls)(optimizer_cls.__name__, (mixin, optimizer_cls), own)


class PerModelOptimizer(Optimizer):
    """The part of a bundle's optimizer that does not depend on the rule of the update.

    A mixin before a torch optimizer class: group i holds all parameters of model i.
    """

    _views: GradientViews
    _optimizer_cls: type[Optimizer]
    _configs: list[dict[str, Any]]
    _complete: bool = False
    _base_options: Mapping[str, Any] = MappingProxyType({})
    """What models that join have, where nothing else is said."""
    _followers: Followers | None = None
    """Those who are told when the models of the bundle change."""
    last_grad_norms: Tensor | None = None
    """Norms `[M]` of the gradients that the last step clipped, as they were before, unscaled."""
    last_inv_scale: Tensor | None = None
    """What the gradients `[M]`, left scaled, were multiplied by in the last step."""

    # Gradient clipping, GradScaler and whatever else walks over the groups of an optimizer reads
    # the gradients there, so asking for the groups is what brings them up to date.
    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """M parameter groups, one per model, in model order."""
        if self._complete:
            self._views.refresh()
        return self.__dict__["param_groups"]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.__dict__["param_groups"] = groups

    def kept_slices(self, stacked: Tensor, grad: Tensor) -> int:
        """How many views of a cleared stacked gradient this optimizer keeps for its next use."""
        return self._views.slices_of(stacked, grad)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of all models.

        Args:
            set_to_none: set them to None instead of zero.
        """
        self._views.clear(set_to_none)
        self.last_grad_norms = self.last_inv_scale = None

    def _models_to_skip(
        self, nonfinite: Callable[[], Collection[int]] | None = None
    ) -> Collection[int]:
        """The models that a gradient scaler makes sit out the step that begins.

        A scaler of torch has one scale and one `found_inf` for all models. It would halve its
        scale for ever for a model that is beyond help, so such a model is lost: its gradients are
        shown to nobody until they are finite again.

        Args:
            nonfinite: finds the models with an infinite or NaN gradient.

        Returns:
            Their numbers, none without a scaler.
        """
        found = self.__dict__.get("found_inf")
        scale: Tensor | None = self.__dict__.get("grad_scale")
        views = self._views
        if found is None:
            views.lose(())
            return ()
        if isinstance(found, Tensor) and found.dim() > 0:
            views.lose(())
            return found.nonzero().flatten().tolist()
        again = views.find_again()
        # Without a scale to divide by, the scaler has divided the others without seeing these.
        late = again if scale is None else []
        if not found:
            return late
        active = {i for i, flag in enumerate(views.active_flags()) if flag}
        bad = active.intersection((nonfinite or views.nonfinite_models)())
        if bad:
            too_small = scale is not None and float(scale) <= 1
            lost = bad if too_small else bad.intersection(views.diverged_models())
            # With nobody left to protect, the scaler may see them: it needs one gradient.
            views.lose(views.lost | lost if active - lost else ())
        # None of them: what overflowed was clipped to finite values after unscale_.
        return {*(bad or range(views.num_models)), *late}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the groups of this optimizer are the models of the bundle."""
        if self._complete:
            raise ModelBatchError(
                "a bundle's optimizer has exactly one parameter group per model, so no group can "
                "be added; to change one model's options write optimizer.param_groups[i][...]"
            )
        # The group comes complete from the model's stock optimizer. torch's own method would look
        # through all groups before it at every call.
        for option, default in self.defaults.items():
            param_group.setdefault(option, default)
        self.__dict__["param_groups"].append(param_group)

    # ---- models that come and go

    def check_models_change(self, change: Change) -> None:
        """Refuses a change that this optimizer cannot follow; nothing is changed.

        Raises:
            ModelBatchError: a bad option of a fresh model, naming model and option.
        """
        change.notes[id(self)] = Joining.of(self, change)

    @torch.no_grad()
    def models_changed(self, change: Change) -> None:
        """Follows a bundle whose models, and stacked parameters, have changed."""
        joining: Joining = change.notes[id(self)]
        left = [self._views.params[old] for old in change.removed]
        self._views.models_changed(change)
        groups = self.__dict__["param_groups"]
        groups[:] = self._changed_groups(change, joining)
        self._configs = change.pick(self._configs, joining.configs.__getitem__)
        for name in LIMITS:
            limits = getattr(self, name, None)
            if limits is not None:
                setattr(self, name, change.pick(limits, joining.limits.get(name, {}).__getitem__))
        for name in ("last_grad_norms", "last_inv_scale"):
            vector = getattr(self, name)
            if vector is not None:
                setattr(self, name, change.rows(vector, torch.nan))
        self._change_state(change, joining, left)
        joining.schedulers.models_changed()

    def _changed_groups(self, change: Change, joining: Joining) -> list[dict[str, Any]]:
        return change.pick(list(self.__dict__["param_groups"]), joining.groups.__getitem__)

    def _change_state(
        self, change: Change, joining: Joining, left: Sequence[Sequence[nn.Parameter]]
    ) -> None:
        for params in left:
            for param in params:
                self.state.pop(param, None)
        for stock in joining.stocks.values():
            self.state.update(stock.state)

    def model_state_dict(self, i: int) -> dict[str, Any]:
        """The state of model i as its own stock torch optimizer would save it.

        Args:
            i: the model's index; a negative one counts from the end.

        Returns:
            A state dict with one group, whose parameters are numbered from 0, that the same torch
            class loads for `models[i].parameters()`. Every tensor in it is a copy.
        """
        i = self._model_index(i)
        group = self.__dict__["param_groups"][i]
        options = {name: _cloned(value) for name, value in group.items() if name != "params"}
        state = {
            k: _cloned(self.state[param])
            for k, param in enumerate(group["params"])
            if param in self.state
        }
        return {
            "state": state,
            "param_groups": [{**options, "params": list(range(len(group["params"])))}],
        }

    def load_model_state_dict(self, i: int, state_dict: Mapping[str, Any]) -> None:
        """Takes the state of model i from a stock state dict of the same torch class.

        Args:
            i: the model's index; a negative one counts from the end.
            state_dict: what `optimizer_cls(model.parameters()).state_dict()` or
                `model_state_dict` gave. Its tensors are copied.

        Raises:
            ModelBatchError: it is no such state dict, or its parameters are not those of the
                model. Nothing has been changed then.
        """
        i = self._model_index(i)
        group = self.__dict__["param_groups"][i]
        params: list[nn.Parameter] = group["params"]
        saved = self._checked_group(i, state_dict)
        stock = stock_optimizer(self._optimizer_cls, params, self._configs[i], i)
        needed = stock.param_groups[0].keys()
        indices = {key: index for index, key in enumerate(saved["params"])}
        for key, values in state_dict["state"].items():
            if key not in indices:
                raise ModelBatchError(
                    f"model {i}: the state dict has state of a parameter {key!r} that is in none "
                    f"of its groups"
                )
            self._check_state(i, indices[key], params[indices[key]], values)
        try:
            stock.load_state_dict(
                {"state": _cloned(state_dict["state"]), "param_groups": [_cloned(saved)]}
            )
        except Exception as error:
            raise ModelBatchError(f"model {i}: the state dict cannot be loaded: {error}") from error
        loaded = stock.param_groups[0]
        if missing := needed - loaded.keys():
            raise ModelBatchError(
                f"model {i}: the state dict lacks the option {', '.join(sorted(missing))} of "
                f"{self._optimizer_cls.__name__}; another class may have saved it"
            )
        group.update({name: value for name, value in loaded.items() if name != "params"})
        for param in params:
            self.state.pop(param, None)
            if param in stock.state:
                self.state[param] = stock.state[param]

    def _checked_group(self, i: int, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The one group of a state dict for model i, once it fits that model."""
        if not isinstance(state_dict, Mapping) or not state_dict.keys() >= {
            "state",
            "param_groups",
        }:
            raise ModelBatchError(
                f"model {i}: this is no state dict of an optimizer, it lacks 'state' or "
                f"'param_groups'"
            )
        groups = state_dict["param_groups"]
        if len(groups) != 1:
            raise ModelBatchError(
                f"model {i}: the state dict has {len(groups)} parameter groups, that of one model "
                f"has one; a whole bundle's is for load_state_dict"
            )
        count = len(self.__dict__["param_groups"][i]["params"])
        if len(groups[0]["params"]) != count:
            raise ModelBatchError(
                f"model {i}: the state dict is of {len(groups[0]['params'])} parameters, the model "
                f"has {count}"
            )
        return dict(groups[0])

    def _check_state(
        self, i: int, index: int, param: nn.Parameter, values: Mapping[str, Any]
    ) -> None:
        # State of as many axes as the parameter has the parameter's shape, or is a reduction of it.
        for key, value in values.items():
            if (
                isinstance(value, Tensor)
                and value.ndim == param.ndim
                and any(
                    size not in (1, own) for size, own in zip(value.shape, param.shape, strict=True)
                )
            ):
                raise ModelBatchError(
                    f"model {i}: state {key!r} of parameter {index} has the shape "
                    f"{tuple(value.shape)}, the parameter {tuple(param.shape)}"
                )

    def _model_index(self, i: int) -> int:
        num_models = self._views.num_models
        if not -num_models <= i < num_models:
            raise ModelBatchError(f"there is no model {i} in a bundle of {num_models}")
        return i % num_models

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a bundle's optimizer cannot be copied or pickled, since it belongs to its bundle's "
            "parameters; use state_dict() or model_state_dict(i)"
        )


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _cloned(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_cloned(item) for item in value)
    return copy.deepcopy(value)
