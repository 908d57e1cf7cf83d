"""The operator of the engine in plain Python: one model after another, by autograd.

It reads the same programs (`csrc/engine/engine.h`) and has the same results, up to rounding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modelbatch.engine import encoding as codes
from modelbatch.engine.encoding import Loss, Op
from modelbatch.ops import optim, random

_RULES = (  # names, and how many kinds of states
    ("sgd", 1),
    ("adam", 3),
    ("adamw", 3),
    ("rmsprop", 3),
    ("adagrad", 1),
)


class _Program:
    def __init__(self, code: Tensor, numbers: Tensor):
        self.header = code[: codes.HEADER_LENGTH].tolist()
        version, values, count, self.output, self.loss = self.header[:5]
        assert version == codes.VERSION
        self.loss_parameters = self.header[5:13]
        self.optimized, self.buffers = self.header[13:]
        place = codes.HEADER_LENGTH
        self.values = code[place : place + 2 * values].reshape(values, 2).tolist()
        place += 2 * values
        self.code = code[place:].reshape(count, codes.INSTRUCTION_LENGTH).tolist()
        self.numbers = numbers


def interpret(
    params: list[Tensor],
    buffers: list[Tensor],
    states: list[Tensor],
    step: Tensor,
    x: Tensor,
    target: Tensor,
    sample_weight: Tensor | None,
    program: Tensor,
    numbers: Tensor,
    hyper: Tensor,
    lr: Tensor | None,
    active: Tensor | None,
    clip_norm: Tensor | None,
    clip_value: Tensor | None,
    seed: Tensor | None,
    stream_step: Tensor | None,
    rule: int,
    flags: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`modelbatch.ops.engine.train_steps_`."""
    code = _Program(program, numbers)
    num_steps, num_models = x.shape[0], step.shape[0]
    losses = torch.zeros(num_steps, num_models, dtype=params[0].dtype)
    status = torch.zeros(num_steps, num_models, dtype=torch.uint8)
    norms = torch.zeros(num_steps, num_models, dtype=torch.float64)
    for m in range(num_models):
        rests = active is not None and not active[m]
        taken = 0
        for k in range(num_steps):
            weight = None
            if sample_weight is not None:
                weight = sample_weight[k, m] if flags & codes.OWN_WEIGHT else sample_weight[k]
            if weight is not None and not weight.any():
                status[k, m] = codes.STATUS_RESTED
                continue
            run = _Run(code, [p[m] for p in params], [b[m] for b in buffers], m, weight)
            if seed is not None and stream_step is not None:
                run.stream = seed[m : m + 1], stream_step[m : m + 1] + taken
            own_x = x[k, m] if flags & codes.OWN_INPUT else x[k]
            own_y = target[k, m] if flags & codes.OWN_TARGET else target[k]
            loss = run.loss(own_x, own_y)
            losses[k, m] = loss.detach()
            if rests:
                status[k, m] = codes.STATUS_RESTED
                continue
            grads = list(torch.autograd.grad(loss, run.params[: code.optimized]))
            run.write_buffers()
            own = {
                "clip_norm": None if clip_norm is None else clip_norm[m : m + 1],
                "clip_value": None if clip_value is None else clip_value[m : m + 1],
            }
            column = hyper[:, m : m + 1].clone()
            if lr is not None:
                column[0, 0] = lr[k, m]
            learning = [p[m : m + 1] for p in params[: code.optimized]]
            own_states = [s[m : m + 1] for s in states]
            own_step = step[m : m + 1]
            norms[k, m] = _update(rule, learning, grads, own_states, own_step, column, **own)
            taken += 1
            bits = codes.STATUS_LOSS * (not loss.isfinite())
            bits |= codes.STATUS_GRAD * (not all(g.isfinite().all() for g in grads))
            bits |= codes.STATUS_WEIGHTS * (not all(p.isfinite().all() for p in learning))
            status[k, m] = bits
            rests = bool(bits and flags & codes.STOP_NONFINITE)
    return losses, status, norms if flags & codes.GRAD_NORM else norms.new_empty(0)


