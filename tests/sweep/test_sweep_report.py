"""Tables, figures, the page and the view of a sweep."""

import io
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sweep.sweep_case import build, data
from torch import nn

from modelbatch import ModelBatchError
from modelbatch.sweep import MedianPruner, SweepResult, run_sweep
from modelbatch.sweep.axes import curve_limits, parallel_axes

ROOT = Path(__file__).resolve().parents[2]
X, Y = data()
EVIL = "<script>alert('x')</script>"
CONFIGS: list[dict[str, Any]] = [
    {"lr": 10 ** (-3 + i / 4), "width": 4 + 2 * (i % 2), "note": f"{EVIL} & {i % 3}", "value": i}
    for i in range(10)
]


def refusing(config: dict[str, Any]) -> nn.Module:
    if config["value"] == 3:
        raise ValueError(EVIL)
    return build(config)


@pytest.fixture(scope="module")
def result() -> SweepResult:
    configs = [*CONFIGS, {"lr": 1e300, "weight_decay": 1e10, "value": 11}]
    return run_sweep(
        refusing,
        configs,
        (X, Y),
        (X[:10], Y[:10]),
        epochs=4,
        batch_size=8,
        optimizer_cls="SGD",  # type: ignore[arg-type]
        pruner=MedianPruner(2),
        progress=False,
    )


class _Page(HTMLParser):
    """Rows of cells, what each tag was seen with, and whether the tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += text


def test_the_page_has_every_trial_and_needs_nothing_else(
    result: SweepResult, tmp_path: Path
) -> None:
    path = result.report(tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    head, *rows = page.rows
    assert head[:3] == ["trial", "status", "val_loss"]
    assert [int(row[0]) for row in rows] == [own.id for own in result.ranking()]
    for row in rows:
        own = result[int(row[0])]
        assert row[1] == own.status
        assert row[2] == ("" if own.value is None else f"{own.value:.6g}")
        assert row[head.index("lr")] == f"{own.config['lr']:.6g}"
        assert row[head.index("error")] == own.error
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert EVIL not in text and "&lt;script&gt;" in text
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe")
        assert not {"src", "href", "onclick"} & set(attributes)
    assert "@import" not in text and "http" not in text and "fetch(" not in text
    lines = [attributes for tag, attributes in page.tags if attributes.get("class") == "line"]
    drawn = [own for own in result.values() if own.epochs]
    valued = [own for own in drawn if own.value is not None and own.status != "diverged"]
    finite = {
        n: [o for o in drawn if any(map(math.isfinite, o.curves[n]))] for n in drawn[0].curves
    }
    assert len(lines) == len(valued) + sum(map(len, finite.values()))
    for attributes in lines:
        assert "nan" not in (attributes["d"] or "") and "inf" not in (attributes["d"] or "")


def test_a_page_that_cannot_be_written(result: SweepResult, tmp_path: Path) -> None:
    with pytest.raises(ModelBatchError, match="cannot be written"):
        result.report(tmp_path / "no" / "report.html")


def test_a_page_of_nothing_but_failures(tmp_path: Path) -> None:
    failed = run_sweep(lambda c: 3, CONFIGS, (X, Y), epochs=1, progress=False)  # type: ignore
    page = _Page(failed.report(tmp_path / "report.html").read_text())
    assert len(page.rows) == 1 + len(CONFIGS)
    with pytest.raises(ModelBatchError, match="no trial has a value of 'loss'; trial 0: "):
        _ = failed.best


def test_the_table(result: SweepResult) -> None:
    table = result.to_dataframe()
    assert list(table.trial) == list(range(11))
    assert list(table.status) == [own.status for own in result.values()]
    assert table.lr[2] == CONFIGS[2]["lr"]
    assert table.config_value[2] == 2 and table.value[2] == result[2].value
    curves = result.to_dataframe(curves=True)
    assert len(curves) == sum(own.epochs for own in result.values())
    one = curves[curves.trial == 2]
    assert list(one.val_loss) == result[2].curves["val_loss"]


def test_the_figures(result: SweepResult, tmp_path: Path) -> None:
    figure = result.plot_curves(tmp_path / "curves.png")
    drawn = [list(line.get_ydata()) for line in figure.axes[0].lines]
    assert drawn[-1] == result.best.curves["val_loss"]  # on top
    assert len(drawn) == 11
    parallel = result.plot_parallel(tmp_path / "parallel.svg")
    assert [label.get_text() for label in parallel.axes[0].get_xticklabels()] == [
        "lr",
        "width",
        "note",
        "value",
        "weight_decay",
        "val_loss",
    ]
    assert (tmp_path / "curves.png").stat().st_size and (tmp_path / "parallel.svg").stat().st_size
    with pytest.raises(ModelBatchError, match="no curve 'acc'; there are: loss, val_loss"):
        result.plot_curves(curve="acc")


def test_axes_are_logarithmic_where_numbers_span_decades(result: SweepResult) -> None:
    results = [result[i] for i in range(10) if i != 3]
    lr, width, note, value = parallel_axes(results, ["lr", "width", "note"], "val_loss")
    exact = [i / 9 for i in range(10) if i != 3]
    assert lr.places == pytest.approx(exact)
    assert width.places == [i % 2 for i in range(10) if i != 3]
    assert [label for _, label in width.ticks] == ["4", "6"]
    assert len(note.ticks) == 3
    assert all(0 <= place <= 1 for place in value.places)
    low, high = curve_limits([[1.0, 1.1, 1.2, 1.3] * 10, [1e30], [math.nan]])
    assert low == 1.0 and 1.3 <= high < 2
    assert curve_limits([[math.nan]]) == (0.0, 1.0)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_view(terminal: bool) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120)
    run_sweep(build, CONFIGS, (X, Y), epochs=2, batch_size=8, console=console)
    shown = text.getvalue()
    assert "10/10 trials" in shown and "10 finished" in shown
    assert ("\x1b[" in shown) == terminal
    assert "best loss" in shown
    if not terminal:
        first, last = shown.splitlines()
        assert first == "0/10 trials"
        assert last.startswith("10/10 trials: 10 finished; best loss ")


@pytest.mark.parametrize(
    ("package", "call"), [("matplotlib", "plot_curves"), ("pandas", "to_dataframe")]
)
def test_optional_packages_are_asked_for_by_name(
    package: str, call: str, result: SweepResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{call} needs {package}: pip install .modelbatch.plot"):
        getattr(result, call)()


def test_sweeps_import_no_optional_package() -> None:
    code = (
        "import sys, modelbatch.sweep; print('pandas' in sys.modules, 'matplotlib' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.split() == ["False", "False"]


def test_the_example_goes_on_where_it_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error::UserWarning", str(ROOT / "examples/config_sweep.py")]
    command += ["--trials", "12", "--epochs", "2", "--out", str(tmp_path)]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, env=_env())
        for _ in range(2)
    )
    assert "12/12 trials" in first.stdout
    for line in first.stdout.splitlines():
        if line.startswith(("1.", "2.", "test accuracy")):
            assert line in second.stdout
    assert _Page((tmp_path / "report.html").read_text()).rows


def _env() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
