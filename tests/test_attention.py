"""Attention against its formula in float64, on every ISA: dense, and what holds of all."""

from __future__ import annotations

import math

import pytest
import torch

from attending import (
    BF16,
    DTYPES,
    F32,
    Paged,
    assert_close,
    decode_arguments,
    exact,
    qkv,
    same,
    varlen,
    varlen_arguments,
)
from lmfuse import functional
from lmfuse.bench.memory import beyond_prompt
from lmfuse.functional import (
    single_query_cached_kv_attention,
    varlen_attention,
)
from lmfuse.modules import IndirectAccessKVCacheAttention, PagedAttention, VarlenAttention

SHAPES = [  # batch, q_len, kv_len, heads, kv_heads, dim, value_dim
    (1, 1, 1, 1, 1, 1, 1),
    (2, 1, 600, 8, 2, 64, 64),
    (1, 5, 261, 6, 3, 80, 96),
    (2, 70, 70, 4, 1, 33, 17),
    (1, 9, 520, 5, 5, 128, 256),
    (1, 300, 310, 2, 1, 120, 40),
    (1, 7, 3, 2, 1, 256, 32),
]


def options(name: str, batch: int, q_len: int, kv_len: int, heads: int) -> dict:
    return {
        "plain": {},
        "causal": {"causal": True},
        "window": {"causal": True, "window": (40, -1)},
        "both windows": {"window": (3, 20), "scale": 0.3},
        "softcap": {"softcap": 2.0, "causal": True},
        "alibi": {"alibi": torch.rand(heads), "causal": True},
        "alibi of each": {"alibi": torch.rand(batch, heads)},
        "sinks": {"sinks": torch.randn(heads), "causal": True, "window": (10, -1)},
        "bool mask": {"mask": torch.rand(batch, 1, q_len, kv_len) > 0.5},
        "mask of keys": {"mask": (torch.rand(batch, 1, 1, kv_len) > 0.5).float() * -1e30},
        "mask of heads": {"mask": torch.randn(heads, 1, kv_len).bfloat16(), "causal": True},
        "mask of queries": {"mask": torch.randn(q_len, 1), "scale": -0.2},
        "all": {
            "causal": True,
            "window": (50, -1),
            "softcap": 3.0,
            "alibi": torch.rand(heads),
            "sinks": torch.randn(heads),
            "mask": torch.rand(1, heads, q_len, kv_len) > 0.3,
            "scale": 0.5,
        },
    }[name]


OPTIONS = [
    "plain", "causal", "window", "both windows", "softcap", "alibi", "alibi of each", "sinks",
    "bool mask", "mask of keys", "mask of heads", "mask of queries", "all",
]  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_formula(isa, name):
    for shape in SHAPES:
        batch, q_len, kv_len, heads = shape[:4]
        for dtype in DTYPES if name in ("plain", "causal", "all") else (F32, BF16):
            q, k, v = qkv(*shape, dtype=dtype)
            chosen = options(name, batch, q_len, kv_len, heads)
            y = functional.attention(q, k, v, **chosen)
            assert y.dtype is dtype
            assert y.is_contiguous()
            assert_close(y, exact(q, k, v, **chosen), v)


def test_strides_and_mixed_dtypes(isa):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(2, 9, 300, 4, 2, 64))
    assert_close(functional.attention(q, k, v), exact(q, k, v), v)
    wide = torch.randn(2, 300, 2, 200)
    v = wide[..., 3:67]
    assert_close(functional.attention(q, k, v), exact(q, k, v), v)
    v = torch.randn(2, 300, 64, 2).transpose(2, 3)
    assert_close(functional.attention(q, k, v), exact(q, k, v), v)
    q, k, v = q, k.half(), v.bfloat16()
    assert_close(functional.attention(q, k, v), exact(q, k, v), v)
    assert_close(functional.attention(q.bfloat16(), k, v), exact(q.bfloat16(), k, v), v)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", [torch.float8_e5m2, torch.float8_e4m3fn])
