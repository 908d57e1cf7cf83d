"""Numbers of every single model in Lightning's own loggers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from ...callbacks.report import MANY_RUNS, learning_rates, read, scalars

__all__ = ["log_models", "log_summary"]


def log_models(
    trainer: Trainer, module: Any, vectors: Mapping[str, Tensor], stage: str, step: int
) -> None:
    """Give every logger the vectors `[M]` of a stage, with one transfer to the host.

    Args:
        trainer: whose loggers these are.
        module: the `BundleModule`.
        vectors: by name; only those of the stage are taken.
        stage: `"train"`, `"val"` or `"test"`.
        step: what the loggers call it.
    """
    if not trainer.loggers:
        return
    bundle = module.bundle
    if stage == "train":  # beside these there are those of the last validation
        names = module._means.means(stage).keys()
        vectors = {name: own for name, own in vectors.items() if name in names}
    values = read(vectors)
    few: dict[str, float] = {}
    if stage == "train":
        few["active_models"] = float(sum(bundle._active))
        rates = learning_rates(bundle, bundle.optimizer)
        if rates is not None:
            few |= scalars("lr", rates, bundle._active)
    for logger in trainer.loggers:
        scalar = module.log_models == "scalars"
        if isinstance(logger, TensorBoardLogger) and not scalar:
            _histograms(logger, values, bundle._active, step)
            row = dict(few)
        elif isinstance(logger, WandbLogger) and not scalar:
            row = {**few, **_wandb_histograms(values, bundle._active)}
        else:
            row = {**few, **_columns(values, bundle.model_ids)}
        if row:
            logger.log_metrics(row, step=step)


def _columns(values: Mapping[str, Sequence[float]], ids: Sequence[int]) -> dict[str, float]:
    return {
        f"{name}_model_{i}": number
        for name, numbers in values.items()
        for i, number in zip(ids, numbers, strict=True)
    }


def _finite(numbers: Sequence[float], active: Sequence[bool]) -> list[float]:
    """The finite values of active models; of all, if none is. A histogram takes no others."""
    everyone = not any(active)
    pairs = zip(numbers, active, strict=True)
    return [number for number, flag in pairs if (flag or everyone) and math.isfinite(number)]


def _histograms(
    logger: TensorBoardLogger,
    values: Mapping[str, Sequence[float]],
    active: Sequence[bool],
    step: int,
) -> None:
    import numpy as np

    for name, numbers in values.items():
        finite = _finite(numbers, active)
        if finite:
            logger.experiment.add_histogram(f"{name}/models", np.array(finite), step)


def _wandb_histograms(
    values: Mapping[str, Sequence[float]], active: Sequence[bool]
) -> dict[str, Any]:
    import wandb

    found = {name: _finite(numbers, active) for name, numbers in values.items()}
    return {f"{name}/models": wandb.Histogram(own) for name, own in found.items() if own}


def log_summary(trainer: Trainer, module: Any) -> None:
    """A row for each model at the end: its hyper-parameters and its latest numbers.

    TensorBoard shows them in its HParams tab (as text where they are many), W&B as the table
    `models`.
    """
    loggers = [own for own in trainer.loggers if isinstance(own, TensorBoardLogger | WandbLogger)]
    if not loggers:
        return
    bundle = module.bundle
    hyper = module.hparams_of_models
    results = read(module.per_model_metrics)
    options = list(dict.fromkeys(name for own in hyper for name in own))
    columns = ["model", "active", *options, *results]
    rows = [
        [
            *(bundle.model_ids[i], bundle._active[i]),
            *(own.get(name) for name in options),
            *(numbers[i] for numbers in results.values()),
        ]
        for i, own in enumerate(hyper)
    ]
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(key="models", columns=columns, data=rows)
        elif len(hyper) > MANY_RUNS:
            lines = [columns, ["---"] * len(columns), *rows]
            text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
            logger.experiment.add_text("models", text, trainer.global_step)
        else:
            for i, own in enumerate(hyper):
                numbers = {f"result/{name}": values[i] for name, values in results.items()}
                numbers["result/active"] = float(bundle._active[i])
                plain = {
                    k: v if isinstance(v, bool | int | float) else str(v) for k, v in own.items()
                }
                run = f"model_{bundle.model_ids[i]:03d}"
                _add_hparams(logger.experiment, plain, numbers, run, trainer.global_step)


def _add_hparams(
    writer: Any, hyper: dict[str, Any], results: dict[str, float], run: str, step: int
) -> None:
    # the writer of tensorboardX, which Lightning falls back to, calls the run `name`
    known = writer.add_hparams.__code__.co_varnames
    key = "run_name" if "run_name" in known else "name"
    writer.add_hparams(hyper, results, **{key: run}, global_step=step)
