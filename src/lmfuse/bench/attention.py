"""Attention against torch's: decoding, limited by reading the cache, and prompts, by arithmetic.

Caches come from memory, as in a model of many layers: each call takes another copy, 512 MB of them
in all. They lie where lmfuse's own caches do, in pages of 2 MB (`functional.new_cache`), for stock
as well; so do the paged ones, but for those called "4 KB pages", which are what torch.empty gives.
The copy in "reshape_and_cache" is between pages of 4 KB.

"int8 / bf16 KV" and "4 beams / 1" compare two ways of lmfuse: `stock` is the second one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lmfuse import functional
from lmfuse.bench.case import Case, Formula, Inputs, walk
from lmfuse.reference.attention import attention as reference

_HEADS, _KV_HEADS = 32, 8
_COLD_BYTES = 512 << 20
_BF16 = torch.bfloat16

# Weights are rounded to bf16, each by up to 2^-9; the errors of many keys cancel, mostly.
_ACCURACY = 8e-3


def _rows(*shape: int) -> Tensor:
    """Random rows; a prime number of them, so that no two heads or blocks are alike."""
    distinct, count = 4099, torch.Size(shape[:-1]).numel()
    rows = torch.randn(min(distinct, count), shape[-1]).to(_BF16)
    return rows.repeat(-(-count // distinct), 1)[:count].view(shape)


def _cache(x: Tensor) -> Tensor:
    """`x`, which is dense, in the memory of a cache."""
    return functional.new_cache((x.numel(),), x.dtype).as_strided(x.shape, x.stride()).copy_(x)


def _cold(make: Callable[[Tensor], Tensor], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    copies = max(1, _COLD_BYTES // (key.nbytes + value.nbytes))
    return walk(key, copies, make), walk(value, copies, make)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> Tensor:
    """Of [batch, seq, heads, dim]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return y.transpose(1, 2)


