"""Files of one model: what plain torch writes goes in, and what comes out it reads."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from checkpoint_case import Net, assert_same, build, everything, train
from torch import nn

from modelbatch import CheckpointError, ModelBatch


class Free(nn.Module):
    """Without tied weights."""

    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
        self.drop = nn.Dropout(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(self.linear(x)))


def trained(net: Any = None, **more: Any) -> ModelBatch:
    mb = build(torch.optim.Adam, net=net, **more)
    train(mb, range(2))
    return mb


def test_per_model_files_load_in_plain_torch(tmp_path: Path) -> None:
    for net in (Net, Free):
        mb = trained(net)
        mb.save_all(tmp_path, per_model=True)
        for i in range(len(mb)):
            path = tmp_path / f"model_{i:04d}" / "model.safetensors"
            fresh = mb.export(i)
            for parameter in fresh.parameters():
                nn.init.zeros_(parameter)
            fresh.load_state_dict(safetensors.torch.load_file(path))
            assert_same(dict(fresh.state_dict()), dict(mb[i].state_dict()))
    fresh = Free()
    safetensors.torch.load_model(fresh, tmp_path / "model_0002/model.safetensors")
    assert_same(dict(fresh.state_dict()), dict(mb[2].state_dict()))


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_from_one_slot_to_another(name: str, tmp_path: Path) -> None:
    mb = trained()
    path = tmp_path / name
    path.write_text("is replaced")
    mb.save_model(1, path)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    if name == "model.pt":
        saved = torch.load(path, weights_only=True)
        assert path.stat().st_size < 2 * sum(t.nbytes for t in saved.values()) + 10_000
    else:
        saved = safetensors.torch.load_file(path)
    fresh = Net()
    fresh.load_state_dict(saved)

    other = trained(seed=1)
    before = everything(other)
    other.load_model(2, path)
    after = everything(other)
    for i in range(3):
        own = dict(other[i].state_dict())
        if i == 2:
            assert_same(own, dict(mb[1].state_dict()))
        else:
            assert_same(own, {k: before["tensors"][_slot(k)][i] for k in own})
    assert_same(after["optimizer"], before["optimizer"])
    assert_same([after["seeds"], after["steps"]], [before["seeds"], before["steps"]])
    other._stack.check_views()
    train(other, range(2))


def _slot(name: str) -> str:
    return "middle.weight" if name == "tied.weight" else name


def test_a_file_of_plain_torch(tmp_path: Path) -> None:
    torch.manual_seed(5)
    alone = Net()
    torch.save(alone.state_dict(), tmp_path / "a.bin")
    torch.save(alone.state_dict(), tmp_path / "b", _use_new_zipfile_serialization=False)
    safetensors.torch.save_model(alone, str(tmp_path / "c"))  # which drops one of the tied names
    for source in (tmp_path / "a.bin", str(tmp_path / "b"), tmp_path / "c", alone.state_dict()):
        mb = trained()
        mb.load_model(-1, source)
        assert_same(dict(mb[2].state_dict()), dict(alone.state_dict()))
        assert not torch.equal(mb[1].first.weight, alone.first.weight)


def test_other_precision(tmp_path: Path) -> None:
    alone = Net().double()
    torch.save(alone.state_dict(), tmp_path / "a.pt")
    mb = trained()
    mb.load_model(0, tmp_path / "a.pt")
    assert torch.equal(mb[0].first.weight, alone.first.weight.float())


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('unpickled')",)


def test_refused(tmp_path: Path) -> None:
    mb = trained()
    state = dict(mb.export(0).state_dict())
    short = {**state, "last.bias": torch.zeros(2)}
    cases: list[tuple[Any, str]] = [
        (short, r"'last.bias' has the shape \(2,\), that of the model \(3,\)"),
        ({**state, "more": torch.zeros(1)}, "'more' is no tensor of the model"),
        ({"state_dict": state}, "'state_dict' is no tensor of the model; .* under a key"),
        ({k: v for k, v in state.items() if k != "norm.bias"}, "'norm.bias' is missing"),
        ({**state, "last.bias": [1.0, 2.0, 3.0]}, "'last.bias' is a list, not a tensor"),
        ({**state, "last.bias": torch.zeros(3, dtype=torch.int64)}, "'last.bias' has integer"),
    ]
    before = everything(mb)
    for content, message in cases:
        with pytest.raises(CheckpointError, match=f"the state dict: {message}"):
            mb.load_model(1, content)
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(CheckpointError, match=f"a.pt: {message}"):
            mb.load_model(1, tmp_path / "a.pt")
    torch.save(Evil(), tmp_path / "evil.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "empty").write_bytes(b"")
    for name, message in (("evil.pt", "cannot be read"), ("list.pt", "a list, not a state dict")):
        with pytest.raises(CheckpointError, match=f"{name} .*{message}"):
            mb.load_model(1, tmp_path / name)
    for name in ("empty", "missing"):
        with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
            mb.load_model(1, tmp_path / name)
    for suffix in (".pt", ".safetensors"):
        path = tmp_path / f"whole{suffix}"
        mb.save_model(0, path)
        data = path.read_bytes()
        for size in range(0, len(data) - 1, len(data) // 12):
            path.write_bytes(data[:size])
            with pytest.raises(CheckpointError, match=f"whole{suffix}"):
                mb.load_model(1, path)
    assert_same(everything(mb), before)


def test_not_strict(tmp_path: Path) -> None:
    mb = trained()
    state = dict(mb.export(0).state_dict())
    del state["norm.bias"]
    expected = mb[1].norm.bias.clone()
    mb.load_model(1, {**state, "more": torch.zeros(1)}, strict=False)
    assert torch.equal(mb[1].first.weight, mb[0].first.weight)
    assert torch.equal(mb[1].norm.bias, expected)


def test_autograd_sees_the_change() -> None:
    mb = build(None, net=lambda p: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)))
    total = mb(torch.randn(2, 4)).sum()
    mb.load_model(0, mb[1].state_dict())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


class Strict(Free):
    """A module that refuses in the middle of loading."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        raise RuntimeError("not today")


def test_a_module_that_fails_to_load() -> None:
    mb = trained(Strict)
    before = everything(mb)
    with pytest.raises(CheckpointError, match="not today"):
        mb.load_model(0, {k: v + 1 for k, v in mb[1].state_dict().items()})
    assert_same(everything(mb), before)


def test_complex_parameters(tmp_path: Path) -> None:
    class Complex(nn.Module):
        def __init__(self, p: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.to(torch.complex64) @ self.weight).abs()

    def new(lr: float) -> ModelBatch:
        mb = ModelBatch([Complex(0.0) for _ in range(3)], [lr] * 3, torch.optim.Adam)
        train_on = torch.randn(8, 4), torch.arange(8) % 3
        mb.train_step(*train_on)
        return mb

    mb, other = new(0.1), new(0.2)
    mb.save_all(tmp_path)
    other.load_all(tmp_path)
    assert_same(everything(other), everything(mb))
    with pytest.raises(CheckpointError, match="model 0: 'weight' is complex"):
        mb.save_all(tmp_path, per_model=True)
    mb.save_model(0, tmp_path / "a.pt")
    other.load_model(1, tmp_path / "a.pt")
    assert torch.equal(other[1].weight, mb[0].weight)


def test_the_directory_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere/a.pt cannot be saved"):
        trained().save_model(0, tmp_path / "nowhere" / "a.pt")
    with pytest.raises(ValueError, match="there is no model 3"):
        trained().save_model(3, tmp_path / "a.pt")
