"""Replacing the files of a checkpoint, so that it is whole at every instant.

A save with the id N works in these steps; `<dir>` is the checkpoint.

1.  All files are written to `<dir>/.save-N/`, and they and that directory are flushed to the disk.
    The checkpoint that was there before has not been touched.
2.  `<dir>/.save-N/bundle.json` is renamed to `<dir>/bundle.json`, which replaces the old one in one
    atomic step. This is the instant at which the new checkpoint takes the place of the old one.
3.  The other files are renamed from `<dir>/.save-N/` to `<dir>/`, one after the other, those of the
    old checkpoint that the new one does not have are removed, and then `.save-N` is.

`bundle.json` has the id N in it, and every other file is looked for in `.save-N` first. A crash
before step 2 leaves the old checkpoint, and a directory that nobody looks at; one after it leaves
the new checkpoint, wherever step 3 had got to. The next save ends what an earlier one began: it
takes the rest of step 3, and removes what belongs to no checkpoint. A load that runs meanwhile sees
by `bundle.json`, which it reads before and after all else, whether to begin again.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError
from .encoding import stored
from .format import FORMAT, FORMAT_VERSION, MANIFEST, ForeignFileError, dump, parse

__all__ = ["Replacement", "sync_directory", "tensor_bytes", "write_synced"]

_STAGING = re.compile(r"\.save-[0-9a-f]{16}")


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file with these tensors."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = stored(tensor)
        address = tensor.untyped_storage().data_ptr()
        # The format refuses tensors that share memory.
        separate[name] = tensor.clone() if address in seen else tensor
        seen.add(separate[name].untyped_storage().data_ptr())
    return safetensors.torch.save(separate)


def write_synced(path: Path, data: bytes) -> None:
    """Writes a new file and waits until the disk has it."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Waits until the disk has the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Replacement:
    """A checkpoint that is about to take the place of the one in a directory.

    Used as a context manager: leaving it without `commit` removes everything that was written.

    Args:
        directory: of the checkpoint. It is made if need be; files of other names in it stay.

    Raises:
        CheckpointError: the directory cannot be written, is that of something else, or another
            process saves to it at the moment.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.save_id = secrets.token_hex(8)
        self._staging = directory / f".save-{self.save_id}"
        self._files: dict[str, dict[str, Any]] = {}
        self._old_files: list[str] = []
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> "Replacement":
        try:
            made = _make_directory(self.directory)
            self._resources.callback(_remove_empty, made)
            self._resources.enter_context(_locked(self.directory))
            old = _manifest_to_replace(self.directory)
            self._old_files = [] if old is None else [*old["files"], *old["obsolete"]]
            _tidy(self.directory, old)
            self._resources.callback(self._discard)
            self._staging.mkdir()
        except BaseException as error:
            self._resources.close()
            if isinstance(error, OSError):
                raise self._failed(self.directory, error) from error
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self._resources.close()

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Writes one file of tensors."""
        path = self._staging / name
        try:
            data = tensor_bytes(tensors)
            path.parent.mkdir(exist_ok=True)
            write_synced(path, data)
        except (OSError, SafetensorError) as error:
            raise self._failed(self.directory / name, error) from error
        self._files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def commit(self, content: Mapping[str, Any]) -> None:
        """Makes the files that were written, and this content of `bundle.json`, the checkpoint."""
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "save_id": self.save_id,
            **content,
            "files": self._files,
            "obsolete": sorted({*self._old_files} - {*self._files}),
        }
        try:
            write_synced(self._staging / MANIFEST, dump(manifest))
            for folder in {(self._staging / name).parent for name in self._files}:
                sync_directory(folder)
            sync_directory(self._staging)
            sync_directory(self.directory)  # which has the name of the staging directory
            os.replace(self._staging / MANIFEST, self.directory / MANIFEST)
        except OSError as error:
            raise self._failed(self.directory / MANIFEST, error) from error
        # The checkpoint is whole. What cannot be moved to its place now, the next save moves.
        with contextlib.suppress(OSError):
            sync_directory(self.directory)
            _settle(self.directory, manifest)

    def _failed(self, path: Path, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{path} cannot be saved: {error}; the checkpoint in {self.directory} is as it was"
        )

    def _discard(self) -> None:
        """Removes the staging directory, unless it is part of the checkpoint by now."""
        with contextlib.suppress(OSError, CheckpointError):
            manifest = _manifest_to_replace(self.directory)
            if manifest is None or manifest["save_id"] != self.save_id:
                shutil.rmtree(self._staging, ignore_errors=True)


def _make_directory(directory: Path) -> list[Path]:
    """Makes a directory and its parents; returns those made, innermost first."""
    missing = []
    for path in (directory, *directory.parents):
        if path.exists():
            break
        missing.append(path)
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_directory(path.parent)
    return missing


def _remove_empty(directories: list[Path]) -> None:
    with contextlib.suppress(OSError):  # not empty: the checkpoint was saved
        for path in directories:
            path.rmdir()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keeps other processes from saving to the same directory; leaves no file behind."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise CheckpointError(
                    f"another save_all is writing to {directory} at this moment"
                ) from error
            # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _manifest_to_replace(directory: Path) -> dict[str, Any] | None:
    """The checkpoint that is there, None if there is none that can be read."""
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return parse(data, str(path))
    except ForeignFileError as error:
        raise CheckpointError(f"{error}; it is not overwritten") from None
    except CheckpointError:
        return None


def _tidy(directory: Path, manifest: Mapping[str, Any] | None) -> None:
    """Ends what saves began that did not come to their end."""
    if manifest is not None:
        _settle(directory, manifest)
    for path in directory.iterdir():
        if _STAGING.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def _settle(directory: Path, manifest: Mapping[str, Any]) -> None:
    """Moves the files of a committed save to their places, and removes those it did without."""
    staging = directory / f".save-{manifest['save_id']}"
    if not staging.is_dir():
        return
    for name in manifest["files"]:
        if (staging / name).exists():
            target = directory / name
            target.parent.mkdir(exist_ok=True)
            os.replace(staging / name, target)
            if target.parent != directory:
                sync_directory(target.parent)
    for name in manifest["obsolete"]:
        path = directory / name
        path.unlink(missing_ok=True)
        if path.parent != directory:
            _remove_empty([path.parent])
    sync_directory(directory)
    shutil.rmtree(staging)
