"""``scripts/install.sh``: a download that broke off is tried again, any other failure is not."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "install.sh"

BROKEN = "error: incomplete-download (499.1 MB/539.1 MB)"


def install(folder, *, error, failures):
    """Installs by a command that fails ``failures`` times; returns its calls, and the end."""
    calls = folder / "calls"
    command = f"""
        echo x >> {calls}
        if [ $(wc -l < {calls}) -le {failures} ]; then echo "{error}" >&2; exit 3; fi
        echo done
    """
    done = subprocess.run(
        ["sh", str(SCRIPT), "sh", "-c", command],
        env={**os.environ, "INSTALL_PAUSES": "0 0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return len(calls.read_text().splitlines()), done


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_broken_download_is_tried_again(tmp_path, failures):
    calls, done = install(tmp_path, error=BROKEN, failures=failures)
    assert (calls, done.returncode, done.stdout) == (failures + 1, 0, "done\n")
    assert done.stderr.count("next try in 0 seconds") == failures
    assert done.stderr.count(BROKEN) == failures


def test_script_gives_up_after_the_last_pause(tmp_path):
    calls, done = install(tmp_path, error=BROKEN, failures=9)
    assert (calls, done.returncode) == (3, 3)


def test_other_failures_end_at_once(tmp_path):
    calls, done = install(tmp_path, error="No matching distribution found", failures=9)
    assert (calls, done.returncode) == (1, 3)
    assert done.stderr == "No matching distribution found\n"
