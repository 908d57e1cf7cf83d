"""The trials of a search that train in one bundle."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

__all__ = ["TrialsOfBundle"]


class TrialsOfBundle:
    """The trials that one bundle runs; to Trainer it is the trial.

    Args:
        study: Optuna's study.
        trials: one for each model.
        own: for each of them, the training arguments that it alone has.
        models: the models, which the bundle takes over.
        seeds: of the models.
    """

    def __init__(
        self,
        study: Any,
        trials: Sequence[Any],
        own: Sequence[Mapping[str, Any]],
        models: Sequence[nn.Module],
        seeds: Sequence[int],
    ):
        self.study, self.trials, self.own = study, list(trials), list(own)
        self.seeds = list(seeds)
        self._models: Sequence[nn.Module] = models
        self.objectives: list[Any] = [None] * len(self.trials)
        self.pruned: set[int] = set()
        self.stopped = False

    @property
    def number(self) -> str:
        """Names the folder of the checkpoints, `run-<number>`."""
        numbers = [trial.number for trial in self.trials]
        return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"

    @property
    def params(self) -> dict[int, Any]:
        """The parameters of each trial, by its number."""
        return {trial.number: trial.params for trial in self.trials}

    def take_models(self) -> list[nn.Module]:
        """The models, which can be taken once."""
        models, self._models = self._models, ()
        return list(models)

    def tell(self) -> None:
        """Tell the study how the trials ended that were not pruned."""
        from optuna.trial import TrialState

        for i, (trial, objective) in enumerate(zip(self.trials, self.objectives)):
            if i in self.pruned:
                continue
            values = objective if isinstance(objective, list | tuple) else [objective]
            good = all(value is not None and math.isfinite(value) for value in values)
            if good:
                self._tell(trial, objective)
            else:
                self._tell(trial, state=TrialState.FAIL)

    def _tell(self, trial: Any, *args: Any, **kwargs: Any) -> None:
        try:
            self.study.tell(trial, *args, **kwargs)
        except RuntimeError as error:
            # A sampler that has nothing left to try stops the study, which is allowed only in
            # `optimize`; the trial has been told by then.
            if "Study.stop" not in str(error):
                raise
            self.stopped = True

    def prune(self, i: int) -> None:
        """Tell the study that trial i was pruned."""
        from optuna.trial import TrialState

        self.pruned.add(i)
        self._tell(self.trials[i], state=TrialState.PRUNED)

    def fail(self) -> None:
        """Tell the study that the trials that go on have failed."""
        from optuna.trial import TrialState

        for i, trial in enumerate(self.trials):
            if i not in self.pruned:
                self._tell(trial, state=TrialState.FAIL)
