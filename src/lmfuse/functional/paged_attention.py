"""Attention over a paged cache: the blocks of each sequence are named by its row of block_tables.

The formula, its order of operations and what the bits of a row depend on: `functional.attention`.
Sequences whose rows of block_tables name the same blocks (beams, forks, a common system prompt)
read them once, if they are neighbours in the batch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lmfuse._library import call, ops, register_fake
from lmfuse.functional import _attention
from lmfuse.functional.attention import check_out, check_result
from lmfuse.functional.cache import block_size_of, check_cache_dtype, check_caches

_op_paged = ops.attention_paged.default


def single_query_cached_kv_attention(
    output: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    head_mapping: Tensor | None,
    scale: float,
    block_tables: Tensor,
    context_lens: Tensor,
    block_size: int,
    max_context_len: int,
    alibi_slopes: Tensor | None,
    window_size: int = -1,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    softcap: float = -1.0,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """One new token for each sequence; its key and value are already in the cache.

    Args:
        output: [sequences, heads, dim], as query; receives the result.
        query: [sequences, heads, dim], float32, bfloat16 or float16.
        key_cache, value_cache: [blocks, kv_heads, block_size, dim], of any dtype of
            `functional.attention`.
        head_mapping: not needed: query head h reads KV head h // (heads // kv_heads).
        scale: of the scores.
        block_tables: [sequences, most blocks], int32 or int64; what lies beyond a length is not
            read.
        context_lens: [sequences], int32 or int64, the new token included. 0 gives zeros.
        block_size: that of the caches.
        max_context_len: not needed, but for window_size, which it must exceed to count.
        alibi_slopes: [heads], [sequences, heads] or None; slope · (position + 1 - context_len) is
            added.
        window_size: how many positions are seen, the own one included; -1 for all.
        k_scale, v_scale: of fp8 caches.
        softcap: c of c tanh(s / c); 0 or -1 for none.
        key_scales, value_scales: of int8 caches: float32 [blocks, kv_heads, block_size].

    Returns:
        output itself.

    Raises:
        TypeError, ValueError: an argument that cannot be, or a block or length beyond the cache;
            see the text of the error.
    """
    if block_size != block_size_of(key_cache):
        raise ValueError(
            f"block_size is {block_size}, but key_cache, of shape {tuple(key_cache.shape)}, has "
            f"blocks of {key_cache.shape[2]}"
        )
    window = window_size - 1 if 0 < window_size < max_context_len else -1
    _paged(
        output,
        query,
        key_cache,
        value_cache,
        None,
        context_lens,
        block_tables,
        alibi_slopes,
        None,
        key_scales,
        value_scales,
        scale,
        True,
        (window, 0),
        softcap,
        (k_scale, v_scale),
    )
    return output


def flash_attn_varlen_func(
    output: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    scale: float,
    is_cusal: bool,
    block_tables: Tensor,
    alibi_slopes: Tensor | None,
    window_size_left: int = -1,
    window_size_right: int = -1,
    kv_cache_dtype: str = "auto",
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    softcap: float = -1.0,
    sinks: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> Tensor:
    """Some new tokens for each sequence (a prompt, or a piece of one), already in the cache.

    Args:
        output: [tokens, heads, dim], as query; receives the result.
        query: [tokens, heads, dim], float32, bfloat16 or float16; sequence b is tokens
            cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        key_cache, value_cache: [blocks, kv_heads, block_size, dim].
        cu_seqlens_q, cu_seqlens_kv: cumulative lengths [sequences + 1], int32 or int64; those of
            the keys include the new tokens.
        max_seqlen_q: not needed.
        max_seqlen_kv: windows of so many positions or more count as none.
        scale: of the scores.
        is_cusal: a query sees the positions up to its own (the spelling is the interface's).
        block_tables: [sequences, most blocks], int32 or int64.
        alibi_slopes: [heads], [sequences, heads] or None.
        window_size_left: how many positions to the left of its own a query sees; 0 or -1 for all.
        window_size_right: and to the right; -1 for all.
        kv_cache_dtype: as in `reshape_and_cache`.
        k_scale, v_scale: of fp8 caches.
        softcap: c of c tanh(s / c); 0 or -1 for none.
        sinks: [heads] or None, as in `attention`.
        key_scales, value_scales: of int8 caches: float32 [blocks, kv_heads, block_size].

    Returns:
        output itself.

    Raises:
        TypeError, ValueError: an argument that cannot be, or a block or length beyond the cache;
            see the text of the error.
    """
    check_cache_dtype("key_cache", kv_cache_dtype, key_cache)
    if cu_seqlens_q is None:
        raise TypeError("cu_seqlens_q is NoneType, but must be a torch.Tensor")
    left = window_size_left if 0 < window_size_left < max_seqlen_kv else -1
    right = window_size_right if 0 <= window_size_right < max_seqlen_kv else -1
    _paged(
        output,
        query,
        key_cache,
        value_cache,
        cu_seqlens_q,
        cu_seqlens_kv,
        block_tables,
        alibi_slopes,
        sinks,
        key_scales,
        value_scales,
        scale,
        is_cusal,
        (left, right),
        softcap,
        (k_scale, v_scale),
    )
    return output


def _paged(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cu_q: Tensor | None,
    lens: Tensor,
    block_tables: Tensor,
    alibi: Tensor | None,
    sinks: Tensor | None,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    scale: float,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
    kv_scales: tuple[float, float],
) -> None:
    check_out(out, "output")
    args = (
        query,
        key_cache,
        value_cache,
        out,
        cu_q,
        lens,
        cu_q is not None,
        block_tables,
        _attention.floats(alibi),
        _attention.floats(sinks),
        key_scales,
        value_scales,
        _attention.number("scale", scale),
        causal,
        *window,
        _attention.softcap(softcap),
        _attention.number("k_scale", kv_scales[0]),
        _attention.number("v_scale", kv_scales[1]),
    )
    call(_op_paged, *args, written=(3,), check=_check_paged)


def _check_paged(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    out: Tensor,
    cu_q: Tensor | None,
    lens: Tensor,
    _: bool,
    block_tables: Tensor,
    alibi: Tensor | None,
    sinks: Tensor | None,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    *__: object,
) -> None:
    _attention.heads("query", query, "[tokens, heads, dim]")
    check_caches(key_cache, value_cache)
    tokens, heads, dim = query.shape
    _attention.equal("key_cache", key_cache.shape[3], dim, "head dimension", "query")
    _attention.groups(heads, key_cache.shape[1], "key_cache")
    check_result(out, query, (tokens, heads, value_cache.shape[3]), "output")
    _attention.indices("block_tables", block_tables, 2, query)
    if cu_q is None:
        _attention.indices("context_lens", lens, 1, query)
        batch = lens.shape[0]
        _attention.equal("context_lens", batch, tokens, "length", "query")
    else:
        _attention.indices("cu_seqlens_q", cu_q, 1, query)
        _attention.indices("cu_seqlens_kv", lens, 1, query)
        batch = cu_q.shape[0] - 1
        _attention.equal("cu_seqlens_kv", lens.shape[0], batch + 1, "length", "cu_seqlens_q")
    _attention.equal("block_tables", block_tables.shape[0], batch, "number of rows", "the batch")
    _attention.slopes("alibi_slopes", alibi, heads, batch)
    _attention.slopes("sinks", sinks, heads)
    _attention.token_scales("key_scales", key_scales, "key_cache", key_cache)
    _attention.token_scales("value_scales", value_scales, "value_cache", value_cache)


@register_fake("attention_paged")
def _(*args: Any) -> None:
    _check_paged(*args)
