"""One bundle as a trial of Ray Tune."""

import copy
import math
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from ray.tune import PlacementGroupFactory

from ...errors import ModelBatchError
from .arguments import read_arguments
from .bundles import ActorBundles
from .checkpoint import load_bundles, save_bundles
from .entries import Many, read_entries

__all__ = ["BundleTrainable"]


class BundleTrainable(tune.Trainable):
    """Trains a whole bundle of models in one actor, on one device.

    `tune.with_parameters(BundleTrainable, build=build, train_data=..., epochs=...)` puts what all
    models share into Ray's object store; a Ray trial's config holds the models, as `BundleSearcher`
    makes it: `{"trials": [{"id": ..., "number": ..., "config": {...}}, ...]}`. A config without
    `"trials"` is that of a single model.

    A class of your own may make the shared arguments in the actor instead, from a file say, by
    overriding `arguments`.

    A step is `epochs_per_step` epochs of all models, and gives Ray:

    * `models`: a row for each model that was trained, a dict with its `id`, `number`, `status`,
      `training_iteration` (its epochs) and curves: `loss`, `val_loss`, `val_<metric>`; `error` for
      one that failed; `copied_from`, `operations` and the new `config` after a copy by `BundlePBT`;
    * `best` and, under its own name, the best value of the metric so far, of all models (NaN as
      long as there is none), and `best_model`, whose it is;
    * `models_active`, and `done` when that is 0. Then a checkpoint is asked for too.

    The result of a model depends on its configuration, its number and `seed` alone, except where a
    pruner or population based training compares it with others. With a checkpoint after some
    steps (`CheckpointConfig(checkpoint_frequency=...)`), an actor that died goes on from the last
    one, and gives to the last bit what it would have given; without one it begins anew, likewise.

    Besides `pbt` and `epochs_per_step`, the shared arguments are those of
    `modelbatch.sweep.run_sweep`: `build`, `train_data`, `val_data`, `epochs`, `batch_size`,
    `metric`, `mode`, `optimizer_cls`, `loss_fn`, `metric_fns`, `pruner`, `scheduler`,
    `scheduler_interval`, `callbacks`, `seed`, `keep_weights`, `device`. The pruner works within
    the actor; a `RungBoard` around it within the experiment. By default `device` is the GPU that
    Ray gives the trial.
    """

    def arguments(self, config: dict[str, Any]) -> dict[str, Any]:
        """Arguments that are made in the actor; override it.

        Args:
            config: of the Ray trial.
        """
        return {}

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        """One CPU, and one GPU if the cluster has any; `tune.with_resources` asks for others."""
        if ray.is_initialized():
            gpu = ray.cluster_resources().get("GPU", 0) > 0
        else:
            gpu = torch.cuda.is_available()
        return PlacementGroupFactory([{"CPU": 1, "GPU": 1} if gpu else {"CPU": 1}])

    def setup(self, config: dict[str, Any], **arguments: Any) -> None:
        """Build the models and stack them; called by Ray.

        Raises:
            ModelBatchError: an argument is missing or bad. A bad configuration of a model raises
                nothing, it costs only this model.
        """
        given = {**arguments, **self.arguments(config)}
        missing = [name for name in ("build", "train_data", "epochs") if given.get(name) is None]
        if missing:
            raise ModelBatchError(
                f"BundleTrainable needs {', '.join(missing)}: "
                "tune.with_parameters(BundleTrainable, build=..., train_data=..., epochs=...)"
            )
        resources: Any = self.trial_resources
        if resources is not None:
            asked = resources.required_resources
            torch.set_num_threads(max(1, int(asked.get("CPU", 1))))
            if given.get("device") is None and asked.get("GPU", 0) and torch.cuda.is_available():
                given["device"] = "cuda"
        shared = read_arguments(**given)
        entries, numbered = read_entries(config)
        if shared.board is not None:
            if not numbered:
                raise ModelBatchError(
                    "a RungBoard tells the models of all bundles apart by their numbers, so each "
                    "needs its own: {'number': ..., 'config': ...}; BundleSearcher gives them"
                )
            shared.board = copy.deepcopy(shared.board)
        self._bundles = ActorBundles(entries, shared, self.trial_id)
        self._shared = shared

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take another bundle, in the same actor."""
        self.cleanup()
        self.setup(new_config)  # that of tune.with_parameters, which adds the arguments
        return True

    def step(self) -> dict[str, Any]:
        """Train all models for an epoch, or for `epochs_per_step`."""
        bundles = self._bundles
        rows = bundles.run_epoch()
        for _ in range(self._shared.epochs_per_step - 1):
            if bundles.done:
                break
            rows += bundles.run_epoch()
        best = bundles.table.best()
        value = math.nan if best is None or best.value is None else best.value
        result = {
            "models": Many(rows),
            "best": value,
            bundles.table.metric: value,
            "best_model": None if best is None else bundles.table.ids[best.id],
            "models_active": len(bundles.table.running()),
            "done": bundles.done,
        }
        if bundles.done:
            result["should_checkpoint"] = True
        return result

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write everything that training goes on from."""
        save_bundles(self._bundles, Path(checkpoint_dir))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Go on from what `save_checkpoint` wrote."""
        load_bundles(self._bundles, Path(checkpoint))

    def cleanup(self) -> None:
        """Tell the callbacks of models that were not finished that the training is over."""
        self._bundles.close()
