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
from lmfuse.functional import _attention, _indirect
from lmfuse.functional._indirect import LayerPast
from lmfuse.functional.attention import attention

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
    divisor = _attention.number("scale_attn", scale_attn)
    if not _attention.traced() and (divisor == 0.0 or not math.isfinite(divisor)):
        raise ValueError(f"scale_attn is {divisor}, but must be finite and not 0")
    scale = 1.0 / divisor
    past = _indirect.past_length(layer_past, seq_info)
    if past == -1 and layer_past is not None:
        _, keys, values, _ = layer_past
        try:
            out = attention(query, keys, values, mask=attention_mask, scale=scale)
        except (TypeError, ValueError) as error:
            words = "of layer_past[1] (key), layer_past[2] (value) and attention_mask (mask)"
            raise type(error)(f"{words}: {error}") from None
        return out.transpose(1, 2), None, layer_past
    if layer_past is not None and seq_info is None and _attention.traced():
        given = (query, key, value, *layer_past, attention_mask)
        options = (None, scale, add_casual_mask, 0, 0.0, text_max_length, _fresh())
        out, *present = call(_op_step, *given, *options, check=_check_step)
        return out.transpose(1, 2), None, cast(LayerPast, tuple(present))
    out, after = _step(
        query, key, value, layer_past, past, attention_mask, text_max_length,
        causal=add_casual_mask, scale=scale,
    )  # fmt: skip
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
    _attention.heads("query", query, "[batch, seq, heads, dim]")
    _indirect.past_length(layer_past, None)
    if mask is not None:
        if _attention.cpu("mask", mask).dim() != 2:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, but must be [batch, L + seq]")
        mask = mask[:, None, None]
    left = 0 if window is None else window
    options = (scale, True, left, softcap, text_max_length, _fresh())
    given = (query, key, value, *layer_past, mask, sinks)
    out, *present = call(_op_step, *given, *options, check=_check_step)
    return out, cast(LayerPast, tuple(present))


def gather_indirect(layer_past: LayerPast) -> tuple[Tensor, Tensor]:
    """Copies of the keys and values that each row sees, [batch, L, kv_heads, dim].

    Raises:
        TypeError, ValueError: not a cache, or a beam index out of range; see the text of the error.
    """
    past = _indirect.past_length(layer_past, None)
    _indirect.check_cache(layer_past, past)
    return _gathered(layer_past, past)


def _gathered(layer_past: LayerPast, past: int) -> tuple[Tensor, Tensor]:
    info, key_cache, value_cache, beam_idx = layer_past
    length = info.size(-2)
    rows, columns = torch.arange(length).unsqueeze(1), _indirect.columns(beam_idx, past, length)
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
    *,
    causal: bool,
    scale: float,
    **options: Any,
) -> tuple[Tensor, LayerPast]:
    """Appends, and attends with the `options` of `attention`; out is [batch, seq, heads, dim]."""
    length = past + query.shape[1]

    def check(*_: object) -> None:
        _check_tokens(query, key, value, layer_past, past, attention_mask)

    mask = _attention.four_dims(attention_mask)
    if past and not options and _indirect.ready(key, value, layer_past, length):
        assert layer_past is not None  # or past were 0
        caches = layer_past[1:]
    else:
        check()
        value = value.to(key.dtype)
        chosen = {"mask": mask, "causal": causal, "scale": scale, **options}
        if layer_past is None or past == 0:
            caches = _indirect.new_caches(key, value, layer_past, text_max_length)
            _indirect.append(key, value, caches, 0, caches[2].shape[1] // query.shape[0])
            return attention(query, key, value, **chosen), (_indirect.info(length), *caches)
        _, keys, values, beam_idx = layer_past
        caches = _indirect.grown((keys, values, beam_idx.contiguous()), length)
        if options:
            _indirect.append(key, value, caches, past, 1)
            present = (_indirect.info(length), *caches)
            return attention(query, *_gathered(present, past), **chosen), present
    args = (query, key, value, *caches, past, mask, None, scale, causal)
    out: Tensor = call(_op_indirect, *args, written=(3, 4), check=check)
    return out, (_indirect.info(length), *caches)


def _check_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer_past: LayerPast | None,
    past: int,
    attention_mask: Tensor | None,
) -> None:
    """Raises unless all of them belong together."""
    _attention.heads("key", key, "[batch, seq, kv_heads, dim]")
    _attention.heads("value", value, "[batch, seq, kv_heads, dim]")
    batch, seq, heads, dim = query.shape
    _attention.mask("attention_mask", attention_mask, batch, heads, seq, past + seq)
    for name, x in (("key", key), ("value", value), ("attention_mask", attention_mask)):
        if x is not None and x.device != query.device:
            raise ValueError(f"{name} is on {x.device}, but query is on {query.device}")
    _attention.equal("key", key.shape[0], batch, "batch size", "query")
    _attention.equal("key", key.shape[1], seq, "length", "query")
    _attention.equal("key", key.shape[3], dim, "head dimension", "query")
    _attention.equal("value", value.shape[0], batch, "batch size", "query")
    _attention.equal("value", value.shape[1], seq, "length", "query")
    _attention.equal("value", value.shape[2], key.shape[2], "number of heads", "key")
    _attention.groups(heads, key.shape[2], "key")
    if past and layer_past is not None:
        _indirect.check_caches(layer_past, key, value, past)


def _one_device(query: Tensor, **others: Tensor | None) -> None:
    for name, x in others.items():
        if x is not None and _attention.cpu(name, x).device != query.device:
            raise ValueError(f"{name} is on {x.device}, but query is on {query.device}")


def _check_step(query: Tensor, *args: Any) -> None:
    names = ("key", "value", *(f"layer_past[{i}]" for i in range(4)), "attention_mask", "sinks")
    _one_device(query, **dict(zip(names, args, strict=False)))


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
    past = _indirect.past_length((seq_info, key_cache, value_cache, beam_idx), None)
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
    layer_past = (seq_info, key_cache, value_cache, beam_idx)
    if fresh:
        layer_past = (seq_info, key_cache.clone(), value_cache.clone(), beam_idx.clone())
    given = (query, key, value, layer_past, past, mask, rows)
    out, present = _step(*given, causal=causal, scale=scale, **options)
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
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))
