"""`bundle.json`: what it holds, how it is written, and how it is recognised.

The file is one JSON object with one entry a line. The first entry is the SHA-256 checksum of all
that follows it; sizes and checksums of the other files are in the entry `files`. So no byte of a
checkpoint can change unnoticed.
"""

import hashlib
import json
import re
from typing import Any

from ..errors import CheckpointError

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST",
    "OPTIMIZER",
    "RANDOM",
    "STACKED",
    "STATES",
    "ForeignFileError",
    "dump",
    "model_file",
    "parse",
]

FORMAT = "modelbatch.bundle"
FORMAT_VERSION = 1

MANIFEST = "bundle.json"
STACKED = "stacked.safetensors"
OPTIMIZER = "optimizer.safetensors"
RANDOM = "random.safetensors"
STATES = "states.safetensors"

_HEAD = re.compile(rb'\{\n"sha256": "([0-9a-f]{64})",\n')
_FILE_NAME = re.compile(r"(model_\d+/)?[a-z]+\.safetensors")
_SAVE_ID = re.compile(r"[0-9a-f]{16}")
_ENTRIES: dict[str, type] = {
    "num_models": int,
    "models": list,
    "attributes": dict,
    "training": dict,
    "random": dict,
    "tensors": dict,
    "extra_state": dict,
    "states": dict,
    "files": dict,
    "obsolete": list,
}


class ForeignFileError(CheckpointError):
    """A `bundle.json` that something else than this library has written."""


def model_file(model_id: int) -> str:
    """The file of one model, as saved with `per_model=True`."""
    return f"model_{model_id:04d}/model.safetensors"


def dump(content: dict[str, Any]) -> bytes:
    """The bytes of `bundle.json`."""
    entries = (f"{json.dumps(key)}: {_compact(value)}" for key, value in content.items())
    body = (",\n".join(entries) + "\n}\n").encode("ascii")
    return b'{\n"sha256": "%s",\n' % hashlib.sha256(body).hexdigest().encode("ascii") + body


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def parse(data: bytes, where: str) -> dict[str, Any]:
    """The content of `bundle.json`.

    Args:
        data: its bytes.
        where: its path, for messages.

    Raises:
        CheckpointError: it is damaged, of another version, or something else altogether.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is truncated or altered: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ForeignFileError(f"{where} is not that of a ModelBatch checkpoint")
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format_version {version!r}; this version of modelbatch reads "
            f"{FORMAT_VERSION}, it was written by modelbatch {content.get('modelbatch')!r}"
        )
    head = _HEAD.match(data)
    if head is None or head[1].decode() != hashlib.sha256(data[head.end() :]).hexdigest():
        raise CheckpointError(f"{where} was altered: its checksum is not right")
    wrong = [key for key, kind in _ENTRIES.items() if not isinstance(content.get(key), kind)]
    if wrong or not _files_are_ours(content):
        raise CheckpointError(f"{where} is incomplete: {', '.join(wrong) or 'files'}")
    return content


def _files_are_ours(content: dict[str, Any]) -> bool:
    # A save removes the files that the one before it has listed, so no other name may be there.
    files, save_id = content["files"], content.get("save_id")
    return (
        isinstance(save_id, str)
        and _SAVE_ID.fullmatch(save_id) is not None
        and STACKED in files
        and all(
            isinstance(name, str) and _FILE_NAME.fullmatch(name)
            for name in (*files, *content["obsolete"])
        )
        and all(isinstance(e, dict) and {"size", "sha256"} <= e.keys() for e in files.values())
    )