def _update(
    rule: int,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    step: Tensor,
    hyper: Tensor,
    clip_norm: Tensor | None,
    clip_value: Tensor | None,
) -> Tensor:
    """A step of one model's optimizer; returns the norm before clipping."""
    stacked = [grad.unsqueeze(0) for grad in grads]
    norm = optim.grad_stats(stacked)[0].sqrt()
    factor = None
    if clip_norm is not None:
        factor = torch.clamp(clip_norm / (norm + 1e-6), max=1.0)
    name, count = _RULES[rule]
    kinds: list[list[Tensor]] = [[] for _ in range(count)]
    for number, kind in enumerate(_present(name, hyper)):
        kinds[kind] = states[number * len(params) : (number + 1) * len(params)]
    operator = getattr(optim, f"{name}_step_")
    with torch.no_grad():
        scaling = (None, None, None, factor, clip_value)
        operator(params, stacked, *kinds, step, hyper.contiguous(), *scaling)
    return norm


def _present(name: str, hyper: Tensor) -> list[int]:
    row = {option: hyper[k, 0].item() for k, option in enumerate(optim.HYPER_ROWS[name])}
    if name == "sgd":
        return [0] if row["momentum"] else []
    if name == "rmsprop":
        return [0] + [1] * bool(row["centered"]) + [2] * bool(row["momentum"] > 0)
    if name in ("adam", "adamw"):
        return [0, 1] + [2] * bool(row["amsgrad"])
    return [0]


