"""Attention over keys and values that lie in order, batched or packed one sequence after the other.

    s[i, j] = scale · q[i] · k[j],   capped: c tanh(s / c),   then biased by ALiBi and the mask
    out[i]  = Σ_j e^s[i, j] v[j] / (Σ_j e^s[i, j] + e^sink)

Query i of q_len is at position kv_len - q_len + i: causal masks and windows are aligned at the
lower right. A query that sees no key gives zeros. No buffer of queries times keys exists.

Sums are fp32 throughout. Products are fp32 as well, except where the queries are bfloat16 and the
keys and values exact in it (bfloat16, fp8, int8): instruction sets with bfloat16 products then use
them, and round the weights e^s ≤ 1 to bfloat16 (relative 2^-9 each, averaged over the keys).

The bits of a row depend on its own query, keys, masks and position and on the instruction set, not
on what else is in the batch, on how the prompt was cut, on where a cache keeps the keys, or on
threads: the keys are taken in chunks of 256 from position 0, and chunks are joined in order.

Source: Dao et al., FlashAttention, 2022; Milakov and Gimelshein, Online normalizer calculation for
softmax, 2018; Press et al., ALiBi, 2021.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lmfuse._library import call, ops, register_fake, write
from lmfuse.functional import _attention, _check

_op_attention = ops.attention.default
_op_varlen = ops.attention_varlen.default


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi: Tensor | None = None,
    sinks: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> Tensor:
    """softmax(scale q kᵀ + bias) v, see above; all strided, contiguous in their last dimension.

    Args:
        query: [batch, q_len, heads, dim], float32, bfloat16 or float16.
        key: [batch, kv_len, kv_heads, dim], kv_heads a divisor of heads (query head h reads KV head
            h // (heads // kv_heads)); a dtype of query, float8_e5m2, float8_e4m3fn or int8.
        value: [batch, kv_len, kv_heads, value_dim], as key; its dtype may be another.
        mask: broadcasts to [batch, heads, q_len, kv_len]; bool (True: seen) or added to the scores.
        causal: a query sees the positions up to its own.
        scale: 1/√dim if None.
        window: how many positions to the left and right of its own a query sees; -1 for all.
        softcap: c above; 0 for none.
        alibi: slopes [heads] or [batch, heads]; -slope · |distance| is added to the scores.
        sinks: [heads], one more score that takes its part of the sum and has no value.
        key_scales, value_scales: of int8: float32, the shape of key and value but for the last
            dimension, one for each token and head.
        key_scale, value_scale: of fp8: the one scale of all.

    Returns:
        [batch, q_len, heads, value_dim] of the dtype of query, contiguous.

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    left, right = window
    args = (
        query,
        key,
        value,
        _attention.four_dims(mask),
        _attention.floats(alibi),
        _attention.floats(sinks),
        key_scales,
        value_scales,
        _attention.default_scale(query) if scale is None else _attention.number("scale", scale),
        causal,
        left,
        right,
        _attention.softcap(softcap),
        _attention.number("key_scale", key_scale),
        _attention.number("value_scale", value_scale),
    )
    return cast(Tensor, call(_op_attention, *args, check=_check_attention))


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    seqlen_q: Tensor,
    seqlen_k: Tensor,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    pdropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    return_softmax: bool,
    gen_: torch.Generator | None,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = -1.0,
) -> Tensor:
    """Attention over sequences of different lengths, packed one after the other; see above.

    Args:
        query: [tokens, heads, dim], float32, bfloat16 or float16.
        key, value: [kv tokens, kv_heads, dim], as in `attention`.
        out: [tokens, heads, value_dim], as query; receives the result.
        seqlen_q, seqlen_k: cumulative lengths [sequences + 1], int32 or int64: sequence b is
            tokens seqlen_q[b] to seqlen_q[b + 1].
        alibi_slopes: [heads], [sequences, heads] or None.
        max_seqlen_q, max_seqlen_k: not needed; the lengths say it.
        pdropout: must be 0: lmfuse is for inference.
        softmax_scale: the scale.
        zero_tensors: also clear the rows of out that belong to no sequence.
        is_causal: a query sees the positions up to its own, aligned at the lower right.
        return_softmax: must be False: the weights exist nowhere.
        gen_: must be None, as there is no dropout.
        window_size_left, window_size_right: positions to either side that are seen; -1 for all.
        softcap: c above; 0 or -1 for none.

    Returns:
        out itself.

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    if pdropout != 0.0:
        raise ValueError(f"pdropout is {pdropout}, but must be 0: lmfuse is for inference")
    if return_softmax:
        raise ValueError("return_softmax must be False: the weights are never stored")
    if gen_ is not None:
        raise ValueError("gen_ must be None: without dropout there is nothing random")
    check_out(out)
    args = (
        query,
        key,
        value,
        out,
        seqlen_q,
        seqlen_k,
        _attention.floats(alibi_slopes),
        None,
        _attention.number("softmax_scale", softmax_scale),
        is_causal,
        window_size_left,
        window_size_right,
        _attention.softcap(softcap),
    )
    if zero_tensors:
        _check_varlen(*args)
        write("out", out, torch.zeros(()))
    call(_op_varlen, *args, written=(3,), check=_check_varlen)
    return out


def check_out(out: Tensor, name: str = "out") -> None:
    """Raises unless `out` can be written in place, which no op sees."""
    _check.tensor(name, out)
    _check.writable(name, out)


def check_result(out: Tensor, query: Tensor, shape: tuple[int, ...], name: str = "out") -> None:
    """Raises unless `out` can take a result of `shape` and the dtype of query."""
    if out.dtype != query.dtype:
        raise TypeError(f"{name} is {out.dtype}, but must be {query.dtype}, the dtype of query")
    if tuple(out.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(out.shape)}, but must have shape {shape}")


def _check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    alibi: Tensor | None,
    sinks: Tensor | None,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    *_: object,
) -> None:
    _attention.heads("query", query, "[batch, q_len, heads, dim]")
    _attention.heads("key", key, "[batch, kv_len, kv_heads, dim]", kv=True)
    _attention.heads("value", value, "[batch, kv_len, kv_heads, value_dim]", kv=True)
    batch, q_len, heads, dim = query.shape
    kv_len = key.shape[1]
    _attention.equal("key", key.shape[0], batch, "batch size", "query")
    _attention.equal("key", key.shape[3], dim, "head dimension", "query")
    _attention.equal("value", value.shape[0], batch, "batch size", "query")
    _attention.equal("value", value.shape[1], kv_len, "length", "key")
    _attention.equal("value", value.shape[2], key.shape[2], "number of heads", "key")
    _attention.groups(heads, key.shape[2], "key")
    _attention.mask("mask", mask, batch, heads, q_len, kv_len)
    _attention.slopes("alibi", alibi, heads, batch)
    _attention.slopes("sinks", sinks, heads)
    _attention.token_scales("key_scales", key_scales, "key", key)
    _attention.token_scales("value_scales", value_scales, "value", value)


def _check_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    seqlen_q: Tensor,
    seqlen_k: Tensor,
    alibi_slopes: Tensor | None,
    *_: object,
) -> None:
    _attention.heads("query", query, "[tokens, heads, dim]")
    _attention.heads("key", key, "[tokens, kv_heads, dim]", kv=True)
    _attention.heads("value", value, "[tokens, kv_heads, value_dim]", kv=True)
    _attention.token_scales("scales, which this function does not take", None, "key", key)
    _attention.token_scales("scales, which this function does not take", None, "value", value)
    tokens, heads, dim = query.shape
    _attention.equal("key", key.shape[2], dim, "head dimension", "query")
    _attention.equal("value", value.shape[0], key.shape[0], "length", "key")
    _attention.equal("value", value.shape[1], key.shape[1], "number of heads", "key")
    _attention.groups(heads, key.shape[1], "key")
    check_result(out, query, (tokens, heads, value.shape[2]))
    _attention.indices("seqlen_q", seqlen_q, 1, query)
    _attention.indices("seqlen_k", seqlen_k, 1, query)
    _attention.equal("seqlen_k", seqlen_k.shape[0], seqlen_q.shape[0], "length", "seqlen_q")
    _attention.slopes("alibi_slopes", alibi_slopes, heads, seqlen_q.shape[0] - 1)


@register_fake("attention")
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    _check_attention(query, key, value, *rest)
    return query.new_empty((*query.shape[:3], value.shape[3]))


@register_fake("attention_varlen")
def _(*args: Any) -> None:
    _check_varlen(*args)
