"""Which process a running trial belongs to, and whether that process is still there."""

import os
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["Mark", "new_mark", "release", "still_runs"]

Mark = dict[str, Any]

# The marks of sweeps that are running in this process.
_own: set[str] = set()


def new_mark() -> Mark:
    """What identifies one call of a sweep's `run`: JSON, for an attribute of its trials."""
    pid, run = os.getpid(), uuid.uuid4().hex
    _own.add(run)
    return {"host": socket.gethostname(), "pid": pid, "started": _started(pid), "run": run}


def release(mark: Mark) -> None:
    """The call has ended."""
    _own.discard(mark["run"])


def still_runs(mark: Mapping[str, Any]) -> bool | None:
    """Whether the call that made a mark still runs; None if that cannot be seen from here."""
    if mark.get("host") != socket.gethostname():
        return None
    pid = mark.get("pid")
    if pid == os.getpid():
        return mark.get("run") in _own
    started = _started(pid)
    return started is not None and started == mark.get("started")


def _started(pid: Any) -> str | None:
    """When a process began, so that a later one of the same number is told apart; None if dead."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # the name, in parentheses, may have spaces
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, TypeError, ValueError):
        return None
    state, ticks = fields[0], fields[19]
    return None if state in "ZX" else f"{boot}/{ticks}"
