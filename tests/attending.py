"""What the tests of all attentions share: inputs, the formula in float64, and its tolerance."""

from __future__ import annotations

import torch
from torch import Tensor

from lmfuse.functional import reshape_and_cache, varlen_attention
from lmfuse.reference.attention import attention as reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)


def qkv(batch, q_len, kv_len, heads, kv_heads, dim, value_dim=None, dtype=F32):
    shapes = (
        (batch, q_len, heads, dim),
        (batch, kv_len, kv_heads, dim),
        (batch, kv_len, kv_heads, value_dim or dim),
    )
    return tuple(torch.randn(s).to(dtype) for s in shapes)


def exact(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
    """The formula in float64, on the numbers that the tensors hold."""
    wide = {
        n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for n, x in options.items()
    }
    return reference(query.double(), key.double(), value.double(), **wide)


def assert_close(y: Tensor, expected: Tensor, value: Tensor) -> None:
    """fp32 arithmetic on averages of `value`, one rounding to the dtype of y; for bfloat16, the
    rounding of the weights to 2^-9 each, whose errors mostly cancel."""
    assert y.shape == expected.shape
    largest = value.double().abs().max() if value.numel() else 1.0
    allowed = 4e-6 * largest + expected.abs() * torch.finfo(y.dtype).eps / 2
    if y.dtype is BF16:
        allowed = allowed + 2.0**-9 * largest
    bad = ~((y.double() - expected).abs() <= allowed)
    assert not bad.any(), (y.double() - expected).abs().max()


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) and not a.isnan().any()


def varlen(q, k, v, out, cu_q, cu_k, scale, causal=False, alibi=None, **rest):
    return varlen_attention(
        q, k, v, out, cu_q, cu_k, alibi, 9, 9, 0.0, scale, False, causal, False, None, **rest
    )


def varlen_arguments():
    q, k, v = (x[0] for x in qkv(1, 6, 8, 4, 2, 16))
    return {
        "query": q,
        "key": k,
        "value": v,
        "out": torch.zeros_like(q),
        "seqlen_q": torch.tensor([0, 2, 6]),
        "seqlen_k": torch.tensor([0, 3, 8]),
        "alibi_slopes": None,
        "max_seqlen_q": 4,
        "max_seqlen_k": torch.tensor(5),
        "pdropout": 0.0,
        "softmax_scale": 0.25,
        "zero_tensors": False,
        "is_causal": True,
        "return_softmax": False,
        "gen_": None,
    }


class Paged:
    """Keys and values of packed sequences in the blocks of a cache, in random order."""

    def __init__(self, key, value, lengths, block, dtype=None, **scales):
        counts = [-(-n // block) for n in lengths]
        total = sum(counts) + 3
        order = torch.randperm(total)[: sum(counts)].split(counts)
        self.tables = torch.full((len(lengths), max(counts) + 1), 10**6, dtype=torch.int32)
        slots = []
        for b, (blocks, n) in enumerate(zip(order, lengths, strict=True)):
            self.tables[b, : len(blocks)] = blocks
            at = torch.arange(n)
            slots.append(blocks[at // block] * block + at % block)
        kind = dtype or key.dtype

        def cache(x: Tensor) -> Tensor:
            return torch.full((total, x.shape[1], block, x.shape[2]), 1.0).to(kind)

        self.caches = cache(key), cache(value)
        reshape_and_cache(key, value, *self.caches, torch.cat(slots), "auto", **scales)


def decode_arguments():
    cache = torch.randn(6, 2, 8, 16)
    return {
        "output": torch.zeros(2, 4, 16),
        "query": torch.randn(2, 4, 16),
        "key_cache": cache,
        "value_cache": cache.clone(),
        "head_mapping": None,
        "scale": 0.25,
        "block_tables": torch.tensor([[0, 1], [5, 3]]).int(),
        "context_lens": torch.tensor([9, 16]).int(),
        "block_size": 8,
        "max_context_len": 16,
        "alibi_slopes": None,
    }
