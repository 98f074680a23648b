"""Attention over paged caches: decoding, prompts in pieces, fp8 and int8, shared prefixes."""

from __future__ import annotations

import math

import pytest
import torch

from attending import (
    BF16,
    F32,
    Paged,
    assert_close,
    decode_arguments,
    exact,
    qkv,
    same,
)
from lmfuse.functional import (
    flash_attn_varlen_func,
    single_query_cached_kv_attention,
)


@pytest.mark.parametrize("block", [1, 5, 16, 128])
def test_paged_decode(isa, block):
    lengths = [1, 40, 700]
    for dtype in (F32, BF16):
        k, v = torch.randn(741, 2, 64).to(dtype), torch.randn(741, 2, 64).to(dtype)
        q, slopes = torch.randn(3, 6, 64).to(dtype), torch.rand(6)
        paged = Paged(k, v, lengths, block)
        for window, cap, alibi in ((-1, -1.0, None), (33, 2.0, slopes), (5000, -1.0, slopes)):
            out = torch.empty_like(q)
            got = single_query_cached_kv_attention(
                out, q, *paged.caches, None, 0.3, paged.tables, torch.tensor(lengths).int(), block,
                700, alibi, window, softcap=cap,
            )  # fmt: skip
            assert got is out
            first = 0
            for b, n in enumerate(lengths):
                keys = slice(first, first + n)
                left = window - 1 if 0 < window < 700 else -1
                want = exact(
                    q[b].view(1, 1, 6, 64), k[None, keys], v[None, keys], scale=0.3, causal=True,
                    window=(left, -1), softcap=max(cap, 0.0), alibi=alibi,
                )  # fmt: skip
                assert_close(out[b].view(1, 1, 6, 64), want, v)
                first += n


def test_paged_prompt_in_pieces(isa):
    """Chunked prefill: the last q_len tokens of each, causal or not, windows as IPEX means them."""
    kv_lengths, q_lengths = [300, 17, 4], [30, 17, 1]
    cu_q = torch.tensor([0, 30, 47, 48]).int()
    cu_k = torch.tensor([0, 300, 317, 321]).int()
    for dtype in (F32, BF16):
        q, k, v = (x[0] for x in qkv(1, 48, 321, 4, 2, 80, dtype=dtype))
        paged = Paged(k, v, kv_lengths, 16)
        for causal, left, right in ((True, -1, -1), (True, 7, 3), (False, 7, 2), (False, 0, -1)):
            out = torch.empty_like(q)
            flash_attn_varlen_func(
                out, q, *paged.caches, cu_q, cu_k, 30, 300, 0.2, causal, paged.tables, None, left,
                right,
            )  # fmt: skip
            for b in range(3):
                rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
                want = exact(
                    q[None, rows], k[None, keys], v[None, keys], scale=0.2, causal=causal,
                    window=(left or -1, right),
                )  # fmt: skip
                assert_close(out[None, rows], want, v)
    assert q_lengths == (cu_q[1:] - cu_q[:-1]).tolist()


