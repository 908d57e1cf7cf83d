"""`BundledTrainer`: Trainer for many models at once."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.utils.generic import can_return_loss, find_labels

from ...batch import ModelBatch
from ...callbacks import Callback
from ...change import Change
from ...errors import ModelBatchError
from .best import BestWeights
from .bundle import PreTrainedBundle
from .callbacks import BundleCallback
from .evaluating import EvaluationMixin
from .logs import LogMixin
from .losses import LossMixin
from .optimization import OptimizationMixin, bundle_optimizer, check_optimizer_kwargs
from .orders import OrderMixin
from .per_model_args import args_of_models, check_count
from .refusals import refuse, refuse_accelerator
from .saving import SavingMixin
from .search import SearchMixin
from .trials import TrialsOfBundle

__all__ = ["BundledTrainer", "HFTrainerMixin"]


class HFTrainerMixin(
    OrderMixin, LossMixin, EvaluationMixin, SavingMixin, LogMixin, SearchMixin, OptimizationMixin
):
    """Makes a Trainer train M models at once, each as if it had a Trainer of its own.

    It stands before the Trainer: `class Mine(HFTrainerMixin, Seq2SeqTrainer)`.

    Args:
        model: a list of models of one architecture, or a `ModelBatch`. One with an optimizer of
            its own (`lr_list=`, `OptimizerFactory`) is trained with that.
        args: the training arguments of all models.
        *positional: what else Trainer takes, in its order.
        models: a list of models, instead of `model`.
        num_models: how many models `model_init` makes; by default as many as there are learning
            rates, `per_model_args` or seeds.
        learning_rates: M learning rates, in place of `args.learning_rate`.
        per_model_args: M dicts of those training arguments in which models may differ:
            `learning_rate`, `weight_decay`, `adam_beta1`, `adam_beta2`, `adam_epsilon`,
            `optim_args`, `max_grad_norm`, `warmup_steps`, `lr_scheduler_type`,
            `lr_scheduler_kwargs`, `seed`, `data_seed`. Without a `data_seed` of their own all
            models see the batches of the bundle's.
        optimizer_kwargs: M dicts of further options of the optimizer class, such as `momentum`.
        seeds: M ints, by default those in `per_model_args`, or `args.seed`, `args.seed + 1`, ...:
            with `model_init`, what `set_seed` is called with before model i is made; and the seed
            of its dropout. The order of the samples does not depend on them.
        rng: as for `ModelBatch`, when the bundle is made here.
        fallback: likewise.
        metric_summary: what `eval_loss` and other metrics of the whole bundle are: the value of
            the `"best"` model, or the `"mean"`. Both are there under `eval_loss_best`,
            `eval_loss_mean` in any case.
        per_model_logs: log the training loss, gradient norm and learning rate of every model.
        **kwargs: what else Trainer takes.

    Raises:
        ModelBatchError: a bad argument, or something that a bundle cannot do; the message says
            what to do instead.
        StructureMismatchError: models that do not fit into one bundle.
    """

    _signature_columns: Any

    def __init__(
        self,
        model: ModelBatch | Sequence[nn.Module] | None = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        models: Sequence[nn.Module] | None = None,
        num_models: int | None = None,
        learning_rates: Sequence[float] | None = None,
        per_model_args: Sequence[Mapping[str, Any]] | None = None,
        optimizer_kwargs: Sequence[Mapping[str, Any]] | None = None,
        seeds: Sequence[int] | None = None,
        rng: str = "philox",
        fallback: str = "warn",
        metric_summary: str = "best",
        per_model_logs: bool = True,
        **kwargs: Any,
    ):
        if metric_summary not in ("best", "mean"):
            raise ModelBatchError(
                f'metric_summary must be "best" or "mean", got {metric_summary!r}'
            )
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        refuse(args)
        bound = inspect.signature(super().__init__).bind_partial(None, args, *positional, **kwargs)
        given = bound.arguments
        model = models if model is None else model
        made = given.get("model_init") is not None
        if made == (model is not None):
            raise ModelBatchError("give a list of models, a ModelBatch, or model_init")
        if isinstance(model, nn.Module) and not isinstance(model, ModelBatch):
            raise ModelBatchError(
                f"got a single {type(model).__name__}: give a list of models, a ModelBatch, or "
                "model_init with num_models"
            )
        per_model: list[Any] = [learning_rates, per_model_args, optimizer_kwargs, seeds]
        count = num_models if model is None else len(model)
        if count is None:
            count = next((len(own) for own in per_model if own is not None), None)
        if not count or (num_models is not None and num_models != count):
            raise ModelBatchError(
                f"num_models={num_models!r}, but the models are {count or 'none'}"
            )
        self.metric_summary, self.per_model_logs = metric_summary, per_model_logs
        self.metrics_of_each = {}
        self._options = {"rng": rng, "fallback": fallback}
        self._own_optimizer_kwargs = check_optimizer_kwargs(optimizer_kwargs, count)
        self.args_of_each = args_of_models(args, count, learning_rates, per_model_args)
        self._seeds = self._seeds_of(args, seeds, per_model_args, count)
        if isinstance(model, ModelBatch):
            own_options = learning_rates, per_model_args, optimizer_kwargs
            if model.optimizer is not None and any(own is not None for own in own_options):
                raise ModelBatchError(
                    "this ModelBatch has an optimizer already; give the options of models to one "
                    "of them, not both"
                )
            if seeds is not None or any("seed" in (own or {}) for own in per_model_args or ()):
                raise ModelBatchError("a ModelBatch has its seeds already: ModelBatch(seeds=...)")
            given["model"] = PreTrainedBundle.adopt(model)
        elif model is not None:
            given["model"] = PreTrainedBundle(model, seeds=self._seeds, **self._options)
        given["callbacks"] = [_as_trainer_callback(c) for c in given.get("callbacks") or ()]
        super().__init__(*bound.args, **bound.kwargs)
        refuse_accelerator(self.accelerator)
        kind = type(self.model.models[0])
        if args.label_names is None:
            self.label_names = find_labels(kind)
        self.can_return_loss = can_return_loss(kind)
        for callback in self._bundle_callbacks():
            callback.setup(self)

    @staticmethod
    def _seeds_of(
        args: TrainingArguments,
        seeds: Sequence[int] | None,
        per_model_args: Sequence[Mapping[str, Any]] | None,
        num_models: int,
    ) -> list[int]:
        own = [(fields or {}).get("seed") for fields in per_model_args or [{}] * num_models]
        if seeds is None:
            return [args.seed + i if seed is None else int(seed) for i, seed in enumerate(own)]
        if any(seed is not None for seed in own):
            raise ModelBatchError("give seeds in seeds or per_model_args")
        return [int(seed) for seed in check_count("seeds", seeds, num_models)]

    # ---- models

    @property
    def num_models(self) -> int:
        """M."""
        return len(self.args_of_each)

    def call_model_init(self, trial: Any = None) -> PreTrainedBundle:
        """Make the models, each after `set_seed` with its own seed."""
        seeds = self._seeds
        if isinstance(trial, TrialsOfBundle):
            models, seeds = trial.take_models(), trial.seeds
        else:
            models = []
            for seed in seeds:
                set_seed(seed)
                models.append(super().call_model_init(trial))
        set_seed(self.args.seed)
        return PreTrainedBundle(models, seeds=seeds, **self._options)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> Any:
        self._start_logs()
        self.best = None
        if self.args.load_best_model_at_end:
            self.best = BestWeights(self.model, bool(self.args.greater_is_better))
        self.model.follow(self)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def check_models_change(self, change: Change) -> None:
        """Trainer counts on the models that it began with.

        Raises:
            ModelBatchError: models would come or go.
        """
        if self.is_in_train and not change.in_place:
            raise ModelBatchError(
                "models cannot join or leave a bundle while a Trainer trains it; freeze them"
            )

    def models_changed(self, change: Change) -> None:
        """Forget what was noted of models that are no longer there."""
        if not change.in_place:
            self.best, self.losses_of_batch, self.grad_norms = None, None, None

    @property
    def inner_optimizer(self) -> Any:
        """The bundle's optimizer, without what accelerate has put around it."""
        return None if self.optimizer is None else bundle_optimizer(self.optimizer)

    # ---- steps

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Trainer's own step, which also notes the loss of each model."""
        self._splits = self._order_seeds is not None
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._splits = False
        losses = self.losses_of_batch
        assert losses is not None
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        self._note_step(losses if scaled else losses / self.current_gradient_accumulation_steps)
        return loss

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            parameters = inspect.signature(self.model.models[0].forward).parameters
            extra = {"label", "label_ids", *self.label_names}
            self._signature_columns = [*parameters, *extra]

    def add_callback(self, callback: Any) -> None:
        """As in Trainer; callbacks of ModelBatch are welcome too."""
        callback = _as_trainer_callback(callback)
        super().add_callback(callback)
        if isinstance(callback, BundleCallback):
            callback.setup(self)


class BundledTrainer(HFTrainerMixin, Trainer):  # type: ignore[misc]
    """Trainer for M models at once; see `HFTrainerMixin` for its arguments.

    ```python
    trainer = BundledTrainer(
        models=[AutoModelForSequenceClassification.from_config(config) for _ in range(16)],
        args=TrainingArguments("out", num_train_epochs=3),
        learning_rates=[1e-5 * 1.5**i for i in range(16)],
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=compute_metrics,
    )
    trainer.train()
    trainer.export_model(trainer.evaluate()["eval_best_model"], "best")
    ```
    """


def _as_trainer_callback(callback: Any) -> Any:
    return BundleCallback(callback) if isinstance(callback, Callback) else callback
