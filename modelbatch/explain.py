"""How each operation of a bundle's forward is computed."""

from dataclasses import dataclass, field

LOOP = "loop over models"

_ADVICE = {
    "data-dependent control flow": "torch.where would batch; the loop is exact too",
    "Tensor.item()": "keep the value in a tensor",
    "forward hooks": "remove the hooks, or keep them: each sees its own model, one at a time",
}


@dataclass
class Operation:
    """One kind of operation in the forward."""

    name: str
    path: str
    """`modelbatch rule`, `torch rule` or `loop over models`."""
    count: int = 1


@dataclass
class Report:
    """What `ModelBatch.explain` found; printable.

    Attributes:
        num_models: models in the bundle.
        step_path: how `train_step` runs.
        operations: the forward's operations in order of first use.
        whole_forward: why the whole forward runs model by model, None if it does not.
    """

    num_models: int
    step_path: str
    operations: list[Operation] = field(default_factory=list)
    whole_forward: str | None = None

    @property
    def fallbacks(self) -> list[str]:
        """Names of what is computed model by model."""
        names = [op.name for op in self.operations if op.path == LOOP]
        return [self.whole_forward, *names] if self.whole_forward else names

    def add(self, name: str, path: str) -> None:
        """Count one operation."""
        for operation in self.operations:
            if operation.name == name and operation.path == path:
                operation.count += 1
                return
        self.operations.append(Operation(name, path))

    def mark_slow(self, name: str) -> None:
        """Note an operation that torch itself loops over."""
        self.operations.append(Operation(name, LOOP))

    def __str__(self) -> str:
        lines = [f"{self.num_models} models; train_step: {self.step_path}"]
        if self.whole_forward:
            lines.append(f"the whole forward runs model by model: {self.whole_forward}")
        width = max((len(op.name) for op in self.operations), default=0)
        lines += [f"  {op.name:<{width}}  x{op.count:<4} {op.path}" for op in self.operations]
        lines += [
            f"  slow: {name}. {_ADVICE.get(name, 'each model is computed on its own here')}"
            for name in self.fallbacks
        ]
        if not self.fallbacks:
            lines.append("  nothing is computed model by model")
        return "\n".join(lines)
