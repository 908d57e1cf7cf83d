"""float16 with a loss scale for each model, on the CPU, where accelerate alone would not scale."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from hf_case import arguments, berts, texts
from transformers import Trainer

from modelbatch.integrations.huggingface import HFTrainerMixin
from modelbatch.optim import BundleGradScaler

RATES = [1e-3, 2e-3, 3e-3]
START = 1024.0


class HalfTrainer(Trainer):
    """What `fp16=True` does on a GPU."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=START, growth_interval=4)


class BundledHalfTrainer(HFTrainerMixin, HalfTrainer):
    pass


@pytest.fixture(autouse=True)
def _precision_as_before() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def _models(dtype: torch.dtype = torch.float32) -> list[Any]:
    """Of which the gradients of the second overflow at this scale."""
    models = berts(3, dtype)
    with torch.no_grad():
        models[1].classifier.weight.mul_(3e3)
    return models


def _alone(args: Any, i: int, trainer: Any, dtype: torch.dtype, data: Any) -> Any:
    args = dataclasses.replace(args, learning_rate=RATES[i])
    found = trainer(_models(dtype)[i], args, train_dataset=data)
    found.train()
    return found


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_as_trainers_with_a_scaler_each(tmp_path, optim) -> None:
    """The schedule of a model that skips a step waits, but for a fused optimizer's."""
    data = texts(40)
    args = arguments(tmp_path, optim=optim, max_grad_norm=0.5, warmup_steps=2)
    bundled = BundledHalfTrainer(
        models=_models(), args=args, learning_rates=RATES, train_dataset=data
    )
    bundled.train()
    scaler = bundled.accelerator.scaler
    assert isinstance(scaler, BundleGradScaler)
    scales = scaler.get_scale()
    assert scales[1] < START < scales[0]
    waited = optim == "adamw_torch"
    rates = [group["lr"] for group in bundled.inner_optimizer.param_groups]
    assert (rates[1] > 0) == waited and rates[0] == 0  # the end of the schedule
    for i in range(3):
        half = _alone(args, i, HalfTrainer, torch.float32, data)
        assert half.accelerator.scaler.get_scale() == scales[i]
        assert half.optimizer.param_groups[0]["lr"] == pytest.approx(rates[i], rel=1e-12)
        AcceleratorState._reset_state(True)
        if i == 1:
            continue  # its steps that were skipped are not there in full precision
        exact = _alone(args, i, Trainer, torch.float64, data).model
        for name, weight in exact.state_dict().items():
            mine = bundled.model.models[i].state_dict()[name].double()
            error = (half.model.state_dict()[name].double() - weight).norm()
            assert (mine - weight).norm() <= 2 * error + 1e-6 * (1 + weight.norm()), name
