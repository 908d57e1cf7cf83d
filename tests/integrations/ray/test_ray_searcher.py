"""Searchers of Ray that suggest whole bundles."""

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.search import ConcurrencyLimiter, Searcher

from modelbatch import ModelBatchError
from modelbatch.integrations.ray import BundleSearcher
from modelbatch.integrations.ray.entries import Many


class Recorder(Searcher):
    """Counts up, and remembers what it was told."""

    def __init__(self, limit: int = 10**9, most_live: int = 10**9) -> None:
        super().__init__(metric="loss", mode="min")
        self.limit, self.most_live, self.count = limit, most_live, 0
        self.live: set[str] = set()
        self.told: list[tuple[Any, ...]] = []

    def suggest(self, trial_id: str) -> Any:
        if self.count >= self.limit:
            return Searcher.FINISHED
        if len(self.live) >= self.most_live:
            return None
        self.live.add(trial_id)
        self.count += 1
        return {"lr": self.count / 10}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        assert not result["done"] and result["trial_id"] == trial_id
        self.told.append(("result", trial_id, result["training_iteration"], result["loss"]))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self.live.remove(trial_id)
        loss = None if result is None else result["loss"]
        self.told.append(("complete", trial_id, loss, error))

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        self.told.append(("concurrency", max_concurrent))
        return True

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).write_bytes(pickle.dumps((self.count, self.live)))

    def restore(self, checkpoint_path: str) -> None:
        self.count, self.live = pickle.loads(Path(checkpoint_path).read_bytes())


def rows(*models: tuple[str, int, str, float]) -> dict[str, Any]:
    names = ("id", "training_iteration", "status", "loss")
    return {"models": Many(dict(zip(names, model)) for model in models)}


def test_a_bundle_is_full() -> None:
    searcher = BundleSearcher(Recorder(), bundle_size=3)
    bundle = searcher.suggest("a")
    assert list(bundle) == ["trials"]
    assert list(bundle["trials"]) == [
        {"id": f"{n:05d}", "number": n, "config": {"lr": (n + 1) / 10}} for n in range(3)
    ]
    assert [item["number"] for item in searcher.suggest("b")["trials"]] == [3, 4, 5]
    assert (searcher.metric, searcher.mode) == ("loss", "min")


def test_bundles_are_shown_by_their_length() -> None:
    trials = BundleSearcher(Recorder(), bundle_size=200).suggest("a")["trials"]
    assert str(trials) == "<200 models>"
    copy = pickle.loads(pickle.dumps(trials))
    assert copy == trials and str(copy) == "<200 models>"


@pytest.mark.parametrize(
    ("limit", "num_trials", "sizes"),
    [(7, None, [3, 3, 1]), (6, None, [3, 3]), (100, 5, [3, 2]), (0, None, []), (2, 50, [2])],
)
def test_the_last_bundle_may_be_smaller(
    limit: int, num_trials: int | None, sizes: list[int]
) -> None:
    searcher = BundleSearcher(Recorder(limit), bundle_size=3, num_trials=num_trials)
    for place, size in enumerate(sizes):
        assert len(searcher.suggest(f"b{place}")["trials"]) == size
    assert searcher.suggest("end") == Searcher.FINISHED
    assert searcher.suggest("end") == Searcher.FINISHED


def test_a_searcher_that_waits_lets_the_bundle_wait() -> None:
    inner = Recorder(most_live=5)
    searcher = BundleSearcher(inner, bundle_size=3)
    assert len(searcher.suggest("a")["trials"]) == 3
    assert searcher.suggest("b") is None  # two were drawn
    searcher.on_trial_result("a", rows(("00001", 1, "finished", 0.5)))
    bundle = searcher.suggest("c")
    assert [item["id"] for item in bundle["trials"]] == ["00003", "00004", "00005"]


def test_a_searcher_that_never_has_enough_gets_smaller_bundles() -> None:
    searcher = BundleSearcher(Recorder(most_live=2), bundle_size=3)
    assert len(searcher.suggest("a")["trials"]) == 2
    assert searcher.suggest("b") is None
    searcher.on_trial_complete("a", rows(("00000", 1, "finished", 1.0)))
    assert len(searcher.suggest("c")["trials"]) == 2


