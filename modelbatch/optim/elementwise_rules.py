"""Torch's elementwise update rules, written for the stacked tensors of all models.

Each is the sequence of operations of torch's own class for one parameter, with a column
`[M, 1, ...]` where torch has one number. Where torch has a branch, every model takes its own.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import ASGD, Adadelta, Adafactor, Adamax, NAdam, Optimizer, RAdam, Rprop

__all__ = ["RULES", "ElementwiseRule"]

_Options = dict[str, Tensor]  # float64 [M] each
_Scalars = dict[str, Tensor]  # float64 [P, M] each
_Columns = dict[str, Tensor]  # of the parameter's dtype, [M, 1, ...] each


class ElementwiseRule:
    """One torch class: its options, its states, and its arithmetic."""

    #: The options that enter the arithmetic, in the order of `itemgetter`.
    options: tuple[str, ...]
    #: The states with one number, and the others.
    scalars: tuple[str, ...] = ("step",)
    tensors: tuple[str, ...]
    #: The others of a parameter with fewer than two axes, if they differ.
    tensors_of_vector: tuple[str, ...] = ()
    #: Whether torch's `foreach` variant computes the same, to rounding of the parameter's dtype.
    same_in_foreach = True

    def tensors_of(self, param: Tensor) -> tuple[str, ...]:
        """The names of the states of one model's parameter that have more than one number."""
        return (param.dim() < 2 and self.tensors_of_vector) or self.tensors

    def coefficients(self, o: _Options, s: _Scalars) -> dict[str, Tensor]:
        """What the update needs of options and scalar states, `[M]` or `[P, M]` each.

        Args:
            o: the options.
            s: the scalar states after `step` was advanced.
        """
        return o

    def advance(self, o: _Options, s: _Scalars, stored: Mapping[str, Tensor]) -> None:
        """Writes the scalar states other than `step`, `[P, M]` each, that torch changes."""

    def update(self, p: Tensor, grad: Tensor, state: Sequence[Tensor], c: _Columns) -> None:
        """Updates a stacked parameter and its states in place."""
        raise NotImplementedError


def _has(column: Tensor) -> bool:
    return bool(column.any())


def _with_decay(p: Tensor, grad: Tensor, decay: Tensor) -> Tensor:
    """The gradient plus `decay` times the parameter, in the models that have a decay."""
    decays = decay != 0
    if not _has(decays):
        return grad
    decayed = grad.addcmul(p, decay)
    # 0 * inf is NaN: a model without decay must not see its parameters here.
    return decayed if bool(decays.all()) else torch.where(decays, decayed, grad)


def _choose(which: Tensor, yes: Callable[[], Tensor], no: Callable[[], Tensor]) -> Tensor:
    """By model: `yes()` where the flag is set, `no()` elsewhere."""
    if bool(which.all()):
        return yes()
    return torch.where(which, yes(), no()) if _has(which) else no()


class _Adamax(ElementwiseRule):
    options = ("lr", "betas", "eps", "weight_decay")
    tensors = ("exp_avg", "exp_inf")

    def coefficients(self, o: _Options, s: _Scalars) -> dict[str, Tensor]:
        rate = o["lr"] / (1 - o["beta1"] ** s["step"])
        return {
            "blend": 1 - o["beta1"],
            "beta2": o["beta2"],
            "eps": o["eps"],
            "decay": o["weight_decay"],
            "rate": -rate,
        }

    def update(self, p: Tensor, grad: Tensor, state: Sequence[Tensor], c: _Columns) -> None:
        exp_avg, exp_inf = state
        grad = _with_decay(p, grad, c["decay"])
        exp_avg.lerp_(grad, c["blend"])
        torch.maximum(exp_inf.mul_(c["beta2"]), grad.abs().add_(c["eps"]), out=exp_inf)
        p.addcdiv_(exp_avg * c["rate"], exp_inf)


