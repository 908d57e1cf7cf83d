"""How many models a bundle of a sweep has where nobody says so."""

import contextlib
import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import _as_call
from ..checkpoint import GlobalRandomState
from ..evaluation import to_device
from ..optim.rules import RULES
from ..random import torch_rng
from ..training.position import generators_of
from .data import Data
from .trials import Trial

__all__ = ["MOST", "automatic_size", "is_out_of_memory", "measured_size"]

#: More models in a bundle gain nothing on any machine, while a pruner would learn later.
MOST = 1024
# Of the memory that is free; the rest is for validation, the allocator and the user.
_SHARE = 0.4
# Temporary tensors in backward, as a multiple of what forward keeps for it.
_BACKWARD = 2.0


def automatic_size(model: nn.Module, trial: Trial, batch: Any, device: torch.device) -> int:
    """How many models like this one fit, at most `MOST`.

    A model needs its parameters, gradients and optimizer states, and what its forward keeps for the
    backward of one batch, which is measured by running it once.

    Args:
        model: one that nobody needs any more.
        trial: for the optimizer.
        batch: an example of what the loader yields.
        device: of the bundle.
    """
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    weights = parameters * (2 + _states(trial)) + 2 * buffers
    need = weights + _BACKWARD * _kept_for_backward(model, batch, device)
    return max(1, min(MOST, int(_SHARE * free_memory(device) / max(need, 1))))


def measured_size(model: nn.Module, trial: Trial, train: Data, device: torch.device | None) -> int:
    """`automatic_size` for an example of the training data; no generator moves.

    Args:
        model: one that nobody needs any more.
        trial: for the optimizer.
        train: the training data.
        device: of the bundle; None for that of the model.
    """
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generators = generators_of([train.loader])
    before = GlobalRandomState().state_dict()
    states = [generator.get_state() for generator in generators]
    try:
        batch = next(iter(train.training(trial.batch_size)), None)
    finally:
        GlobalRandomState().load_state_dict(before)
        for generator, state in zip(generators, states):
            generator.set_state(state)
    return automatic_size(model, trial, batch, device)


def _states(trial: Trial) -> int:
    """How many tensors as large as the parameters the optimizer keeps."""
    rule = RULES.get(trial.optimizer_cls)
    if rule is None:
        return 2
    parameter = nn.Parameter(torch.zeros(1))
    group = trial.optimizer_cls([parameter], **trial.options).param_groups[0]
    return sum(rule.needed(group))


def _kept_for_backward(model: nn.Module, batch: Any, device: torch.device) -> int:
    """Bytes that a forward keeps, besides the parameters; 0 where it cannot be tried."""
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    # What is wrong with a model shows, with a better message, when it is trained.
    with contextlib.suppress(Exception), torch_rng(device):
        model = copy.deepcopy(model).to(device)
        args, kwargs = _as_call(to_device(batch[0], device))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(*args, **kwargs)
    return sum(kept.values())


def free_memory(device: torch.device) -> int:
    """Bytes that are free: of a GPU, or of the machine and of the process's control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")]
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = [int(line.split()[1]) * 1024]
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free.append(limit - int((group / "memory.current").read_text()))
    return max(min(free), 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    phrases = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate")
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in phrases)