def test_results_go_to_each_model() -> None:
    inner = Recorder()
    searcher = BundleSearcher(inner, bundle_size=5)
    searcher.suggest("a")
    searcher.on_trial_result(
        "a",
        rows(
            ("00000", 1, "running", 5.0),
            ("00001", 1, "pruned", 7.0),
            ("00002", 1, "diverged", math.nan),
            ("00003", 1, "running", 3.0),
            ("00004", 1, "failed", math.nan),
        ),
    )
    assert inner.told == [
        ("result", "00000", 1, 5.0),
        ("complete", "00001", 7.0, False),
        ("complete", "00002", None, True),
        ("result", "00003", 1, 3.0),
        ("complete", "00004", None, True),
    ]
    del inner.told[:]
    searcher.on_trial_complete(
        "a", rows(("00000", 2, "finished", 4.0), ("00003", 2, "running", 2.0))
    )
    assert inner.told == [
        ("complete", "00000", 4.0, False),
        ("result", "00003", 2, 2.0),
        ("complete", "00003", 2.0, False),  # the bundle ended, and the model with it
    ]
    assert not inner.live


def test_what_is_told_again_is_not_handed_on() -> None:
    inner = Recorder()
    searcher = BundleSearcher(inner, bundle_size=2)
    searcher.suggest("a")
    first = rows(("00000", 1, "running", 5.0), ("00001", 1, "pruned", 7.0))
    searcher.on_trial_result("a", first)
    searcher.on_trial_result("a", rows(("00000", 2, "running", 4.0)))
    known = list(inner.told)
    searcher.on_trial_result("a", first)  # the actor died, and began anew
    searcher.on_trial_result("a", rows(("00000", 2, "running", 4.0)))
    assert inner.told == known
    searcher.on_trial_result("a", rows(("00000", 3, "running", 3.0)))
    assert inner.told[-1] == ("result", "00000", 3, 3.0)


def test_the_models_of_a_bundle_that_failed_are_errors() -> None:
    inner = Recorder()
    searcher = BundleSearcher(inner, bundle_size=2)
    searcher.suggest("a")
    searcher.on_trial_result("a", rows(("00000", 1, "running", 5.0)))
    searcher.on_trial_complete("a", None, error=True)
    assert inner.told[1:] == [
        ("complete", "00000", None, True),
        ("complete", "00001", None, True),
    ]


def test_concurrency_is_counted_in_bundles() -> None:
    inner = Recorder()
    limited = ConcurrencyLimiter(BundleSearcher(inner, bundle_size=4), max_concurrent=2)
    assert inner.told == [("concurrency", 8)]
    assert limited.suggest("a") and limited.suggest("b")
    assert limited.suggest("c") is None
    limited.on_trial_complete("a", rows())
    assert limited.suggest("c")


@pytest.mark.parametrize("way", ["file", "states"])
def test_saved_in_the_middle(way: str, tmp_path: Path) -> None:
    def fresh() -> BundleSearcher:
        return BundleSearcher(Recorder(most_live=4), bundle_size=3, num_trials=10)

    searcher = fresh()
    searcher.suggest("a")
    searcher.on_trial_result("a", rows(("00000", 1, "running", 5.0)))
    assert searcher.suggest("b") is None
    other = fresh()
    path = str(tmp_path / "state")
    if way == "file":
        searcher.save(path)
        other.restore(path)
    else:  # as Ray does
        searcher.searcher.save(path)
        other.set_state(searcher.get_state())
        other.searcher.restore(path)
    for own in (searcher, other):
        inner: Any = own.searcher
        del inner.told[:]
        own.on_trial_result("a", rows(("00000", 1, "running", 5.0), ("00001", 1, "pruned", 6.0)))
        own.on_trial_complete("a", rows(("00000", 2, "finished", 4.0)))
        bundle = own.suggest("c")["trials"]
        assert [item["config"]["lr"] for item in bundle] == [0.4, 0.5, 0.6]
        assert inner.told == [
            ("complete", "00001", 6.0, False),
            ("complete", "00000", 4.0, False),
            ("complete", "00002", None, True),
        ]


# ---- search spaces


SPACE = {
    "lr": tune.loguniform(1e-4, 1e-1),
    "net": {"width": tune.choice([4, 6]), "depth": 2},
    "batch_size": 8,
}


def drawn(searcher: BundleSearcher, bundles: int = 2) -> list[dict[str, Any]]:
    found = []
    for place in range(bundles):
        found += [item["config"] for item in searcher.suggest(f"b{place}")["trials"]]
    return found


def test_a_space_is_drawn_from() -> None:
    configs = drawn(BundleSearcher(SPACE, bundle_size=20))
    assert configs == drawn(BundleSearcher(SPACE, bundle_size=40), 1)
    assert configs != drawn(BundleSearcher(SPACE, bundle_size=20, seed=1))
    assert len({own["lr"] for own in configs}) == 40
    assert all(1e-4 <= own["lr"] <= 1e-1 and own["batch_size"] == 8 for own in configs)
    assert {own["net"]["width"] for own in configs} == {4, 6}
    assert {own["net"]["depth"] for own in configs} == {2}
    assert all(type(own["lr"]) is float for own in configs)


