"""hyperparameter_search with several trials in a bundle."""

from typing import Any

import pytest
from hf_case import accuracy, arguments, config, texts
from transformers import BertForSequenceClassification, Trainer, set_seed

from modelbatch import ModelBatchError
from modelbatch.integrations.huggingface import BundledTrainer

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.WARNING)
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def _init(trial: Any = None) -> Any:
    width = 16 if trial is None else trial.params.get("width", 16)
    options = {} if trial is None else {"hidden_dropout_prob": trial.params.get("dropout", 0.0)}
    return BertForSequenceClassification(config(intermediate_size=width, **options)).double()


def _trainer(tmp_path: Any, **more: Any) -> Any:
    options = {"eval_strategy": "epoch", "num_train_epochs": 2, "logging_steps": 100}
    return BundledTrainer(
        model_init=_init,
        num_models=4,
        args=arguments(tmp_path, **options),
        train_dataset=texts(8),
        eval_dataset=texts(6, seed=1),
        compute_metrics=accuracy,
        **more,
    )


def _loss(metrics: dict[str, float]) -> float:
    return metrics["eval_loss"]


def test_trials_in_bundles_equal_trials_alone(tmp_path) -> None:
    def space(trial: Any) -> dict[str, Any]:
        return {
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-1, log=True),
            "weight_decay": trial.suggest_float("weight_decay", 0.0, 0.5),
            "seed": trial.suggest_int("seed", 1, 9),
        }

    trainer = _trainer(tmp_path)
    sampler = optuna.samplers.RandomSampler(seed=1)
    storage = optuna.storages.InMemoryStorage()
    best = trainer.hyperparameter_search(
        space, _loss, n_trials=6, bundle_size=4, sampler=sampler, storage=storage, study_name="s"
    )
    trials = optuna.load_study(study_name="s", storage=storage).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 6
    assert trainer.args.num_train_epochs == 2 and trainer.num_models == 4
    for trial in trials[:2]:
        # the data of a bundle are in one order, that of args.seed
        fields = {**trial.params, "data_seed": trainer.args.seed, "eval_strategy": "epoch"}
        args = arguments(tmp_path, num_train_epochs=2, logging_steps=100, **fields)
        alone = Trainer(
            args=args,
            model_init=_init,
            train_dataset=texts(8),
            eval_dataset=texts(6, seed=1),
            compute_metrics=accuracy,
        )
        set_seed(args.seed)
        alone.train()
        last = [e for e in alone.state.log_history if "eval_loss" in e][-1]
        assert trial.value == pytest.approx(last["eval_loss"], abs=1e-7)
    assert best.objective == min(trial.value for trial in trials)
    assert best.hyperparameters == trials[int(best.run_id)].params


def test_what_differs_too_much_trains_apart(tmp_path) -> None:
    bundles: list[list[int]] = []

    def space(trial: Any) -> dict[str, Any]:
        trial.suggest_float("dropout", 0.0, 0.5)
        trial.suggest_categorical("width", [8, 16])
        return {"per_device_train_batch_size": trial.suggest_categorical("batch", [2, 4])}

    trainer = _trainer(tmp_path)
    train = trainer.train

    def note(trial: Any) -> Any:
        bundles.append([one.number for one in trial.trials])
        assert len({(t.params["width"], t.params["batch"]) for t in trial.trials}) == 1
        assert trainer.args.per_device_train_batch_size == trial.trials[0].params["batch"]
        return train(trial=trial)

    trainer.train = note
    grid = {"dropout": [0.1, 0.4], "width": [8, 16], "batch": [2, 4]}
    sampler = optuna.samplers.GridSampler(grid, seed=0)
    trainer.hyperparameter_search(space, _loss, n_trials=8, bundle_size=8, sampler=sampler)
    assert sorted(number for own in bundles for number in own) == list(range(8))
    assert 4 <= len(bundles) < 8
    assert trainer.args.per_device_train_batch_size == 4


def test_pruned_trials_are_frozen(tmp_path) -> None:
    class Odd(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            return trial.number % 2 == 1

    trainer = _trainer(tmp_path)
    storage = optuna.storages.InMemoryStorage()
    trainer.hyperparameter_search(
        lambda t: {"learning_rate": t.suggest_float("learning_rate", 1e-3, 1e-1)},
        _loss,
        n_trials=4,
        pruner=Odd(),
        storage=storage,
        study_name="s",
    )
    states = [t.state.name for t in optuna.load_study(study_name="s", storage=storage).trials]
    assert states == ["COMPLETE", "PRUNED", "COMPLETE", "PRUNED"]
    assert trainer.model.active.tolist() == [True, False, True, False]


def test_a_failure_and_bad_arguments(tmp_path) -> None:
    trainer = _trainer(tmp_path)
    storage = optuna.storages.InMemoryStorage()

    def broken(metrics: dict[str, float]) -> float:
        raise RuntimeError("no objective")

    space = {"hp_space": lambda t: {"learning_rate": t.suggest_float("lr", 1e-3, 1e-1)}}
    with pytest.raises(RuntimeError, match="no objective"):
        trainer.hyperparameter_search(
            **space, compute_objective=broken, n_trials=2, storage=storage, study_name="s"
        )
    study = optuna.load_study(study_name="s", storage=storage)
    assert [t.state.name for t in study.trials] == ["FAIL", "FAIL"]
    with pytest.raises(ModelBatchError, match="backend='optuna'"):
        trainer.hyperparameter_search(**space, backend="wandb")
    with pytest.raises(ModelBatchError, match="bundle_size"):
        trainer.hyperparameter_search(**space, bundle_size=0)
    with pytest.raises(ModelBatchError, match="n_jobs"):
        trainer.hyperparameter_search(**space, n_jobs=2)
