"""Attention over a cache that beam search reorders by indices alone: no key or value ever moves.

The cache of a layer is a 4-tuple, with L the tokens it holds:

    0  seq_info     [1, L, L, 1] int64   only its size is used; it occupies a single element
    1  key_cache    [rows, batch, kv_heads, dim]
    2  value_cache  as key_cache
    3  beam_idx     [rows + 2, batch] int64

Row t of beam_idx says, for each row of the batch, in which column the keys of position t lie for
what came after it. After each step the caller writes `beam_idx[L - 1] = parents`, unless each row
goes on with itself; the chain is followed back from there. Element [rows, 0] is the length of the
prompt and [rows + 1, 0] its batch size. A prompt whose batch is smaller than the cache's is shared:
the keys of sequence b then lie in the first of its beams' columns only, and all beams read them
there, once.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from lmfuse._library import call, ops, register_fake
from lmfuse.functional import _attention, _check
from lmfuse.functional.attention import attention
from lmfuse.functional.cache import new_cache, reshape_and_cache

LayerPast = tuple[Tensor, Tensor, Tensor, Tensor]

_op_indirect = ops.attention_indirect.default

# Unless `fresh`, it writes the caches in place and returns them while they do not grow. No schema
# can say "the same or another", so it says nothing, and a caller goes on with what was returned.
torch.library.define(
    "lmfuse::attention_indirect_step",
    "(Tensor query, Tensor key, Tensor value, Tensor seq_info, Tensor key_cache,"
    " Tensor value_cache, Tensor beam_idx, Tensor? mask, Tensor? sinks, float scale, bool causal,"
    " int window, float softcap, int rows, bool fresh)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_op_step = ops.attention_indirect_step.default


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
        text_max_length: rows of a new cache; at most seq: seq rows more. A full cache is doubled,
            or more if the new tokens need it.

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
    divisor = float(scale_attn)
    if not _attention.traced() and (divisor == 0.0 or not math.isfinite(divisor)):
        raise ValueError(f"scale_attn is {divisor}, but must be finite and not 0")
    scale = 1.0 / divisor
    past = _past_length(layer_past, seq_info)
    if past == -1 and layer_past is not None:
        _, keys, values, _ = layer_past
        out = attention(query, keys, values, mask=attention_mask, scale=scale)
        return out.transpose(1, 2), None, layer_past
    if layer_past is not None and seq_info is None and _attention.traced():
        given = (query, key, value, *layer_past, attention_mask)
        out, *present = call(
            _op_step, *given, None, scale, add_casual_mask, 0, 0.0, text_max_length, _fresh()
        )
        return out.transpose(1, 2), None, cast(LayerPast, tuple(present))
    options = {"causal": add_casual_mask, "scale": scale}
    out, after = _step(
        query, key, value, layer_past, past, attention_mask, text_max_length, options
    )
    return out.transpose(1, 2), None, after


def _fresh() -> bool:
    """Whether the caches are copied at each step: what torch.compile and torch.export hold may
    neither write into its arguments nor return them. torch.jit's graphs append in place."""
    return torch.compiler.is_compiling()


def indirect_cache_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer_past: LayerPast,
    *,
    mask: Tensor | None = None,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    text_max_length: int = 2048,
) -> tuple[Tensor, LayerPast]:
    """The causal one for traced graphs: one op, whether the cache is still a placeholder or not.

    So a graph that torch.jit, torch.export or torch.compile traced for the first token serves the
    next ones too, for any length, batch and number of beams.

    Args:
        query: [batch, seq, heads, dim], float32, bfloat16 or float16.
        key, value: [batch, seq, kv_heads, dim].
        layer_past: see `indirect_access_kv_cache_attention`; written in place until it grows.
        mask: [batch, L + seq] bool (True: seen); None: nothing is hidden.
        scale: what the scores are multiplied by.
        window: how many positions a query sees, its own included; None for all.
        softcap, sinks: as in `attention`; the cache is then gathered for each call.
        text_max_length: rows of a new cache.

    Returns:
        (out, present): out is [batch, seq, heads, dim].

    Raises:
        TypeError, ValueError: as `indirect_access_kv_cache_attention`.
    """
    out, *present = call(
        _op_step,
        query,
        key,
        value,
        *layer_past,
        None if mask is None else mask[:, None, None],
        sinks,
        scale,
        True,
        0 if window is None else window,
        softcap,
        text_max_length,
        _fresh(),
    )
    return out, cast(LayerPast, tuple(present))


def gather_indirect(layer_past: LayerPast) -> tuple[Tensor, Tensor]:
    """Copies of the keys and values that each row sees, [batch, L, kv_heads, dim]."""
    return _gathered(layer_past, layer_past[0].size(-2))