class _NAdam(ElementwiseRule):
    options = ("lr", "betas", "eps", "weight_decay", "momentum_decay", "decoupled_weight_decay")
    scalars = ("step", "mu_product")
    tensors = ("exp_avg", "exp_avg_sq")

    @staticmethod
    def _mu(o: _Options, step: Tensor) -> Tensor:
        return o["beta1"] * (1 - 0.5 * 0.96 ** (step * o["momentum_decay"]))

    def advance(self, o: _Options, s: _Scalars, stored: Mapping[str, Tensor]) -> None:
        product = stored["mu_product"]
        product.mul_(self._mu(o, s["step"]).to(product))
        s["mu_product"] = product.to(s["step"])

    def coefficients(self, o: _Options, s: _Scalars) -> dict[str, Tensor]:
        mu, mu_next = self._mu(o, s["step"]), self._mu(o, s["step"] + 1)
        decoupled = o["decoupled_weight_decay"] != 0
        return {
            "blend": 1 - o["beta1"],
            "beta2": o["beta2"],
            "blend2": 1 - o["beta2"],
            "eps": o["eps"],
            "decay": o["weight_decay"].masked_fill(decoupled, 0.0),
            "shrink": 1 - (o["lr"] * o["weight_decay"]).masked_fill(~decoupled, 0.0),
            "correction2": 1 - o["beta2"] ** s["step"],
            "of_grad": -o["lr"] * (1 - mu) / (1 - s["mu_product"]),
            "of_average": -o["lr"] * mu_next / (1 - s["mu_product"] * mu_next),
        }

    def update(self, p: Tensor, grad: Tensor, state: Sequence[Tensor], c: _Columns) -> None:
        exp_avg, exp_avg_sq = state
        if _has(c["shrink"] != 1):
            p.mul_(c["shrink"])
        grad = _with_decay(p, grad, c["decay"])
        exp_avg.lerp_(grad, c["blend"])
        exp_avg_sq.mul_(c["beta2"]).addcmul_(grad * c["blend2"], grad)
        denominator = exp_avg_sq.div(c["correction2"]).sqrt_().add_(c["eps"])
        p.addcdiv_(grad * c["of_grad"], denominator)
        p.addcdiv_(exp_avg * c["of_average"], denominator)


class _RAdam(ElementwiseRule):
    options = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay")
    tensors = ("exp_avg", "exp_avg_sq")

    def coefficients(self, o: _Options, s: _Scalars) -> dict[str, Tensor]:
        decoupled = o["decoupled_weight_decay"] != 0
        power = o["beta2"] ** s["step"]
        correction2 = 1 - power
        longest = 2 / (1 - o["beta2"]) - 1
        length = longest - 2 * s["step"] * power / correction2
        square = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        return {
            "lr": o["lr"],
            "blend": 1 - o["beta1"],
            "beta2": o["beta2"],
            "blend2": 1 - o["beta2"],
            "eps": o["eps"],
            "decay": o["weight_decay"].masked_fill(decoupled, 0.0),
            "shrink": 1 - (o["lr"] * o["weight_decay"]).masked_fill(~decoupled, 0.0),
            "correction1": 1 - o["beta1"] ** s["step"],
            "root2": correction2.sqrt(),
            # Of a model that is not rectified yet, the square may be negative.
            "rectified": (length > 5).double(),
            "rectifier": square.clamp(min=0).sqrt(),
        }

    def update(self, p: Tensor, grad: Tensor, state: Sequence[Tensor], c: _Columns) -> None:
        exp_avg, exp_avg_sq = state
        if _has(c["shrink"] != 1):
            p.mul_(c["shrink"])
        grad = _with_decay(p, grad, c["decay"])
        exp_avg.lerp_(grad, c["blend"])
        exp_avg_sq.mul_(c["beta2"]).addcmul_(grad * c["blend2"], grad)
        plain = (exp_avg / c["correction1"]).mul_(c["lr"])

        def rectified() -> Tensor:
            adaptive = c["root2"] / exp_avg_sq.sqrt().add_(c["eps"])
            return adaptive.mul_(plain).mul_(c["rectifier"])

        p.sub_(_choose(c["rectified"] != 0, rectified, lambda: plain))


class _Adadelta(ElementwiseRule):
    options = ("lr", "rho", "eps", "weight_decay")
    tensors = ("square_avg", "acc_delta")

    def coefficients(self, o: _Options, s: _Scalars) -> dict[str, Tensor]:
        return {
            "rate": -o["lr"],
            "rho": o["rho"],
            "blend": 1 - o["rho"],
            "eps": o["eps"],
            "decay": o["weight_decay"],
        }

    def update(self, p: Tensor, grad: Tensor, state: Sequence[Tensor], c: _Columns) -> None:
        square_avg, acc_delta = state
        grad = _with_decay(p, grad, c["decay"])
        square_avg.mul_(c["rho"]).addcmul_(grad * c["blend"], grad)
        deviation = square_avg.add(c["eps"]).sqrt_()
        delta = acc_delta.add(c["eps"]).sqrt_().div_(deviation).mul_(grad)
        acc_delta.mul_(c["rho"]).addcmul_(delta * c["blend"], delta)
        p.addcmul_(delta, c["rate"])


