"""Attention in plain torch, score by score: the formula of `lmfuse.functional.attention`."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[batch, q_len, heads, dim] by [batch, kv_len, kv_heads, …], in the dtype of the arguments."""
    batch, q_len, heads, dim = query.shape
    kv_len, group = key.shape[1], heads // key.shape[2]
    q = query.transpose(1, 2)
    k, v = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (key, value))
    s = q @ k.transpose(-1, -2) * (1 / math.sqrt(dim) if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    distance = torch.arange(kv_len) - (kv_len - q_len + torch.arange(q_len)).unsqueeze(1)
    if alibi is not None:
        s = s - alibi.to(s).reshape(-1, heads, 1, 1) * distance.abs()
    seen = torch.ones(q_len, kv_len, dtype=torch.bool)
    if causal:
        seen &= distance <= 0
    if window[0] >= 0:
        seen &= distance >= -window[0]
    if window[1] >= 0:
        seen &= distance <= window[1]
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else s + mask.to(s)
    s = s.masked_fill(~seen, -math.inf)
    if sinks is not None:
        s = torch.cat((s, sinks.to(s).reshape(1, heads, 1, 1).expand(batch, -1, q_len, 1)), -1)
    weights = torch.softmax(s, -1).nan_to_num(0.0)  # a row that sees nothing
    return (weights[..., :kv_len] @ v).transpose(1, 2)
