"""Configurations for whole bundles, from any searcher of Ray Tune."""

import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from ...errors import ModelBatchError
from ...sweep.arguments import check_count
from ...sweep.trials import ENDED
from .entries import TRIALS, Many
from .space import SpaceSearcher, constants_of, merged, unresolved

__all__ = ["BundleSearcher"]

# What a key of `param_space` that every model has its own value of becomes for the bundle.
_INSIDE = "in trials"


class BundleSearcher(Searcher):
    """Asks a searcher for as many configurations as a bundle has models.

    To Ray, a bundle is one trial: `num_samples` of `TuneConfig` counts bundles. To the searcher
    inside, every model is a trial of its own, of which it sees each epoch, and the end at the time
    when the model ends; models that failed or diverged are errors to it.

    Args:
        searcher: one of Ray's, `OptunaSearch(space, metric=..., mode=...)` for example; or a dict,
            a search space of Ray Tune that is drawn from at random (with `tune.grid_search`, all
            combinations); or None for the `param_space` of the `Tuner`.
        bundle_size: models in a bundle.
        num_trials: models altogether. Then `num_samples=-1` stands for as many bundles as that
            takes, the last of which may be smaller.
        seed: of random draws from a space.
        metric: which number of the models' results counts; by default that of the searcher inside.
        mode: `"min"` or `"max"`.

    Raises:
        ModelBatchError: a bad argument.
    """

    def __init__(
        self,
        searcher: Searcher | Mapping[str, Any] | None = None,
        *,
        bundle_size: int,
        num_trials: int | None = None,
        seed: int = 0,
        metric: str | None = None,
        mode: str | None = None,
    ) -> None:
        check_count("bundle_size", bundle_size)
        if num_trials is not None:
            check_count("num_trials", num_trials)
        if searcher is None or isinstance(searcher, Mapping):
            searcher = SpaceSearcher(searcher, seed=seed, metric=metric, mode=mode)
        elif not isinstance(searcher, Searcher):
            raise ModelBatchError(
                f"searcher must be a Searcher of Ray Tune or a dict, got {type(searcher).__name__}"
            )
        super().__init__(metric=metric or searcher.metric, mode=mode or searcher.mode)
        # Ray looks for an attribute of this name, to save what is inside by itself
        self.searcher: Searcher = searcher
        self.bundle_size, self.num_trials = bundle_size, num_trials
        self._state: dict[str, Any] = {
            "next": 0,  # number of the next model
            "finished": False,
            "drawn": [],  # of a bundle that is not full yet
            "live": {},  # by bundle, by id of the model: the last row, None for none
            "constants": {},
            "inside": [],  # keys of param_space that models have their own values of
        }

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Hand metric, mode and `param_space` on to the searcher inside."""
        self._metric, self._mode = metric or self._metric, mode or self._mode
        self._state["constants"] = constants_of(config)
        self._state["inside"] = [key for key, value in config.items() if unresolved(value)]
        if not self._state["inside"] and getattr(self.searcher, "has_space", True):
            return True  # nothing but constants, which all models get
        return self.searcher.set_search_properties(metric, mode, config, **spec)

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Tell the searcher inside how many models there may be; bundles are for Ray to count."""
        self.searcher.set_max_concurrency(max_concurrent * self.bundle_size)
        return False

    def suggest(self, trial_id: str) -> Any:
        """The configurations of a bundle, None if there are none now, or `FINISHED`."""
        state = self._state
        drawn: list[dict[str, Any]] = state["drawn"]
        while len(drawn) < self.bundle_size and not state["finished"]:
            number = state["next"]
            if self.num_trials is not None and number >= self.num_trials:
                state["finished"] = True
                break
            own = f"{number:05d}"
            config: Any = self.searcher.suggest(own)
            if config == Searcher.FINISHED:
                state["finished"] = True
            if config is None or state["finished"]:
                break
            state["next"] += 1
            config = merged(state["constants"], config)
            drawn.append({"id": own, "number": number, "config": config})
        if not drawn:
            return Searcher.FINISHED if state["finished"] else None
        if len(drawn) < self.bundle_size and not state["finished"] and state["live"]:
            return None  # the searcher waits for results, so the bundle waits for the searcher
        state["drawn"] = []
        state["live"][trial_id] = {item["id"]: None for item in drawn}
        return {**dict.fromkeys(state["inside"], _INSIDE), TRIALS: Many(drawn)}

    # ---- results

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Hand on what is new of each model."""
        live = self._state["live"].get(trial_id, {})
        for row in result.get("models", ()):
            own = row["id"]
            last = live.get(own)
            if own not in live:
                continue  # it has ended; the bundle went on from a checkpoint before that
            if last is not None and row["training_iteration"] <= last["training_iteration"]:
                continue
            ended = row["status"] in ENDED
            told = {**row, "trial_id": own, "done": ended}
            if row["status"] in ("failed", "diverged"):
                del live[own]
                self.searcher.on_trial_complete(own, result=None, error=True)
            elif ended:
                del live[own]
                self.searcher.on_trial_complete(own, result=told)
            else:
                live[own] = told
                self.searcher.on_trial_result(own, told)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Hand on the last results; models that have not ended end with their bundle."""
        if result:
            self.on_trial_result(trial_id, result)
        for own, last in self._state["live"].pop(trial_id, {}).items():
            if error or last is None:
                self.searcher.on_trial_complete(own, result=None, error=True)
            else:
                self.searcher.on_trial_complete(own, result={**last, "done": True})

    # ---- state

    def get_state(self) -> dict[str, Any]:
        """What is known of the bundles; the searcher inside is saved by itself."""
        own = {"metric": self._metric, "mode": self._mode, "state": self._state}
        return pickle.loads(pickle.dumps(own))

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over what `get_state` returned."""
        self._metric, self._mode, self._state = state["metric"], state["mode"], state["state"]

    def save(self, checkpoint_path: str) -> None:
        """Write this searcher and the one inside to a file."""
        with tempfile.TemporaryDirectory() as folder:
            inside = Path(folder) / "searcher"
            self.searcher.save(str(inside))
            saved = {"own": self.get_state(), "searcher": inside.read_bytes()}
        Path(checkpoint_path).write_bytes(pickle.dumps(saved))

    def restore(self, checkpoint_path: str) -> None:
        """Take over what `save` wrote."""
        saved = pickle.loads(Path(checkpoint_path).read_bytes())
        with tempfile.TemporaryDirectory() as folder:
            inside = Path(folder) / "searcher"
            inside.write_bytes(saved["searcher"])
            self.searcher.restore(str(inside))
        self.set_state(saved["own"])
