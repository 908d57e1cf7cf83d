"""The weights that trials of a sweep ended with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import ModelBatch
from ..callbacks import BestModel
from ..checkpoint.one_model import _read
from ..errors import ModelBatchError
from ..random import torch_rng

__all__ = ["Weights", "seeded"]


class Weights:
    """Keeps state dicts of trials, as files if there is a directory, else in memory.

    Args:
        directory: of the sweep.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = None if directory is None else directory / "weights"
        if self.directory is not None:
            self.directory.mkdir(exist_ok=True)
        self._states: dict[int, dict[str, Any]] = {}

    def _path(self, trial: int) -> Path:
        assert self.directory is not None
        return self.directory / f"trial_{trial:05d}.pt"

    def keep(self, trial: int, mb: ModelBatch, slot: int, best: BestModel | None) -> None:
        """Keep the weights of a model that leaves; the best ones if `best` has watched it."""
        if best is not None:
            best.restore(slot)
        if self.directory is not None:
            mb.save_model(slot, self._path(trial))
            return
        state = mb[slot].state_dict()
        self._states[trial] = {
            name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
            for name, value in state.items()
        }

    def __contains__(self, trial: int) -> bool:
        if self.directory is not None:
            return self._path(trial).exists()
        return trial in self._states

    def load(self, trial: int, model: nn.Module) -> None:
        """Give a freshly built model the weights of a trial.

        Raises:
            ModelBatchError: they were not kept, or do not fit.
        """
        if trial not in self:
            raise ModelBatchError(
                f"trial {trial}: no weights were kept; only trials that trained to an end have "
                "them, with keep_weights="
            )
        state = self._states[trial] if self.directory is None else _read(self._path(trial))
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ModelBatchError(
                f"trial {trial}: build now makes another model than in the sweep: {error}"
            ) from error

    def forget(self, trials: list[int]) -> None:
        """Remove what is kept of trials that begin anew."""
        for trial in trials:
            self._states.pop(trial, None)
            if self.directory is not None:
                self._path(trial).unlink(missing_ok=True)


def seeded(build: Any, config: dict[str, Any], seed: int) -> nn.Module:
    """The model of a trial with its first weights; torch's generators are left as they were."""
    with torch_rng(torch.device("cuda" if torch.cuda.is_initialized() else "cpu")):
        torch.manual_seed(seed)
        model = build(dict(config))
    if not isinstance(model, nn.Module):
        raise ModelBatchError(f"build must return a torch.nn.Module, got {type(model).__name__}")
    return model
