"""The curves of a training, per model."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..change import Change
from ..errors import ModelBatchError

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["Best", "History"]

_LOSSES = ("loss", "val_loss")


class Best(NamedTuple):
    """The best value of a metric, and where it was reached."""

    model: int
    value: float
    epoch: int


class History:
    """What `fit` returns: a curve per model for every metric.

    `history["loss"]` is a float64 tensor `[E, M]` on the CPU, E epochs by M models; `"val_loss"`
    and `"val_<metric>"` are there if there was a validation, NaN in epochs without it. `"lr"` are
    the learning rates at the start of each epoch, and `"active"` (bool) says which models were
    training at its end. The curve of a frozen model goes on with what its weights, which rest,
    are worth.

    Where models come and go during the training there is a column for every model that ever was,
    `model_ids` says which: NaN (False for `"active"`) before it joined and after it left.

    Args:
        num_models: M.
        model_ids: of the models; 0 to M - 1 by default.

    Attributes:
        num_models: how many columns the curves have.
        model_ids: the id of the model of each column.
        status: `"finished"`, `"interrupted"` (Ctrl-C), `"stopped"` (by a callback), or `"frozen"`
            (no model was active any more).
    """

    def __init__(self, num_models: int, model_ids: Sequence[int] | None = None) -> None:
        self.num_models = num_models
        self.model_ids = list(range(num_models) if model_ids is None else model_ids)
        self._columns = list(range(num_models))  # of the models that there are now
        self.status = "finished"
        self._curves: dict[str, list[Tensor]] = {}
        self._seconds: list[float] = []

    # ---- what is in it

    @property
    def epochs(self) -> int:
        """Epochs recorded."""
        return len(self._seconds)

    @property
    def seconds(self) -> float:
        """How long these epochs took, validation and callbacks included, pauses not."""
        return sum(self._seconds)

    def keys(self) -> list[str]:
        """The names of the curves."""
        return list(self._curves)

    def __iter__(self) -> Iterator[str]:
        return iter(self._curves)

    def __len__(self) -> int:
        return self.epochs

    def __contains__(self, name: object) -> bool:
        return name in self._curves

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._curves:
            known = ", ".join(self._curves) or "none, no epoch has ended"
            raise ModelBatchError(f"there is no curve {name!r}; there are: {known}")
        return torch.stack(self._curves[name])

    def __repr__(self) -> str:
        return (
            f"History({self.num_models} models, {self.epochs} epochs, {self.status}: "
            f"{', '.join(self._curves)})"
        )

    def append(self, rows: Mapping[str, Tensor], seconds: float) -> None:
        """Record an epoch: `[M]` by name. A curve without a value in an epoch has NaN there."""
        missing = torch.full((self.num_models,), torch.nan, dtype=torch.float64)
        for name in rows:
            self._curves.setdefault(name, [missing] * self.epochs)
        for name, curve in self._curves.items():
            curve.append(self._spread(rows[name]) if name in rows else missing)
        self._seconds.append(seconds)

    def _spread(self, row: Tensor) -> Tensor:
        """Values `[M]` of the models that there are, in the columns of all that ever were."""
        if len(self._columns) == self.num_models and self._columns == sorted(self._columns):
            return row
        nothing = False if row.dtype == torch.bool else torch.nan
        wide = row.new_full((self.num_models,), nothing)
        wide[self._columns] = row
        return wide

    def models_changed(self, change: Change) -> None:
        """Record what follows for the models that there are after a change."""
        new = [model_id for model_id in change.ids if model_id not in self.model_ids]
        for curve in self._curves.values():
            for epoch, row in enumerate(curve):
                nothing = False if row.dtype == torch.bool else torch.nan
                curve[epoch] = torch.cat([row, row.new_full((len(new),), nothing)])
        self.model_ids += new
        self.num_models = len(self.model_ids)
        self._columns = [self.model_ids.index(model_id) for model_id in change.ids]

    # ---- questions to it

    def best(self, metric: str | None = None, mode: str | None = None) -> Best:
        """The best value that any model reached in any epoch; NaN never counts.

        Args:
            metric: name of a curve; by default `"val_loss"`, or `"loss"` without a validation.
            mode: `"min"` or `"max"`; may be left out for losses, which are to be small.

        Returns:
            (model, value, epoch), the first if several are equal; the model by its id.

        Raises:
            ModelBatchError: no such curve, a bad mode, or nothing but NaN.
        """
        metric = self._metric(metric)
        if mode is None and metric in _LOSSES:
            mode = "min"
        if mode not in ("min", "max"):
            raise ModelBatchError(f'mode must be "min" or "max" for {metric!r}, got {mode!r}')
        values = self[metric].double()
        if not (values == values).any():
            raise ModelBatchError(f"no model has a value of {metric!r} other than NaN")
        worst = torch.inf if mode == "min" else -torch.inf
        # Infinity may be the best there is, and NaN must not be taken for it.
        filled = torch.where(values != values, worst, values)
        extreme = filled.min() if mode == "min" else filled.max()
        at = int((values == extreme).flatten().nonzero()[0])
        epoch, column = divmod(at, self.num_models)
        return Best(self.model_ids[column], float(extreme), epoch)

    def to_dataframe(self) -> "pandas.DataFrame":
        """A table of one number per row: the columns are epoch, model, metric and value.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                'History.to_dataframe needs pandas: pip install "modelbatch[plot]"'
            ) from error
        names = list(self._curves)
        shape = (len(names), self.epochs, self.num_models)
        values = torch.empty(shape, dtype=torch.float64)
        for i, name in enumerate(names):
            values[i] = self[name]
        metric, epoch, model = (
            axis.flatten()
            for axis in torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
        )
        return pandas.DataFrame(
            {
                "epoch": epoch.numpy(),
                "model": torch.tensor(self.model_ids)[model].numpy(),
                "metric": pandas.Categorical.from_codes(metric.numpy(), categories=names),
                "value": values.flatten().numpy(),
            }
        )

    def plot(
        self, path: str | Path | None = None, *, metric: str | None = None, mode: str | None = None
    ) -> "Figure":
        """Draw the curves of all models, and the last values over the learning rates.

        The left panel has the best model, the median and the quartiles of each epoch before the
        thin curves of all models. The right one has what every model ended with over the learning
        rate that it began with, on a logarithmic axis.

        Args:
            path: a file to write, in the format of its suffix; without one the figure is that of
                `matplotlib.pyplot`, and a notebook shows it.
            metric: name of a curve; by default `"val_loss"`, or `"loss"` without a validation.
            mode: `"min"` or `"max"`, see `best`.

        Raises:
            ModelBatchError: no such curve, or no epoch was recorded.
            ImportError: matplotlib is not installed.
        """
        from .plot import plot_history

        metric = self._metric(metric)
        if mode is None and metric not in _LOSSES:
            mode = "max" if "acc" in metric else None
        return plot_history(self, path, metric, self._best_or_none(metric, mode))

    def _best_or_none(self, metric: str, mode: str | None) -> Best | None:
        if mode is None and metric not in _LOSSES:
            return None  # who knows what is good
        values = self[metric]
        return self.best(metric, mode) if (values == values).any() else None

    def _metric(self, metric: str | None) -> str:
        if metric is None:
            metric = "val_loss" if "val_loss" in self._curves else "loss"
        return metric

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Everything in plain containers and tensors `[E, M]`."""
        return {
            "num_models": self.num_models,
            "model_ids": list(self.model_ids),
            "columns": list(self._columns),
            "status": self.status,
            "curves": {name: torch.stack(curve) for name, curve in self._curves.items()},
            "seconds": list(self._seconds),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ModelBatchError: it is that of another number of models; nothing has changed then.
        """
        saved = state_dict["num_models"]
        columns = state_dict.get("columns", range(saved))
        if len(columns) != len(self._columns):
            raise ModelBatchError(
                f"the history is of {len(columns)} models, not of {len(self._columns)}"
            )
        self.num_models, self._columns = saved, list(columns)
        self.model_ids = list(state_dict.get("model_ids", range(saved)))
        self.status = state_dict["status"]
        curves = state_dict["curves"].items()
        self._curves = {name: list(curve.detach().cpu().clone()) for name, curve in curves}
        self._seconds = [float(seconds) for seconds in state_dict["seconds"]]
