"""Learning rate schedulers: every model of a bundle follows a schedule of its own.

The schedules are torch's own scheduler objects, one per model. Each of them sees an optimizer whose
only parameter group is that of its model in the bundle's optimizer, so it computes what it would
compute for that model alone, and what it writes takes effect at the next step of the bundle.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NoReturn

import numpy as np
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..change import Change
from ..errors import ModelBatchError
from .base import PerModelOptimizer
from .one_model import OneModelOptimizer, kept_group, put_back, track_steps
from .scheduler_state import alike, checked_records, kind, parts, plain

__all__ = ["PerModelLRScheduler", "create_lr_scheduler"]

_Build = Callable[[Optimizer, int], LRScheduler]


def create_lr_scheduler(
    optimizer: Optimizer,
    scheduler_cls: type[LRScheduler] | Sequence[type[LRScheduler]] | _Build,
    configs: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
) -> "PerModelLRScheduler":
    """Gives every model of a bundle its own learning rate schedule.

    Args:
        optimizer: the optimizer of a bundle.
        scheduler_cls: a class of `torch.optim.lr_scheduler` (or derived from `LRScheduler`), or M
            classes, one per model; or a function `build(optimizer_i, i)` that returns the scheduler
            of model i. `optimizer_i` is an optimizer with one parameter group, that of model i;
            every scheduler that the function makes must be given it.
        configs: the arguments of the class: M dicts, or one for all models. Not for a function.

    Returns:
        One object that steps all M schedulers.

    Raises:
        ModelBatchError: a wrong count, no scheduler class, arguments that torch refuses, or a
            function that returns something else than a scheduler of `optimizer_i`. The message
            names the model. The parameter groups are then as they were.
    """
    if not isinstance(optimizer, PerModelOptimizer):
        raise ModelBatchError(
            f"the optimizer must be that of a bundle, got {type(optimizer).__name__}; for an "
            f"optimizer of your own use the schedulers of torch"
        )
    groups = optimizer.param_groups
    builds = _builds(len(groups), scheduler_cls, configs)
    kept = [kept_group(group) for group in groups]
    patched = "step" in optimizer.__dict__
    try:
        track_steps(optimizer)
        schedulers = [
            _build(OneModelOptimizer(optimizer, i), i, *builds[i]) for i in range(len(groups))
        ]
    except BaseException:
        for group, before in zip(groups, kept):
            put_back(group, before)
        if not patched:
            optimizer.__dict__.pop("step", None)
        raise
    return PerModelLRScheduler(optimizer, schedulers, builds)


class PerModelLRScheduler(LRScheduler):
    """M schedulers of torch, one per model, behind the methods of one.

    Made by `create_lr_scheduler`.

    The schedule of a frozen model stands still, and goes on from there when the model does.

    Attributes:
        optimizer: the bundle's optimizer.
        schedulers: the M schedulers. Model i's is what it would be alone.
        last_epoch: the number of steps so far; that of a model which was never frozen.
        build_new: `build(optimizer_i, i)`, the schedule of a model that joins the bundle, which
            begins at its start; by default the one that all models have. Where they differ it is
            None: a model that replaces another then begins the schedule of that one, and `append`
            is refused until this is set.
    """

    optimizer: PerModelOptimizer
    schedulers: list[LRScheduler]
    build_new: _Build | None

    # Torch's own constructor is not called: it would take a step of a schedule that is none.
    def __init__(
        self,
        optimizer: PerModelOptimizer,
        schedulers: list[LRScheduler],
        builds: list[tuple[str, _Build]],
    ) -> None:
        self.optimizer = optimizer
        self.schedulers = schedulers
        self._builds = builds
        same = all(build is builds[0][1] for _, build in builds)
        self.build_new = builds[0][1] if same else None
        if optimizer._followers is not None:
            optimizer._followers.add(self)
        # ChainedScheduler counts nothing.
        self.last_epoch = max(getattr(scheduler, "last_epoch", 0) for scheduler in schedulers)
        self._takes_metrics = [_takes_metrics(scheduler) for scheduler in schedulers]
        self._begun = False

    def step(self, metrics: Any = None, *, models: Iterable[int] | None = None) -> None:
        """Takes one step of the schedule of every model that is not frozen.

        Args:
            metrics: what `ReduceLROnPlateau` watches: M numbers (a tensor `[M]`, an array, a list),
                or one number for all models. Other schedulers are stepped without; a model that
                needs none may have None. NaN is no improvement, as in torch.
            models: only these; by default all. What a gradient scaler made skip its step may wait.

        Raises:
            ModelBatchError: no such model, or metrics are missing or of a wrong count, and nothing
                has changed; or a model's scheduler failed, and those of the other models have taken
                their step.
        """
        # The bundle's own flags: a model that a gradient scaler has given up is not frozen.
        active = self.optimizer._views._active()
        if len(active) != len(self.schedulers):
            raise ModelBatchError(
                f"{len(self.schedulers)} schedules do not fit a bundle of {len(active)} models"
            )
        moving = [i for i, flag in enumerate(active) if flag]
        if models is not None:
            chosen = {self.optimizer._model_index(i) for i in models}
            moving = [i for i in moving if i in chosen]
        values = self._metrics_per_model(metrics, moving)
        self.last_epoch += 1
        if self._begun:
            failed = self._advance(moving, values)
        else:
            # Torch checks at the first step that the optimizer has taken one, once per scheduler.
            # Said once, it points at the line that called this.
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                failed = self._advance(moving, values)
            self._begun = True
            for message in {(w.category, str(w.message)): w.message for w in caught}.values():
                warnings.warn(message, stacklevel=2)
        if failed:
            problems = "; ".join(
                f"model {i}: {type(self.schedulers[i]).__name__}: {error}" for i, error in failed
            )
            raise ModelBatchError(problems) from failed[0][1]

    def _advance(self, moving: list[int], values: list[Any]) -> list[tuple[int, Exception]]:
        failed: list[tuple[int, Exception]] = []
        for i in moving:
            try:
                if self._takes_metrics[i]:
                    self.schedulers[i].step(metrics=values[i])  # type: ignore[call-arg]
                else:
                    self.schedulers[i].step()
            except Exception as error:
                failed.append((i, error))
        return failed

    def get_last_lr(self) -> list[float]:  # type: ignore[override]
        """The M learning rates that the schedulers set last."""
        return [float(scheduler.get_last_lr()[0]) for scheduler in self.schedulers]

    def state_dict(self) -> dict[str, Any]:
        """The state of all schedulers: dicts, lists, numbers and, for tensor rates, tensors.

        As with torch, functions given to a scheduler are not part of it, and the learning rates
        themselves belong to the optimizer's state. `schedulers[i].state_dict()` is one model's in
        torch's form.
        """
        return {
            "last_epoch": self.last_epoch,
            "schedulers": [
                {"class": kind(scheduler), "state": plain(scheduler.state_dict())}
                for scheduler in self.schedulers
            ],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave, for as many models with schedulers of the same classes.

        As with torch, load the optimizer's state too.

        Raises:
            ModelBatchError: it does not fit. Nothing has changed then.
        """
        records = checked_records(state_dict, self.schedulers)
        before = [(part, dict(vars(part))) for own in self.schedulers for part in parts(own)]
        for i, (scheduler, record) in enumerate(zip(self.schedulers, records)):
            try:
                scheduler.load_state_dict(alike(record["state"], scheduler.state_dict()))
            except Exception as error:
                for part, attributes in before:
                    vars(part).clear()
                    vars(part).update(attributes)
                raise ModelBatchError(
                    f"model {i}: {type(scheduler).__name__}: the state cannot be loaded: {error}"
                ) from error
        self.last_epoch = state_dict["last_epoch"]

    def _metrics_per_model(self, metrics: Any, moving: list[int]) -> list[Any]:
        num_models = len(self.schedulers)
        if metrics is None:
            values: list[Any] = [None] * num_models
        elif isinstance(metrics, (Tensor, np.ndarray)):
            if metrics.ndim > 1:
                raise ModelBatchError(
                    f"metrics must be {num_models} numbers, got the shape {tuple(metrics.shape)}"
                )
            values = metrics.tolist() if metrics.ndim else [metrics.item()] * num_models
        elif isinstance(metrics, Real):
            if isinstance(metrics, int) and not any(self._takes_metrics):
                raise ModelBatchError(
                    f"step({metrics}): no scheduler here takes metrics, and there is no step to a "
                    f"given epoch"
                )
            values = [metrics] * num_models
        elif isinstance(metrics, Iterable) and not isinstance(metrics, (str, bytes, Mapping)):
            values = list(metrics)
        else:
            raise ModelBatchError(
                f"metrics must be {num_models} numbers or one, got {type(metrics).__name__}"
            )
        if len(values) != num_models:
            raise ModelBatchError(f"got {len(values)} metrics for {num_models} models")
        for i in moving:
            if not self._takes_metrics[i]:
                continue
            if values[i] is None:
                raise ModelBatchError(
                    f"model {i}: {type(self.schedulers[i]).__name__} needs a metric: step(metrics)"
                )
            try:
                values[i] = float(values[i])
            except (TypeError, ValueError, RuntimeError) as error:
                raise ModelBatchError(f"model {i}: the metric is no number: {error}") from error
        return values

    # ---- models that come and go

    def restart(self, i: int, build: _Build | None = None) -> None:
        """Begins the schedule of model i anew, from the learning rate that it began with.

        Args:
            i: the model's index; a negative one counts from the end.
            build: `build(optimizer_i, i)` for another schedule than before.

        Raises:
            ModelBatchError: no such model, or no scheduler came of it; nothing has changed then.
        """
        i = self.optimizer._model_index(i)
        name, own = self._builds[i] if build is None else ("build", build)
        group = self.optimizer.__dict__["param_groups"][i]
        before = kept_group(group)
        try:
            if "initial_lr" in group:
                group["lr"] = group.pop("initial_lr")
            scheduler = _build(OneModelOptimizer(self.optimizer, i), i, name, own)
        except BaseException:
            put_back(group, before)
            raise
        self.schedulers[i], self._builds[i] = scheduler, (name, own)
        self._takes_metrics[i] = _takes_metrics(scheduler)

    def check_models_change(self, change: Change) -> None:
        """Builds the schedules of models that are about to join.

        Raises:
            ModelBatchError: what they are is not known, or cannot be built.
        """
        notes: dict[int, tuple[tuple[str, _Build], LRScheduler]] = {}
        joining = change.notes[id(self.optimizer)]
        for slot in change.fresh:
            old = change.replaced(slot)
            if self.build_new is not None:
                known = self._builds[0] if self._builds[0][1] is self.build_new else None
                build = known or ("build_new", self.build_new)
            elif old is not None:
                build = self._builds[old]
            else:
                raise ModelBatchError(
                    f"model {slot} (new): the models' learning rate schedules differ, so say which "
                    "one it has: scheduler.build_new = lambda optimizer, i: ..."
                )
            own = OneModelOptimizer(self.optimizer, slot, joining.groups[slot])
            notes[slot] = (build, _build(own, slot, *build))
        change.notes[id(self)] = notes

    def models_changed(self, change: Change) -> None:
        """Follows a bundle whose models have changed."""
        notes = change.notes[id(self)]
        self.schedulers[:] = change.pick(list(self.schedulers), lambda slot: notes[slot][1])
        self._builds = change.pick(self._builds, lambda slot: notes[slot][0])
        self._takes_metrics = [_takes_metrics(scheduler) for scheduler in self.schedulers]
        for slot, scheduler in enumerate(self.schedulers):
            own: Any = scheduler.optimizer
            own.move(slot)

    def _no_member(self) -> NoReturn:
        raise ModelBatchError(
            "a per-model scheduler cannot be a member of SequentialLR; chain the schedulers of "
            "each model in the function given to create_lr_scheduler"
        )

    # What SequentialLR calls to begin with a member.
    _initial_step = _no_member

    def _update_lr(self, epoch: int | None = None) -> NoReturn:
        self._no_member()