class _Run:
    """One forward of one model."""

    def __init__(
        self,
        code: _Program,
        params: list[Tensor],
        buffers: list[Tensor],
        model: int,
        weight: Tensor | None,
    ):
        self.code, self.model, self.buffers = code, model, buffers
        self.params = [p.detach().clone().requires_grad_(k < code.optimized) for k, p in
                       enumerate(params)]  # fmt: skip
        self.weight = None if weight is None else weight.to(params[0].dtype)
        self.stream: Any = None
        self.written: list[tuple[Tensor, Tensor]] = []

    def number(self, row: int) -> float:
        return float(self.code.numbers[row, self.model])

    def write_buffers(self) -> None:
        for buffer, value in self.written:
            buffer.copy_(value)

    # ---- the forward

    def output(self, x: Tensor) -> Tensor:
        rows, width = self.code.values[0]
        if self.weight is not None:  # a sample that takes part, in the place of one that does not
            used = self.weight != 0
            x = x[torch.where(used, torch.arange(len(x)), used.to(torch.int8).argmax())]
        values: dict[int, Tensor] = {0: x.reshape(len(x), rows, width)}
        for op, first, second, out, weight, bias, mean, var, number, extra in self.code.code:
            a = values[first]
            w, b = (None if p < 0 else self.params[p] for p in (weight, bias))
            if op == Op.BATCH_NORM:
                result = self.batch_norm(a[:, 0], w, b, mean, var, number, extra).unsqueeze(1)
            elif op == Op.ADD:
                result = a + values[second]
            elif op == Op.EMBEDDING:
                padding = None if extra < 0 else extra
                assert w is not None
                result = F.embedding(a[..., 0], w, padding)
            else:
                result = self.layer(Op(op), a, w, b, number, extra)
            rows, width = self.code.values[out]
            values[out] = result.reshape(len(x), rows, width)
        return values[self.code.output]

    def layer(
        self, op: Op, a: Tensor, w: Tensor | None, b: Tensor | None, number: int, extra: int
    ) -> Tensor:
        match op:
            case Op.LINEAR:
                assert w is not None
                return F.linear(a, w, b)
            case Op.LEAKY_RELU:
                return F.leaky_relu(a, self.number(number))
            case Op.ELU:
                return F.elu(a, self.number(number))
            case Op.GELU:
                return F.gelu(a, approximate="tanh" if extra else "none")
            case Op.SOFTPLUS:
                return F.softplus(a, self.number(number), self.number(number + 1))  # type: ignore[arg-type]
            case Op.LAYER_NORM:
                return F.layer_norm(a, a.shape[-1:], w, b, self.number(number))
            case Op.DROPOUT:
                p = torch.tensor([self.number(number)], dtype=torch.float64)
                return random.dropout(a.unsqueeze(0), p, *self.stream, extra)[0]
            case Op.MEAN_ROWS:
                return a.mean(1, keepdim=True)
            case Op.RESHAPE:
                return a
        plain = {Op.RELU: F.relu, Op.SILU: F.silu, Op.TANH: torch.tanh, Op.SIGMOID: torch.sigmoid}
        return plain[op](a)

    def batch_norm(
        self,
        a: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        mean: int,
        var: int,
        number: int,
        extra: int,
    ) -> Tensor:
        weights = torch.ones(len(a), dtype=a.dtype) if self.weight is None else self.weight
        count = weights.sum()
        column = weights.unsqueeze(1)
        centre = (a * column).sum(0) / count
        spread = ((a - centre).square() * column).sum(0) / count
        out = (a - centre) * (spread + self.number(number)).rsqrt()
        if extra >= 0:
            self.written.append((self.buffers[extra], self.buffers[extra] + 1))
        if mean >= 0:
            momentum = self.number(number + 1)
            if momentum != momentum:
                momentum = 1.0 / (self.buffers[extra].item() + 1)
            unbiased = spread * (count.clamp(min=1) / (count - 1).clamp(min=1))
            for place, value in ((mean, centre), (var, unbiased)):
                old = self.buffers[place]
                self.written.append((old, (1 - momentum) * old + momentum * value.detach()))
        out = out if w is None else out * w
        return out if b is None else out + b

    # ---- the loss

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.output(x)
        ignore, smoothing, column, delta, sums = self.code.loss_parameters[:5]
        width = out.shape[-1]
        columns = None
        if column >= 0:
            columns = torch.tensor([self.number(column + c) for c in range(width)]).to(out.dtype)
        kind = Loss(self.code.loss)
        share: Tensor | None = None
        if kind in (Loss.CROSS_ENTROPY, Loss.CROSS_ENTROPY_SOFT, Loss.NLL):
            out = out[:, 0]
            if kind is not Loss.CROSS_ENTROPY_SOFT:
                if self.weight is not None:
                    y = torch.where(self.weight != 0, y, 0)
                kept = y != ignore
                share = kept.to(out.dtype)
                if columns is not None:
                    share = share * columns[torch.where(kept, y, 0)]
            if kind is Loss.NLL:
                each = F.nll_loss(out, y, columns, ignore_index=ignore, reduction="none")
            else:
                options: dict[str, Any] = {}
                if kind is Loss.CROSS_ENTROPY:
                    options["ignore_index"] = ignore
                if smoothing >= 0:
                    options["label_smoothing"] = self.number(smoothing)
                each = F.cross_entropy(out, y, columns, reduction="none", **options)
        else:
            y = y.reshape(out.shape)
            each = self.elementwise(kind, out, y, columns, delta).flatten(1)
        if self.weight is None:
            if sums:
                return each.sum()
            return each.sum() / share.sum() if share is not None else each.mean()
        w = self.weight.reshape(-1, *[1] * (each.dim() - 1))
        total = torch.where(w != 0, each * w, 0.0).sum()
        count = (w.expand_as(each) if share is None else share * w).sum()
        return torch.where(count != 0, total / torch.where(count != 0, count, 1.0), 0.0 * total)

    def elementwise(
        self, kind: Loss, out: Tensor, y: Tensor, columns: Tensor | None, delta: int
    ) -> Tensor:
        if self.weight is not None:
            y = torch.where((self.weight != 0).reshape(-1, 1, 1), y, 0.0)
        match kind:
            case Loss.MSE:
                return F.mse_loss(out, y, reduction="none")
            case Loss.L1:
                return F.l1_loss(out, y, reduction="none")
            case Loss.HUBER:
                return F.huber_loss(out, y, reduction="none", delta=self.number(delta))
            case Loss.SMOOTH_L1:
                return F.smooth_l1_loss(out, y, reduction="none", beta=self.number(delta))
        assert kind is Loss.BCE_LOGITS
        return F.binary_cross_entropy_with_logits(out, y, reduction="none", pos_weight=columns)