def _gathered(layer_past: LayerPast, past: int) -> tuple[Tensor, Tensor]:
    info, key_cache, value_cache, beam_idx = layer_past
    length = info.size(-2)
    rows, columns = torch.arange(length).unsqueeze(1), _columns(beam_idx, past, length)
    keys, values = key_cache[rows, columns], value_cache[rows, columns]
    return keys.transpose(0, 1), values.transpose(0, 1)


def _step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer_past: LayerPast | None,
    past: int,
    attention_mask: Tensor | None,
    text_max_length: int,
    options: dict[str, Any],
) -> tuple[Tensor, LayerPast]:
    """Appends, and attends with the `options` of `attention`; out is [batch, seq, heads, dim]."""
    _attention.heads("key", key, "[batch, seq, kv_heads, dim]")
    _attention.heads("value", value, "[batch, seq, kv_heads, dim]")
    for name, x in (("key", key), ("value", value)):
        if x.device != query.device:
            raise ValueError(f"{name} is on {x.device}, but query is on {query.device}")
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
        out = attention(query, key, value, mask=mask, **options)
    else:
        assert layer_past is not None  # or past were 0
        caches = _grown(_check_caches(layer_past, key, value, past), past + seq)
        _append(key, value, caches, past, 1)
        out = _attend(query, (_info(past + seq), *caches), mask, **options)
    return out, (_info(past + seq), *caches)


def _info(length: int) -> Tensor:
    return torch.zeros((), dtype=torch.int64).expand(1, length, length, 1)


def _attend(
    query: Tensor,
    layer_past: LayerPast,
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float,
    **options: Any,
) -> Tensor:
    """Attention of the last tokens over a cache that holds them."""
    info, *caches = layer_past
    length = info.size(-2)
    if not options:
        out: Tensor = call(_op_indirect, query, *caches, length, mask, None, scale, causal)
        return out
    keys, values = _gathered(layer_past, length - query.shape[1])
    return attention(query, keys, values, mask=mask, causal=causal, scale=scale, **options)


def _columns(beam_idx: Tensor, past: int, length: int) -> Tensor:
    """[length, batch]: in which column of the cache each position of each row lies.

    The positions from `past` on are new, and nobody has reordered them yet.
    """
    own = torch.arange(beam_idx.shape[1])
    beams = own.numel() // int(beam_idx[-1, 0])
    shared = min(int(beam_idx[-2, 0]), past) if beams > 1 else 0
    columns = own.repeat(length, 1)
    columns[:shared] = own // beams * beams
    column = own
    for t in range(past - 1, shared - 1, -1):
        column = columns[t] = beam_idx[t, column]
    return columns


def _past_length(layer_past: LayerPast | None, seq_info: int | Tensor | None) -> int:
    if layer_past is None:
        return 0
    if not isinstance(layer_past, (tuple, list)) or len(layer_past) != 4:
        raise TypeError("layer_past must be a tuple of 4 tensors, or None")
    for i, x in enumerate(layer_past):
        if not isinstance(x, Tensor):
            raise TypeError(f"layer_past[{i}] is {type(x).__name__}, but must be a torch.Tensor")
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
    key_cache = new_cache((rows, columns, kv_heads, dim), dtype, alone=True)
    value_cache = new_cache((rows, columns, kv_heads, value.shape[3]), dtype, alone=True)
    beams = columns // batch
    own = torch.arange(columns)
    beam_idx = own.repeat(rows + 2, 1)  # rows that nobody reorders go on with themselves
    beam_idx[:seq] = own // beams * beams
    beam_idx[rows:] = 0
    beam_idx[rows, 0] = seq
    beam_idx[rows + 1, 0] = batch
    return key_cache, value_cache, beam_idx


