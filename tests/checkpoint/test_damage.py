"""A damaged checkpoint is refused with the name of the file, and the bundle stays as it was."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_case import Net, assert_same, build, everything, train
from safetensors.torch import load_file, save_file

from modelbatch import CheckpointError, ModelBatch
from modelbatch.checkpoint import checkpoint_info
from modelbatch.checkpoint.format import dump


class Counter:
    def __init__(self) -> None:
        self.state: Any = {"count": 1, "tensor": torch.arange(3)}

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    mb = build(torch.optim.Adam, rng="torch")
    train(mb, range(2))
    mb.save_all(directory, per_model=True, states={"counter": Counter()})
    return directory


@pytest.fixture(scope="module")
def mb() -> ModelBatch:
    mb = build(torch.optim.Adam, rng="torch", seed=1)
    train(mb, range(3))
    return mb


def refused(mb: ModelBatch, directory: Path, **options: Any) -> str:
    """Loads, which must fail and change nothing; returns the message."""
    before, counter = everything(mb), Counter()
    counter.state = "mine"
    with pytest.raises(CheckpointError) as caught:
        mb.load_all(directory, states={"counter": counter}, **options)
    assert counter.state == "mine"
    assert_same(everything(mb), before)
    return str(caught.value)


FILES = [
    "bundle.json",
    "stacked.safetensors",
    "optimizer.safetensors",
    "random.safetensors",
    "states.safetensors",
    "model_0001/model.safetensors",
]


def test_these_are_all_files(saved: Path) -> None:
    found = {str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()}
    assert found == {*FILES, "model_0000/model.safetensors", "model_0002/model.safetensors"}


@pytest.mark.parametrize("name", FILES)
def test_truncated(name: str, saved: Path, mb: ModelBatch, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    data = (copy / name).read_bytes()
    offsets = {0, 1, 7, 8, 9, 100, len(data) - 1, len(data) - 2}
    offsets |= {*range(0, len(data), max(1, len(data) // 25))}
    for offset in sorted(offsets & {*range(len(data))}):
        (copy / name).write_bytes(data[:offset])
        assert name in refused(mb, copy), offset
    (copy / name).write_bytes(data + b" ")
    assert name in refused(mb, copy)
    (copy / name).write_bytes(data)
    mb.load_all(copy)


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits(name: str, saved: Path, mb: ModelBatch, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    data = (copy / name).read_bytes()
    places = {*range(0, min(90, len(data)), 3), *range(0, len(data), max(1, len(data) // 40))}
    for place in sorted(places):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        (copy / name).write_bytes(changed)
        assert name in refused(mb, copy), place


@pytest.mark.parametrize("name", FILES)
def test_missing_file(name: str, saved: Path, mb: ModelBatch, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    (copy / name).unlink()
    message = refused(mb, copy)
    assert name in message
    assert "missing" in message or "is not a checkpoint" in message


def test_without_strict_the_models_files_do_not_matter(
    saved: Path, mb: ModelBatch, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    shutil.rmtree(copy / "model_0001")
    mb.load_all(copy, strict=False)


def test_not_a_checkpoint(mb: ModelBatch, tmp_path: Path) -> None:
    assert "is not a checkpoint: it is no directory" in refused(mb, tmp_path / "nowhere")
    assert "is not a checkpoint: it has no bundle.json" in refused(mb, tmp_path)
    (tmp_path / "file").write_text("x")
    assert "is no directory" in refused(mb, tmp_path / "file")
    for text in ("", "[]", "{}", '{"format": "other"}', "\x00", "[" * 100_000, "null", "\xff"):
        (tmp_path / "bundle.json").write_bytes(text.encode("latin-1"))
        assert "bundle.json" in refused(mb, tmp_path)
        with pytest.raises(CheckpointError, match="bundle.json"):
            checkpoint_info(tmp_path)


# ---- files that are whole, but of another content


def rewrite(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes bundle.json and gives it the checksum that it should have then."""
    path = directory / "bundle.json"
    content = json.loads(path.read_bytes())
    content.pop("sha256")
    for name in content["files"]:
        data = (directory / name).read_bytes()
        content["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(content)
    path.write_bytes(dump(content))


def retensor(directory: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = {key: value.clone() for key, value in load_file(directory / name).items()}
    change(tensors)
    save_file(tensors, directory / name)
    rewrite(directory, lambda content: None)


def test_other_versions(saved: Path, mb: ModelBatch, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "c")
    for version in (0, 2, "1", None):
        rewrite(tmp_path / "c", lambda content, v=version: content.update(format_version=v))
        message = refused(mb, tmp_path / "c")
        assert f"format_version {version!r}" in message
        assert "reads 1" in message


@pytest.mark.parametrize("name", ["stacked.safetensors", "optimizer.safetensors"])
def test_a_tensor_is_missing_or_another(
    name: str, saved: Path, mb: ModelBatch, tmp_path: Path
) -> None:
    key = {"stacked": "first.bias", "optimizer": "first.bias.exp_avg"}[name.split(".")[0]]
    for change in (
        lambda tensors: tensors.pop(key),
        lambda tensors: tensors.update({key: tensors[key].double()}),
        lambda tensors: tensors.update({key: tensors[key][:, :2].clone()}),
    ):
        copy = tmp_path / "c"
        shutil.copytree(saved, copy, dirs_exist_ok=True)
        retensor(copy, name, change)
        assert f"{name}: tensor '{key}'" in refused(mb, copy)


def test_a_bundle_json_that_makes_no_sense(saved: Path, mb: ModelBatch, tmp_path: Path) -> None:
    entries = json.loads((saved / "bundle.json").read_bytes())
    for key in entries:
        if key in ("sha256", "files", "attributes", "modelbatch", "torch"):
            continue
        for value in (None, [], {}, "x", -1):
            if value == entries[key]:
                continue
            copy = tmp_path / "c"
            shutil.copytree(saved, copy, dirs_exist_ok=True)
            rewrite(copy, lambda content, k=key, v=value: content.update({k: v}))
            assert str(copy) in refused(mb, copy), (key, value)


def test_no_other_files_can_be_named(saved: Path, mb: ModelBatch, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "c")
    for name in ("../x.safetensors", "/x.safetensors", "notes.txt", "model_1/../../x.safetensors"):
        shutil.copy(saved / "bundle.json", tmp_path / "c")
        rewrite(
            tmp_path / "c",
            lambda content, n=name: content["files"].update({n: {"size": 1, "sha256": ""}}),
        )
        assert "incomplete: files" in refused(mb, tmp_path / "c")


# ---- checkpoints that do not fit


class Wider(Net):
    def __init__(self, p: float) -> None:
        super().__init__(p, width=7)


class Fewer(Net):
    def __init__(self, p: float) -> None:
        super().__init__(p)
        del self.last
        self.last = torch.nn.Identity()


class More(Net):
    def __init__(self, p: float) -> None:
        super().__init__(p)
        self.register_buffer("extra", torch.zeros(2))


def other(net: type | None = None, cls: type = torch.optim.Adam, **more: Any) -> ModelBatch:
    return build(cls, net=net, **{"rng": "torch", **more})


@pytest.mark.parametrize(
    ("mb_of", "message"),
    [
        (
            lambda: other(Wider),
            r"'first.weight' has the shape \(6, 4\) for each model, that of the bundle \(7, 4\)",
        ),
        (lambda: other(Fewer), "tensor 'last.bias' is none of the bundle's"),
        (lambda: other(More), "tensor 'extra' is missing"),
        (
            lambda: other(cls=torch.optim.AdamW),
            "optimizer is torch.optim.Adam, the bundle's is torch.optim.AdamW",
        ),
        (lambda: other(rng="philox"), "rng='torch', the bundle's are rng='philox'"),
        (lambda: other(num_models=2), "has 3 models, the bundle 2; choose 2 of them with indices="),
        (lambda: other().to(torch.complex64), "floating-point values .* complex ones"),
    ],
)
@pytest.mark.filterwarnings("ignore:Complex modules")
def test_another_bundle(mb_of: Callable[[], ModelBatch], message: str, saved: Path) -> None:
    import re

    assert re.search(message, refused(mb_of(), saved))


def test_bad_indices(saved: Path, mb: ModelBatch) -> None:
    for indices, message in (
        ([0, 1], "2 entries for 3 models"),
        ([0, 1, 3], "no model 3 in a checkpoint of 3"),
        ([0, 1, -4], "no model -4"),
        ([0, 1, True], "no model True"),
        ([0, 1, 0.5], "no model 0.5"),
    ):
        assert message in refused(mb, saved, indices=indices)
    assert "cannot be picked" in refused(mb, saved, indices=[0, 0, 1])


def test_an_optimizer_or_scaler_that_was_not_saved(tmp_path: Path) -> None:
    from modelbatch import BundleGradScaler

    build(None).save_all(tmp_path)
    mb = build(torch.optim.SGD, seed=1)
    with pytest.raises(CheckpointError, match="the bundle has an optimizer, the checkpoint has"):
        mb.load_all(tmp_path)
    mb.load_all(tmp_path, strict=False)
    assert_same(everything(mb)["tensors"], everything(build(None))["tensors"])
    build(torch.optim.SGD).save_all(tmp_path)
    mb.grad_scaler = BundleGradScaler()
    with pytest.raises(CheckpointError, match="has a gradient scaler, the checkpoint has none"):
        mb.load_all(tmp_path)
    mb.load_all(tmp_path, strict=False)
