"""Optimizer operators: one step of every model's own optimizer, in place, on stacked tensors.

``params``, ``grads`` and the lists of states hold stacked tensors ``[M, ...]``, one per parameter.
Every model has its own options, its own count of steps and may sit out a step:

* ``hyper``, float64 ``[K, M]`` and contiguous, holds one option per row; `HYPER_ROWS` names them.
  Options that are true or false are 1 or 0.
* ``step``, float32 ``[M]``, counts the steps that each model has done; the operator adds 1 for
  every model that it updates (`sgd_step_`: for those of them that have momentum).
* ``active`` and ``nonfinite``, bool ``[M]``: a model that is not active, or is nonfinite, is left
  alone. Its parameters, gradients and states are not even read, and its step does not count.
* ``inv_scale``, float32, and ``clip_factor``, float64 ``[M]``: the gradient is multiplied by the
  one, then by the other; ``clip_value``, float64 ``[M]``: then it is clamped to
  ``[-clip_value, clip_value]``.
  The tensors in ``grads`` are not changed.

Parameters and gradients are float32, float64, bfloat16 or float16, all of one dtype. States are
float64 for float64 and float32 for all others, and so is the arithmetic; coefficients such as
``1 - beta ** step`` are computed in float64 and rounded once. An element's result depends on
nothing but its own values and its model's options: not on the other models, the number of threads
or the instruction set. Tensors may have any strides. Contiguous ones are the fast ones, and so are
parameters in any dense order of their dimensions whose states have the same strides; others are
worked on as contiguous copies, models that sit out included. A list of states may be empty where no
model's options ask for it.

All of them raise RuntimeError for wrong shapes, dtypes or devices, for expanded parameters or
states, and for a model that asks for a state whose list is empty, before anything is changed. They
have no autograd: parameters that require gradients are to be passed under `torch.no_grad`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from modelbatch import _extension as _extension  # Registers the operators.

HYPER_ROWS: dict[str, tuple[str, ...]] = {
    "sgd": ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"),
    "adam": ("lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize", "decoupled"),
    "adamw": ("lr", "beta1", "beta2", "eps", "weight_decay", "amsgrad", "maximize", "decoupled"),
    "rmsprop": ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize"),
    "adagrad": ("lr", "lr_decay", "eps", "weight_decay", "maximize"),
    "adadelta": ("lr", "rho", "eps", "weight_decay", "maximize"),
    "adamax": ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize"),
    "radam": ("lr", "beta1", "beta2", "eps", "weight_decay", "decoupled", "maximize"),
    "nadam": (
        *("lr", "beta1", "beta2", "eps", "weight_decay"),
        *("momentum_decay", "decoupled", "maximize"),
    ),
    "asgd": ("lr", "lambd", "alpha", "t0", "weight_decay", "maximize"),
    "rprop": ("lr", "etaminus", "etaplus", "step_size_min", "step_size_max", "maximize"),
}
"""The rows of ``hyper`` for each rule: `torch.optim`'s options; ``betas``, ``etas`` and
``step_sizes`` as two rows each, ``decoupled`` for ``decoupled_weight_decay``."""

_sgd_step_ = torch.ops.modelbatch.sgd_step_.default
_adam_step_ = torch.ops.modelbatch.adam_step_.default
_adamw_step_ = torch.ops.modelbatch.adamw_step_.default
_rmsprop_step_ = torch.ops.modelbatch.rmsprop_step_.default
_adagrad_step_ = torch.ops.modelbatch.adagrad_step_.default
_adadelta_step_ = torch.ops.modelbatch.adadelta_step_.default
_adamax_step_ = torch.ops.modelbatch.adamax_step_.default
_radam_step_ = torch.ops.modelbatch.radam_step_.default
_rprop_step_ = torch.ops.modelbatch.rprop_step_.default
_nadam_step_ = torch.ops.modelbatch.nadam_step_.default
_asgd_step_ = torch.ops.modelbatch.asgd_step_.default
_grad_stats = torch.ops.modelbatch.grad_stats.default


def sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    step: Tensor,
    hyper: Tensor,
    active: Tensor | None = None,
    nonfinite: Tensor | None = None,
    inv_scale: Tensor | None = None,
    clip_factor: Tensor | None = None,
    clip_value: Tensor | None = None,
) -> None:
    """A step of `torch.optim.SGD` for every model.

    Only models with momentum count their steps. At such a model's first step the momentum buffer
    becomes the gradient; what it held before is not read.

    Args:
        params: the parameters ``[M, ...]``, changed in place.
        grads: their gradients.
        momentum_buffers: one per parameter, or empty where all momenta are 0.
        step: float32 ``[M]``.
        hyper: float64 ``[6, M]``, rows `HYPER_ROWS` ``["sgd"]``.
        active: bool ``[M]``, see above, as for the other four.
        nonfinite: bool ``[M]``.
        inv_scale: float32 ``[M]``.
        clip_factor: float64 ``[M]``.
        clip_value: float64 ``[M]``.

    Raises:
        RuntimeError: wrong arguments, see above.
    """
    common = (active, nonfinite, inv_scale, clip_factor, clip_value)
    _sgd_step_(params, grads, momentum_buffers, step, hyper, *common)
    increment_version(params)


def adam_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    hyper: Tensor,
    active: Tensor | None = None,
    nonfinite: Tensor | None = None,
    inv_scale: Tensor | None = None,
    clip_factor: Tensor | None = None,
    clip_value: Tensor | None = None,
) -> None:
    """A step of `torch.optim.Adam` for every model.

    Args:
        params: the parameters ``[M, ...]``, changed in place.
        grads: their gradients.
        exp_avgs: the first moments, one per parameter.
        exp_avg_sqs: the second moments, one per parameter.
        max_exp_avg_sqs: one per parameter, or empty where no model has ``amsgrad``.
        step: float32 ``[M]``.
        hyper: float64 ``[8, M]``, rows `HYPER_ROWS` ``["adam"]``; ``decoupled`` is the option
            ``decoupled_weight_decay``.
        active: bool ``[M]``, see above, as for the other four.
        nonfinite: bool ``[M]``.
        inv_scale: float32 ``[M]``.
        clip_factor: float64 ``[M]``.
        clip_value: float64 ``[M]``.

    Raises:
        RuntimeError: wrong arguments, see above.
    """
    common = (active, nonfinite, inv_scale, clip_factor, clip_value)
    _adam_step_(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, step, hyper, *common)
    increment_version(params)


def adamw_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    hyper: Tensor,
    active: Tensor | None = None,
    nonfinite: Tensor | None = None,
    inv_scale: Tensor | None = None,
    clip_factor: Tensor | None = None,
    clip_value: Tensor | None = None,
) -> None:
    """A step of `torch.optim.AdamW` for every model.

    The arguments are those of `adam_step_`; weight decay is decoupled for every model, whatever the
    row ``decoupled`` says.

    Raises:
        RuntimeError: wrong arguments, see above.
    """
    common = (active, nonfinite, inv_scale, clip_factor, clip_value)
    _adamw_step_(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, step, hyper, *common)
    increment_version(params)


def rmsprop_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    square_avgs: Sequence[Tensor],
    grad_avgs: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    step: Tensor,
    hyper: Tensor,
    active: Tensor | None = None,
    nonfinite: Tensor | None = None,
    inv_scale: Tensor | None = None,
    clip_factor: Tensor | None = None,
    clip_value: Tensor | None = None,
) -> None:
    """A step of `torch.optim.RMSprop` for every model.

    Args:
        params: the parameters ``[M, ...]``, changed in place.
        grads: their gradients.
        square_avgs: the mean squares, one per parameter.
        grad_avgs: the mean gradients, one per parameter, or empty where no model is ``centered``.
        momentum_buffers: one per parameter, or empty where all momenta are 0.
        step: float32 ``[M]``.
        hyper: float64 ``[7, M]``, rows `HYPER_ROWS` ``["rmsprop"]``.
        active: bool ``[M]``, see above, as for the other four.
        nonfinite: bool ``[M]``.
        inv_scale: float32 ``[M]``.
        clip_factor: float64 ``[M]``.
        clip_value: float64 ``[M]``.

    Raises:
        RuntimeError: wrong arguments, see above.
    """
    common = (active, nonfinite, inv_scale, clip_factor, clip_value)
    _rmsprop_step_(params, grads, square_avgs, grad_avgs, momentum_buffers, step, hyper, *common)
    increment_version(params)


def adagrad_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    sums: Sequence[Tensor],
    step: Tensor,
    hyper: Tensor,
    active: Tensor | None = None,
    nonfinite: Tensor | None = None,
    inv_scale: Tensor | None = None,
    clip_factor: Tensor | None = None,
    clip_value: Tensor | None = None,
) -> None:
    """A step of `torch.optim.Adagrad` for every model.

    Args:
        params: the parameters ``[M, ...]``, changed in place.
        grads: their gradients.
        sums: the sums of squares, one per parameter, filled with each model's
            ``initial_accumulator_value`` before the first step.
        step: float32 ``[M]``.
        hyper: float64 ``[5, M]``, rows `HYPER_ROWS` ``["adagrad"]``.
        active: bool ``[M]``, see above, as for the other four.
        nonfinite: bool ``[M]``.
        inv_scale: float32 ``[M]``.
        clip_factor: float64 ``[M]``.
        clip_value: float64 ``[M]``.

    Raises:
        RuntimeError: wrong arguments, see above.
    """
    common = (active, nonfinite, inv_scale, clip_factor, clip_value)
    _adagrad_step_(params, grads, sums, step, hyper, *common)
    increment_version(params)


def adadelta_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    square_avgs: Sequence[Tensor],
    acc_deltas: Sequence[Tensor],
    step: Tensor,
    hyper: Tensor,
    active: Tensor | None = None,
    nonfinite: Tensor | None = None,
    inv_scale: Tensor | None = None,
    clip_factor: Tensor | None = None,
    clip_value: Tensor | None = None,
) -> None:
    """A step of `torch.optim.Adadelta` for every model.

    Args:
        params: the parameters ``[M, ...]``, changed in place.
        grads: their gradients.
        square_avgs: the mean squares of the gradients, one per parameter.
        acc_deltas: the mean squares of the updates, one per parameter.
        step: float32 ``[M]``.
        hyper: float64 ``[5, M]``, rows `HYPER_ROWS` ``["adadelta"]``.
        active: bool ``[M]``, see above, as for the other four.
        nonfinite: bool ``[M]``.
        inv_scale: float32 ``[M]``.
        clip_factor: float64 ``[M]``.
        clip_value: float64 ``[M]``.
    """
    common = (active, nonfinite, inv_scale, clip_factor, clip_value)
    _adadelta_step_(params, grads, square_avgs, acc_deltas, step, hyper, *common)
    increment_version(params)


def adamax_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_infs: Sequence[Tensor],
    step: Tensor,
    hyper: Tensor,
    active: Tensor | None = None,
    nonfinite: Tensor | None = None,
    inv_scale: Tensor | None = None,
    clip_factor: Tensor | None = None,
    clip_value: Tensor | None = None,
) -> None:
    """A step of `torch.optim.Adamax` for every model.

    Args:
        params: the parameters ``[M, ...]``, changed in place.
        grads: their gradients.
        exp_avgs: the first moments, one per parameter.
        exp_infs: the infinity norms, one per parameter.
        step: float32 ``[M]``.
        hyper: float64 ``[6, M]``, rows `HYPER_ROWS` ``["adamax"]``.
        active: bool ``[M]``, see above, as for the other four.
        nonfinite: bool ``[M]``.
        inv_scale: float32 ``[M]``.
        clip_factor: float64 ``[M]``.
        clip_value: float64 ``[M]``.
    """
    common = (active, nonfinite, inv_scale, clip_factor, clip_value)
    _adamax_step_(params, grads, exp_avgs, exp_infs, step, hyper, *common)
    increment_version(params)


def radam_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: Tensor,
    hyper: Tensor,
    active: Tensor | None = None,
    nonfinite: Tensor | None = None,
    inv_scale: Tensor | None = None,
    clip_factor: Tensor | None = None,
    clip_value: Tensor | None = None,
) -> None:
    """A step of `torch.optim.RAdam` for every model.

    Args:
        params: the parameters ``[M, ...]``, changed in place.
        grads: their gradients.
        exp_avgs: the first moments, one per parameter.
        exp_avg_sqs: the second moments, one per parameter.
        step: float32 ``[M]``.
        hyper: float64 ``[7, M]``, rows `HYPER_ROWS` ``["radam"]``.
        active: bool ``[M]``, see above, as for the other four.
        nonfinite: bool ``[M]``.
        inv_scale: float32 ``[M]``.
        clip_factor: float64 ``[M]``.
        clip_value: float64 ``[M]``.
    """
    common = (active, nonfinite, inv_scale, clip_factor, clip_value)
    _radam_step_(params, grads, exp_avgs, exp_avg_sqs, step, hyper, *common)
    increment_version(params)


def rprop_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    prevs: Sequence[Tensor],
    step_sizes: Sequence[Tensor],
    step: Tensor,
    hyper: Tensor,
    active: Tensor | None = None,
    nonfinite: Tensor | None = None,
    inv_scale: Tensor | None = None,
    clip_factor: Tensor | None = None,
    clip_value: Tensor | None = None,
) -> None:
    """A step of `torch.optim.Rprop` for every model.

    Args:
        params: the parameters ``[M, ...]``, changed in place.
        grads: their gradients.
        prevs: the previous gradients, one per parameter.
        step_sizes: the step sizes, one per parameter. At a model's first step, and only then,
            they are its ``lr``, whatever they hold.
        step: float32 ``[M]``.
        hyper: float64 ``[6, M]``, rows `HYPER_ROWS` ``["rprop"]``.
        active: bool ``[M]``, see above, as for the other four.
        nonfinite: bool ``[M]``.
        inv_scale: float32 ``[M]``.
        clip_factor: float64 ``[M]``.
        clip_value: float64 ``[M]``.
    """
    common = (active, nonfinite, inv_scale, clip_factor, clip_value)
    _rprop_step_(params, grads, prevs, step_sizes, step, hyper, *common)
    increment_version(params)


def nadam_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    mu_product: Tensor,
    step: Tensor,
    hyper: Tensor,
    active: Tensor | None = None,
    nonfinite: Tensor | None = None,
    inv_scale: Tensor | None = None,
    clip_factor: Tensor | None = None,
    clip_value: Tensor | None = None,
) -> None:
    """A step of `torch.optim.NAdam` for every model.

    Args:
        params: the parameters ``[M, ...]``, changed in place.
        grads: their gradients.
        exp_avgs: the first moments, one per parameter.
        exp_avg_sqs: the second moments, one per parameter.
        mu_product: ``[M]`` and contiguous, changed in place; not read at a model's first step. It
            is float32, on the CPU also float64: torch has it in its default dtype, and in the
            parameter's own once a state was loaded.
        step: float32 ``[M]``.
        hyper: float64 ``[8, M]``, rows `HYPER_ROWS` ``["nadam"]``.
        active: bool ``[M]``, see above, as for the other four.
        nonfinite: bool ``[M]``.
        inv_scale: float32 ``[M]``.
        clip_factor: float64 ``[M]``.
        clip_value: float64 ``[M]``.
    """
    common = (active, nonfinite, inv_scale, clip_factor, clip_value)
    _nadam_step_(params, grads, exp_avgs, exp_avg_sqs, mu_product, step, hyper, *common)
    increment_version(params)


def asgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    axs: Sequence[Tensor],
    eta: Tensor,
    mu: Tensor,
    step: Tensor,
    hyper: Tensor,
    active: Tensor | None = None,
    nonfinite: Tensor | None = None,
    inv_scale: Tensor | None = None,
    clip_factor: Tensor | None = None,
    clip_value: Tensor | None = None,
) -> None:
    """A step of `torch.optim.ASGD` for every model.

    Args:
        params: the parameters ``[M, ...]``, changed in place.
        grads: their gradients.
        axs: the averages, one per parameter.
        eta: the step sizes, ``[M]`` and contiguous, changed in place; not read at a model's first
            step, when it is ``lr``. It is float32, on the CPU also float64: torch has it in its
            default dtype.
        mu: the weights of the averages, likewise and of the same dtype; 1 at the first step.
        step: float32 ``[M]``.
        hyper: float64 ``[6, M]``, rows `HYPER_ROWS` ``["asgd"]``.
        active: bool ``[M]``, see above, as for the other four.
        nonfinite: bool ``[M]``.
        inv_scale: float32 ``[M]``.
        clip_factor: float64 ``[M]``.
        clip_value: float64 ``[M]``.
    """
    common = (active, nonfinite, inv_scale, clip_factor, clip_value)
    _asgd_step_(params, grads, axs, eta, mu, step, hyper, *common)
    increment_version(params)


def grad_stats(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Every model's squared gradient norm, and whether its gradient is finite.

    Squares are added in float64 in the order of the elements' indices, whatever the strides, so a
    model's result depends neither on the other models nor on the number of threads.

    Args:
        grads: tensors ``[M, ...]``, at least one, all of one dtype: float32, float64, bfloat16 or
            float16.

    Returns:
        The sums of squares over all of a model's elements, float64 ``[M]``, infinite or NaN where
        an element is; and, bool ``[M]``, whether any element is infinite or NaN. A sum of float64
        squares may overflow to infinity although all elements are finite; the flag stays False.

    Raises:
        RuntimeError: no tensors, or a wrong shape, dtype or device.
    """
    return _grad_stats(grads)


# ---- fakes --------------------------------------------------------------------------------------


def _step_fake(*args: object) -> None:
    """The operators return nothing, and change no shapes."""


for _rule in HYPER_ROWS:
    torch.library.register_fake(f"modelbatch::{_rule}_step_")(_step_fake)


@torch.library.register_fake("modelbatch::grad_stats")
def _grad_stats_fake(grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    m = grads[0].shape[0]
    sq_norm = grads[0].new_empty([m], dtype=torch.float64)
    return sq_norm, grads[0].new_empty([m], dtype=torch.bool)
