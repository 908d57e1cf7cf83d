"""The Python code of the README and of the documentation runs as printed.

The blocks of one page run in order in one namespace, as a reader would type them.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[int, str]]:
    """(first line, code) of each fenced Python block of a page."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(1)), m.group(1)) for m in _BLOCK.finditer(text)]


PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "```python" in page.read_text(encoding="utf-8")
]


# Lightning's own: how it walks through batches, that a loader has no workers, and that a second fit
# writes its checkpoints where the first one did.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated")
@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_python_block_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some blocks save a file
    code = blocks(page)
    assert code, "the page has a Python block that was not recognised"
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, block in code:
        exec(compile("\n" * line + block, str(page), "exec"), namespace)


def test_the_readme_example_is_short() -> None:
    ((_, code),) = blocks(ROOT / "README.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert pages
    assert [page for page in pages if page not in navigation] == []
