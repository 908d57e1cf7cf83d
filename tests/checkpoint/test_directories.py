"""Where a checkpoint may be saved, and what becomes of other files there."""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_case import assert_same, build, everything, train

from modelbatch import CheckpointError, ModelBatch

ROOT = Path(__file__).resolve().parent.parent.parent


def trained(steps: int = 1, seed: int = 0) -> ModelBatch:
    mb = build(torch.optim.Adam, seed=seed)
    train(mb, range(steps))
    return mb


def names(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())


PLAIN = ["bundle.json", "optimizer.safetensors", "stacked.safetensors"]


def test_other_files_stay_and_old_ones_go(tmp_path: Path) -> None:
    mb = trained()
    (tmp_path / "log.csv").write_text("mine")
    (tmp_path / ".save-notes").mkdir()
    mb.save_all(tmp_path, per_model=True)
    (tmp_path / "model_0001" / "notes.txt").write_text("mine")
    assert len(names(tmp_path)) == 3 + 3 + 2
    mb.save_all(str(tmp_path))
    assert names(tmp_path) == sorted([*PLAIN, "log.csv", "model_0001/notes.txt"])
    assert (tmp_path / ".save-notes").is_dir()
    assert not (tmp_path / "model_0000").exists()


def test_leftovers_of_a_crash_are_removed(tmp_path: Path) -> None:
    trained().save_all(tmp_path)
    leftover = tmp_path / ".save-0123456789abcdef"
    leftover.mkdir()
    (leftover / "stacked.safetensors").write_bytes(b"half")
    fresh = trained(2, seed=1)
    fresh.load_all(tmp_path)
    assert leftover.exists()  # loading writes nothing
    fresh.save_all(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == PLAIN


def test_a_damaged_checkpoint_is_replaced(tmp_path: Path) -> None:
    mb = trained()
    mb.save_all(tmp_path)
    (tmp_path / "bundle.json").write_bytes(b"{")
    mb.save_all(tmp_path)
    other = trained(2, seed=1)
    other.load_all(tmp_path)
    assert_same(everything(other), everything(mb))


def test_the_bundle_json_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text('{"name": "web"}')
    with pytest.raises(CheckpointError, match="is not that of a ModelBatch .* not overwritten"):
        trained().save_all(tmp_path)
    assert (tmp_path / "bundle.json").read_text() == '{"name": "web"}'
    assert names(tmp_path) == ["bundle.json"]


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for target in ("file", "file/deeper"):
        with pytest.raises(CheckpointError, match="cannot be saved"):
            trained().save_all(tmp_path / target)
    assert (tmp_path / "file").read_text() == "mine"


def test_moved_and_copied(tmp_path: Path) -> None:
    mb = trained()
    mb.save_all(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "c")
    (tmp_path / "link").symlink_to(tmp_path / "c")
    for name in ("b", "c", "link"):
        other = trained(2, seed=1)
        other.load_all(tmp_path / name)
        assert_same(everything(other), everything(mb))
    mb.save_all(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        trained().save_all(tmp_path)
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in PLAIN} == {0o644}


def test_two_saves_at_once(tmp_path: Path) -> None:
    mb = trained()
    mb.save_all(tmp_path)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another save_all is writing to"):
            mb.save_all(tmp_path)
        trained(2).load_all(tmp_path)
    finally:
        os.close(descriptor)
    mb.save_all(tmp_path)


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A read-only directory for a user whom permissions bind."""
    directory = Path(tempfile.mkdtemp())
    trained().save_all(directory / "checkpoint")
    (directory / "checkpoint").chmod(0o555)
    directory.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield directory
    finally:
        os.seteuid(user)
        directory.chmod(0o755)
        (directory / "checkpoint").chmod(0o755)
        shutil.rmtree(directory)


def test_a_read_only_directory(nobody: Path) -> None:
    mb = trained(2, seed=1)
    for target in (nobody / "checkpoint", nobody / "new"):
        with pytest.raises(CheckpointError, match=r"cannot be saved: .*Permission denied"):
            mb.save_all(target)
    assert sorted(p.name for p in (nobody / "checkpoint").iterdir()) == PLAIN
    assert [p.name for p in nobody.iterdir()] == ["checkpoint"]
    mb.load_all(nobody / "checkpoint")
    assert_same(everything(mb), everything(trained()))


_SMALL_DISK = """
import resource, sys, torch
from torch import nn
from modelbatch import CheckpointError, ModelBatch
mb = ModelBatch([nn.Linear(100, 100) for _ in range(3)])
mb.save_all(sys.argv[1])
first = [p.detach().clone() for p in mb.parameters()]
with torch.no_grad():
    for p in mb.parameters():
        p.zero_()
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    mb.save_all(sys.argv[1])
except CheckpointError as error:
    assert "stacked.safetensors cannot be saved" in str(error), error
else:
    raise SystemExit("not refused")
mb.load_all(sys.argv[1])
assert all(torch.equal(a, b) for a, b in zip(first, mb.parameters()))
"""


def test_a_file_that_the_system_does_not_let_grow(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SMALL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert names(tmp_path) == ["bundle.json", "stacked.safetensors"]