def _takes_metrics(scheduler: LRScheduler) -> bool:
    return "metrics" in inspect.signature(scheduler.step).parameters


# ---- building


def _builds(num_models: int, scheduler: Any, configs: Any) -> list[tuple[str, Callable[..., Any]]]:
    """Per model, what to call itself in a message and `build(optimizer_i, i)`."""
    if isinstance(scheduler, Sequence) and not isinstance(scheduler, (str, bytes)):
        classes = list(scheduler)
        if len(classes) != num_models:
            raise ModelBatchError(f"got {len(classes)} scheduler classes for {num_models} models")
    elif isinstance(scheduler, type) or not callable(scheduler):
        classes = [scheduler] * num_models
    elif configs is not None:
        raise ModelBatchError("configs are for a scheduler class; a function needs none")
    else:
        return [("build", scheduler)] * num_models
    for i, cls in enumerate(classes):
        if not (isinstance(cls, type) and issubclass(cls, LRScheduler)):
            raise ModelBatchError(
                f"model {i}: {cls!r} is neither a class of torch.optim.lr_scheduler nor a function"
            )
    if configs is None or isinstance(configs, Mapping):
        options = [configs] * num_models
    elif isinstance(configs, Iterable) and not isinstance(configs, (str, bytes)):
        options = list(configs)
    else:
        raise ModelBatchError(
            f"configs must be a dict for all models or {num_models} dicts, got "
            f"{type(configs).__name__}"
        )
    if len(options) != num_models:
        raise ModelBatchError(f"got {len(options)} configs for {num_models} models")
    for i, config in enumerate(options):
        if config is not None and not isinstance(config, Mapping):
            raise ModelBatchError(f"model {i}: its config must be a dict, got {config!r}")
    builds: list[tuple[str, Callable[..., Any]]] = []
    for cls, config in zip(classes, options):
        # one and the same where all are equal, so that it is known what a further model's is
        same = bool(builds) and _same(classes[0], options[0], cls, config)
        builds.append((cls.__name__, builds[0][1] if same else _from_class(cls, config or {})))
    return builds


def _same(cls: Any, config: Any, other_cls: Any, other: Any) -> bool:
    if cls is not other_cls:
        return False
    try:
        return config is other or bool((config or {}) == (other or {}))
    except Exception:  # tensors and arrays have no yes-or-no comparison
        return False


def _from_class(cls: type[LRScheduler], config: Mapping[str, Any]) -> _Build:
    return lambda optimizer, i: cls(optimizer, **config)


def _build(own: OneModelOptimizer, i: int, name: str, build: Callable[..., Any]) -> LRScheduler:
    try:
        scheduler = build(own, i)
    except Exception as error:
        raise ModelBatchError(f"model {i}: {name}: {error}") from error
    if not isinstance(scheduler, LRScheduler):
        raise ModelBatchError(
            f"model {i}: {name} must return a scheduler of torch, got {type(scheduler).__name__}"
        )
    if scheduler.optimizer is not own:
        raise ModelBatchError(
            f"model {i}: {name} returned a {type(scheduler).__name__} of another optimizer; a "
            f"scheduler must be made for the optimizer that is handed to {name}"
        )
    return scheduler