def test_values_are_drawn_independently() -> None:
    space = {"a": tune.uniform(0, 1), "b": tune.uniform(0, 1)}
    (own,) = drawn(BundleSearcher(space, bundle_size=1), 1)
    assert own["a"] != own["b"]


def test_a_grid_is_gone_through_once() -> None:
    grid = {"lr": tune.grid_search([0.1, 0.2]), "width": tune.grid_search([4, 6, 8])}
    searcher = BundleSearcher(grid, bundle_size=4)
    configs = drawn(searcher)
    assert {(own["lr"], own["width"]) for own in configs} == {
        (lr, width) for lr in (0.1, 0.2) for width in (4, 6, 8)
    }
    assert len(configs) == 6
    assert searcher.suggest("c") == Searcher.FINISHED


def test_a_grid_with_random_values_begins_again() -> None:
    space = {"lr": tune.uniform(0, 1), "width": tune.grid_search([4, 6])}
    configs = drawn(BundleSearcher(space, bundle_size=3))
    assert [own["width"] for own in configs] == [4, 6] * 3
    assert len({own["lr"] for own in configs}) == 6


def test_a_space_goes_on_where_it_was(tmp_path: Path) -> None:
    space = {"lr": tune.uniform(0, 1), "width": tune.grid_search([4, 6])}
    whole = drawn(BundleSearcher(space, bundle_size=3))
    first, second = (BundleSearcher(space, bundle_size=3) for _ in range(2))
    first.suggest("b0")
    first.save(str(tmp_path / "state"))
    second.restore(str(tmp_path / "state"))
    assert drawn(second, 1) == whole[3:]


def test_the_space_of_the_tuner() -> None:
    searcher = BundleSearcher(bundle_size=20)
    with pytest.raises(ModelBatchError, match="no search space"):
        searcher.suggest("early")
    searcher = BundleSearcher(bundle_size=20)
    assert searcher.set_search_properties("loss", "max", SPACE)
    assert (searcher.metric, searcher.mode) == ("loss", "max")
    bundle = searcher.suggest("b0")
    assert (bundle["lr"], bundle["net"]) == ("in trials", "in trials")
    assert "batch_size" not in bundle
    assert [item["config"] for item in bundle["trials"]] == drawn(
        BundleSearcher(SPACE, bundle_size=20), 1
    )


def test_constants_of_the_tuner_reach_every_model() -> None:
    searcher = BundleSearcher(Recorder(), bundle_size=2)
    assert searcher.set_search_properties("loss", "min", {"width": 7, "net": {"depth": 2}})
    for config in drawn(searcher):
        assert (config["width"], config["net"]) == (7, {"depth": 2})


def test_two_spaces_are_refused() -> None:
    searcher = BundleSearcher(SPACE, bundle_size=2)
    assert not searcher.set_search_properties("loss", "min", {"lr": tune.uniform(0, 1)})


def test_optuna_sees_every_model() -> None:
    optuna = pytest.importorskip("optuna")
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(seed=1, n_startup_trials=4)
    inner = OptunaSearch(metric="loss", mode="min", sampler=sampler)
    searcher = BundleSearcher(inner, bundle_size=3, num_trials=6)
    assert searcher.set_search_properties("loss", "min", {"lr": tune.uniform(0, 1), "width": 4})
    for name in ("a", "b"):
        trials = searcher.suggest(name)["trials"]
        assert all(set(item["config"]) == {"lr", "width"} for item in trials)
        for epoch in (1, 2):
            told = [
                (item["id"], epoch, "finished" if epoch == 2 else "running", item["config"]["lr"])
                for item in trials[1:]
            ]
            told += [(trials[0]["id"], 1, "failed", math.nan)] * (epoch == 1)
            searcher.on_trial_result(name, rows(*told))
        searcher.on_trial_complete(name, rows())
    states = [trial.state.name for trial in inner._ot_study.trials]
    assert states == ["FAIL", "COMPLETE", "COMPLETE"] * 2
    assert inner._ot_study.best_value == min(
        t.params["lr"] for t in inner._ot_study.trials if t.state.name == "COMPLETE"
    )
    assert sorted(inner._ot_study.trials[1].intermediate_values) == [1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bundle_size": 0}, "bundle_size must be"),
        ({"bundle_size": 2, "num_trials": 1.5}, "num_trials must be"),
        ({"bundle_size": 2, "searcher": [1]}, "must be a Searcher"),
    ],
)
def test_bad_arguments_of_a_searcher_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelBatchError, match=words):
        BundleSearcher(**arguments)
