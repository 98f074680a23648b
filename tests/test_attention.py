"""Attention against its formula in float64: dense, packed, paged and indirect, on every ISA."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lmfuse import functional
from lmfuse.functional import (
    flash_attn_varlen_func,
    reshape_and_cache,
    single_query_cached_kv_attention,
    varlen_attention,
)
from lmfuse.functional import indirect_access_kv_cache_attention as indirect
from lmfuse.modules import IndirectAccessKVCacheAttention, PagedAttention, VarlenAttention
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


_PEAK = """
import torch
from lmfuse.functional import attention

def memory(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) << 10

length = 32768
q, k, v = (torch.randn(1, length, h, 64).bfloat16() for h in (4, 1, 1))
attention(q[:, :512], k[:, :512], v[:, :512], causal=True)  # threads start
open("/proc/self/clear_refs", "w").write("5")  # VmHWM from here on
start = memory("VmRSS")
out = attention(q, k, v, causal=True)
print(memory("VmHWM") - start - out.nbytes)
"""


def test_peak_memory_of_a_prompt_of_32k():
    """No buffer of queries times keys: beyond q, k, v and the result there are some MB."""
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64 << 20


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


# --- packed --------------------------------------------------------------------------------------


def varlen(q, k, v, out, cu_q, cu_k, scale, causal=False, alibi=None, **rest):
    return varlen_attention(
        q, k, v, out, cu_q, cu_k, alibi, 9, 9, 0.0, scale, False, causal, False, None, **rest
    )


def test_varlen(isa):
    """Unequal lengths, an empty sequence, the scale, ALiBi, windows and softcap."""
    cu_q, cu_k = torch.tensor([0, 5, 5, 6, 80]).int(), torch.tensor([0, 9, 12, 300, 390])
    for dtype in (F32, BF16):
        q, k, v = (x[0] for x in qkv(1, 80, 390, 4, 2, 64, 32, dtype=dtype))
        slopes = torch.rand(4)
        for causal, rest in (
            (False, {}),
            (True, {}),
            (True, {"window_size_left": 6, "softcap": 3.0}),
            (False, {"window_size_left": 0, "window_size_right": 2}),
        ):
            out = torch.empty(80, 4, 32, dtype=dtype)
            got = varlen(q, k, v, out, cu_q, cu_k, 0.4, causal, slopes, **rest)
            assert got is out
            for b in range(4):
                rows = slice(cu_q[b], cu_q[b + 1])
                keys = slice(cu_k[b], cu_k[b + 1])
                window = rest.get("window_size_left", -1), rest.get("window_size_right", -1)
                want = exact(
                    q[None, rows], k[None, keys], v[None, keys], scale=0.4, causal=causal,
                    alibi=slopes, window=window, softcap=rest.get("softcap", 0.0),
                )  # fmt: skip
                assert_close(out[None, rows], want, v)


def _varlen_arguments():
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


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"pdropout": 0.1}, ValueError, "pdropout"),
        ({"return_softmax": True}, ValueError, "return_softmax"),
        ({"gen_": torch.Generator()}, ValueError, "gen_"),
        ({"seqlen_q": torch.tensor([0, 4, 2])}, ValueError, "seqlen_q must not fall"),
        ({"seqlen_k": torch.tensor([0, 3, 9])}, ValueError, "seqlen_k ends at 9"),
        ({"seqlen_k": torch.tensor([1, 3, 8])}, ValueError, "seqlen_k must begin"),
        ({"seqlen_k": torch.tensor([0, 8])}, ValueError, "seqlen_k"),
        ({"seqlen_q": torch.tensor([0.0, 2, 6])}, TypeError, "seqlen_q"),
        ({"query": torch.randn(6, 3, 16), "out": torch.zeros(6, 3, 16)}, ValueError, "divide"),
        ({"key": torch.randn(8, 2, 15)}, ValueError, "key"),
        ({"value": torch.randn(7, 2, 16)}, ValueError, "value"),
        ({"out": torch.zeros(6, 4, 15)}, ValueError, "out"),
        ({"out": torch.zeros(6, 4, 16).bfloat16()}, TypeError, "out"),
        ({"out": torch.zeros(1, 1, 16).expand(6, 4, 16)}, ValueError, "out"),
        ({"softcap": -2.0}, ValueError, "softcap"),
        ({"softmax_scale": math.inf}, ValueError, "softmax_scale"),
        ({"alibi_slopes": torch.rand(3)}, ValueError, "alibi_slopes"),
    ],
)
def test_varlen_bad_input(change, error, text):
    with pytest.raises(error, match=text):
        varlen_attention(**{**_varlen_arguments(), **change})


# --- paged ---------------------------------------------------------------------------------------


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


def _decode_arguments():
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
        ({"value_cache": torch.randn(6, 2, 8, 16).half()}, TypeError, "value_cache"),
        ({"value_cache": torch.randn(5, 2, 8, 16)}, ValueError, "value_cache"),
        ({"query": torch.randn(2, 4, 15)}, ValueError, "key_cache"),
        ({"output": torch.zeros(2, 4, 15)}, ValueError, "output"),
        ({"softcap": -3.0}, ValueError, "softcap"),
        ({"k_scale": math.nan}, ValueError, "k_scale"),
    ],
)
def test_paged_bad_input(change, error, text):
    single_query_cached_kv_attention(**_decode_arguments())
    with pytest.raises(error, match=text):
        single_query_cached_kv_attention(**{**_decode_arguments(), **change})


def test_paged_prompt_bad_input():
    a = _decode_arguments()
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


# --- indirect ------------------------------------------------------------------------------------


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
    )  # 100 more
    assert past[1].shape[0] == 192


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
        (ValueError, "prompt", {"layer_past": (*past[:3], parents)}),
        (ValueError, "row 4", {"layer_past": (later[0], *later[1:3], bad)}),
        (ValueError, "holds 9 tokens", {"seq_info": 9}),
        (ValueError, "columns", {"layer_past": placeholder(5)}),
    ):
        with pytest.raises(error, match=text):
            step(**change)


# --- torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compile(backend):
    q, k, v = qkv(2, 3, 9, 4, 2, 16)
    f = torch.compile(functional.attention, fullgraph=True, backend=backend)
    assert same(f(q, k, v, causal=True), functional.attention(q, k, v, causal=True))
    arguments = _varlen_arguments()
    want = varlen_attention(**arguments).clone()
    arguments["out"].zero_()
    g = torch.compile(VarlenAttention(), fullgraph=True, backend=backend)
    assert same(g(**arguments), want)
    decode = _decode_arguments()
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
