"""`ModelBatch`: many models of one structure, trained at once."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from . import evaluation, loss
from .change import Change, Followers
from .class_loss import cross_entropy, ignore_index_of
from .compilation import Compiled
from .engine import Engine
from .engine.describe import step_path
from .errors import ModelBatchError
from .explain import Report
from .forward import Forward
from .inputs import resolve
from .memory import keep_freed_memory
from .optim import merge_configs
from .pytree import flatten, flatten_call
from .random import Streams, check_seeds, derive_seeds, torch_rng
from .stack import Stack, stack_from_factory
from .steps import Steps
from .structure import analyse, tensor_at, walk
from .substitute import Call, GradMemory

_LATER = {
    "chunk_size": "computing models in chunks",
    "memory_budget": "planning memory",
    "devices": "several devices",
}


class ModelBatch(Steps):
    """M independent models of one structure, trained together, each as if it were alone.

    The parameters exist once, stacked along dim 0 under the user's own names; `mb.models[i]` is the
    user's own module, its parameters and buffers views into the stack.

    Args:
        models: modules of one structure: same classes, parameter and buffer names, shapes, dtypes,
            device and train mode. Plain attributes must be equal too, apart from numbers that can
            be honoured for each model (dropout `p`, normalisation `eps` and `momentum`, slopes).
        lr_list: M learning rates (floats or one-element tensors); needs `optimizer_cls`.
        optimizer_cls: any `torch.optim` class; builds `mb.optimizer` with M parameter groups.
        base_batch: an example input (tensor, tuple of arguments or dict of keywords): the forward
            is tried on it at once, without effect, so that slow or failing operations show now.
        optimizer_kwargs: further optimizer options, one dict for all models or M dicts.
        shared_input: True if `x` is `[B, ...]` for all models, False if it is `[M, B, ...]`.
        seeds: M ints, the random stream of each model; by default derived from torch's seed.
        rng: `"philox"` (fast counter-based streams) or `"torch"` (each model draws what it would
            draw alone after `torch.manual_seed(seeds[i])`).
        chunk_size: reserved.
        memory_budget: reserved.
        fallback: what to do with an operation that cannot be batched: `"warn"` (compute it model by
            model, one warning per bundle and operation), `"error"` or `"silent"`.
        devices: reserved.
        ignore_attributes: names of plain attributes that may differ because no forward reads them.

    Raises:
        StructureMismatchError: naming what differs, in which model, and both values.
        ModelBatchError: for any other bad argument; the models are then unchanged.
        NotImplementedError: for a reserved argument.
    """

    def __init__(
        self,
        models: Iterable[nn.Module],
        lr_list: Sequence[float | Tensor] | Tensor | None = None,
        optimizer_cls: type[Optimizer] | None = None,
        base_batch: Any = None,
        *,
        optimizer_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        shared_input: bool = True,
        seeds: Sequence[int] | None = None,
        rng: str = "philox",
        chunk_size: int | str | None = None,
        memory_budget: int | str | None = None,
        fallback: str = "warn",
        devices: Sequence[Any] | None = None,
        ignore_attributes: Iterable[str] = (),
        _stacked: dict[str, Tensor] | None = None,
    ):
        super().__init__()
        for name, value in (
            ("chunk_size", chunk_size),
            ("memory_budget", memory_budget),
            ("devices", devices),
        ):
            if value is not None:
                raise NotImplementedError(f"{name}=: {_LATER[name]} is not available yet")
        if fallback not in ("warn", "error", "silent"):
            raise ModelBatchError(f'fallback must be "warn", "error" or "silent", got {fallback!r}')
        if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList | nn.Sequential):
            raise ModelBatchError("models must be a sequence of modules, got a single module")
        models = list(models)
        self._ignored = frozenset(ignore_attributes)
        structure = analyse(models, self._ignored)
        checked_seeds = check_seeds(seeds, len(models)) or derive_seeds(len(models))
        configs = self._check_optimizer(len(models), lr_list, optimizer_cls, optimizer_kwargs)
        slots = structure.slots
        device = torch.device("cpu")
        if slots:
            device = tensor_at(walk(models[0])[1], slots[0]).device
        streams = Streams(rng, checked_seeds, device)
        # from here on nothing fails: the models become views
        if device.type == "cpu":
            keep_freed_memory()
        self.shared_input = shared_input
        self._streams = streams
        self._stack = Stack(models, structure, self, _stacked)
        self._grad_memory = GradMemory()
        self._forward = Forward(self._stack, streams, fallback, self._grad_memory)
        self._active = [True] * len(models)
        self._ids, self._next_id = list(range(len(models))), len(models)
        self._followers = Followers()
        self._active_tensor: Tensor | None = None
        self._latest_losses: Tensor | None = None
        self._looped_losses: set[Any] = set()
        self._compiler: Compiled | None = None
        self._engine = Engine()
        self._optimizer: Optimizer | None = None
        self._recipe = None
        self._grad_scaler: torch.amp.GradScaler | None = None
        self.training = models[0].training
        for node, module in zip(self._stack.nodes, self._stack.modules[0]):
            node.training = module.training
        if configs is not None:
            assert optimizer_cls is not None
            common = optimizer_kwargs if isinstance(optimizer_kwargs, Mapping) else None
            self._build_optimizer(optimizer_cls, configs, {}, base=common)
        if base_batch is not None:
            self._try(base_batch)

    @classmethod
    def from_factory(
        cls,
        build: Callable[..., nn.Module],
        num_models: int,
        *,
        seeds: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> "ModelBatch":
        """Build the models one after another, straight into the stack.

        Args:
            build: `build()` or `build(i)`; it gets the model's number if it has a required
                positional parameter.
            num_models: M.
            seeds: M ints. Model i is then initialised as after `torch.manual_seed(seeds[i])`
                (torch's own generators are left as they were), and these are its stream's seeds;
                with `rng="torch"` its stream goes on where the initialisation stopped.
            **kwargs: as for `ModelBatch`.

        Raises:
            ModelBatchError: if a seed or the number of models is bad, or `build` returns no module.
            StructureMismatchError: as for `ModelBatch`.
        """
        if isinstance(num_models, bool) or not isinstance(num_models, int) or num_models < 1:
            raise ModelBatchError(f"num_models must be a positive integer, got {num_models!r}")
        checked = check_seeds(seeds, num_models)
        numbered = _takes_a_number(build)
        after: list[Tensor] = []

        def build_one(i: int) -> nn.Module:
            if checked is None:
                return build(i) if numbered else build()
            with torch_rng(torch.device("cuda" if torch.cuda.is_initialized() else "cpu")):
                torch.manual_seed(checked[i])
                model = build(i) if numbered else build()
                after.append(torch.get_rng_state())
            return model

        models, stacked = stack_from_factory(build_one, num_models)
        bundle = cls(models, seeds=checked, _stacked=stacked, **kwargs)
        if bundle._streams.kind == "torch":
            for states, state in zip(bundle._streams.states, after):
                states[0] = state
        return bundle

    # ---- forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call every model.

        Args:
            *args: the models' own arguments. With `shared_input=True` tensors are the same for all
                models unless wrapped in `modelbatch.per_model`; with `shared_input=False` they are
                `[M, ...]` unless wrapped in `modelbatch.shared`.
            **kwargs: likewise.

        Returns:
            The model's own output structure, each tensor with a leading model axis.
        """
        leaves, spec = flatten_call(args, kwargs)
        values, batched = resolve(leaves, not self.shared_input, self.num_models, "input")
        if self._compiler is not None:
            return self._compiler.forward(values, batched, spec, self._active_tensor)
        return self._forward.run(values, batched, spec, self._active_tensor)

    def _forward_of(self, x: Any) -> Any:
        args, kwargs = _as_call(x)
        return self(*args, **kwargs)

    def _compiled_step(
        self, x: Any, y: Any, loss_fn: Callable[..., Tensor], sample_weight: Any
    ) -> Tensor | None:
        if self._compiler is None:
            return None
        return self._compiler.whole_step.step(_as_call(x), y, loss_fn, sample_weight)

    # ---- loss

    def compute_loss(
        self,
        outputs: Any,
        targets: Any,
        loss_fn: Callable[..., Tensor] = F.cross_entropy,
        *,
        sample_weight: Any = None,
        reduction: str = "mean",
    ) -> Tensor:
        """The loss of all models, with the gradient of each model's own loss.

        Args:
            outputs: what the bundle returned.
            targets: `[B, ...]` for all models; `[M, B, ...]` with `shared_input=False` or where
                wrapped in `modelbatch.per_model`.
            loss_fn: called for one model's (outputs, targets); returns one number.
            sample_weight: `[B]` for all models or `[M, B]`; the loss of a model is then the mean
                over its samples by weight. A sample of weight 0 takes no part. Its input may
                even be NaN if the forward ran in `train_step` or inside `sample_weights`.
            reduction: `"mean"`, `"sum"` (over active models) or `"none"`.

        Returns:
            A scalar whose value is the mean (or sum) over active models with a finite loss and
            whose gradient for model i is that of its own loss, or the losses `[M]`.

        Raises:
            ModelBatchError: bad reduction or shapes, or a loss that fails, naming the model.
        """
        if reduction not in ("mean", "sum", "none"):
            raise ModelBatchError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
        losses = self._losses(outputs, targets, loss_fn, sample_weight)
        self._engine.nothing()
        self._latest_losses = losses.detach()
        return loss.combine(losses, self._active_tensor, reduction)

    @property
    def latest_losses(self) -> Tensor | None:
        """The losses `[M]` of the last `compute_loss`, detached; None before the first."""
        return self._latest_losses

    def _losses(
        self, outputs: Any, targets: Any, loss_fn: Callable[..., Tensor], sample_weight: Any
    ) -> Tensor:
        if sample_weight is None and self._compiler is None:
            losses = self._class_losses(outputs, targets, loss_fn)
            if losses is not None:
                return losses
        out_leaves, _ = flatten(outputs)
        out_values, out_batched = resolve(out_leaves, True, self.num_models, "output")
        target_leaves, _ = flatten(targets)
        target_values, target_batched = resolve(
            target_leaves, not self.shared_input, self.num_models, "target"
        )
        arguments: tuple[Any, ...] = (outputs, targets)
        values, batched = out_values + target_values, out_batched + target_batched
        if sample_weight is not None:
            per_model = isinstance(sample_weight, Tensor) and sample_weight.dim() > 1
            weight_leaves, _ = flatten(sample_weight)
            more, more_batched = resolve(weight_leaves, per_model, self.num_models, "sample_weight")
            arguments = (*arguments, sample_weight)
            values, batched = values + more, batched + more_batched
        _, spec = flatten(arguments)
        run = loss.loss_for_weights(loss_fn, sample_weight is not None)
        if loss_fn in self._looped_losses:
            return loss.losses_one_by_one(run, values, batched, spec, self.num_models)
        if self._compiler is not None:
            return self._compiler.losses(run, loss_fn, values, batched, spec)
        return self._batched_losses(run, loss_fn, values, batched, spec)

    def _class_losses(
        self, outputs: Any, targets: Any, loss_fn: Callable[..., Tensor]
    ) -> Tensor | None:
        """Cross entropy of plain logits, where no structure has to be taken apart."""
        if not isinstance(outputs, Tensor) or ignore_index_of(loss_fn) is None:
            return None
        resolve([outputs], True, self.num_models, "output")
        (target,), (own,) = resolve([targets], not self.shared_input, self.num_models, "target")
        return cross_entropy(loss_fn, outputs, target, own)

    def _batched_losses(
        self,
        run: Callable[..., Tensor],
        loss_fn: Callable[..., Tensor],
        values: list[Any],
        batched: list[bool],
        spec: Any,
    ) -> Tensor:
        if self.num_models == 1:
            with self._loss_call(1, None):
                return loss.losses_one_by_one(run, values, batched, spec, 1)
        try:
            return loss.per_model_losses(
                run, values, batched, spec, self.num_models, self._loss_call
            )
        except ModelBatchError:
            raise
        except Exception as error:
            losses = loss.losses_one_by_one(run, values, batched, spec, self.num_models)
            self._looped_losses.add(loss_fn)
            name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
            self._forward._report(f"loss {name}", str(error).splitlines()[0], error)
            return losses

    def _loss_call(self, num_models: int, level: int | None) -> Call:
        return Call(num_models, level, self._streams, device=self._streams.device)

    # ---- evaluation

    def evaluate(
        self,
        loader: Iterable[Any],
        loss_fn: Callable[..., Tensor] = F.cross_entropy,
        metric_fns: Mapping[str, Callable[..., Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """Losses and metrics of every model over a data set, in eval mode and without gradients.

        Args:
            loader: yields (x, y), see `train_step`, (x, y, sample_weight) or `RoutedBatch`.
            loss_fn: one model's (outputs, targets) to one number, a mean over the batch.
            metric_fns: further such functions by name.

        Returns:
            `{"loss": [M], name: [M], ...}`, means over all samples by weight; NaN for a model
            without samples.

        Raises:
            ModelBatchError: if the loader is empty or yields something else.
        """
        return evaluation.evaluate(self, loader, loss_fn, dict(metric_fns or {}))

    def metrics(self) -> dict[str, float]:
        """A flat dict of numbers for loggers, from the last `compute_loss` and backward."""
        return evaluation.metrics(self)

    # ---- how it runs

    def explain(self, *args: Any, **kwargs: Any) -> Report:
        """How each operation of the forward is computed for these arguments; changes nothing."""
        leaves, spec = flatten_call(args, kwargs)
        values, batched = resolve(leaves, not self.shared_input, self.num_models, "input")
        path = step_path(self, args, kwargs)
        if self._compiler is not None:
            path = self._compiler.whole_step.explained(path)
        report = Report(self.num_models, path)
        self._forward.explain(report, values, batched, spec)
        return report

    def _try(self, base_batch: Any) -> None:
        report = Report(self.num_models, "")
        leaves, spec = flatten(_as_call(base_batch))
        values, batched = resolve(leaves, not self.shared_input, self.num_models, "base_batch")
        self._forward.explain(report, values, batched, spec)

    def enable_compile(self, **torch_compile_kwargs: Any) -> "ModelBatch":
        """Run training steps, and else forward and loss, through `torch.compile`.

        `train_step` becomes one graph of forward, loss, backward and optimizer wherever the engine
        does not take the step, which is faster still. What cannot be compiled as a whole, and calls
        of the bundle, get one graph for the forward and one for the loss. Compiling takes seconds
        for each shape of the inputs; `explain` and the logger `modelbatch` tell how many.

        Args:
            **torch_compile_kwargs: handed to `torch.compile`.

        Raises:
            ModelBatchError: with `rng="torch"`, whose draws cannot be compiled.
        """
        self._compiler = Compiled(self, torch_compile_kwargs)
        return self

    # ---- models that come and go

    def _structure_changed(self, change: Change) -> None:
        super()._structure_changed(change)
        if self._latest_losses is not None:
            self._latest_losses = change.rows(self._latest_losses, torch.nan)
        self._without_samples = frozenset(change.renumber(self._without_samples))
        if self._compiler is not None:
            self._compiler.clear()
        self._engine.nothing()
        self._engine.forget()

    # ---- construction helpers

    def _check_optimizer(
        self,
        num_models: int,
        lr_list: Any,
        optimizer_cls: type[Optimizer] | None,
        optimizer_kwargs: Any,
    ) -> list[dict[str, Any]] | None:
        if optimizer_cls is None:
            if lr_list is not None or optimizer_kwargs is not None:
                raise ModelBatchError("lr_list and optimizer_kwargs need optimizer_cls")
            return None
        return merge_configs(optimizer_cls, num_models, lr_list, optimizer_kwargs)


def _as_call(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that an input stands for: a tuple is positional, a mapping keywords."""
    if isinstance(x, tuple):
        return x, {}
    if isinstance(x, Mapping):
        return (), dict(x)
    return (x,), {}


def _takes_a_number(build: Callable[..., nn.Module]) -> bool:
    try:
        parameters = inspect.signature(build).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)
