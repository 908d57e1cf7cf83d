"""Networks for the tests of `train_steps_`: as torch modules and as programs, trained both ways."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import modelbatch  # noqa: F401  (registers the operators)

HEADER, LENGTH = 15, 10
OPCODES = {
    nn.Linear: 0,
    nn.ReLU: 1,
    nn.LeakyReLU: 2,
    nn.ELU: 3,
    nn.GELU: 4,
    nn.SiLU: 5,
    nn.Tanh: 6,
    nn.Sigmoid: 7,
    nn.Softplus: 8,
    nn.LayerNorm: 9,
    nn.BatchNorm1d: 10,
    nn.Dropout: 11,
    nn.Flatten: 13,
    nn.Embedding: 14,
}
LOSSES = ("cross_entropy", "soft", "nll", "mse", "l1", "huber", "smooth_l1", "bce")
RULES = {
    torch.optim.SGD: 0,
    torch.optim.Adam: 1,
    torch.optim.AdamW: 2,
    torch.optim.RMSprop: 3,
    torch.optim.Adagrad: 4,
    torch.optim.Adadelta: 5,
    torch.optim.Adamax: 6,
    torch.optim.RAdam: 7,
    torch.optim.Rprop: 8,
}
# Rows of hyper: names of the options, or pairs of a tuple's name and index.
ROWS: dict[int, tuple[Any, ...]] = {
    0: ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize"),
    1: (
        *("lr", ("betas", 0), ("betas", 1), "eps", "weight_decay", "amsgrad", "maximize"),
        "decoupled_weight_decay",
    ),
    3: ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize"),
    4: ("lr", "lr_decay", "eps", "weight_decay", "maximize"),
    5: ("lr", "rho", "eps", "weight_decay", "maximize"),
    6: ("lr", ("betas", 0), ("betas", 1), "eps", "weight_decay", "maximize"),
    7: (
        *("lr", ("betas", 0), ("betas", 1), "eps", "weight_decay", "decoupled_weight_decay"),
        "maximize",
    ),
    8: ("lr", ("etas", 0), ("etas", 1), ("step_sizes", 0), ("step_sizes", 1), "maximize"),
}
ROWS[2] = ROWS[1]
STATES = {
    0: ("momentum_buffer",),
    1: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    2: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    3: ("square_avg", "grad_avg", "momentum_buffer"),
    4: ("sum",),
    5: ("square_avg", "acc_delta"),
    6: ("exp_avg", "exp_inf"),
    7: ("exp_avg", "exp_avg_sq"),
    8: ("prev", "step_size"),
}
ASKED_BY = {
    (0, 0): "momentum",
    (1, 2): "amsgrad",
    (2, 2): "amsgrad",
    (3, 1): "centered",
    (3, 2): "momentum",
}


class Residual(nn.Sequential):
    """x + f(x)"""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class MeanRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Drop(nn.Module):
    """Dropout with the masks of a model's stream."""

    def __init__(self, p: float, op_index: int):
        super().__init__()
        self.p, self.op_index = p, op_index
        self.seed, self.step = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        ones = torch.ones_like(x).unsqueeze(0)
        scales = torch.ops.modelbatch.dropout(
            ones,
            torch.tensor([self.p], dtype=torch.float64),
            torch.tensor([self.seed]),
            torch.tensor([self.step]),
            self.op_index,
            1,
        )[0]
        return torch.where(scales != 0, x * scales, 0.0)


