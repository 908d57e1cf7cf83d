"""The random streams of the models in a bundle.

`rng="philox"`: each model has a counter-based stream (see `modelbatch.ops.random`) keyed by its own
seed. The counter is (forward calls of this model that drew anything, random operation within the
call, element), so what a model draws depends neither on the number of models nor on its slot.

`rng="torch"`: each model has a saved state of torch's own generators. A random operation is run
once for each model with that state in place, so that model i draws exactly what it would draw
alone after `torch.manual_seed(seeds[i])`. Slower; for audits.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .change import Change
from .errors import ModelBatchError

_MASK = (1 << 64) - 1


def derive_seeds(num_models: int, base: int | None = None) -> list[int]:
    """Seeds for M models from torch's current seed, without drawing from its generator.

    SplitMix64 (Steele, Lea and Flood, 2014) over (seed, model number): model i gets the same seed
    whatever M is.
    """
    start = torch.initial_seed() if base is None else base
    return [derive_seed(i, start) for i in range(num_models)]


def derive_seed(number: int, base: int | None = None) -> int:
    """The seed of model `number`, see `derive_seeds`."""
    start = torch.initial_seed() if base is None else base
    z = (start + (number + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 1  # 63 bits: a valid argument of torch.manual_seed


def check_seeds(seeds: Sequence[int] | None, num_models: int) -> list[int] | None:
    """Seeds as plain ints.

    Raises:
        ModelBatchError: wrong count, or a seed that is no 64-bit integer.
    """
    if seeds is None:
        return None
    values = list(seeds)
    if len(values) != num_models:
        raise ModelBatchError(f"seeds has {len(values)} entries for {num_models} models")
    for i, seed in enumerate(values):
        try:
            value = int(seed)
        except (TypeError, ValueError):
            value = None
        if value is None or value != seed or not -(1 << 63) <= value < 1 << 64:
            raise ModelBatchError(f"seeds[{i}] must be a 64-bit integer, got {seed!r}")
        values[i] = value
    return values


@contextlib.contextmanager
def torch_rng(device: torch.device) -> Iterator[None]:
    """Leave torch's generators for the CPU and `device` as they were found."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=True):
        yield


