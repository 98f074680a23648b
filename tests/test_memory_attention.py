"""No attention, however odd its shapes, tables, lengths and options, touches what is not its own.

Tables, lengths, slots and beam indices are often wrong, and then refused before anything is read:
each test knows when they must be. As test_memory.py; `tools/asan` runs both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from guarded import Guarded, Layout, Placed, placed, some
from helpers import BF16, DTYPES, F32, assert_same_bits
from lmfuse import functional as F

SMALL = (torch.float8_e5m2, torch.float8_e4m3fn, torch.int8)  # what else caches may hold
DIMS = (1, 8, 17, 32, 64, 80)
FAR = 2**62


def _heads(data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype) -> Placed:
    return placed(data, shape, dtype, (1,))


def _refused(call: Callable[[], object]) -> bool:
    """Runs `call`, which may find that indices are out of range."""
    try:
        call()
    except ValueError:
        return True
    return False


def _integers(data: st.DataObject, shape: tuple[int, ...], low: int, high: int) -> Tensor:
    """From low to high; often one of them, now and then something far beyond. Of either width."""
    count = torch.Size(shape).numel()
    beyond = (low - 1, high + 1, 2**31 - 1, -(2**31))
    number = st.one_of(*(st.integers(low, high) for _ in range(9)), st.sampled_from(beyond))
    numbers = data.draw(st.lists(number, min_size=count, max_size=count))
    dtype = data.draw(st.sampled_from((torch.int64, torch.int32)))
    found = torch.tensor(numbers, dtype=dtype).view(shape)
    if dtype is torch.int64 and count and data.draw(st.integers(0, 19)) == 0:
        found.view(-1)[-1] = data.draw(st.sampled_from((FAR, -FAR, 2**32 + low)))
    return found


def _cumulative(data: st.DataObject, batch: int, most: int) -> Tensor:
    ends = _integers(data, (batch,), 0, most)
    return torch.cat((torch.zeros(1, dtype=ends.dtype), ends.sort().values))


def _fall_outside(cumulative: Tensor, most: int) -> bool:
    return bool((cumulative < 0).any()) or int(cumulative[-1]) > most


def _window(data: st.DataObject) -> int:
    return data.draw(st.sampled_from((-1, -1, 0, 1, 5, 40, 300, FAR)))


def _vector(data: st.DataObject, heads: int, batch: int | None = None) -> Placed | None:
    """Slopes or sinks: none, one for each head, or (where `batch` is given) for each sequence."""
    shapes = [None, (heads,)] if batch is None else [None, (heads,), (batch, heads)]
    shape = data.draw(st.sampled_from(shapes))
    return None if shape is None else placed(data, shape, data.draw(st.sampled_from(DTYPES)))


def _checked(*operands: Placed | None) -> None:
    for one in operands:
        if one is not None:
            one.check()


def _tensor(one: Placed | None) -> Tensor | None:
    return None if one is None else one.tensor


def _caches(
    data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype, value_dim: int | None = None
) -> list[Placed]:
    """Keys and values, of `dtype`, fp8 or int8, and with int8 their scales."""
    kind = data.draw(st.sampled_from((dtype, dtype, *SMALL)))
    shapes = shape, (*shape[:-1], value_dim or shape[-1])
    caches = [_heads(data, s, kind) for s in shapes]
    scales = [_heads(data, shape[:-1], F32) for _ in range(2)] if kind is torch.int8 else []
    return caches + scales


def _named(caches: list[Placed], suffix: str = "_cache") -> dict[str, Tensor]:
    names = (f"key{suffix}", f"value{suffix}", "key_scales", "value_scales")
    return {name: c.tensor for name, c in zip(names, caches, strict=False)}


def _attention(data: st.DataObject) -> None:
    batch, q_len, kv_len, kv_heads, group = (
        data.draw(st.integers(1, n)) for n in (2, 40, 600, 2, 5)
    )
    dim, value_dim = (data.draw(st.sampled_from(DIMS)) for _ in range(2))
    dtype, heads = data.draw(st.sampled_from(DTYPES)), kv_heads * group
    query = _heads(data, (batch, q_len, heads, dim), dtype)
    caches = _caches(data, (batch, kv_len, kv_heads, dim), dtype, value_dim)
    mask = None
    if data.draw(st.booleans()):
        sizes = tuple(data.draw(st.sampled_from((1, n))) for n in (batch, heads, q_len, kv_len))
        mask = placed(data, sizes, data.draw(st.sampled_from((torch.bool, *DTYPES))))
    alibi, sinks = _vector(data, heads, batch), _vector(data, heads)
    y = F.attention(
        query.tensor, **_named(caches, ""), mask=_tensor(mask), alibi=_tensor(alibi),
        sinks=_tensor(sinks), window=(_window(data), _window(data)),
        causal=data.draw(st.booleans()), softcap=data.draw(st.sampled_from((0.0, 2.0))),
    )  # fmt: skip
    assert y.isfinite().all() or caches[0].tensor.dtype in SMALL
    _checked(query, *caches, mask, alibi, sinks)


def _misses(tables: Tensor, lens: Tensor, blocks: int, block: int) -> bool:
    """Whether a sequence needs blocks that its row of the tables, or the cache, does not have."""
    room = tables.shape[1] * block
    if bool((lens < 0).any() or (lens > room).any()):
        return True
    rows = zip(tables.tolist(), lens.tolist(), strict=True)
    return any(not 0 <= entry < blocks for row, n in rows for entry in row[: -(-n // block)])


def _pages(data: st.DataObject) -> tuple[list[Placed], Tensor, dict[str, Any], int, int, int]:
    """Caches, tables, the rest that both functions take, and the sizes."""
    blocks, block, kv_heads, group = (data.draw(st.integers(1, n)) for n in (5, 140, 2, 4))
    batch, width = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 4))
    dim, value_dim = (data.draw(st.sampled_from(DIMS)) for _ in range(2))
    dtype = data.draw(st.sampled_from(DTYPES))
    caches = _caches(data, (blocks, kv_heads, block, dim), dtype, value_dim)
    tables = _integers(data, (batch, width), 0, blocks - 1)
    if data.draw(st.booleans()):  # all sequences over the same blocks
        tables = tables[:1].expand(batch, width)
    rest = {"scale": 0.2, "softcap": data.draw(st.sampled_from((-1.0, 2.0)))}
    return caches, tables, rest | _named(caches), kv_heads * group, dim, value_dim


def _paged_attention(data: st.DataObject) -> None:
    """Also with wrong block tables and lengths, which are refused before anything is read."""
    caches, tables, rest, heads, dim, value_dim = _pages(data)
    (blocks, _, block, _), batch = caches[0].tensor.shape, len(tables)
    dtype = caches[0].tensor.dtype
    dtype = data.draw(st.sampled_from(DTYPES)) if dtype in SMALL else dtype
    query, out = (_heads(data, (batch, heads, d), dtype) for d in (dim, value_dim))
    lens = _integers(data, (batch,), 0, tables.shape[1] * block)
    bad = _misses(tables, lens, blocks, block)
    alibi = _vector(data, heads, batch)
    call = functools.partial(
        F.single_query_cached_kv_attention, out.tensor, query.tensor, **rest, head_mapping=None,
        block_tables=tables, context_lens=lens, block_size=block, alibi_slopes=_tensor(alibi),
        max_context_len=2**31, window_size=_window(data),
    )  # fmt: skip
    assert _refused(call) == bad
    out.check(written=not bad)
    _checked(query, *caches, alibi)


def _paged_prompt(data: st.DataObject) -> None:
    """As `_paged_attention`, of several tokens for each sequence."""
    caches, tables, rest, heads, dim, value_dim = _pages(data)
    (blocks, _, block, _), batch = caches[0].tensor.shape, len(tables)
    tokens, dtype = data.draw(st.integers(0, 40)), caches[0].tensor.dtype
    dtype = data.draw(st.sampled_from(DTYPES)) if dtype in SMALL else dtype
    query, out = (_heads(data, (tokens, heads, d), dtype) for d in (dim, value_dim))
    cu_q = _cumulative(data, batch, tokens)
    lens = _integers(data, (batch,), 0, tables.shape[1] * block)
    cu_kv = torch.cat((torch.zeros(1).long(), lens.long().cumsum(0)))
    bad = _misses(tables, lens, blocks, block) or _fall_outside(cu_q, tokens)
    alibi, sinks = _vector(data, heads, batch), _vector(data, heads)
    call = functools.partial(
        F.flash_attn_varlen_func, out.tensor, query.tensor, **rest, cu_seqlens_q=cu_q,
        cu_seqlens_kv=cu_kv, max_seqlen_q=9, max_seqlen_kv=2**31, alibi_slopes=_tensor(alibi),
        is_cusal=data.draw(st.booleans()), block_tables=tables, sinks=_tensor(sinks),
        window_size_left=_window(data), window_size_right=_window(data),
    )  # fmt: skip
    assert _refused(call) == bad
    out.check(written=not bad)
    _checked(query, *caches, alibi, sinks)


def _varlen_attention(data: st.DataObject) -> None:
    tokens, keys, batch = (data.draw(st.integers(1, n)) for n in (40, 600, 3))
    dtype = data.draw(st.sampled_from(DTYPES))
    query, out = (_heads(data, (tokens, 2, 32), dtype) for _ in range(2))
    key, value = (_heads(data, (keys, 1, 32), dtype) for _ in range(2))
    cu_q, cu_k = _cumulative(data, batch, tokens), _cumulative(data, batch, keys)
    bad = _fall_outside(cu_q, tokens) or _fall_outside(cu_k, keys)
    alibi = _vector(data, 2, batch)
    arguments = (query.tensor, key.tensor, value.tensor, out.tensor, cu_q, cu_k, _tensor(alibi))
    rest = (1, 1, 0.0, 0.2, False, data.draw(st.booleans()), False, None)
    more = (_window(data), _window(data), data.draw(st.sampled_from((-1.0, 2.0))))
    assert _refused(lambda: F.varlen_attention(*arguments, *rest, *more)) == bad
    out.check(written=not bad)
    _checked(query, key, value, alibi)


def _indirect(data: st.DataObject) -> tuple[list[Placed], list[Placed], tuple[Tensor, ...], int]:
    """New tokens, caches that may be full, their tuple with beam indices that may be wrong."""
    prompts, beams, past, seq = (data.draw(st.integers(1, n)) for n in (2, 3, 40, 4))
    batch, rows, dim = prompts * beams, past + data.draw(st.integers(0, 5)), 32
    dtype = data.draw(st.sampled_from(DTYPES))
    new = [_heads(data, (batch, seq, n, dim), dtype) for n in (4, 2, 2)]
    kind = data.draw(st.sampled_from((dtype, dtype, *SMALL[:2])))
    caches = [_heads(data, (rows, batch, 2, dim), kind) for _ in range(2)]
    parents = _integers(data, (rows + 2, batch), 0, batch - 1).long()
    parents[rows, 0] = data.draw(st.integers(-1, past + 9))
    parents[rows + 1, 0] = data.draw(st.sampled_from((prompts, prompts, prompts, 0, -1, 7, FAR)))
    info = torch.zeros(()).long().expand(1, past, past, 1)
    return new, caches, (info, caches[0].tensor, caches[1].tensor, parents), past


def _wrong(parents: Tensor) -> bool:
    """Whether any beam index, or what is recorded of the prompt, is out of range."""
    rows, batch = len(parents) - 2, parents.shape[1]
    prompt, prompts = parents[-2:, 0].tolist()
    fits = 0 <= prompt <= rows and 0 < prompts <= batch and batch % prompts == 0
    return not fits or bool((parents[:rows] < 0).any() or (parents[:rows] >= batch).any())


def _indirect_attention(data: st.DataObject) -> None:
    """Some new tokens over a cache that grows where it is full."""
    new, caches, layer_past, past = _indirect(data)
    query, key, value = (x.tensor for x in new)
    batch, seq = query.shape[:2]
    mask = None
    if data.draw(st.booleans()):
        sizes = tuple(data.draw(st.sampled_from((1, n))) for n in (batch, 4, seq, past + seq))
        mask = placed(data, sizes, data.draw(st.sampled_from((torch.bool, *DTYPES))))
    call = functools.partial(
        F.indirect_access_kv_cache_attention, query, key, value, 5.0, layer_past,
        attention_mask=_tensor(mask), add_casual_mask=data.draw(st.booleans()),
    )  # fmt: skip
    assert not _refused(call) or _wrong(layer_past[3])
    _checked(*new, mask)
    for cache in caches:
        cache.check(written=True)


def _indirect_cache(data: st.DataObject) -> None:
    """As traced graphs call it; with softcap and sinks the cache is gathered first."""
    new, caches, layer_past, _ = _indirect(data)
    query, key, value = (x.tensor for x in new)
    sinks = _vector(data, 4)
    call = functools.partial(
        F.indirect_cache_attention, query, key, value, layer_past, scale=0.2,
        sinks=_tensor(sinks), softcap=data.draw(st.sampled_from((0.0, 2.0))),
        window=data.draw(st.sampled_from((None, 1, 3, 2**40))),
    )  # fmt: skip
    assert not _refused(call) or _wrong(layer_past[3])
    _checked(*new, sinks)
    for cache in caches:
        cache.check(written=True)


def _cache_write(data: st.DataObject) -> None:
    tokens, blocks, block, heads = (data.draw(st.integers(1, n)) for n in (5, 4, 9, 3))
    dim, value_dim = (data.draw(st.integers(1, 70)) for _ in range(2))
    dtype = data.draw(st.sampled_from(DTYPES))
    key, value = (placed(data, (tokens, heads, d), dtype) for d in (dim, value_dim))
    caches = _caches(data, (blocks, heads, block, dim), dtype, value_dim)
    slots = _integers(data, (tokens,), -1, blocks * block - 1)
    bad = bool((slots >= blocks * block).any())
    call = functools.partial(
        F.reshape_and_cache, key.tensor, value.tensor, slot_mapping=slots, **_named(caches)
    )
    assert _refused(call) == bad
    for cache in caches:
        cache.check(written=not bad)
    _checked(key, value)


def _large_cache_write(data: st.DataObject) -> None:
    """So many rows that they go around the caches, if they begin where lines do."""
    tokens, heads, dtype = 1100, 8, data.draw(st.sampled_from((BF16, F32)))
    dim = data.draw(st.sampled_from((120, 128, 160)))
    layout: Layout = ([1, 0, 2, 3], [0, 0, data.draw(st.sampled_from((0, 32))), 0], 1, True)
    rows = torch.randn(tokens, heads, dim).to(dtype)
    caches = [Placed((tokens // 10, heads, 10, dim), dtype, layout) for _ in range(2)]
    slots = torch.randperm(tokens)
    F.reshape_and_cache(rows, rows, *(c.tensor for c in caches), slots)
    for cache in caches:
        cache.check(written=True)
        assert_same_bits(cache.tensor.transpose(1, 2).reshape(rows.shape)[slots], rows)


CALLS: dict[str, Callable[[st.DataObject], None]] = {
    "dense": _attention,
    "paged": _paged_attention,
    "paged prompt": _paged_prompt,
    "varlen": _varlen_attention,
    "indirect": _indirect_attention,
    "indirect cache": _indirect_cache,
    "cache_write": _cache_write,
    "cache_write large": _large_cache_write,
}


@pytest.mark.parametrize("call", CALLS)
@some
@given(data=st.data())
def test_nothing_outside_is_touched(isa: str, call: str, data: st.DataObject) -> None:
    with torch.no_grad():
        CALLS[call](data)


@pytest.mark.parametrize(("dtype", "dim"), [(torch.int8, 96), (BF16, 64), (F32, 32)])
def test_rows_far_apart(isa: str, dtype: torch.dtype, dim: int) -> None:
    """Keys that lie farther apart than caches have sets give what they give side by side."""
    heads = 48
    shape = (1, 96, heads, dim)  # panels of 32 keys, all whole: the last ends before the fence
    query = torch.randn((1, 1, 2 * heads, dim)).bfloat16()
    memory = [Guarded(shape[1] * heads * dim * dtype.itemsize, at_end=True) for _ in range(2)]
    key, value = (m.tensor.view(dtype).view(shape) for m in memory)
    for states in (key, value):
        states.copy_(torch.randn(shape) * (20 if dtype is torch.int8 else 1))
    scales = {}
    if dtype is torch.int8:
        scales = {n: torch.rand(shape[:3]) / 20 for n in ("key_scales", "value_scales")}
    got = F.attention(query, key, value, **scales)
    near = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (key, value)]
    assert_same_bits(got, F.attention(query, near[0], near[1], **scales))
    assert all(m.intact() for m in memory)
