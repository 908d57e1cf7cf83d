"""Steps on torch tensors of any strides, for the emulated operators and for those on a device."""

from dataclasses import dataclass
from typing import Any

import torch
from cuda_emulation.optim_cases import HYPER, NUM_STATES, OPTIONS, SCALARS

M = 7
SHAPES = [(16, 20), (16,), (), (10,), (2, 3, 2, 3, 2), (0, 4), (90, 50)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
STRIDES = ["dense", "reversed", "models_last", "gaps"]


@dataclass
class Problem:
    """The arguments of a step."""

    rule: str
    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    states: list[list[torch.Tensor]]
    step: torch.Tensor
    hyper: torch.Tensor
    scalars: list[torch.Tensor]
    options: dict[str, torch.Tensor]

    def run(self, ops: Any = torch.ops.modelbatch) -> None:
        """With the operators of that namespace."""
        options = [self.options.get(name) for name in OPTIONS]
        operator = getattr(ops, f"{self.rule}_step_")
        per_model = *self.scalars, self.step, self.hyper, *options
        operator(self.params, self.grads, *self.states, *per_model)

    def to(self, device: str) -> "Problem":
        """A copy on the device, of the same strides where they leave no gaps."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone(memory_format=torch.preserve_format).to(device)

        return Problem(
            self.rule,
            [moved(t) for t in self.params],
            [moved(t) for t in self.grads],
            [[moved(t) for t in of_state] for of_state in self.states],
            moved(self.step),
            moved(self.hyper),
            [moved(t) for t in self.scalars],
            {name: moved(t) for name, t in self.options.items()},
        )

    def written(self) -> list[torch.Tensor]:
        return [
            *self.params,
            *(t for of_state in self.states for t in of_state),
            self.step,
            *self.scalars,
        ]


def resized(values: list[Any], **kwargs: Any) -> torch.Tensor:
    return torch.tensor([values[i % len(values)] for i in range(M)], **kwargs)


def with_strides(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "reversed":  # all dimensions of a slice, five of them in one tensor
        axes = [0, *range(tensor.dim() - 1, 0, -1)]
        return tensor.permute(axes).contiguous().permute(axes)
    if kind == "models_last":
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    if kind == "gaps":
        return torch.stack([tensor, tensor], -1)[..., 0]
    return tensor.contiguous()


def make_problem(
    rule: str,
    dtype: torch.dtype,
    grads: str = "dense",
    params: str = "dense",
    states: str | None = None,
    first: bool = False,
) -> Problem:
    """The same for the same arguments. States have the strides of the parameters unless said."""
    generator = torch.Generator().manual_seed(0)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn((M, *shape), generator=generator, dtype=torch.float64)

    def state(shape: tuple[int, ...], number: int) -> torch.Tensor:
        # The first one exceeds the others' squares, so that RMSprop's variance is positive.
        values = normal(shape).square() + 1 if number == 0 else normal(shape).tanh().abs() / 2
        return with_strides((values * (not first)).to(state_dtype), states or params)

    return Problem(
        rule,
        params=[with_strides(normal(shape).to(dtype), params) for shape in SHAPES],
        grads=[with_strides(normal(shape).to(dtype), grads) for shape in SHAPES],
        states=[[state(shape, i) for shape in SHAPES] for i in range(NUM_STATES[rule])],
        step=torch.zeros(M) if first else torch.arange(M) * 3.0,
        hyper=torch.stack([resized(row, dtype=torch.float64) for row in HYPER[rule]]),
        scalars=[resized(values[not first]) for values in SCALARS.get(rule, [])],
        options={
            "active": resized([True, True, True, False]),
            "nonfinite": resized([False, False, True, False, False]),
            "inv_scale": resized([1.0, 0.5]),
            "clip_factor": resized([1.0, 0.7], dtype=torch.float64),
            "clip_value": resized([float("inf"), 0.4], dtype=torch.float64),
        },
    )