def _get_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_states(device: torch.device, states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


class Streams:
    """The streams of all models of one bundle.

    Args:
        kind: `"philox"` or `"torch"`.
        seeds: M ints.
        device: where the bundle lives.
    """

    def __init__(self, kind: str, seeds: Sequence[int], device: torch.device):
        if kind not in ("philox", "torch"):
            raise ModelBatchError(f'rng must be "philox" or "torch", got {kind!r}')
        self.kind = kind
        self.seeds = list(seeds)
        self.device = device
        self.seed = self._seed_tensor()
        self.step = torch.zeros(len(self.seeds), dtype=torch.int64, device=device)
        self.op_index = 0
        self.states: list[list[Tensor]] = []
        self._constants: dict[tuple[float | None, ...], Tensor] = {}
        if kind == "torch":
            self._init_torch_states()

    def _seed_tensor(self) -> Tensor:
        signed = [s if s < 1 << 63 else s - (1 << 64) for s in self.seeds]
        return torch.tensor(signed, dtype=torch.int64, device=self.device)

    def _init_torch_states(self) -> None:
        self.states = self._first_states(self.seeds)

    def _first_states(self, seeds: Sequence[int]) -> list[list[Tensor]]:
        states = []
        with torch_rng(self.device):
            for seed in seeds:
                torch.manual_seed(seed)
                states.append(_get_states(self.device))
        return states

    def models_changed(self, change: Change, seeds: Mapping[int, int]) -> None:
        """Carry the streams over to the models after a change.

        Args:
            change: what has changed.
            seeds: those of the fresh models, by slot; their streams begin at their start.
        """
        self.seeds = change.pick(self.seeds, seeds.__getitem__)
        self.seed, self.step = self._seed_tensor(), change.rows(self.step)
        if self.kind == "torch":
            first = dict(zip(seeds, self._first_states(list(seeds.values()))))
            self.states = change.pick(self.states, first.__getitem__)
        self.op_index = 0
        self._constants.clear()

    def to(self, device: torch.device) -> None:
        """Move the streams with the bundle."""
        if device == self.device:
            return
        self.device = device
        self._constants.clear()
        self.seed, self.step = self.seed.to(device), self.step.to(device)
        if self.kind == "torch":
            cpu_states = [states[0] for states in self.states]
            self._init_torch_states()
            for states, cpu_state in zip(self.states, cpu_states):
                states[0] = cpu_state

    def constant(self, values: tuple[float | None, ...]) -> Tensor:
        """One float64 number per model as a tensor `[M]`, made once and not to be changed."""
        tensor = self._constants.get(values)
        if tensor is None:
            tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
            if type(tensor) is Tensor:  # a tensor made while a graph is traced belongs to the graph
                self._constants[values] = tensor
        return tensor

    def next_op(self) -> int:
        """The number of the next random operation within this forward call."""
        self.op_index += 1
        return self.op_index - 1

    @contextlib.contextmanager
    def as_model(self, i: int) -> Iterator[None]:
        """Put model i's generator state in place, and keep what it becomes (`rng="torch"`)."""
        _set_states(self.device, self.states[i])
        yield
        self.states[i] = _get_states(self.device)

    def snapshot(self) -> tuple[Tensor, list[list[Tensor]]]:
        """What `restore` takes back: neither part is ever changed in place."""
        return self.step, [list(states) for states in self.states]

    def restore(self, snapshot: tuple[Tensor, list[list[Tensor]]]) -> None:
        """Go back to an earlier position of all streams."""
        self.step, self.states = snapshot[0], [list(states) for states in snapshot[1]]
        self.op_index = 0

    def state_dict(self) -> dict[str, Any]:
        """Where the streams are: plain values and tensors on the CPU."""
        return {
            "kind": self.kind,
            "seeds": list(self.seeds),
            "step": self.step.cpu().clone(),
            "states": [[own.cpu().clone() for own in states] for states in self.states],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` of streams of this kind returned, on this device."""
        saved = Streams(self.kind, state_dict["seeds"], self.device)
        saved.step = state_dict["step"].to(self.device)
        for mine, states in zip(saved.states, state_dict["states"]):
            # a generator that the saved bundle's device did not have begins with the seed
            for which, state in enumerate(states[: len(mine)]):
                mine[which] = state.cpu()
        self.become(saved)

    def become(self, other: "Streams") -> None:
        """Take over seeds and positions of streams of this kind and device."""
        self.seeds, self.seed = other.seeds, other.seed
        self.step, self.states = other.step, other.states
        self.op_index = 0

    def finish_call(
        self, snapshot: tuple[Tensor, list[list[Tensor]]], active: Tensor | None
    ) -> None:
        """End one forward call: the streams of the active models advance if anything was drawn.

        Args:
            snapshot: taken before the call.
            active: bool `[M]` on the streams' device, None if all models are active.
        """
        if self.op_index:
            self.step = self.step + (1 if active is None else active.to(torch.int64))
            self.op_index = 0
        if active is not None and self.kind == "torch":
            for i, keep in enumerate(active.tolist()):
                if not keep:
                    self.states[i] = snapshot[1][i]

    def traced(self, seed: Tensor, step: Tensor) -> "Streams":
        """The same streams with traced tensors for seeds and steps."""
        other = object.__new__(Streams)
        other.kind, other.seeds, other.device = self.kind, self.seeds, self.device
        other.seed, other.step = seed, step
        other.op_index, other.states, other._constants = 0, [], {}
        return other

    def fork(self, i: int) -> "Streams":
        """The stream of model i alone, at its current position; shares nothing (`"philox"`)."""
        alone = object.__new__(Streams)
        alone.kind, alone.seeds, alone.device = self.kind, [self.seeds[i]], self.device
        alone.seed, alone.step = self.seed[i : i + 1], self.step[i : i + 1]
        alone.op_index, alone.states, alone._constants = 0, [], {}
        return alone
