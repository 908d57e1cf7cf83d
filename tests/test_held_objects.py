"""Objects that modules hold, such as a configuration, which a forward writes to."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelbatch import ModelBatch, StructureMismatchError


class Config:
    def __init__(self) -> None:
        self.kind: str | None = None
        self.seen: list[int] = []
        self.once = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class Learns(nn.Module):
    """What its forward finds out it writes to its configuration, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.linear = nn.Linear(3, 2)
        self.linear.config = self.config  # type: ignore[assignment]

    def forward(self, x: Tensor, fail: bool = False) -> Any:
        if self.config.kind is None:
            self.config.kind = "classes"
            self.config.seen = [*self.config.seen, x.shape[0]]
            vars(self.config).pop("once", None)
        if fail:
            raise RuntimeError("of the model's own")
        return self.linear(x)


def _bundle() -> ModelBatch:
    return ModelBatch([Learns() for _ in range(3)])


def test_every_model_gets_what_the_forward_wrote() -> None:
    bundle = _bundle()
    bundle(torch.randn(4, 3))
    configs = [model.config for model in bundle.models]
    assert all(vars(config) == {"kind": "classes", "seen": [4]} for config in configs)
    assert len({id(config.seen) for config in configs}) == 3
    bundle.eval()  # compares all attributes
    bundle(torch.randn(4, 3))


def test_explain_changes_nothing() -> None:
    bundle = _bundle()
    bundle.explain(torch.randn(4, 3))
    assert all(model.config == Config() for model in bundle.models)


def test_a_failing_forward_changes_nothing_of_the_others() -> None:
    bundle = _bundle()
    with pytest.raises(RuntimeError, match="of the model's own"):
        bundle(torch.randn(4, 3), fail=True)
    assert all(model.config == Config() for model in bundle.models[1:])


def test_what_a_user_writes_to_one_model_is_refused_as_ever() -> None:
    bundle = _bundle()
    bundle.models[0].config.kind = "numbers"
    with pytest.raises(StructureMismatchError, match="config"):
        bundle.eval()
