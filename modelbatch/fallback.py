"""Finding out what torch's vmap could not batch."""

import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch._C._functorch as _functorch

# not in torch's stubs
functorch: Any = _functorch

_SLOW_RULE = re.compile(r"batching rule for (\S+?)\.? ?\.|batching rule for (\S+)")


_LIBRARIES = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


def users_stacklevel() -> int:
    """The `stacklevel` with which a warning given by the caller points at the user's own line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        level, frame = level + 1, frame.f_back
    return level


class FallbackWatch:
    """Notices operations that torch's vmap loops over, while a bundle's first forwards run."""

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.found: list[tuple[str, str]] = []

    def __enter__(self) -> "FallbackWatch":
        if self.enabled:
            functorch._set_vmap_fallback_warning_enabled(True)
            self.catcher = warnings.catch_warnings(record=True)
            self.caught = self.catcher.__enter__()
            warnings.simplefilter("always")
        return self

    def __exit__(self, *exc_info: Any) -> None:
        if not self.enabled:
            return
        self.catcher.__exit__(*exc_info)
        functorch._set_vmap_fallback_warning_enabled(False)
        for item in self.caught or ():
            text = str(item.message)
            match = _SLOW_RULE.search(text) if "performance drop" in text else None
            if match is None:
                warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)
            else:
                name = (match.group(1) or match.group(2)).rstrip(".")
                self.found.append((name, "torch has no batching rule for it"))


def cause(error: Exception) -> tuple[str, str]:
    """A name for what could not be batched, and why, from the error of the batched run."""
    text = str(error)
    match = re.search(r"[Bb]atching rule not implemented for (\S+?)[;,. ]", text + " ")
    if match:
        return match.group(1), "torch has no batching rule for it"
    if "data-dependent control flow" in text:
        return "data-dependent control flow", "a branch of the forward depends on a tensor's value"
    if ".item()" in text:
        return "Tensor.item()", "the forward reads a tensor's value"
    first = text.splitlines()[0] if text else ""
    return "the forward", f"{type(error).__name__}: {first}"
