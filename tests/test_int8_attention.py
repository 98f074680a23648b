"""Attention over int8 caches: where it is computed in integers, their limits; and its bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attending import BF16, DTYPES, F16, F32, Paged, assert_close, exact, same
from lmfuse import functional
from lmfuse.functional import single_query_cached_kv_attention

NAN, INF = float("nan"), float("inf")


def caches(batch: int, length: int, heads: int, dim: int, value_dim: int | None = None) -> dict:
    """All values of int8, with scales such that keys and values are at most 2."""
    shapes = (batch, length, heads, dim), (batch, length, heads, value_dim or dim)
    key, value = (torch.randint(-128, 128, s, dtype=torch.int8) for s in shapes)
    scales = (torch.rand(batch, length, heads) / 64 for _ in range(2))
    names = ("key", "value", "key_scales", "value_scales")
    return dict(zip(names, (key, value, *scales), strict=True))


def check(query: Tensor, cache: dict, **options) -> None:
    wide = [
        cache[n].double() * cache[f"{n}_scales"].double().unsqueeze(-1) for n in ("key", "value")
    ]
    y = functional.attention(query, **cache, **options)
    assert_close(y, exact(query, *wide, **options), wide[1])


def queries(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_formula(isa, dtype):
    for dim, value_dim in ((128, 128), (80, 96), (33, 17), (256, 40)):
        for q_len in (1, 5, 40):
            cache, q = caches(2, 300, 2, dim, value_dim), queries(2, q_len, 6, dim, dtype=dtype)
            check(q, cache)
            check(q, cache, causal=True, window=(40, -1), softcap=2.0, sinks=torch.randn(6))
            check(q, cache, mask=torch.rand(2, 1, q_len, 300) > 0.5, scale=-0.2)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("power", [-30, -6, 6, 30])
def test_scales_of_any_size(isa, dtype, power):
    cache, q = caches(1, 300, 2, 64), queries(1, 3, 4, 64, dtype=dtype)
    check(q, cache | {"value_scales": cache["value_scales"] * 10.0**power})
    q = (q * 10.0**power).to(dtype)
    check(q, cache | {"key_scales": cache["key_scales"] * 10.0**-power})


def test_scales_beside_others(isa):
    """Of either sign, 0, and some a million times smaller or larger."""
    cache, q = caches(1, 700, 2, 64), queries(1, 3, 4, 64)
    for factor in (0.0, -1.0, 1e-6, 1e6):
        for name in ("key_scales", "value_scales"):
            scales = cache[name].clone()
            scales[:, ::7] *= factor if name == "value_scales" else min(factor, 10.0)
            check(q, cache | {name: scales})
    check(q, cache | {"value_scales": torch.zeros(1, 700, 2)})


def test_outliers_in_queries(isa):
    cache = caches(1, 700, 2, 128)
    for factor in (100.0, 3000.0):
        q = queries(1, 3, 4, 128)
        q[..., 5] *= factor
        check(q, cache | {"key_scales": cache["key_scales"] / factor})


def test_equal_weights_of_many_keys(isa):
    """The mean of the values; to far less than bf16 keeps of a weight, but on AMX."""
    cache, q = caches(1, 5000, 1, 64), torch.zeros(1, 2, 4, 64, dtype=BF16)
    check(q, cache)
    mean = (cache["value"].double() * cache["value_scales"].double().unsqueeze(-1)).mean(1)
    y = functional.attention(q, **cache).double()
    assert ((y - mean).abs() <= mean.abs() * 2.0**-8 + (2e-4 if isa == "amx" else 1e-5)).all()


def test_sums_of_the_largest_products(isa):
    """Those of 512 dimensions and 256 keys fit in 32 bits, just; more dimensions go another way."""
    for dim in (512, 544):
        for code in (-128, 127):
            cache = caches(1, 256, 1, dim)
            cache["key"].fill_(code)
            cache["value"].fill_(code)
            for scales in ("key_scales", "value_scales"):
                cache[scales].fill_(1 / 128)
            for q in (1.0, -1.0):
                q_len = 20 if code < 0 else 1
                y = functional.attention(torch.full((1, q_len, 2, dim), q, dtype=BF16), **cache)
                assert (y == code / 128).all()  # all scores are equal


def test_nan_and_infinity(isa):
    cache = caches(1, 300, 2, 64)
    for bad in (NAN, INF):
        for q_len in (1, 20):
            q = queries(1, q_len, 4, 64)
            q[0, 0, 1, 3] = bad
            y = functional.attention(q, **cache)
            assert y[0, 0, 1].isnan().all()
            assert not y[0, 0, [0, 2, 3]].isnan().any()
            assert not y[0, 1:].isnan().any()
            for scales in ("key_scales", "value_scales"):
                worse = cache[scales].clone()
                worse[0, 270, 1] = bad
                y = functional.attention(queries(1, q_len, 4, 64), **(cache | {scales: worse}))
                assert not y[..., 2:, :].isfinite().any() or (scales, bad) == ("key_scales", INF)
                assert y[..., :2, :].isfinite().all()


def test_rows_that_see_nothing_are_zero(isa):
    """Whatever they hold; scales of keys that no row sees may be anything, too."""
    cache = caches(1, 9, 1, 64)
    for q_len in (12, 40):
        for first in (1.0, NAN, 0.0):
            q = queries(1, q_len, 2, 64)
            q[:, 0] = first
            y = functional.attention(q, **cache, causal=True, scale=1e-12)
            assert (y[:, : q_len - 9] == 0).all()
            assert y.isfinite().all()
    q = queries(1, 1, 4, 64)
    whole = {n: x.clone() for n, x in caches(1, 320, 2, 64).items()}
    for scales in ("key_scales", "value_scales"):
        whole[scales][:, 290:] = NAN
    cut = {n: x[:, :290] for n, x in whole.items()}
    assert functional.attention(q, **cut).isfinite().all()


# --- the bits of a row ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("dim", [64, 40])
def test_bits_do_not_depend_on_batch_chunks_or_threads(isa, dtype, dim):
    length = 530
    q, cache = queries(5, length, 4, dim, dtype=dtype), caches(5, length, 2, dim)
    alone = {n: x[3:4] for n, x in cache.items()}

    def attend(rows: slice, threads: int = 2, **options) -> Tensor:
        torch.set_num_threads(threads)
        seen = {n: x[:, : rows.stop] for n, x in alone.items()}
        y = functional.attention(q[3:4, rows], **seen, causal=True, **options)
        torch.set_num_threads(2)
        return y

    for options in ({}, {"window": (90, -1), "softcap": 4.0, "alibi": torch.rand(4)}):
        whole = functional.attention(q, **cache, causal=True, **options)[3:4]
        assert same(whole, attend(slice(0, length), threads=1, **options))
        for first in (0, 7, 14, 252, 259, 523):
            piece = slice(first, first + 7)
            assert same(whole[:, piece], attend(piece, **options))
        for at in (0, 1, 31, 32, 255, 256, 529):
            one = slice(at, at + 1)
            assert same(whole[:, one], attend(one, **options))


def test_bits_do_not_depend_on_pages(isa):
    lengths, heads, dim = [1, 300, 517, 256], 2, 64
    k, v = (torch.randn(sum(lengths), heads, dim) for _ in range(2))
    q, results = queries(len(lengths), 6, dim), []
    for block in (512, 1, 16, 37):
        blocks = sum(-(-n // block) for n in lengths) + 3
        scales = {f"{n}_scales": torch.zeros(blocks, heads, block) for n in ("key", "value")}
        paged = Paged(k, v, lengths, block, torch.int8, **scales)
        out = torch.empty_like(q)
        single_query_cached_kv_attention(
            out, q, *paged.caches, None, 0.2, paged.tables, torch.tensor(lengths), block, 600, None,
            **scales,
        )  # fmt: skip
        results.append(out)
    assert all(same(results[0], y) for y in results[1:])


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_bits_do_not_depend_on_how_heads_lie(isa, dtype):
    """Beside each other, also of a few sequences at each position, or one by one."""
    for kv_heads, dim in ((8, 128), (20, 64), (3, 40)):
        for batch, q_len, length in ((1, 1, 300), (3, 2, 290), (2, 9, 33)):
            cache = caches(batch, length, kv_heads, dim)
            q = queries(batch, q_len, 2 * kv_heads, dim, dtype=dtype)
            y = functional.attention(q, **cache, causal=True)
            for order in ((1, 2), (0, 1)):
                other = {
                    n: x.transpose(*order).contiguous().transpose(*order) for n, x in cache.items()
                }
                assert same(y, functional.attention(q, **other, causal=True))
