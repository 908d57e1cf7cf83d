"""Reading and checking the files of a checkpoint; see `files` for how they are written."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError
from .format import MANIFEST, parse

__all__ = ["StoredFiles", "read"]

_ATTEMPTS = 100
_CHUNK = 1 << 22


class StoredFiles:
    """A checkpoint that was read and found undamaged.

    Attributes:
        directory: where it is.
        manifest: the content of `bundle.json`.
        tensors: those of each file, by file and name. They are views of the files: to be copied.
    """

    def __init__(
        self, directory: Path, manifest: dict[str, Any], tensors: dict[str, dict[str, Tensor]]
    ) -> None:
        self.directory = directory
        self.manifest = manifest
        self.tensors = tensors

    def path(self, name: str) -> str:
        """The path of a file, for messages."""
        return str(self.directory / name)


def read(directory: Path, names: tuple[str, ...], *, check_all: bool = False) -> StoredFiles:
    """Reads and checks a checkpoint.

    Args:
        directory: where it is.
        names: the files to be read, those of them that the checkpoint has.
        check_all: check the other files too.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    for _ in range(_ATTEMPTS):
        data = _read_manifest(directory)
        try:
            manifest = parse(data, str(directory / MANIFEST))
            files = [name for name in manifest["files"] if check_all or name in names]
            tensors = {
                name: _read_tensors(directory, manifest, name, load=name in names) for name in files
            }
        except CheckpointError:
            # A save that runs at the same time puts its own files in the place of these.
            if _read_manifest(directory) != data:
                continue
            raise
        # Files change only after bundle.json has, so these are of one checkpoint.
        if _read_manifest(directory) == data:
            return StoredFiles(directory, manifest, tensors)
    raise CheckpointError(f"{directory} is saved to faster than it can be read")


def _read_manifest(directory: Path) -> bytes:
    path = directory / MANIFEST
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = "has no bundle.json" if directory.is_dir() else "is no directory"
        raise CheckpointError(f"{directory} is not a checkpoint: it {missing}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _read_tensors(
    directory: Path, manifest: Mapping[str, Any], name: str, *, load: bool
) -> dict[str, Tensor]:
    # In this order: a save may be moving the file from the one place to the other.
    for path in (directory / f".save-{manifest['save_id']}" / name, directory / name):
        try:
            _check(path, manifest["files"][name])
            return safetensors.torch.load_file(path) if load else {}
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    raise CheckpointError(f"{directory / name} is missing")


def _check(path: Path, expected: Mapping[str, Any]) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != expected["size"]:
            raise CheckpointError(
                f"{path} was truncated or altered: it has {size} bytes, bundle.json says "
                f"{expected['size']}"
            )
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != expected["sha256"]:
        raise CheckpointError(f"{path} was altered: its checksum is not that in bundle.json")