def _check_caches(layer_past: LayerPast, key: Tensor, value: Tensor, past: int) -> Caches:
    batch, _, kv_heads, dim = key.shape
    _, key_cache, value_cache, beam_idx = layer_past
    for name, cache in (("layer_past[1]", key_cache), ("layer_past[2]", value_cache)):
        _attention.heads(name, cache, "[rows, batch, kv_heads, dim]", kv=True)
        if not _attention.traced():  # symbolic strides cannot be sorted
            _check.writable(name, cache)
        if cache.dtype != key.dtype and cache.dtype not in _attention.FP8:
            raise TypeError(f"{name} is {cache.dtype}, but must be {key.dtype}, the dtype of key")
        if cache.shape[1:3] != (batch, kv_heads) or cache.shape[0] != key_cache.shape[0]:
            raise ValueError(
                f"{name} has shape {tuple(cache.shape)}, but must have [rows, {batch}, {kv_heads}, "
                "dim]: the batch and heads of key"
            )
    _attention.equal("layer_past[1]", key_cache.shape[3], dim, "head dimension", "key")
    dims = value_cache.shape[3], value.shape[3]
    _attention.equal("layer_past[2]", *dims, "head dimension", "value")
    if value_cache.dtype != key_cache.dtype:
        raise TypeError(
            f"layer_past[2] is {value_cache.dtype}, but must be {key_cache.dtype}, the dtype of "
            "layer_past[1]"
        )
    _attention.indices("layer_past[3]", beam_idx, 2)
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
    """The caches with their rows doubled, or as many as `length`, if it does not fit."""
    key_cache, value_cache, beam_idx = caches
    old = key_cache.shape[0]
    if length <= old:
        return caches
    rows = max(2 * old, length)

    def grow(cache: Tensor) -> Tensor:
        new = new_cache((rows, *cache.shape[1:]), cache.dtype, alone=True)
        new[:old] = cache
        return new

    new_idx = torch.arange(beam_idx.shape[1]).repeat(rows + 2, 1)
    new_idx[:old] = beam_idx[:old]
    new_idx[rows:] = beam_idx[old:]
    return grow(key_cache), grow(value_cache), new_idx


def _append(key: Tensor, value: Tensor, caches: Caches, past: int, beams: int) -> None:
    """Token t of sequence b into row past + t, column b * beams."""
    batch, seq = key.shape[:2]
    if caches[0].dtype is key.dtype and not torch.is_grad_enabled():  # two copies: 6 us for 40
        for new, cache in zip((key, value), caches, strict=False):
            cache[past : past + seq, ::beams].copy_(new.transpose(0, 1))
        return
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


@torch.library.impl("lmfuse::attention_indirect_step", "CompositeExplicitAutograd")
@torch.no_grad()
def _op_step_impl(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seq_info: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    beam_idx: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    rows: int,
    fresh: bool,
) -> tuple[Tensor, ...]:
    _attention.heads("query", query, "[batch, seq, heads, dim]")
    past = _past_length((seq_info, key_cache, value_cache, beam_idx), None)
    seq = query.shape[1]
    options: dict[str, Any] = {}
    if softcap or sinks is not None:
        options = {"softcap": softcap, "sinks": sinks}
    if window and window < past + seq:
        if past == 0 or options:
            options["window"] = (window - 1, -1)
        else:
            at = torch.arange(past + seq)
            near = at > at[past:].unsqueeze(1) - window
            mask = near if mask is None else mask & near
    options |= {"causal": causal, "scale": scale}
    layer_past = (seq_info, key_cache, value_cache, beam_idx)
    if fresh:
        layer_past = (seq_info, key_cache.clone(), value_cache.clone(), beam_idx.clone())
    out, present = _step(query, key, value, layer_past, past, mask, rows, options)
    return out, *present


def _either(first: Any, a: Any, b: Any) -> Any:
    """`a` if `first` else `b`, without a guard where sizes are symbols."""
    if isinstance(first, bool):
        return a if first else b
    zero = (a - a) + (b - b)  # makes a symbol of a number
    return torch.sym_ite(first, a + zero, b + zero)  # type: ignore[no-untyped-call]


@register_fake("attention_indirect_step")
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seq_info: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    beam_idx: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    rows: int,
    fresh: bool,
) -> tuple[Tensor, ...]:
    seq, past = query.shape[1], seq_info.shape[-2]
    length = past + seq
    dtype = key_cache.dtype if key_cache.dtype in _attention.FP8 else key.dtype
    if past == 0:
        rows = _either(rows > seq, rows, rows + seq)
    else:
        held = key_cache.shape[0]
        grown = torch.sym_max(2 * held, length)  # type: ignore[no-untyped-call]
        rows = _either(length <= held, held, grown)
    columns = beam_idx.shape[1]
    return (
        query.new_empty((*query.shape[:3], value.shape[3])),
        seq_info.new_empty(()).expand(1, length, length, 1),
        key.new_empty((rows, columns, *key.shape[2:]), dtype=dtype),
        value.new_empty((rows, columns, *value.shape[2:]), dtype=dtype),
        beam_idx.new_empty((rows + 2, columns)),
    )


@register_fake("attention_indirect")
def _(query: Tensor, key_cache: Tensor, value_cache: Tensor, *_: object) -> Tensor:
    return query.new_empty((*query.shape[:3], value_cache.shape[3]))
