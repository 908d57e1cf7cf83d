"""`Trainer.hyperparameter_search` with several trials in one training."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import (
    BestRun,
    HPSearchBackend,
    default_compute_objective,
    default_hp_space_optuna,
)

from ...errors import ModelBatchError
from .bundle import PreTrainedBundle
from .per_model_args import args_of_models, split
from .trials import TrialsOfBundle

_Base: Any = object  # Trainer comes after the mixin

__all__ = ["SearchMixin"]


class SearchMixin(_Base):
    """The part of `HFTrainerMixin` that searches hyper-parameters."""

    model: PreTrainedBundle
    args_of_each: list[TrainingArguments]
    metrics_of_model: Callable[..., dict[str, Any]]
    hp_search_backend: Any

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], Any] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        backend: str | HPSearchBackend | None = None,
        hp_name: Callable[[Any], str] | None = None,
        *,
        bundle_size: int | None = None,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """As in Trainer, with up to `bundle_size` trials in each training.

        Trials train together whose hyper-parameters differ in nothing but what each model of a
        bundle may have alone (`per_model_args`), and in what `model_init(trial)` makes of them as
        long as the models fit together, such as dropout rates. Others get a bundle of their own.

        Args:
            hp_space: as in Trainer.
            compute_objective: likewise; it is given the metrics of one model.
            n_trials: likewise.
            direction: likewise.
            backend: `"optuna"`, the default.
            hp_name: names the folder of a bundle's checkpoints.
            bundle_size: trials to ask for at a time; by default `num_models`.
            **kwargs: for `optuna.create_study`, and `timeout`.

        Raises:
            ModelBatchError: another backend, or a bad argument.
            RuntimeError: there is no `model_init`.
        """
        if HPSearchBackend(backend or "optuna") is not HPSearchBackend.OPTUNA:
            raise ModelBatchError(
                f"bundles are searched with backend='optuna', not {backend!r}; for Ray see "
                "modelbatch.integrations.ray"
            )
        try:
            import optuna
        except ImportError as error:
            raise ImportError(
                'hyperparameter_search needs Optuna: pip install "modelbatch[optuna]"'
            ) from error
        if self.model_init is None:
            raise RuntimeError(
                "To use hyperparameter search, you need to pass your model through a model_init "
                "function."
            )
        size: Any = self.num_models if bundle_size is None else bundle_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ModelBatchError(f"bundle_size must be a positive integer, got {bundle_size!r}")
        if kwargs.pop("n_jobs", 1) != 1:
            raise ModelBatchError("n_jobs: the trials of a bundle run together; set bundle_size")
        kwargs.pop("gc_after_trial", None)
        timeout, catch = kwargs.pop("timeout", None), kwargs.pop("catch", ())
        directions: Any = direction if isinstance(direction, list) else None
        if kwargs.get("sampler") is None and directions is None:
            # asked for several trials before any is told, it keeps them apart
            kwargs["sampler"] = optuna.samplers.TPESampler(constant_liar=True)
        study = optuna.create_study(
            direction=None if directions else cast(Any, direction),
            directions=directions,
            **kwargs,
        )
        self.hp_space = hp_space or default_hp_space_optuna
        self.compute_objective = compute_objective or default_compute_objective
        self.hp_name, self.hp_search_backend = hp_name, HPSearchBackend.OPTUNA
        kept = copy.copy(self.args), self.args_of_each
        try:
            self._search(study, n_trials, size, timeout, catch, kept[0])
        finally:
            _assign(self.args, vars(kept[0]))
            self.args_of_each, self.hp_search_backend = kept[1], None
        if directions is None:
            best: Any = study.best_trial
            return BestRun(str(best.number), best.value, best.params)
        return [BestRun(str(best.number), best.values, best.params) for best in study.best_trials]

    def _search(
        self, study: Any, n_trials: int, size: int, timeout: Any, catch: Any, args: Any
    ) -> None:
        start, asked, stopped = time.monotonic(), 0, False
        while (
            not stopped
            and asked < n_trials
            and (timeout is None or time.monotonic() - start < timeout)
        ):
            trials = [study.ask() for _ in range(min(size, n_trials - asked))]
            asked += len(trials)
            for together, common in self._bundles(study, trials, args):
                _assign(self.args, vars(args))
                _assign(self.args, common)
                try:
                    self._train_trials(together)
                except Exception as error:
                    together.fail()
                    if not isinstance(error, tuple(catch) if isinstance(catch, list) else catch):
                        raise
                stopped = stopped or together.stopped

    def _bundles(
        self, study: Any, trials: Sequence[Any], args: TrainingArguments
    ) -> list[tuple[TrialsOfBundle, dict[str, Any]]]:
        """Trials that can train together, and the training arguments that they share."""
        groups: dict[Any, list[Any]] = {}
        for trial in trials:
            own, common = split(self.hp_space(trial))
            common = {
                name: _cast(args, name, v) for name, v in common.items() if hasattr(args, name)
            }
            seed = int(own.get("seed", args.seed))
            set_seed(seed)
            model = super().call_model_init(trial)
            key = (tuple(sorted(common.items())), _structure(model))
            groups.setdefault(key, []).append((trial, own, common, model, seed))
        return [
            (
                TrialsOfBundle(study, *([member[k] for member in group] for k in (0, 1, 3, 4))),
                group[0][2],
            )
            for group in groups.values()
        ]

    def _train_trials(self, together: TrialsOfBundle) -> None:
        self.args_of_each = args_of_models(self.args, len(together.trials), None, together.own)
        self.train(trial=together)
        if any(objective is None for objective in together.objectives):
            metrics = self.evaluate()
            for i, objective in enumerate(together.objectives):
                if objective is None:
                    together.objectives[i] = self._objective_of(metrics, i)
        together.tell()

    def _objective_of(self, metrics: dict[str, Any], i: int) -> Any:
        return self.compute_objective(self.metrics_of_model(metrics, i))

    def _hp_search_setup(self, trial: Any) -> None:
        if not isinstance(trial, TrialsOfBundle):
            super()._hp_search_setup(trial)
            return
        self._trial = trial
        self._train_batch_size = self.args.train_batch_size
        self.create_accelerator_and_postprocess()

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume: Any, trial: Any
    ) -> tuple[int, int]:
        several = isinstance(trial, TrialsOfBundle)
        # what Trainer notes of a trial, it takes from one of Optuna's
        own = None if several else trial
        result = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume, own)
        if several:
            self.state.is_hyper_param_search = True
            self.state.trial_params = trial.params
        return result

    def _report_to_hp_search(self, trial: Any, step: int, metrics: dict[str, float]) -> None:
        """Report every model's objective; those that are pruned are frozen."""
        if not isinstance(trial, TrialsOfBundle):
            super()._report_to_hp_search(trial, step, metrics)
            return
        several = len(trial.study.directions) > 1
        for i, one in enumerate(trial.trials):
            if i in trial.pruned:
                continue
            trial.objectives[i] = self._objective_of(metrics, i)
            if several:
                continue
            one.report(trial.objectives[i], step)
            if one.should_prune():
                trial.prune(i)
                self.model.freeze(i)
        if len(trial.pruned) == len(trial.trials):
            self.control.should_training_stop = True


def _assign(args: TrainingArguments, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(args, name, value)


def _cast(args: TrainingArguments, name: str, value: Any) -> Any:
    before = getattr(args, name)
    return value if before is None else type(before)(value)


def _structure(model: nn.Module) -> tuple[Any, ...]:
    """What is equal for models that fit into one bundle."""
    tensors = model.state_dict().items()
    shapes = ((name, v.shape, v.dtype) for name, v in tensors if isinstance(v, Tensor))
    config = getattr(model, "config", None)
    plain = ((k, v) for k, v in vars(config).items() if isinstance(v, str | int)) if config else ()
    return (*((name, type(m)) for name, m in model.named_modules()), *shapes, *plain)