class _ASGD(ElementwiseRule):
    same_in_foreach = False  # it has its learning rate in single precision
    options = ("lr", "lambd", "alpha", "t0", "weight_decay")
    scalars = ("step", "eta", "mu")
    tensors = ("ax",)

    def coefficients(self, o: _Options, s: _Scalars) -> dict[str, Tensor]:
        return {
            "shrink": 1 - o["lambd"] * s["eta"],
            "rate": -s["eta"],
            "mu": s["mu"],
            "decay": o["weight_decay"],
        }

    def advance(self, o: _Options, s: _Scalars, stored: Mapping[str, Tensor]) -> None:
        # Those of the next step: `s` keeps what this step uses. torch makes tensors of the default
        # dtype of them before it stores them.
        dtype = torch.get_default_dtype()
        eta = o["lr"] / (1 + o["lambd"] * o["lr"] * s["step"]) ** o["alpha"]
        mu = 1 / (s["step"] - o["t0"]).clamp(min=1)
        stored["eta"].copy_(eta.to(dtype))
        stored["mu"].copy_(mu.to(dtype))

    def update(self, p: Tensor, grad: Tensor, state: Sequence[Tensor], c: _Columns) -> None:
        (average,) = state
        grad = _with_decay(p, grad, c["decay"])
        p.mul_(c["shrink"]).addcmul_(grad, c["rate"])
        average.copy_(
            _choose(c["mu"] == 1, lambda: p, lambda: average + p.sub(average).mul_(c["mu"]))
        )


class _Adafactor(ElementwiseRule):
    options = ("lr", "beta2_decay", "eps", "d", "weight_decay")
    tensors = ("row_var", "col_var")
    tensors_of_vector = ("variance",)

    def coefficients(self, o: _Options, s: _Scalars) -> dict[str, Tensor]:
        slowest = 1 / s["step"].sqrt()
        return {
            "blend": s["step"] ** o["beta2_decay"],
            "rate": torch.where(slowest < o["lr"], slowest, o["lr"]),
            "eps1": o["eps1"],
            "eps2": o["eps2"],
            "threshold": o["d"],
            "shrink": 1 - o["lr"] * o["weight_decay"],
        }

    def update(self, p: Tensor, grad: Tensor, state: Sequence[Tensor], c: _Columns) -> None:
        # Not given, it is the precision of the parameter.
        eps = torch.where(c["eps1"].isnan(), torch.finfo(p.dtype).eps, c["eps1"])
        scale = _root_mean_square(p)
        # As Python's max: a NaN is not above anything.
        rate = torch.where(scale > c["eps2"], scale, c["eps2"]).mul_(c["rate"])
        if _has(c["shrink"] != 1):
            p.mul_(c["shrink"])
        if p.dim() > 2:
            row_var, col_var = state
            for var, dim in ((row_var, -1), (col_var, -2)):
                mean = torch.linalg.vector_norm(grad, dim=dim, keepdim=True).square_()
                var.lerp_(mean.div_(grad.size(dim)), c["blend"])
            smallest = torch.maximum(row_var.mean(dim=-2, keepdim=True), eps)
            estimate = (row_var * col_var).div_(smallest)
        else:
            (estimate,) = state
            estimate.lerp_(grad * grad, c["blend"])
        update = torch.maximum(estimate, eps * eps).rsqrt_().mul_(grad)
        excess = _root_mean_square(update) / c["threshold"]
        p.sub_(update.mul_(rate / torch.where(excess > 1, excess, 1.0)))


def _root_mean_square(tensor: Tensor) -> Tensor:
    """Of every model's elements, `[M, 1, ...]`."""
    flat = tensor.reshape(tensor.shape[0], -1)
    norm = torch.linalg.vector_norm(flat, dim=1) / flat.shape[1] ** 0.5
    return norm.reshape(-1, *[1] * (tensor.dim() - 1))


class _Rprop(ElementwiseRule):
    options = ("etas", "step_sizes")
    tensors = ("prev", "step_size")

    def update(self, p: Tensor, grad: Tensor, state: Sequence[Tensor], c: _Columns) -> None:
        previous, step_size = state
        sign = grad.mul(previous).sign_()
        factor = torch.where(sign > 0, c["etaplus"], sign)
        factor = torch.where(sign < 0, c["etaminus"], factor)
        factor = torch.where(sign == 0, 1.0, factor)
        step_size.mul_(factor)
        torch.clamp(step_size, c["smallest"], c["largest"], out=step_size)
        previous.copy_(torch.where(sign < 0, 0.0, grad))
        p.addcmul_(previous.sign(), step_size, value=-1)


RULES: dict[type[Optimizer], ElementwiseRule] = {
    Adadelta: _Adadelta(),
    Adafactor: _Adafactor(),
    Adamax: _Adamax(),
    ASGD: _ASGD(),
    NAdam: _NAdam(),
    RAdam: _RAdam(),
    Rprop: _Rprop(),
}