def test_fp8(isa, dtype, fp8):
    for dim in (64, 45):
        q, k, v = qkv(2, 3, 300, 4, 2, dim, dtype=dtype)
        k, v = (k.float() * 2).to(fp8), v.float().to(fp8)
        y = functional.attention(q, k, v, key_scale=0.5, value_scale=3.0, softcap=9.0)
        wide = k.double() * 0.5, v.double() * 3.0
        assert_close(y, exact(q, *wide, softcap=9.0), wide[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8(isa, dtype):
    for dim in (64, 45):
        q, k, v = qkv(2, 3, 300, 4, 2, dim, dtype=dtype)
        scales = [torch.rand(2, 300, 2) / 64 for _ in range(2)]
        ints = [torch.randint(-127, 128, x.shape, dtype=torch.int8) for x in (k, v)]
        y = functional.attention(q, *ints, key_scales=scales[0], value_scales=scales[1])
        wide = [x.double() * s.double().unsqueeze(-1) for x, s in zip(ints, scales, strict=True)]
        assert_close(y, exact(q, *wide), wide[1])


def test_rows_that_see_nothing_are_zero(isa):
    for dtype in DTYPES:
        q, k, v = qkv(2, 300, 300, 2, 1, 32, dtype=dtype)
        mask = torch.ones(2, 1, 300, 300, dtype=torch.bool)
        mask[1, 0, 7], mask[0, 0, 280:] = False, False
        y = functional.attention(q, k, v, mask=mask)
        assert (y[1, 7] == 0).all()
        assert (y[0, 280:] == 0).all()
        assert not y.isnan().any()
        y = functional.attention(q, k[:, :9], v[:, :9], causal=True, sinks=torch.zeros(2))
        assert (y[:, :291] == 0).all()
        assert (y[:, 291:] != 0).any()
        empty = functional.attention(q, k[:, :0], v[:, :0])
        assert (empty == 0).all()
        assert functional.attention(q[:, :0], k, v).shape == (2, 0, 2, 32)
        assert functional.attention(q[:0], k[:0], v[:0]).shape == (0, 300, 2, 32)


def test_large_scores_and_nan(isa):
    for dtype in (F32, BF16):
        q, k, v = qkv(1, 2, 300, 2, 2, 64, dtype=dtype)
        assert_close(functional.attention(q * 100, k, v), exact(q * 100, k, v), 8 * v)
        q[0, 1, 0, 3] = float("nan")
        y = functional.attention(q, k, v)
        assert y[0, 1, 0].isnan().all()
        assert not y[0, 0].isnan().any()
        assert not y[0, 1, 1].isnan().any()


def test_what_no_row_sees_is_not_read(isa):
    """NaN beyond the length of a sequence, where caches hold what they held before."""
    q, k, v = qkv(1, 1, 320, 4, 2, 64, dtype=BF16)
    k[:, 290:], v[:, 290:] = float("nan"), float("nan")
    cut = functional.attention(q, k[:, :290], v[:, :290])
    assert not cut.isnan().any()


def test_peak_memory_of_a_prompt_of_32k():
    """No buffer of queries times keys: beyond q, k, v and the result there are some MB."""
    size = beyond_prompt()
    assert size is not None
    assert size < 64 << 20


# --- the bits of a row ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 40])
def test_bits_do_not_depend_on_batch_chunks_or_threads(isa, dtype, dim):
    length = 530
    q, k, v = qkv(8, length, length, 4, 2, dim, dtype=dtype)
    slopes, kwargs = torch.rand(4), {"causal": True}
    for extra in ({}, {"window": (90, -1), "softcap": 4.0, "alibi": slopes}):
        kwargs |= extra
        whole = functional.attention(q, k, v, **kwargs)
        alone = functional.attention(q[3:4], k[3:4], v[3:4], **kwargs)
        assert same(whole[3:4], alone)
        torch.set_num_threads(1)
        assert same(alone, functional.attention(q[3:4], k[3:4], v[3:4], **kwargs))
        torch.set_num_threads(2)
        for first in (*range(0, 21, 7), 252, 259, 523):  # a prompt in pieces of 7
            end = first + 7
            piece = functional.attention(q[3:4, first:end], k[3:4, :end], v[3:4, :end], **kwargs)
            assert same(alone[:, first:end], piece)
        for at in (0, 255, 256, 529):  # and one token at a time, alone and in a batch
            end = at + 1
            one = functional.attention(q[:, at:end], k[:, :end], v[:, :end], **kwargs)
            assert same(whole[:, at:end], one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(-1, -1), (3000, -1)])
def test_bits_do_not_depend_on_how_long_sequences_are_cut(isa, dtype, window):
    """Over spans of 8 chunks of 256: many rows whole, few in pieces for each thread and batch."""
    length, last = 2 * 2048 + 900, 40
    q, k, v = qkv(4, last, length, 4, 2, 32, dtype=dtype)
    kwargs = {"causal": True, "window": window}
    whole = functional.attention(q, k, v, **kwargs)
    for at, end in ((last - 1, length), (3, length - last + 4)):
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            for batch in (slice(0, 4), slice(1, 3), slice(2, 3)):
                one = q[batch, at : at + 1], k[batch, :end], v[batch, :end]
                y = functional.attention(*one, **kwargs)
                assert same(whole[batch, at : at + 1], y), (at, threads, batch)
    torch.set_num_threads(2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv", [F32, BF16, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("dim", [96, 128, 40])
def test_bits_do_not_depend_on_the_number_of_rows(isa, dtype, kv, dim):
    """Few rows have kernels of their own, which read keys and values as they lie."""
    length = 301
    q, k, v = qkv(1, 40, length, 1, 1, dim, dtype=dtype)
    scales = {}
    if kv == torch.int8:
        k, v = (torch.randint(-128, 128, x.shape, dtype=kv) for x in (k, v))
        scales = {f"{name}_scales": torch.rand(1, length, 1) / 64 for name in ("key", "value")}
    k, v = k.to(kv), v.to(kv)
    many = functional.attention(q, k, v, **scales)
    for rows in (1, 2, 3, 4, 5, 6, 7, 13, 16, 17):
        assert same(many[:, :rows], functional.attention(q[:, :rows], k, v, **scales))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_where_keys_lie(isa, dtype):
    """Dense, packed, and pages of any size in any order: one result."""
    lengths = [1, 300, 517, 256]
    heads, kv_heads, dim = 4, 2, 48
    q, k, v = qkv(1, len(lengths), sum(lengths), heads, kv_heads, dim, dtype=dtype)
    firsts = [sum(lengths[:b]) for b in range(len(lengths))]
    want = torch.cat(
        [
            functional.attention(
                q[:, b : b + 1], k[:, f : f + n], v[:, f : f + n], scale=0.2
            ).flatten(0, 1)
            for b, (f, n) in enumerate(zip(firsts, lengths, strict=True))
        ]
    )
    cu_k = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    out = torch.empty_like(q[0])
    packed = varlen(q[0], k[0], v[0], out, torch.arange(5), cu_k, 0.2)
    assert same(packed, want)
    for block in (1, 16, 37, 512):
        paged = Paged(k[0], v[0], lengths, block)
        got = single_query_cached_kv_attention(
            torch.empty_like(out), q[0], *paged.caches, None, 0.2, paged.tables,
            torch.tensor(lengths), block, 600, None,
        )  # fmt: skip
        assert same(got, want)


# --- torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compile(backend):
    q, k, v = qkv(2, 3, 9, 4, 2, 16)
    f = torch.compile(functional.attention, fullgraph=True, backend=backend)
    assert same(f(q, k, v, causal=True), functional.attention(q, k, v, causal=True))
    arguments = varlen_arguments()
    want = varlen_attention(**arguments).clone()
    arguments["out"].zero_()
    g = torch.compile(VarlenAttention(), fullgraph=True, backend=backend)
    assert same(g(**arguments), want)
    decode = decode_arguments()
    want = single_query_cached_kv_attention(**decode).clone()
    decode["output"].zero_()
    h = torch.compile(
        PagedAttention.single_query_cached_kv_attention, fullgraph=True, backend=backend
    )
    assert same(h(**decode), want)
    module = IndirectAccessKVCacheAttention(4)
    i = torch.compile(module, fullgraph=True, backend=backend)
    past = mine = None
    for n in (3, 1, 1, 1):
        args = (q[:, :n], k[:, :n], v[:, :n], 4.0)
        want, _, past = module(*args, past)
        got, _, mine = i(*args, mine)
        assert same(got, want)


def test_export_and_trace():
    q, k, v = qkv(2, 3, 3, 4, 2, 16)

    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return functional.attention(q, k, v, causal=True)

    want = Attend()(q, k, v)
    assert same(torch.export.export(Attend(), (q, k, v)).module()(q, k, v), want)
    assert same(torch.jit.trace(Attend(), (q, k, v))(q, k, v), want)


def test_autocast_and_backward():
    q, k, v = qkv(1, 3, 9, 4, 2, 16)
    with torch.autocast("cpu", dtype=BF16):
        y = functional.attention(q.bfloat16(), k, v)
    assert y.dtype is BF16
    y = functional.attention(q.requires_grad_(), k, v)
    if y.requires_grad:
        with pytest.raises(RuntimeError, match="no backward"):
            y.sum().backward()


def test_dense_bad_input():
    q, k, v = qkv(2, 3, 9, 4, 2, 16)
    for error, text, args, kwargs in (
        (ValueError, "query", (q[0], k, v), {}),
        (TypeError, "query", (q.double(), k, v), {}),
        (TypeError, "key", (q, k.long(), v), {}),
        (TypeError, "key_scales", (q, k.to(torch.int8), v), {}),
        (ValueError, "key_scales", (q, k.to(torch.int8), v), {"key_scales": torch.rand(2, 9, 1)}),
        (ValueError, "key", (q, k[:1], v), {}),
        (ValueError, "value", (q, k, v[:, :8]), {}),
        (ValueError, "value", (q, k, v[..., :0]), {}),
        (TypeError, "'window_left'", (q, k, v), {"window": ("near", 1)}),
        (ValueError, "divide", (q[:, :, :3], k, v), {}),
        (ValueError, "mask", (q, k, v), {"mask": torch.ones(3, 1, 3, 9)}),
        (ValueError, "mask", (q, k, v), {"mask": torch.ones(1, 1, 1, 3, 9)}),
        (TypeError, "mask", (q, k, v), {"mask": torch.ones(3, 9).int()}),
        (ValueError, "sinks", (q, k, v), {"sinks": torch.ones(2)}),
        (ValueError, "scale", (q, k, v), {"scale": math.nan}),
        (ValueError, "softcap", (q, k, v), {"softcap": -5.0}),
    ):
        with pytest.raises(error, match=text):
            functional.attention(*args, **kwargs)
