"""`ModelBatchStudy`, as version 0.1.0 had it: an objective of your own for each bundle."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import TrialState
from torch import nn

from ...batch import ModelBatch
from ...errors import ModelBatchError
from ...structure import same_structure
from ...sweep.arguments import check_count
from ...sweep.failing import what_happened
from .constraints import ConstraintSpec
from .link import ask_marked
from .processes import Mark, new_mark, release
from .recovery import ERROR, abandon, enqueue_lost, recover
from .studies import Budget, optimize_loop, warn_of_sampler

__all__ = ["ModelBatchStudy"]

Objective = Callable[[ModelBatch, list[dict[str, Any]]], Sequence[float]]

_DEFAULT_TRIALS = 100


@dataclass
class _Group:
    """Trials that can share a bundle."""

    key: str
    asked: list[optuna.Trial] = field(default_factory=list)
    configs: list[dict[str, Any]] = field(default_factory=list)
    models: list[nn.Module] = field(default_factory=list)


class ModelBatchStudy:
    """Groups the trials of a study by the structure of their models, and trains each group at once.

    Derive a class that has `suggest_parameters`. New programs use `OptunaSweep`, which trains by
    itself, prunes, and does not wait for the slowest trial of a bundle.

    Args:
        study: of one objective.
        model_factory: makes a model of what `suggest_parameters` returned.
        constraint_spec: what else trials of a bundle must share; None for nothing.
        min_models_per_batch: a smaller group waits until there is nothing else to train.
        max_models_per_batch: a group of so many is trained at once; None for any number.
        batch_timeout: has no effect, like the next two: nothing arrives while one waits, since
            asking for a trial takes no time.
        partial_batch_timeout_factor: see there.
        min_accumulation_time: see there.
        periodic_execution_interval: after so many trials without a full group, the largest one is
            trained.

    Raises:
        ModelBatchError: a bad argument, or a study of several objectives.
    """

    def __init__(
        self,
        study: optuna.Study,
        model_factory: Callable[[dict[str, Any]], nn.Module],
        constraint_spec: ConstraintSpec | None = None,
        min_models_per_batch: int = 1,
        max_models_per_batch: int | None = None,
        batch_timeout: float | None = 60.0,
        partial_batch_timeout_factor: float = 0.5,
        min_accumulation_time: float = 10.0,
        periodic_execution_interval: int = 10,
    ) -> None:
        check_count("min_models_per_batch", min_models_per_batch)
        check_count("periodic_execution_interval", periodic_execution_interval)
        if max_models_per_batch is not None:
            check_count("max_models_per_batch", max_models_per_batch)
        if len(study.directions) > 1:
            raise ModelBatchError("an objective gives one value for each model, the study has more")
        self.study, self.model_factory = study, model_factory
        self.constraint_spec = constraint_spec or ConstraintSpec(use_auto_compatibility=True)
        self.min_models_per_batch = min_models_per_batch
        self.max_models_per_batch = max_models_per_batch
        self.periodic_execution_interval = periodic_execution_interval
        self._groups: list[_Group] = []
        self._trained = 0  # groups

    def suggest_parameters(self, trial: optuna.Trial) -> dict[str, Any]:
        """The parameters of a trial, suggested by it; to be overridden."""
        raise NotImplementedError("derive a class from ModelBatchStudy that has suggest_parameters")

    def optimize(
        self,
        objective_fn: Objective,
        timeout: float | None = None,
        n_trials: int | None = None,
        *,
        show_progress_bar: bool = True,
    ) -> None:
        """Ask for trials, and train them group by group.

        Args:
            objective_fn: `objective_fn(model_batch, configs)` trains the models and returns a
                number for each, in their order. `configs` has a dict of optimizer options per
                model, to be given to `OptimizerFactory.create_optimizer`: the parameters named
                `optimizer.lr`, `optimizer.weight_decay`, ..., or just `lr`; with a `ConstraintSpec`
                of variable parameters, those of them that are among these.
            timeout: seconds after which no trial begins.
            n_trials: so many; without it and a timeout 100.
            show_progress_bar: show how many trials have ended.

        Raises:
            Exception: what the objective or the model factory raised; the trials concerned are told
                as failed, and others that wait are enqueued again.
            ModelBatchError: the objective did not return a number for each model.
        """
        study, mark = self.study, new_mark()
        if n_trials is None and timeout is None:
            n_trials = _DEFAULT_TRIALS
        with contextlib.ExitStack() as stack:
            stack.callback(release, mark)
            stack.enter_context(optimize_loop(study))
            recover(study, take_over=False)
            if self.max_models_per_batch != 1:
                warn_of_sampler(study)
            budget = Budget(study, n_trials, None, timeout)
            show = stack.enter_context(_bar(n_trials)) if show_progress_bar else lambda count: None
            stack.callback(self._abandon)
            while (group := self._fill(budget, mark)) is not None:
                self._train(group, objective_fn)
                show(len(group.asked))

    # ---- groups

    def _fill(self, budget: Budget, mark: Mark) -> _Group | None:
        """Ask until there is a group to train."""
        asked = 0
        while budget.take():
            group = self._ask(mark)
            asked += 1
            if len(group.asked) == self.max_models_per_batch:
                return group
            if asked % self.periodic_execution_interval == 0:
                largest = self._largest()
                if largest is not None and len(largest.asked) >= self.min_models_per_batch:
                    return largest
        return self._largest()

    def _largest(self) -> _Group | None:
        return max(self._groups, key=lambda group: len(group.asked), default=None)

    def _ask(self, mark: Mark) -> _Group:
        asked = ask_marked(self.study, mark)
        try:
            parameters = self.suggest_parameters(asked)
            model = self.model_factory(parameters)
            self.constraint_spec.validate_trial(asked)
            key = self.constraint_spec.get_constraint_key(parameters, model)
        except BaseException as error:
            self._fail([asked], error)
            raise
        for group in self._groups:
            if group.key == key and same_structure(group.models[0], model):
                break
        else:
            group = _Group(key)
            self._groups.append(group)
        group.asked.append(asked)
        group.configs.append(self.constraint_spec.optimizer_options(parameters))
        group.models.append(model)
        return group

    def _train(self, group: _Group, objective_fn: Objective) -> None:
        self._groups.remove(group)
        self._trained += 1
        count = len(group.asked)
        try:
            values = [float(v) for v in objective_fn(ModelBatch(group.models), group.configs)]
            if len(values) != count:
                raise ModelBatchError(
                    f"the objective returned {len(values)} numbers for {count} models"
                )
        except BaseException as error:
            self._fail(group.asked, error)
            raise
        for asked, value in zip(group.asked, values):
            if math.isnan(value):
                self._fail([asked], "the objective returned NaN")
            else:
                self.study.tell(asked, value)

    def _fail(self, trials: list[optuna.Trial], error: BaseException | str) -> None:
        text = error if isinstance(error, str) else what_happened(error)
        for asked in trials:
            if not isinstance(error, KeyboardInterrupt):
                asked.set_user_attr(ERROR, text)
            self.study.tell(asked, state=TrialState.FAIL)
        enqueue_lost(self.study)

    def _abandon(self) -> None:
        """What waits in groups when something was raised is for the next call."""
        for group in self._groups:
            for asked in group.asked:
                abandon(self.study, asked._trial_id, asked.number, "another trial raised an error")
        self._groups.clear()
        enqueue_lost(self.study)

    def get_optimization_summary(self) -> dict[str, Any]:
        """How many trials there are in the study, and how many groups were made of them."""
        states = [trial.state for trial in self.study.get_trials(deepcopy=False)]
        return {
            "total_trials": len(states),
            "completed_trials": states.count(TrialState.COMPLETE),
            "failed_trials": states.count(TrialState.FAIL),
            "total_groups": self._trained + len(self._groups),
            "ready_groups": sum(
                len(group.asked) >= self.min_models_per_batch for group in self._groups
            ),
        }


@contextlib.contextmanager
def _bar(total: int | None) -> Iterator[Callable[[int], None]]:
    from rich.progress import Progress

    with Progress() as progress:
        task = progress.add_task("trials", total=total)
        yield lambda count: progress.advance(task, count)