@dataclass
class Loss:
    """A loss by its name in `LOSSES`, with torch's options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, output: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        functions: dict[str, Any] = {
            "cross_entropy": nn.functional.cross_entropy,
            "soft": nn.functional.cross_entropy,
            "nll": nn.functional.nll_loss,
            "mse": nn.functional.mse_loss,
            "l1": nn.functional.l1_loss,
            "huber": nn.functional.huber_loss,
            "smooth_l1": nn.functional.smooth_l1_loss,
            "bce": nn.functional.binary_cross_entropy_with_logits,
        }
        function = functions[self.name]
        if weight is None:
            return function(output, target, **self.options)
        used = weight != 0
        each = function(output[used], target[used], reduction="none", **self.options)
        w = weight[used].reshape(-1, *[1] * (each.dim() - 1))
        share = torch.ones_like(each)
        if self.name in ("cross_entropy", "nll"):
            share = (target[used] != self.options.get("ignore_index", -100)).to(each.dtype)
            if self.options.get("weight") is not None:
                share = share * self.options["weight"][target[used].clamp(min=0)]
        count = (share * w).sum()
        return (each * w).sum() / count if count != 0 else 0.0 * each.sum()


class Network:
    """Stacked parameters of equally built models, and their program.

    Args:
        models: `nn.Sequential`s; `requires_grad=False` freezes a parameter.
        loss: a loss, or one per model.
        size: (rows, width) of the input.
    """

    def __init__(self, models: list[nn.Module], loss: Any, size: tuple[int, int]):
        self.models = models
        self.losses = loss if isinstance(loss, list) else [loss] * len(models)
        named = list(zip(*(m.named_parameters() for m in models), strict=True))
        trained = [row for row in named if row[0][1].requires_grad]
        fixed = [row for row in named if not row[0][1].requires_grad]
        self.names = [row[0][0] for row in trained + fixed]
        self.params = [torch.stack([p.detach() for _, p in row]) for row in trained + fixed]
        self.num_optimized = len(trained)
        buffers = list(zip(*(m.named_buffers() for m in models), strict=True))
        self.buffer_names = [row[0][0] for row in buffers]
        self.buffers = [torch.stack([b for _, b in row]) for row in buffers]
        self.sizes, self.instructions = [size], []
        self.numbers: list[Tensor] = []
        output = self._layers("", models, 0)
        self.program = torch.tensor(
            [1, len(self.sizes), len(self.instructions), output]
            + self._loss()
            + [self.num_optimized, len(self.buffers)]
            + [n for size in self.sizes for n in size]
            + [n for instruction in self.instructions for n in instruction]
        )

    def number_rows(self) -> Tensor:
        if not self.numbers:
            return torch.zeros(0, len(self.models), dtype=torch.float64)
        return torch.stack(self.numbers)

    def _row(self, values: list[Any]) -> int:
        row = [float("nan") if v is None else float(v) for v in values]
        self.numbers.append(torch.tensor(row, dtype=torch.float64))
        return len(self.numbers) - 1

    def _loss(self) -> list[int]:
        options = [loss.options for loss in self.losses]
        first = options[0]
        smoothing = weight = delta = -1
        if "label_smoothing" in first:
            smoothing = self._row([o["label_smoothing"] for o in options])
        name = "pos_weight" if "pos_weight" in first else "weight"
        if name in first:
            weight = len(self.numbers)
            for column in range(self.sizes[-1][1]):
                self._row([o[name].expand(self.sizes[-1][1])[column] for o in options])
        if self.losses[0].name in ("huber", "smooth_l1"):
            key = "delta" if self.losses[0].name == "huber" else "beta"
            delta = self._row([o.get(key, 1.0) for o in options])
        is_sum = int(first.get("reduction", "mean") == "sum")
        ignored = first.get("ignore_index", -100)
        kind = LOSSES.index(self.losses[0].name)
        return [kind, ignored, smoothing, weight, delta, is_sum, 0, 0, 0]

    def _new(self, rows: int, width: int) -> int:
        self.sizes.append((rows, width))
        return len(self.sizes) - 1

    def _layers(self, prefix: str, layers: list[Any], value: int) -> int:
        if isinstance(layers[0], nn.Sequential):
            start = value
            for name, _ in layers[0].named_children():
                children = [getattr(layer, name) for layer in layers]
                value = self._layers(f"{prefix}{name}.", children, value)
            if isinstance(layers[0], Residual):
                out = self._new(*self.sizes[value])
                self.instructions.append([12, start, value, out, -1, -1, -1, -1, -1, 0])
                value = out
            return value
        return self._layer(prefix, layers, value)

    def _layer(self, prefix: str, layers: list[Any], value: int) -> int:
        layer = layers[0]
        rows, width = self.sizes[value]
        index = {name: self.names.index(prefix + name) for name, _ in layer.named_parameters()}
        places = {name: self.buffer_names.index(prefix + name) for name, _ in layer.named_buffers()}
        number, extra, size = -1, 0, (rows, width)

        def numbers(*names: str) -> int:
            rows = [self._row([getattr(each, name) for each in layers]) for name in names]
            return rows[0]

        opcode = OPCODES.get(type(layer), -1)
        match layer:
            case nn.Linear():
                size = (rows, layer.out_features)
            case nn.LeakyReLU():
                number = numbers("negative_slope")
            case nn.ELU():
                number = numbers("alpha")
            case nn.GELU():
                extra = int(layer.approximate == "tanh")
            case nn.Softplus():
                number = numbers("beta", "threshold")
            case nn.LayerNorm():
                number = numbers("eps")
            case nn.BatchNorm1d():
                number = numbers("eps", "momentum")
                extra = places.get("num_batches_tracked", -1)
            case Drop():
                opcode, number, extra = 11, numbers("p"), layer.op_index
            case nn.Flatten():
                size = (1, rows * width)
            case nn.Embedding():
                size = (rows, layer.embedding_dim)
                extra = -1 if layer.padding_idx is None else layer.padding_idx
            case MeanRows():
                opcode, size = 15, (1, width)
        out = self._new(*size)
        self.instructions.append(
            [
                *(opcode, value, -1, out, index.get("weight", -1), index.get("bias", -1)),
                *(places.get("running_mean", -1), places.get("running_var", -1), number, extra),
            ]
        )
        return out


@dataclass
class Training:
    """One call of the operator, and the same in torch.

    x and y are [K, B, ...], or [K, M, B, ...] where `own_x`, `own_y`; weight [K, B] or [K, M, B].
    """

    network: Network
    x: Tensor
    y: Tensor
    optimizer: Any = torch.optim.SGD
    options: Any = field(default_factory=lambda: {"lr": 0.1})
    own_x: bool = False
    own_y: bool = False
    weight: Tensor | None = None
    active: list[bool] | None = None
    clip_norm: list[float] | None = None
    clip_value: list[float] | None = None
    lr: Tensor | None = None
    stop: bool = False
    seeds: list[int] | None = None

    def __post_init__(self) -> None:
        net, count = self.network, len(self.network.models)
        self.M, self.K = count, len(self.x)
        options = self.options if isinstance(self.options, list) else [self.options] * count
        reference = [self.optimizer([torch.zeros(1)], **o).defaults for o in options]
        self.per_model = options
        self.rule = RULES[self.optimizer]

        def option(defaults: dict[str, Any], name: Any) -> float:
            if isinstance(name, tuple):
                return float(defaults[name[0]][name[1]])
            return float(defaults.get(name) or 0.0)

        self.hyper = torch.tensor(
            [[option(d, name) for d in reference] for name in ROWS[self.rule]], dtype=torch.float64
        )
        trained = net.params[: net.num_optimized]
        self.states = []
        for kind, name in enumerate(STATES[self.rule]):
            asking = ASKED_BY.get((self.rule, kind))
            if asking is None or any(option(d, asking) for d in reference):
                for param in trained:
                    state = torch.zeros_like(param)
                    if name == "step_size":
                        state += self.hyper[0].to(state).reshape(-1, *[1] * (state.dim() - 1))
                    if name == "sum":
                        for i, defaults in enumerate(reference):
                            state[i] = defaults["initial_accumulator_value"]
                    self.states.append(state)
        self.params = [p.clone() for p in net.params]
        self.buffers = [b.clone() for b in net.buffers]
        self.step = torch.zeros(count)
        self.done = torch.zeros(count, dtype=torch.int64)

    def flags(self, grad_norm: bool) -> int:
        flags = int(self.own_x) + 2 * self.own_y + 8 * grad_norm + 16 * self.stop
        return flags + 4 * (self.weight is not None and self.weight.dim() == 3)

    def run(
        self, first: int = 0, last: int | None = None, grad_norm: bool = False, **changes: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Steps `first` to `last` of the operator."""
        part = slice(first, last)

        def doubles(values: Any) -> Tensor | None:
            return None if values is None else torch.tensor(values, dtype=torch.float64)

        seeds = self.seeds or list(range(100, 100 + self.M))
        arguments = {
            "params": self.params,
            "buffers": self.buffers,
            "states": self.states,
            "step": self.step,
            "x": self.x[part],
            "target": self.y[part],
            "sample_weight": None if self.weight is None else self.weight[part],
            "program": self.network.program,
            "numbers": self.network.number_rows(),
            "hyper": self.hyper,
            "lr": None if self.lr is None else self.lr[part],
            "active": None if self.active is None else torch.tensor(self.active),
            "clip_norm": doubles(self.clip_norm),
            "clip_value": doubles(self.clip_value),
            "seed": torch.tensor(seeds),
            "stream_step": self.done.clone(),
            "rule": self.rule,
            "flags": self.flags(grad_norm),
        }
        arguments.update(changes)
        losses, status, norms = torch.ops.modelbatch.train_steps_(*arguments.values())
        self.done += (status & 8 == 0).sum(0)
        return losses, status, norms

    def everything(self) -> list[Tensor]:
        return [*self.params, *self.buffers, *self.states, self.step]

    # ---- torch

    def reference(self) -> tuple[Tensor, Tensor]:
        """Trains a copy of each model with torch: losses and norms [K, M]."""
        losses = torch.zeros(self.K, self.M, dtype=torch.float64)
        norms = torch.zeros(self.K, self.M, dtype=torch.float64)
        self.trained = [copy.deepcopy(model) for model in self.network.models]
        seeds = self.seeds or list(range(100, 100 + self.M))
        for i, model in enumerate(self.trained):
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = self.optimizer(trained, **self.per_model[i])
            done = 0
            for k in range(self.K):
                frozen = self.active is not None and not self.active[i]
                if self.lr is not None:
                    optimizer.param_groups[0]["lr"] = float(self.lr[k, i])
                x = self.x[k, i] if self.own_x else self.x[k]
                y = self.y[k, i] if self.own_y else self.y[k]
                w = self.weight
                if w is not None:
                    w = w[k, i] if w.dim() == 3 else w[k]
                    if not w.any():
                        continue
                for module in model.modules():
                    if isinstance(module, Drop):
                        module.seed, module.step = seeds[i], done
                kept = copy.deepcopy(dict(model.named_buffers()))
                optimizer.zero_grad()
                loss = self.network.losses[i](model(x), y, w)
                losses[k, i] = loss.detach()
                if frozen:
                    for name, buffer in model.named_buffers():
                        buffer.copy_(kept[name])
                    continue
                loss.backward()
                grads = [p.grad.flatten() for p in trained if p.grad is not None]
                norms[k, i] = torch.cat(grads).double().norm()
                if self.clip_norm is not None:
                    nn.utils.clip_grad_norm_(trained, self.clip_norm[i])
                if self.clip_value is not None:
                    nn.utils.clip_grad_value_(trained, self.clip_value[i])
                optimizer.step()
                done += 1
        return losses, norms

    def compare(self, tolerance: float) -> None:
        """The parameters and buffers against those that `reference` trained."""
        net = self.network
        named = list(zip(net.names, self.params)) + list(zip(net.buffer_names, self.buffers))
        for name, stacked in named:
            for i, model in enumerate(self.trained):
                want = model.state_dict()[name].to(stacked.dtype)
                scale = max(float(want.abs().max()), 1e-3) if want.is_floating_point() else 1.0
                torch.testing.assert_close(
                    stacked[i], want, rtol=0, atol=tolerance * scale, equal_nan=True, msg=None
                )
