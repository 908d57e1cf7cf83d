"""The random generators that belong to no bundle."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["GlobalRandomState"]


class GlobalRandomState:
    """The positions of Python's, numpy's and torch's own generators, as part of a checkpoint.

    A bundle's random streams are its own. But a stock `DataLoader(shuffle=True)` draws its order
    from torch's generator, and transforms may draw from any of the three. With
    `states={"random": GlobalRandomState()}` they go on where they stopped, too.
    """

    def state_dict(self) -> dict[str, Any]:
        """The positions of all generators, those of GPUs only where CUDA is in use."""
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=True),
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_initialized():
            state["cuda"] = [own.cpu() for own in torch.cuda.get_rng_state_all()]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Puts all generators to positions that `state_dict` gave."""
        random.setstate(state_dict["python"])
        np.random.set_state(state_dict["numpy"])
        torch.set_rng_state(state_dict["torch"])
        states = state_dict.get("cuda", ())
        if torch.cuda.is_available():
            for device, state in zip(range(torch.cuda.device_count()), states):
                torch.cuda.set_rng_state(state, device)