def _decode(
    name: str,
    shape: tuple[int, ...],
    caches: Callable[[], Inputs],
    run: Formula,
    stock: Formula,
    formula: Formula,
    limit: str | None = "read",
) -> Case:
    def make(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
        return torch.randn(shape).to(dtype), *caches()

    return Case(name, "decode", shape, _BF16, make, run, stock, formula, limit, accuracy=_ACCURACY)


def _length(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def contiguous(batch: int, kv_len: int, dim: int) -> Case:
    """One token each over keys as transformers' caches hold them, head by head."""

    def caches() -> Inputs:
        key, value = (_rows(batch, _KV_HEADS, kv_len, dim).transpose(1, 2) for _ in range(2))
        return key, value

    return _decode(
        f"decode {_length(kv_len)}",
        (batch, 1, _HEADS, dim),
        caches,
        lambda q, k, v: functional.attention(q, *_cold(_cache, k, v)),
        lambda q, k, v: _sdpa(q, *_cold(_cache, k, v)),
        reference,
    )


_INT8_SCALE = 1 / 32


def _to_int8(x: Tensor) -> Tensor:
    return (x / _INT8_SCALE).round().clamp(-127, 127).to(torch.int8)


def _from_int8(x: Tensor) -> Tensor:
    return _cache(x.to(_BF16) * _INT8_SCALE)


def int8(batch: int, kv_len: int, dim: int) -> Case:
    """The same keys as int8 with a scale for each token and head, against bf16."""

    def caches() -> Inputs:
        _, key, value = contiguous(batch, kv_len, dim).inputs()
        scales = torch.full(key.shape[:-1], _INT8_SCALE)
        return _to_int8(key), _to_int8(value), scales, scales.clone()

    def run(q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor, v_scales: Tensor) -> Tensor:
        k, v = _cold(_cache, k, v)
        return functional.attention(q, k, v, key_scales=k_scales, value_scales=v_scales)

    def formula(q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor, v_scales: Tensor) -> Tensor:
        return reference(q, k * k_scales.unsqueeze(-1), v * v_scales.unsqueeze(-1))

    def bf16(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        return functional.attention(q, *_cold(_from_int8, k, v))

    name = f"int8 / bf16 KV {_length(kv_len)}"
    return _decode(name, (batch, 1, _HEADS, dim), caches, run, bf16, formula, None)


def paged(
    batch: int, kv_len: int, dim: int, block: int, shared: int = 0, large_pages: bool = True
) -> Case:
    """One token each over blocks in random order; `shared`: so many tokens are those of all."""
    common, own = shared // block, (kv_len - shared) // block
    in_memory = _cache if large_pages else torch.clone

    def caches() -> Inputs:
        blocks = common + batch * own
        order = torch.randperm(blocks)
        tables = torch.cat((order[:common].repeat(batch, 1), order[common:].view(batch, own)), 1)
        key, value = (_rows(blocks, _KV_HEADS, block, dim) for _ in range(2))
        return key, value, tables.int()

    def run(query: Tensor, key: Tensor, value: Tensor, tables: Tensor) -> Tensor:
        n = query.shape[0]
        key, value = _cold(in_memory, key, value)
        return functional.single_query_cached_kv_attention(
            torch.empty_like(query),
            query,
            key,
            value,
            None,
            dim**-0.5,
            tables[:n],
            torch.full((n,), kv_len, dtype=torch.int32),
            block,
            kv_len,
            None,
        )

    def gathered(attend: Formula, query: Tensor, key: Tensor, value: Tensor, t: Tensor) -> Tensor:
        k, v = (c[t.long()].transpose(2, 3).flatten(1, 2) for c in (key, value))
        y = attend(query.unsqueeze(1), k, v)
        assert isinstance(y, Tensor)
        return y.squeeze(1)

    def stock(query: Tensor, key: Tensor, value: Tensor, tables: Tensor) -> Tensor:
        if shared:
            return run(query[:1], key, value, tables)
        key, value = _cold(in_memory, key, value)
        return gathered(_sdpa, query, key, value, tables)

    name = f"decode {_length(kv_len)} paged {block}" + ("" if large_pages else ", 4 KB pages")
    if shared:
        name = f"{batch} beams / 1 paged {block}"
    limit = None if shared else "read"
    formula = partial(gathered, reference)
    return _decode(name, (batch, _HEADS, dim), caches, run, stock, formula, limit)


def indirect(batch: int, kv_len: int, dim: int, shared: int = 0) -> Case:
    """One token each, appended to caches behind beam indices, with `shared` tokens of a prompt."""

    def caches() -> Inputs:
        new = (_rows(batch, 1, _KV_HEADS, dim) for _ in range(2))
        key, value = (_rows(kv_len, 1 if shared else batch, _KV_HEADS, dim) for _ in range(2))
        return *new, key, value

    def columns(cache: Tensor) -> Tensor:
        return _cache(cache.repeat(1, batch, 1, 1) if shared else cache)

    beam_idx = torch.arange(batch).repeat(kv_len + 2, 1)
    beam_idx[kv_len:] = 0
    beam_idx[kv_len, 0], beam_idx[kv_len + 1, 0] = shared, 1 if shared else batch
    info = torch.zeros(()).long().expand(1, kv_len - 1, kv_len - 1, 1)

    def run(q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = _cold(columns, key, value)
        past = (info, key, value, beam_idx)
        out, *_ = functional.indirect_access_kv_cache_attention(q, k, v, dim**0.5, past)
        return out.transpose(1, 2)

    def whole(q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor) -> Inputs:
        past = (c[:-1].transpose(0, 1).expand(q.shape[0], -1, -1, -1) for c in (key, value))
        return q, *(torch.cat(pair, 1) for pair in zip(past, (k, v), strict=True))

    def stock(q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if shared:
            key, value = _cold(_cache, key, value)
            past = (info, key, value, beam_idx[:, :1].contiguous())
            out, *_ = functional.indirect_access_kv_cache_attention(
                q[:1], k[:1], v[:1], dim**0.5, past
            )
            return out.transpose(1, 2)
        key, value = (c.transpose(0, 1) for c in _cold(columns, key, value))
        return _sdpa(q, key, value)

    name = f"decode {_length(kv_len)} indirect"
    if shared:
        name = f"{batch} beams / 1 indirect"
    limit = None if shared else "read"
    shape = (batch, 1, _HEADS, dim)
    return _decode(name, shape, caches, run, stock, lambda *a: reference(*whole(*a)), limit)


def prompt(length: int, dim: int, checked: int = 128) -> Case:
    """Causal, in one piece; the last queries are checked."""

    def make(shape: tuple[int, ...], _: torch.dtype) -> Inputs:
        key, value = (_rows(1, length, _KV_HEADS, dim) for _ in range(2))
        return torch.randn(shape).to(_BF16), key, value

    return Case(
        "causal prompt",
        "prompt",
        (1, length, _HEADS, dim),
        _BF16,
        make,
        lambda q, k, v: functional.attention(q, k, v, causal=True),
        lambda q, k, v: _sdpa(q, k, v, causal=True),
        lambda q, k, v: reference(q[:, -checked:], k, v, causal=True),
        "roof",
        2 * length * (length + 1) * _HEADS * dim,
        _ACCURACY,
    )


def cache_write(tokens: int, dim: int, block: int) -> Case:
    """Keys and values of a prompt into the blocks of a cache, in random order."""

    def make(_: tuple[int, ...], __: torch.dtype) -> Inputs:
        blocks = torch.randperm(tokens // block).unsqueeze(1) * block
        key, value = (_rows(tokens, _KV_HEADS, dim) for _ in range(2))
        return key, value, (blocks + torch.arange(block)).flatten()

    def cache_of(x: Tensor) -> Tensor:
        return x.new_empty((tokens // block, _KV_HEADS, block, dim)).fill_(0)  # its pages are there

    def run(key: Tensor, value: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        key_cache, value_cache = _cold(cache_of, key, value)
        key, value = _cold(torch.clone, key, value)
        return functional.reshape_and_cache(key, value, key_cache, value_cache, slots)

    def put(caches: Inputs, key: Tensor, value: Tensor, slots: Tensor) -> Inputs:
        slots = slots.long()
        for cache, x in zip(caches, (key, value), strict=True):
            cache[slots // block, :, slots % block] = x
        return caches

    def stock(key: Tensor, value: Tensor, slots: Tensor) -> Inputs:
        caches = _cold(cache_of, key, value)
        key, value = _cold(torch.clone, key, value)
        return put(caches, key, value, slots)

    return Case(
        f"reshape_and_cache {block}",
        "stream",
        (tokens, _KV_HEADS, dim),
        _BF16,
        make,
        run,
        stock,
        lambda k, v, slots: put((cache_of(k), cache_of(v)), k, v, slots),
        "copy",
    )


_WIDE = ((1, 4096), (8, 4096), (1, 32768))  # batch and length

CASES = [
    *(contiguous(b, n, dim) for dim in (64, 128) for b, n in (*_WIDE, (8, 32768))),
    *(paged(b, n, dim, block) for dim in (64, 128) for block in (16, 128) for b, n in _WIDE[1:]),
    paged(8, 4096, 128, 16, large_pages=False),
    *(indirect(b, n, dim) for dim in (64, 128) for b, n in _WIDE[1:]),
    *(int8(1, 32768, dim) for dim in (64, 128)),
    paged(4, 4096 + 16, 128, 16, shared=4096),
    indirect(4, 4096 + 16, 128, shared=4096),
    *(prompt(length, dim) for dim in (64, 128) for length in (512, 2048, 8192)),
    *(cache_write(4096, 128, block) for block in (16, 128)),
]
