"""A sweep that kills its own process: python optuna_program.py KIND PATH REPORTS_BEFORE_DEATH."""

import os
import signal
import sys
from typing import Any

import optuna
import torch
from integrations.optuna.optuna_case import make, tpe
from optuna.storages.journal import JournalFileBackend

TOTAL = 16


def storage(kind: str, path: str) -> Any:
    if kind == "sqlite":
        return f"sqlite:///{path}"
    return optuna.storages.JournalStorage(JournalFileBackend(path))


class Deadly(optuna.pruners.MedianPruner):
    def __init__(self, reports: int) -> None:
        super().__init__(n_startup_trials=3)
        self.left = reports

    def prune(self, study: optuna.Study, trial: Any) -> bool:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().prune(study, trial)


def run(kind: str, path: str, reports: int = 0) -> Any:
    sweep = make(
        storage(kind, path),
        study_name="killed",
        sampler=tpe(),
        pruner=Deadly(reports),
        bundle_size=5,
    )
    if not sweep.study.trials:
        sweep.study.enqueue_trial({"lr": 0.0123})
        sweep.study.enqueue_trial({"lr": 0.0234, "width": 4})
    return sweep, sweep.run(total=TOTAL, progress=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    run(sys.argv[1], sys.argv[2], int(sys.argv[3]))