def test_paged_fp8_and_int8(isa):
    k, v, q = torch.randn(300, 2, 64), torch.randn(300, 2, 64), torch.randn(1, 4, 64).bfloat16()
    lens = torch.tensor([300])
    for fp8 in (torch.float8_e5m2, torch.float8_e4m3fn):
        paged = Paged(k, v, [300], 16, fp8, k_scale=0.5, v_scale=0.25)
        out = torch.empty_like(q)
        single_query_cached_kv_attention(
            out, q, *paged.caches, None, 0.125, paged.tables, lens, 16, 300, None, -1, 0.5, 0.25
        )
        wide = (k / 0.5).to(fp8).double() * 0.5, (v / 0.25).to(fp8).double() * 0.25
        want = exact(q[None], wide[0][None], wide[1][None], scale=0.125)
        assert_close(out[None], want, v)
    scales = [torch.zeros(22, 2, 16) for _ in range(2)]
    named = {"key_scales": scales[0], "value_scales": scales[1]}
    paged = Paged(k, v, [300], 16, torch.int8, **named)
    out = torch.empty_like(q)
    single_query_cached_kv_attention(
        out, q, *paged.caches, None, 0.125, paged.tables, lens, 16, 300, None, **named
    )
    want = exact(q[None], k[None], v[None], scale=0.125)
    assert (out[None].double() - want).abs().max() < 0.02


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_shared_prefixes_give_the_same_bits(isa, dtype):
    """Five sequences, the first 600 positions of four of them in the same blocks."""
    k, v = torch.randn(1000, 2, 64).to(dtype), torch.randn(1000, 2, 64).to(dtype)
    paged = Paged(k, v, [1000], 8)
    tables, lens = paged.tables.repeat(5, 1), torch.tensor([700, 640, 601, 900, 77])
    tables[1, 75:], tables[3, 80:110] = tables[0, 20:].roll(1)[: tables.shape[1] - 75], 3
    tables[4] = tables[0, :].roll(2)
    tables.clamp_(0, paged.caches[0].shape[0] - 1)
    q = torch.randn(5, 6, 64).to(dtype)

    def run(rows):
        return single_query_cached_kv_attention(
            torch.empty_like(q[rows]), q[rows], *paged.caches, None, 0.2, tables[rows], lens[rows],
            8, 900, None,
        )  # fmt: skip

    together = run(slice(None))
    for b in range(5):
        assert same(together[b : b + 1], run(slice(b, b + 1)))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"block_tables": torch.tensor([[0, 1], [6, 3]])},
            ValueError,
            r"block_tables\[1, 0\] is 6",
        ),
        ({"block_tables": torch.tensor([[0, -1], [5, 3]])}, ValueError, "block_tables"),
        ({"block_tables": torch.tensor([[0, 1]])}, ValueError, "block_tables"),
        ({"block_tables": torch.tensor([0, 1])}, ValueError, "block_tables"),
        ({"context_lens": torch.tensor([9, 17])}, ValueError, "length of sequence 1 is 17"),
        ({"context_lens": torch.tensor([-1, 16])}, ValueError, "length of sequence 0 is -1"),
        ({"context_lens": torch.tensor([9])}, ValueError, "context_lens"),
        ({"context_lens": torch.tensor([9.0, 16.0])}, TypeError, "context_lens"),
        ({"block_size": 16}, ValueError, "block_size"),
        ({"key_cache": torch.randn(6, 8)}, ValueError, "key_cache"),
        ({"key_cache": None}, TypeError, "key_cache"),
        ({"value_cache": torch.randn(6, 2, 8, 16).half()}, TypeError, "value_cache"),
        ({"value_cache": torch.randn(5, 2, 8, 16)}, ValueError, "value_cache"),
        ({"query": torch.randn(2, 4, 15)}, ValueError, "key_cache"),
        ({"output": torch.zeros(2, 4, 15)}, ValueError, "output"),
        ({"softcap": -3.0}, ValueError, "softcap"),
        ({"k_scale": math.nan}, ValueError, "k_scale"),
    ],
)
def test_paged_bad_input(change, error, text):
    single_query_cached_kv_attention(**decode_arguments())
    with pytest.raises(error, match=text):
        single_query_cached_kv_attention(**{**decode_arguments(), **change})


def test_paged_prompt_bad_input():
    a = decode_arguments()
    args = (a["output"], a["query"], a["key_cache"], a["value_cache"])
    rest = (2, 16, 0.25, True, a["block_tables"], None)
    good, kv = torch.tensor([0, 1, 2]), torch.tensor([0, 9, 25])
    flash_attn_varlen_func(*args, good, kv, *rest)
    for cu_q, cu_kv, text in (
        (torch.tensor([0, 2, 1]), kv, "cu_seqlens_q must not fall"),
        (torch.tensor([0, 1, 3]), kv, "cu_seqlens_q ends at 3"),
        (good, torch.tensor([0, 9, 26]), "length of sequence 1 is 17"),
        (good, torch.tensor([0, 9, 8]), "cu_seqlens_kv must not fall"),
        (good, torch.tensor([0, 9]), "cu_seqlens_kv"),
    ):
        with pytest.raises(ValueError, match=text):
            flash_attn_varlen_func(*args, cu_q, cu_kv, *rest)
