"""Attention over a cache that beam search reorders by indices alone: no key or value ever moves.

The cache of a layer is a 4-tuple, with L the tokens it holds:

    0  seq_info     [1, L, L, 1] int64   only its size is used; it occupies a single element
    1  key_cache    [rows, batch, kv_heads, dim]
    2  value_cache  as key_cache
    3  beam_idx     [rows + 2, batch] int64

Row t of beam_idx says, for each row of the batch, in which column the keys of position t lie for
what came after it. After each step the caller writes `beam_idx[L - 1] = parents`; the chain is
followed back from there. Element [rows, 0] is the length of the prompt and [rows + 1, 0] its batch
size. A prompt whose batch is smaller than the cache's is shared: the keys of sequence b then lie in
the first of its beams' columns only, and all beams read them there, once.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lmfuse._library import call, ops, register_fake
from lmfuse.functional import _attention
from lmfuse.functional.attention import attention
from lmfuse.functional.cache import reshape_and_cache

LayerPast = tuple[Tensor, Tensor, Tensor, Tensor]

_op_indirect = ops.attention_indirect.default


def indirect_access_kv_cache_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale_attn: float | Tensor,
    layer_past: LayerPast | None = None,
    head_mask: None = None,
    attention_mask: Tensor | None = None,
    alibi: None = None,
    add_casual_mask: bool = True,
    seq_info: int | Tensor | None = None,
    text_max_length: int = 0,
) -> tuple[Tensor, None, LayerPast | None]:
    """Appends key and value to the cache of a layer and attends to all of it; see above.

    Args:
        query: [batch, seq, heads, dim], float32, bfloat16 or float16.
        key, value: [batch, seq, kv_heads, dim]; value is converted to the dtype of key.
        scale_attn: what the scores are divided by, usually √dim.
        layer_past: the cache, or before the first token a placeholder (0 tokens), of which the
            dtype of element 1 (that of key, or an fp8) and the columns of element 3 count: batch
            times beams. None: a placeholder for the batch of query.
        head_mask: must be None.
        attention_mask: broadcasts to [batch, heads, seq, L + seq]; bool (True: seen) or added to
            the scores. None: nothing is hidden but by add_casual_mask.
        alibi: must be None: add the bias to attention_mask.
        add_casual_mask: a query sees the positions up to its own (the spelling is the interface's).
        seq_info: how many tokens the cache holds, where element 0 does not say it; -1 for cross
            attention, with elements 1 and 2 as [batch, kv_len, kv_heads, dim] and nothing appended.
        text_max_length: rows of a new cache; at most seq: seq rows more. A full cache is doubled
            until the new tokens fit.

    Returns:
        (out, None, present): out is [batch, heads, seq, dim], a view of [batch, seq, heads, dim];
        present is the cache for the next call, in the same memory as layer_past until it grows.

    Raises:
        TypeError, ValueError: an argument that cannot be, or a beam index out of range; see the
            text of the error.
    """
    if head_mask is not None:
        raise ValueError("head_mask must be None")
    if alibi is not None:
        raise ValueError("alibi must be None: add its bias to attention_mask")
    _attention.heads("query", query, "[batch, seq, heads, dim]")
    scale = 1.0 / float(scale_attn)
    past = _past_length(layer_past, seq_info)
    if past == -1 and layer_past is not None:
        _, keys, values, _ = layer_past
        out = attention(query, keys, values, mask=attention_mask, scale=scale)
        return out.transpose(1, 2), None, layer_past
    _attention.heads("key", key, "[batch, seq, kv_heads, dim]")
    _attention.heads("value", value, "[batch, seq, kv_heads, dim]")
    value = value.to(key.dtype)
    batch, seq, heads, dim = query.shape
    _attention.equal("key", key.shape[0], batch, "batch size", "query")
    _attention.equal("key", key.shape[1], seq, "length", "query")
    _attention.equal("key", key.shape[3], dim, "head dimension", "query")
    _attention.equal("value", value.shape[0], batch, "batch size", "query")
    _attention.equal("value", value.shape[1], seq, "length", "query")
    _attention.equal("value", value.shape[2], key.shape[2], "number of heads", "key")
    _attention.groups(heads, key.shape[2], "key")
    _attention.mask("attention_mask", attention_mask, batch, heads, seq, past + seq)
    mask = _attention.four_dims(attention_mask)
    if past == 0:
        caches = _new_caches(key, value, layer_past, text_max_length)
        _append(key, value, caches, 0, caches[2].shape[1] // batch)
        out = attention(query, key, value, mask=mask, causal=add_casual_mask, scale=scale)
    else:
        assert layer_past is not None  # or past were 0
        caches = _grown(_check_caches(layer_past, key, past), past + seq)
        _append(key, value, caches, past, 1)
        out = cast(
            Tensor,
            call(_op_indirect, query, *caches, past + seq, mask, None, scale, add_casual_mask),
        )
    length = past + seq
    info = torch.zeros((), dtype=torch.int64).expand(1, length, length, 1)
    return out.transpose(1, 2), None, (info, *caches)


def _past_length(layer_past: LayerPast | None, seq_info: int | Tensor | None) -> int:
    if layer_past is None:
        return 0
    if not isinstance(layer_past, (tuple, list)) or len(layer_past) != 4:
        raise TypeError("layer_past must be a tuple of 4 tensors, or None")
    if seq_info is not None:
        past = int(seq_info)
        if past < -1:
            raise ValueError(f"seq_info is {past}, but must be a length, or -1")
        return past
    if layer_past[0].dim() != 4:
        raise ValueError(
            f"layer_past[0] has shape {tuple(layer_past[0].shape)}, but must be [1, L, L, 1]"
        )
    return layer_past[0].size(-2)


Caches = tuple[Tensor, Tensor, Tensor]


def _new_caches(
    key: Tensor, value: Tensor, layer_past: LayerPast | None, text_max_length: int
) -> Caches:
    batch, seq, kv_heads, dim = key.shape
    columns, dtype = batch, key.dtype
    if layer_past is not None:
        columns, dtype = layer_past[3].shape[-1], layer_past[1].dtype
        if dtype not in _attention.FP8:
            dtype = key.dtype
    if columns == 0 or columns % batch:
        raise ValueError(
            f"layer_past[3] has {columns} columns, but must have as many as the batch of key, "
            f"{batch}, times the beams"
        )
    rows = text_max_length if text_max_length > seq else text_max_length + seq
    key_cache = key.new_empty((rows, columns, kv_heads, dim), dtype=dtype)
    value_cache = value.new_empty((rows, columns, kv_heads, value.shape[3]), dtype=dtype)
    beams = columns // batch
    own = torch.arange(columns)
    beam_idx = (own // beams * beams).repeat(rows + 2, 1)
    beam_idx[rows:] = 0
    beam_idx[rows, 0] = seq
    beam_idx[rows + 1, 0] = batch
    return key_cache, value_cache, beam_idx


def _check_caches(layer_past: LayerPast, key: Tensor, past: int) -> Caches:
    batch, _, kv_heads, dim = key.shape
    _, key_cache, value_cache, beam_idx = layer_past
    for name, cache in (("layer_past[1]", key_cache), ("layer_past[2]", value_cache)):
        _attention.heads(name, cache, "[rows, batch, kv_heads, dim]", kv=True)
        if cache.shape[-1] > 1 and cache.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension")
        if cache.dtype != key.dtype and cache.dtype not in _attention.FP8:
            raise TypeError(f"{name} is {cache.dtype}, but must be {key.dtype}, the dtype of key")
        if cache.shape[1:3] != (batch, kv_heads) or cache.shape[0] != key_cache.shape[0]:
            raise ValueError(
                f"{name} has shape {tuple(cache.shape)}, but must have [rows, {batch}, {kv_heads}, "
                "dim]: the batch and heads of key"
            )
    _attention.equal("layer_past[1]", key_cache.shape[3], dim, "head dimension", "key")
    rows = key_cache.shape[0]
    if beam_idx.dtype != torch.int64 or tuple(beam_idx.shape) != (rows + 2, batch):
        raise ValueError(
            f"layer_past[3] is {beam_idx.dtype} of shape {tuple(beam_idx.shape)}, but must be "
            f"int64 of shape ({rows + 2}, {batch})"
        )
    if past > rows:
        raise ValueError(f"layer_past holds {past} tokens in {rows} rows")
    return key_cache, value_cache, beam_idx.contiguous()


def _grown(caches: Caches, length: int) -> Caches:
    """The caches with their rows doubled until `length` fit."""
    key_cache, value_cache, beam_idx = caches
    old = rows = key_cache.shape[0]
    while rows < length:
        rows *= 2
    if rows == old:
        return caches

    def grow(cache: Tensor) -> Tensor:
        new = cache.new_empty((rows, *cache.shape[1:]))
        new[:old] = cache
        return new

    new_idx = torch.arange(beam_idx.shape[1]).repeat(rows + 2, 1)
    new_idx[:old] = beam_idx[:old]
    new_idx[rows:] = beam_idx[old:]
    return grow(key_cache), grow(value_cache), new_idx


def _append(key: Tensor, value: Tensor, caches: Caches, past: int, beams: int) -> None:
    """Token t of sequence b into row past + t, column b * beams."""
    batch, seq = key.shape[:2]
    columns = caches[0].shape[1]
    slots = torch.arange(past * columns, (past + seq) * columns, beams)  # token by token
    if seq > 1:
        slots = slots.view(seq, batch).t()
    reshape_and_cache(
        key.flatten(0, 1),
        value.flatten(0, 1),
        caches[0].transpose(1, 2),
        caches[1].transpose(1, 2),
        slots.flatten(),
    )


@register_fake("attention_indirect")
def _(query: Tensor, key_cache: Tensor, value_cache: Tensor, *_: object) -> Tensor:
    return query.new_empty((*query.shape[:3], value_cache.shape[3]))
