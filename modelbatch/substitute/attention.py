"""Scaled dot product attention: it has no weights, so models fold into the batch axis."""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attributes import PerModelFloat
from .mode import Call, handles_per_model_numbers, register


def _fold(call: Call, value: Tensor, rank: int) -> Tensor:
    """Physical `[M, ...]` with exactly `rank` batch axes behind the model axis, folded into one."""
    physical = call.physical(value)
    missing = rank + 3 - physical.dim()
    for _ in range(missing):
        physical = physical.unsqueeze(1)
    return physical


def _fold_mask(call: Call, mask: Tensor | None, batch: tuple[int, ...]) -> Tensor | None:
    """An attention mask that broadcasts against `[M * B, H, L, S]`."""
    if mask is None:
        return None
    tensor, batched = call.unwrap(mask)
    if not batched and all(size == 1 for size in mask.shape[:-2]):
        return tensor.reshape(mask.shape[-2:])
    rows = mask.shape[-2:]
    full = _fold(call, mask, len(batch))
    full = full.expand(call.num_models, *batch, *rows)
    return full.reshape(call.num_models * math.prod(batch[:-1]), batch[-1], *rows)


@handles_per_model_numbers
@register(F.scaled_dot_product_attention, random=True)
def scaled_dot_product_attention(
    call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Attention of all models in one call, dropout from the models' own streams."""
    arguments = _Arguments(*args, **kwargs)
    dropout = _probability(arguments.dropout_p)
    if call.streams.kind == "torch" and dropout:
        from .random_ops import seeded_by_model

        return seeded_by_model(call, func, args, kwargs)
    tensors = (arguments.query, arguments.key, arguments.value, arguments.attn_mask)
    if not dropout and (call.level is None or not any(call.is_batched(t) for t in tensors)):
        return func(*args, **kwargs)
    query, key, value = tensors[:3]
    if min(query.dim(), key.dim(), value.dim()) < 2:
        return NotImplemented
    if dropout:
        with call:
            return _with_dropout(call, arguments)
    # [M, *batch, L, E]; without a head axis the last batch axis takes its place
    rank = max(query.dim(), key.dim(), value.dim()) - 2
    q, k, v = (_fold(call, t, max(rank, 1)) for t in (query, key, value))
    heads = (q.shape[-3], k.shape[-3], v.shape[-3])
    batch = torch.broadcast_shapes(q.shape[1:-3], k.shape[1:-3], v.shape[1:-3])
    joint = call.num_models * math.prod(batch)
    if not arguments.enable_gqa:
        shared_heads = torch.broadcast_shapes((heads[0],), (heads[1],), (heads[2],))[0]
        heads = (shared_heads,) * 3
    q, k, v = (
        t.expand(call.num_models, *batch, h, *t.shape[-2:]).reshape(joint, h, *t.shape[-2:])
        for t, h in zip((q, k, v), heads)
    )
    mask = _fold_mask(call, arguments.attn_mask, (*batch, heads[0]))
    with call.lowered():
        out = func(q, k, v, mask, 0.0, **arguments.options())
    full = out.view(call.num_models, *batch, *out.shape[1:])
    if rank == 0:  # [L, E] queries: drop the head axis that was put in
        full = full.squeeze(-3)
    return call.wrap(full)


@register(torch._nested_tensor_from_mask_left_aligned)
def left_aligned(call: Call, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """What `nn.TransformerEncoder` asks before it turns a padded batch into a nested tensor."""
    return False


def padded_encoder(
    module: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """`nn.TransformerEncoder.forward`, with zeros where its nested tensors would have put them.

    One model alone leaves padding out of the batch where it needs no gradients, and fills it up
    with zeros before the last normalisation.
    """
    layer: Any = module.layers[0]
    needs_grad = torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters())
    forward = functools.partial(nn.TransformerEncoder.forward, module)
    if (
        not module.use_nested_tensor
        or not torch.backends.mha.get_fastpath_enabled()
        or layer.training
        or src.dim() != 3
        or src_key_padding_mask is None
        or mask is not None
        or torch.is_autocast_enabled()
        or needs_grad
        or (torch.is_grad_enabled() and src.requires_grad)
    ):
        return forward(src, mask, src_key_padding_mask, is_causal)
    norm, module.norm = module.norm, None
    try:
        out = forward(src, mask, src_key_padding_mask, is_causal)
    finally:
        module.norm = norm
    padding = src_key_padding_mask.bool()
    aligned = (padding[:, :-1] <= padding[:, 1:]).all()
    out = out.masked_fill((padding & aligned).unsqueeze(-1), 0.0)
    return out if norm is None else norm(out)


class _Arguments:
    """The arguments of `F.scaled_dot_product_attention` by name."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ):
        self.query, self.key, self.value, self.attn_mask = query, key, value, attn_mask
        self.dropout_p, self.is_causal = dropout_p, is_causal
        self.scale, self.enable_gqa = scale, enable_gqa

    def options(self) -> dict[str, Any]:
        return {"is_causal": self.is_causal, "scale": self.scale, "enable_gqa": self.enable_gqa}


def _probability(p: Any) -> bool:
    """Whether any model drops anything."""
    return any(v for v in p.values) if isinstance(p, PerModelFloat) else p > 0.0


def _with_dropout(call: Call, a: _Arguments) -> Tensor:
    """Attention written out, as torch does wherever it has to drop attention weights."""
    query, key, value = a.query, a.key, a.value
    if a.enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(repeats, -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scale = 1 / math.sqrt(query.shape[-1]) if a.scale is None else a.scale
    root = math.sqrt(scale) if scale >= 0 else None
    if root is None:
        scores = (query @ key.transpose(-2, -1)) * scale
    else:  # scaling both sides keeps half precision in range
        scores = (query * root) @ (key.transpose(-2, -1) * root)
    if a.is_causal:
        if a.attn_mask is not None:
            raise RuntimeError("scaled_dot_product_attention: is_causal excludes attn_mask")
        rows, columns = query.shape[-2], key.shape[-2]
        keep = torch.ones(rows, columns, dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~keep, -math.inf)
    elif a.attn_mask is not None:
        if a.attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~a.attn_mask, -math.inf)
        else:
            scores = scores + a.attn_mask
    weights = F.dropout(torch.softmax(scores, -1), a.dropout_p, training=True)
    return weights @ value
