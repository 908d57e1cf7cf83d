"""`History`: the curves of a training."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modelbatch import ModelBatchError
from modelbatch.training import Best, History

NAN, INF = float("nan"), float("inf")


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def history() -> History:
    made = History(3)
    rates = row(0.1, 1.0, 10.0)
    active = torch.tensor([True, True, True])
    made.append({"loss": row(2, 2, 2), "lr": rates, "active": active}, 1.5)
    made.append(
        {
            "loss": row(1, 3, INF),
            "val_loss": row(1.5, 2.5, NAN),
            "val_accuracy": row(0.5, 0.75, NAN),
            "lr": rates,
            "active": torch.tensor([True, True, False]),
        },
        0.5,
    )
    made.append(
        {
            "loss": row(0.5, 0.5, NAN),
            "val_loss": row(1.75, 1.25, NAN),
            "val_accuracy": row(0.75, 0.5, NAN),
            "lr": rates / 2,
            "active": torch.tensor([True, True, False]),
        },
        0.25,
    )
    return made


def test_the_curves(history: History) -> None:
    assert history.epochs == len(history) == 3
    assert history.seconds == 2.25
    assert list(history) == history.keys()
    assert history.keys() == ["loss", "lr", "active", "val_loss", "val_accuracy"]
    assert "val_loss" in history and "val_auc" not in history
    assert history["loss"].shape == (3, 3) and history["loss"].dtype == torch.float64
    assert history["active"].dtype == torch.bool
    assert history["lr"][2].tolist() == [0.05, 0.5, 5.0]
    assert history["val_loss"][0].isnan().all()  # there was no validation then
    assert repr(history) == (
        "History(3 models, 3 epochs, finished: loss, lr, active, val_loss, val_accuracy)"
    )


def test_an_unknown_curve(history: History) -> None:
    with pytest.raises(ModelBatchError, match="no curve 'auc'; there are: loss, lr"):
        history["auc"]
    with pytest.raises(ModelBatchError, match="no epoch has ended"):
        History(2)["loss"]


def test_the_best(history: History) -> None:
    assert history.best() == Best(model=1, value=1.25, epoch=2)
    assert history.best("loss") == (0, 0.5, 2)  # the first of two equal ones
    assert history.best("loss", "max") == (2, INF, 1)
    assert history.best("val_accuracy", "max") == (1, 0.75, 1)
    assert history.best(metric="val_accuracy", mode="min") == (0, 0.5, 1)
    plain = History(2)
    plain.append({"loss": row(NAN, INF)}, 0.0)
    assert plain.best() == (1, INF, 0)  # without a validation it is the training loss


def test_the_best_of_what(history: History) -> None:
    with pytest.raises(ModelBatchError, match='mode must be "min" or "max" for \'val_accuracy\''):
        history.best("val_accuracy")
    with pytest.raises(ModelBatchError, match="got 'least'"):
        history.best(mode="least")
    lost = History(2)
    lost.append({"loss": row(NAN, NAN)}, 0.0)
    with pytest.raises(ModelBatchError, match="other than NaN"):
        lost.best()


def test_the_table(history: History) -> None:
    table = history.to_dataframe()
    assert list(table.columns) == ["epoch", "model", "metric", "value"]
    assert len(table) == 5 * 3 * 3
    for name in history:
        wide = table[table.metric == name].pivot(index="epoch", columns="model", values="value")
        values = torch.tensor(wide.to_numpy(copy=True))
        assert torch.equal(values.nan_to_num(9.0), history[name].double().nan_to_num(9.0))


def test_the_table_without_an_epoch() -> None:
    assert len(History(4).to_dataframe()) == 0


def test_the_state(history: History) -> None:
    other = History(3)
    history.status = "frozen"
    other.load_state_dict(history.state_dict())
    assert other.keys() == history.keys() and other.status == "frozen"
    assert other.seconds == history.seconds
    for name in history:
        assert torch.equal(other[name].nan_to_num(9.0), history[name].nan_to_num(9.0))
        assert other[name].dtype == history[name].dtype
    other.append({"loss": row(1, 1, 1)}, 1.0)
    assert history.epochs == 3
    with pytest.raises(ModelBatchError, match="of 3 models, not of 2"):
        History(2).load_state_dict(history.state_dict())


# ---- plots


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_plot_is_written(history: History, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plot{suffix}"
    figure = history.plot(path)
    assert path.stat().st_size > 4000
    curves, last = figure.axes
    assert curves.get_ylabel() == "validation loss"
    assert last.get_xscale() == "log"
    names = [text.get_text() for text in curves.get_legend().get_texts()]
    assert names == ["quartiles", "median", "best: model 1, 1.25"]
    # the model without a number is not forgotten
    assert "diverged: 1" in [text.get_text() for text in last.get_legend().get_texts()]


def test_what_is_drawn(history: History, tmp_path: Path) -> None:
    curves, last = history.plot(tmp_path / "plot.png", metric="loss").axes
    lines = [line.get_ydata() for line in curves.get_lines()]
    assert [list(y) for y in lines[:2]] == [[2, 1, 0.5], [2, 3, 0.5]]
    median = lines[3]
    assert list(median) == [2, 2, 0.5]  # of the finite ones
    assert last.collections[0].get_offsets().tolist() == [[0.1, 0.5], [1.0, 0.5]]


def test_a_huge_loss_does_not_hide_the_others(tmp_path: Path) -> None:
    history = History(4)
    for loss in (1.0, 0.1):
        rates = row(1e-3, 1e-2, 1e-1, 1e2)
        history.append({"loss": row(2 * loss, loss, loss, 1e30), "lr": rates}, 1.0)
    axes = history.plot(tmp_path / "plot.png").axes[0]
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[1] < 1e20 and axes.get_ylim()[0] < 0.1


@pytest.mark.parametrize("values", [[NAN, NAN], [0.5, 0.5], [0.0, -3.0], [INF, 1.0]])
@pytest.mark.parametrize("rates", [[NAN, NAN], [0.1, 0.1], [0.0, 1.0]])
def test_odd_curves_are_drawn(tmp_path: Path, values: list[float], rates: list[float]) -> None:
    history = History(2)
    history.append({"loss": row(*values), "lr": row(*rates)}, 1.0)
    figure = history.plot(tmp_path / "plot.png")
    assert len(figure.axes) == (1 if rates[0] != rates[0] else 2)


def test_accuracies_are_better_when_large(history: History, tmp_path: Path) -> None:
    axes = history.plot(tmp_path / "plot.png", metric="val_accuracy").axes[0]
    assert axes.get_ylabel() == "validation accuracy"
    assert "best: model 1, 0.75" in [text.get_text() for text in axes.get_legend().get_texts()]
    axes = history.plot(tmp_path / "plot.png", metric="val_accuracy", mode="min").axes[0]
    assert "best: model 0, 0.5" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_plot_without_a_file(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    import matplotlib.pyplot

    matplotlib.pyplot.switch_backend("agg")
    figure = history.plot()
    assert matplotlib.pyplot.get_fignums() == [figure.number]
    matplotlib.pyplot.close(figure)


def test_writing_a_plot_leaves_pyplot_alone(history: History, tmp_path: Path) -> None:
    import matplotlib.pyplot

    before = matplotlib.pyplot.get_fignums()
    history.plot(tmp_path / "plot.png")
    assert matplotlib.pyplot.get_fignums() == before


def test_nothing_to_plot(tmp_path: Path) -> None:
    with pytest.raises(ModelBatchError, match="no epoch has ended"):
        History(2).plot(tmp_path / "plot.png")


@pytest.mark.parametrize(("name", "call"), [("pandas", "to_dataframe"), ("matplotlib", "plot")])
def test_what_is_not_installed_is_named(
    history: History, monkeypatch: pytest.MonkeyPatch, name: str, call: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"needs {name}: pip install .*modelbatch\[plot\]"):
        getattr(history, call)()


def test_the_package_imports_neither() -> None:
    import subprocess

    code: Any = (
        "import sys, modelbatch.training as t; "
        "sys.exit(any(n in sys.modules for n in ('pandas', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
