"""Adam and AdamW over all models with as little Python as torch's fused kernel allows.

`torch.optim.Adam.step` gathers states and regroups tensors anew for every parameter group, which
for a group of a few tiny tensors costs more than the update. Once all states exist, this calls the
same kernel with the same arguments from lists that are kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

__all__ = ["AdamLoop"]


class _Model(NamedTuple):
    group: dict[str, Any]
    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    amsgrad: bool


class AdamLoop:
    """The kept lists of one optimizer.

    Args:
        optimizer: of class `Adam` or `AdamW`, its groups those of the models.
    """

    def __init__(self, optimizer: Optimizer):
        self._optimizer = optimizer
        self._models: list[_Model] | None = None
        self._steps: list[Tensor] = []
        self._key: Any = None

    @staticmethod
    def suits(optimizer_cls: type[Optimizer]) -> bool:
        """Whether the class's step is the one that this repeats."""
        return optimizer_cls in (Adam, AdamW) and hasattr(torch, "_fused_adamw_")

    def forget(self) -> None:
        """Collect the lists anew at the next step."""
        self._models = None

    @torch.no_grad()
    def step(self, groups: list[dict[str, Any]], pattern: Any) -> bool:
        """One step of all models with gradients.

        Args:
            groups: the parameter groups.
            pattern: which models and parameters have gradients, see `GradientViews.pattern`.

        Returns:
            Whether it was done; if not, nothing has changed and torch's own step is due.
        """
        state = self._optimizer.state
        key = (pattern, id(state), len(state))
        if self._models is None or self._key != key:
            self._models, self._key = self._collect(groups), key
            if self._models is None:
                return False
            self._steps = [step for model in self._models for step in model.steps]
        for model in self._models:
            group = model.group
            if type(group["lr"]) is not float or group["amsgrad"] != model.amsgrad:
                return False
            if not group["fused"] or group["capturable"] or group["differentiable"]:
                return False
        torch._foreach_add_(self._steps, 1)
        for model in self._models:
            group = model.group
            update = torch._fused_adam_
            if group["decoupled_weight_decay"]:
                update = torch._fused_adamw_
            beta1, beta2 = group["betas"]
            update(
                model.params,
                [param.grad for param in model.params],  # type: ignore[misc]
                model.exp_avgs,
                model.exp_avg_sqs,
                model.max_exp_avg_sqs,
                model.steps,
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=model.amsgrad,
                maximize=group["maximize"],
            )
        return True

    def _collect(self, groups: list[dict[str, Any]]) -> list[_Model] | None:
        """The lists of every model with gradients; None where a state is still missing."""
        models = []
        for group in groups:
            if "decoupled_weight_decay" not in group:
                return None
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            states = [self._optimizer.state.get(param) for param in params]
            kinds = {(param.device, param.dtype) for param in params}
            if len(kinds) != 1 or any(not s or "exp_avg" not in s for s in states):
                return None
            amsgrad = bool(group["amsgrad"])
            if amsgrad and any("max_exp_avg_sq" not in s for s in states if s):
                return None
            lists: list[list[Tensor]] = [
                [s[name] for s in states if s] for name in ("exp_avg", "exp_avg_sq", "step")
            ]
            if any(not isinstance(step, Tensor) for step in lists[2]):
                return None
            highest = [s["max_exp_avg_sq"] for s in states if s] if amsgrad else []
            models.append(_Model(group, params, lists[0], lists[1], highest, lists[2], amsgrad))
        return models
