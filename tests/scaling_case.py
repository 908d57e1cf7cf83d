"""A bundle, its data with overflows at chosen steps, and training it under a gradient scaler."""

import math

import torch
import torch.nn.functional as F
from torch import nn, optim

from modelbatch import ModelBatch
from modelbatch.optim.clip import clip_grad_norm_

INF = math.inf
M = 4


class OwnAdam(optim.Adam):
    """What only the universal path takes."""


KINDS = {
    "adam": (optim.Adam, {"weight_decay": 0.01}),
    "sgd": (optim.SGD, {"momentum": 0.9}),
    "nadam": (optim.NAdam, {}),
    "own": (OwnAdam, {"amsgrad": True}),
}
RATES = [0.01, 0.02, 0.005, 0.03]


def make_models(dtype=torch.float64):
    torch.manual_seed(3)
    models = [nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)) for _ in range(M)]
    return [model.to(dtype) for model in models]


def make_bundle(kind=KINDS["adam"], dtype=torch.float64, **options):
    options = {"lr_list": RATES, "optimizer_cls": kind[0], "optimizer_kwargs": kind[1], **options}
    return ModelBatch(make_models(dtype), shared_input=False, fallback="silent", **options)


def make_batches(count, dtype=torch.float64, overflows=()):
    """x [M, B, 5] and y [M, B, 2] for every step; `overflows` holds (step, model)."""
    generator = torch.Generator().manual_seed(11)
    batches = []
    for step in range(count):
        x = torch.randn(M, 6, 5, generator=generator, dtype=torch.float64).to(dtype)
        y = torch.randn(M, 6, 2, generator=generator, dtype=torch.float64).to(dtype)
        for at, i in overflows:
            if at == step:
                x[i, 2, 3] = INF if step % 2 else math.nan
        batches.append((x, y))
    return batches


def train(bundle, scaler, batches, clip=None, reduction="mean"):
    """Trains as torch's examples do; returns the scales after every step."""
    scales = []
    for x, y in batches:
        bundle.zero_grad()
        loss = bundle.compute_loss(bundle(x), y, F.mse_loss, reduction=reduction)
        loss = scaler.scale(loss)
        (loss.sum() if reduction == "none" else loss).backward()
        if clip is not None:
            scaler.unscale_(bundle.optimizer)
            clip_grad_norm_(bundle, clip)
        scaler.step(bundle.optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def train_alone(model, optimizer, scaler, batches, i, limit=None, clip=nn.utils.clip_grad_norm_):
    scales = []
    for x, y in batches:
        optimizer.zero_grad()
        scaler.scale(F.mse_loss(model(x[i]), y[i])).backward()
        if limit is not None:
            scaler.unscale_(optimizer)
            clip(model.parameters(), limit)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def error(model, alone):
    pairs = list(zip(model.parameters(), alone.parameters(), strict=True))
    return max(float((p - q).detach().abs().max() / q.detach().abs().max()) for p, q in pairs)


OVERFLOWS = [(2, 1), (3, 1), (3, 2), (7, 1), (8, 3), (0, 2), (11, 0), (11, 1), (11, 2), (11, 3)]
