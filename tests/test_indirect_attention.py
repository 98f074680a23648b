"""Attention behind beam indices: the life of a cache, its growth, masks, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from attending import (
    BF16,
    DTYPES,
    F32,
    assert_close,
    exact,
    qkv,
)
from lmfuse.functional import indirect_access_kv_cache_attention as indirect
from lmfuse.modules import IndirectAccessKVCacheAttention


def placeholder(columns: int, dtype=F32):
    return (
        torch.zeros(1, 0, 0, 1, dtype=torch.long),
        torch.zeros(1, 1, 1, 1, dtype=dtype),
        torch.zeros(1, 1, 1, 1, dtype=dtype),
        torch.zeros(4, columns, dtype=torch.long),
    )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_indirect_lifecycle(isa, shared, dtype):
    """A prompt, then steps with the parents written between them, against K[parents]."""
    batch, beams, heads, kv_heads, dim, prompt = 2, 3, 4, 2, 32, 5
    columns = batch * beams
    rows = batch if shared else columns
    attend = IndirectAccessKVCacheAttention(text_max_length=7)
    q, k, v = qkv(rows, prompt, prompt, heads, kv_heads, dim, dtype=dtype)
    mask = torch.zeros(rows, 1, 1, prompt)
    mask[0, ..., 0] = -math.inf
    out, weights, past = attend(q, k, v, dim**0.5, placeholder(columns), attention_mask=mask)
    assert weights is None
    assert out.shape == (rows, heads, prompt, dim)
    assert_close(out.transpose(1, 2), exact(q, k, v, mask=mask, causal=True), v)
    assert past[0].size(-2) == prompt
    assert past[3].shape == (9, columns)
    assert past[3][7, 0] == prompt
    assert past[3][8, 0] == rows

    spread = beams if shared else 1
    keys, values = k.repeat_interleave(spread, 0), v.repeat_interleave(spread, 0)
    for step in range(12):
        parents = torch.randint(beams, (columns,)) + torch.arange(columns) // beams * beams
        past[3][past[0].size(-2) - 1] = parents
        if not (shared and step == 0):
            keys, values = keys[parents], values[parents]
        q, k, v = qkv(columns, 1, 1, heads, kv_heads, dim, dtype=dtype)
        keys, values = torch.cat((keys, k), 1), torch.cat((values, v), 1)
        mask = torch.zeros(columns, 1, 1, keys.shape[1])
        mask[:beams, ..., 0] = -1e30
        out, _, past = attend(q, k, v, dim**0.5, past, attention_mask=mask)
        assert past[0].shape == (1, prompt + step + 1, prompt + step + 1, 1)
        assert past[0].untyped_storage().nbytes() == 8
        assert_close(out.transpose(1, 2), exact(q, keys, values, mask=mask), values)


def test_indirect_cache_sizes():
    """Appendix A.2."""
    k = torch.randn(1, 5, 2, 8)
    q = torch.randn(1, 5, 2, 8)
    mask = torch.zeros(1, 1, 1, 1)
    for text, want in ((6, 6), (4, 9), (5, 10), (0, 5)):
        _, _, past = indirect(q, k, k, 2.0, None, None, mask, text_max_length=text)
        assert past[1].shape[0] == want
    _, _, past = indirect(q, k, k, 2.0, None, None, mask, text_max_length=6)
    first = past[1].data_ptr()
    for want in (6, 12, 12):
        _, _, past = indirect(q[:, :1], k[:, :1], k[:, :1], 2.0, past, None, mask)
        assert past[1].shape[0] == want
        assert past[3].shape[0] == want + 2
        assert (past[1].data_ptr() == first) == (want == 6)
    _, _, past = indirect(
        *(x.repeat(1, 20, 1, 1) for x in (q, k, k)), 2.0, past, None, mask
    )  # 100 more: more than twice as many
    assert past[1].shape[0] == 108


@pytest.mark.parametrize("dtype", DTYPES)
def test_indirect_several_tokens_masks_and_growth(isa, dtype):
    """Several new tokens under a real mask, masks of any kind, fp16, no mask."""
    batch, heads, dim = 3, 4, 32
    masks = {
        "none": lambda q, k: None,
        "causal": lambda q, k: torch.full((q, k), -math.inf).triu(k - q + 1),
        "bool": lambda q, k: torch.rand(batch, 1, 1, k) > 0.3,
        "broadcast": lambda q, k: torch.randn(1, heads, 1, k).to(dtype),
    }
    for name, make in masks.items():
        past, keys, values = None, torch.empty(batch, 0, 2, dim), torch.empty(batch, 0, 2, dim)
        for n in (6, 1, 5, 40, 1):
            q, k, v = qkv(batch, n, n, heads, 2, dim, dtype=dtype)
            keys, values = torch.cat((keys, k), 1), torch.cat((values, v), 1)
            mask = make(n, keys.shape[1])
            out, _, past = indirect(q, k, v, 4.0, past, None, mask)
            want = exact(q, keys, values, mask=mask, causal=True, scale=0.25)
            assert_close(out.transpose(1, 2), want, values), name
            assert past[0].size(-2) == keys.shape[1]


def test_indirect_fp8_cache_and_cross_attention(isa):
    q, k, v = qkv(2, 1, 300, 4, 2, 64, dtype=BF16)
    past = placeholder(2, torch.float8_e5m2)
    _, _, past = indirect(q.expand(2, 300, 4, 64), k, v, 8.0, past, None, torch.zeros(1, 1, 1, 1))
    assert past[1].dtype is torch.float8_e5m2
    q2, k2, v2 = qkv(2, 1, 1, 4, 2, 64, dtype=BF16)
    out, _, _ = indirect(q2, k2, v2, 8.0, past)
    wide = [torch.cat(x, 1).to(torch.float8_e5m2) for x in ((k, k2), (v, v2))]
    assert_close(out.transpose(1, 2), exact(q2, *wide), v)
    static = (past[0], k, v, past[3])
    mask = torch.rand(2, 1, 1, 300) > 0.5
    out, _, present = indirect(q, k2, v2, 8.0, static, None, mask, seq_info=torch.tensor(-1))
    assert present[1] is k
    assert_close(out.transpose(1, 2), exact(q, k, v, mask=mask), v)


def test_indirect_bad_input():
    q, k, v = qkv(2, 3, 3, 4, 2, 16)
    _, _, past = indirect(q, k, v, 4.0, placeholder(4), text_max_length=8)
    q, k, v = qkv(4, 1, 1, 4, 2, 16)
    bad = past[3].clone()
    bad[3] = 4
    parents = past[3].clone()
    parents[9, 0] = 3  # batch of the prompt
    shared, fp8 = past[1][:1].expand(past[1].shape), torch.float8_e5m2

    def step(**change):
        a = {"query": q, "key": k, "value": v, "scale_attn": 4.0, "layer_past": past} | change
        return indirect(**a)

    _, _, later = step()
    for error, text, change in (
        (ValueError, "head_mask", {"head_mask": torch.ones(4)}),
        (ValueError, "alibi", {"alibi": torch.ones(4)}),
        (ValueError, "attention_mask", {"attention_mask": torch.zeros(4, 1, 1, 5)}),
        (ValueError, "attention_mask", {"attention_mask": torch.zeros(3, 1, 1, 4)}),
        (TypeError, "attention_mask", {"attention_mask": torch.zeros(4, 1, 1, 4).long()}),
        (ValueError, "key", {"key": k[:2]}),
        (ValueError, "divide", {"query": q[:, :, :3]}),
        (TypeError, "layer_past", {"layer_past": past[:3]}),
        (TypeError, r"layer_past\[1\]", {"layer_past": (past[0], past[1].half(), *past[2:])}),
        (ValueError, r"layer_past\[1\]", {"layer_past": (past[0], past[1][:, :2], *past[2:])}),
        (ValueError, r"layer_past\[3\]", {"layer_past": (*past[:3], past[3][:-1])}),
        (TypeError, r"layer_past\[3\]", {"layer_past": (*past[:3], None)}),
        (TypeError, r"layer_past\[2\]", {"layer_past": (*past[:2], past[2].to(fp8), past[3])}),
        (ValueError, r"layer_past\[2\]", {"layer_past": (*past[:2], past[2][..., :15], past[3])}),
        (ValueError, r"layer_past\[1\]", {"layer_past": (past[0], shared, *past[2:])}),
        (ValueError, "value is on meta", {"value": v.to("meta")}),
        (ValueError, r"layer_past\[2\]", {"value": torch.randn(4, 1, 2, 8)}),
        (ValueError, "scale_attn", {"scale_attn": 0.0}),
        (ValueError, "scale_attn", {"scale_attn": math.nan}),
        (ValueError, "prompt", {"layer_past": (*past[:3], parents)}),
        (ValueError, "row 4", {"layer_past": (later[0], *later[1:3], bad)}),
        (ValueError, "holds 9 tokens", {"seq_info": 9}),
        (ValueError, "columns", {"layer_past": placeholder(5)}),
    ):
        with pytest.raises(error, match=text):
            step(**change)
