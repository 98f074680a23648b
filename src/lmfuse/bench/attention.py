"""Attention against torch's: decoding, limited by reading the cache, and prompts, by arithmetic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmfuse import functional
from lmfuse.bench.case import Case, Inputs
from lmfuse.reference.attention import attention as reference

GROUP = 4  # query heads of each KV head


def _inputs(kv_len: int, shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    batch, _, heads, dim = shape
    key, value = (torch.randn(batch, kv_len, heads // GROUP, dim).to(dtype) for _ in range(2))
    return torch.randn(shape).to(dtype), key, value


def _stock(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return y.transpose(1, 2)


def _decode(batch: int, kv_len: int, dim: int) -> Case:
    return Case(
        "decode",
        "stream",
        (batch, 1, 32, dim),
        torch.bfloat16,
        lambda shape, dtype: _inputs(kv_len, shape, dtype),
        lambda q, k, v: functional.attention(q, k, v),
        lambda q, k, v: _stock(q, k, v, False),
        lambda q, k, v: reference(q, k, v),
        "read",
    )


def _prompt(length: int, dim: int) -> Case:
    heads = 8
    return Case(
        "causal prompt",
        "prompt",
        (1, length, heads, dim),
        torch.bfloat16,
        lambda shape, dtype: _inputs(length, shape, dtype),
        lambda q, k, v: functional.attention(q, k, v, causal=True),
        lambda q, k, v: _stock(q, k, v, True),
        lambda q, k, v: reference(q, k, v, causal=True),
        flops=2 * length * (length + 1) * heads * dim,
    )


CASES = [
    *(_decode(batch, 4096, dim) for dim in (64, 128) for batch in (1, 8)),
    _decode(1, 32768, 64),
    _decode(1, 32768, 128),
    *(_prompt(length, dim) for dim in (64, 128) for length in (512, 2048)),
]
