"""The cache of `functional.indirect_attention`: its tensors, checked, made, grown and written."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from lmfuse.functional import _attention, _check
from lmfuse.functional.cache import new_cache, reshape_and_cache

LayerPast = tuple[Tensor, Tensor, Tensor, Tensor]
Caches = tuple[Tensor, Tensor, Tensor]  # a LayerPast but for its first


def info(length: int) -> Tensor:
    return torch.zeros((), dtype=torch.int64).expand(1, length, length, 1)


def past_length(layer_past: LayerPast | None, seq_info: int | Tensor | None) -> int:
    if layer_past is None:
        return 0
    if not isinstance(layer_past, (tuple, list)) or len(layer_past) != 4:
        raise TypeError("layer_past must be a tuple of 4 tensors, or None")
    for i, x in enumerate(layer_past):
        if not isinstance(x, Tensor):
            raise TypeError(f"layer_past[{i}] is {type(x).__name__}, but must be a torch.Tensor")
    if seq_info is not None:
        past = _attention.integer("seq_info", seq_info)
        if past < -1:
            raise ValueError(f"seq_info is {past}, but must be a length, or -1")
        return past
    if _attention.cpu("layer_past[0]", layer_past[0]).dim() != 4:
        raise ValueError(
            f"layer_past[0] has shape {tuple(layer_past[0].shape)}, but must be [1, L, L, 1]"
        )
    return layer_past[0].size(-2)


def new_caches(
    key: Tensor, value: Tensor, layer_past: LayerPast | None, text_max_length: int
) -> Caches:
    batch, seq, kv_heads, dim = key.shape
    columns, dtype = batch, key.dtype
    if layer_past is not None:
        if _attention.cpu("layer_past[3]", layer_past[3]).dim() == 0:
            raise ValueError("layer_past[3] has no dimension, but must be [rows, columns]")
        columns, dtype = layer_past[3].shape[-1], layer_past[1].dtype
        if dtype not in _attention.FP8:
            dtype = key.dtype
    if batch == 0 or columns == 0 or columns % batch:
        raise ValueError(
            f"layer_past[3] has {columns} columns, but must have as many as the batch of key, "
            f"{batch}, times the beams"
        )
    if _attention.integer("text_max_length", text_max_length) < 0:
        raise ValueError(f"text_max_length is {text_max_length}, but must not be negative")
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


def ready(key: Tensor, value: Tensor, layer_past: LayerPast | None, length: int) -> bool:
    """Whether the op can append to the caches as they are; what else is wrong, it says."""
    try:
        assert layer_past is not None
        _, *caches = layer_past
        dense = all(c.is_contiguous() for c in caches)
        return dense and caches[0].shape[0] >= length and key.dtype is value.dtype
    except (AttributeError, IndexError, RuntimeError):
        return False


def check_caches(layer_past: LayerPast, key: Tensor, value: Tensor, past: int) -> Caches:
    batch, _, kv_heads, dim = key.shape
    caches = check_cache(layer_past, past)
    key_cache, value_cache, _ = caches
    if key_cache.device != key.device:
        raise ValueError(f"layer_past[1] is on {key_cache.device}, but key is on {key.device}")
    if not _attention.traced():  # symbolic strides cannot be sorted
        _check.writable("layer_past[1]", key_cache)
        _check.writable("layer_past[2]", value_cache)
    if key_cache.dtype != key.dtype and key_cache.dtype not in _attention.FP8:
        raise TypeError(
            f"layer_past[1] is {key_cache.dtype}, but must be {key.dtype}, the dtype of key"
        )
    if key_cache.shape[1:3] != (batch, kv_heads):
        raise ValueError(
            f"layer_past[1] has shape {tuple(key_cache.shape)}, but must have [rows, {batch}, "
            f"{kv_heads}, dim]: the batch and heads of key"
        )
    _attention.equal("layer_past[1]", key_cache.shape[3], dim, "head dimension", "key")
    dims = value_cache.shape[3], value.shape[3]
    _attention.equal("layer_past[2]", *dims, "head dimension", "value")
    return caches


def check_cache(layer_past: LayerPast, past: int) -> Caches:
    """The three tensors of a cache that holds `past` tokens, if they belong together."""
    _, key_cache, value_cache, beam_idx = layer_past
    for name, cache in (("layer_past[1]", key_cache), ("layer_past[2]", value_cache)):
        _attention.heads(name, cache, "[rows, batch, kv_heads, dim]", kv=True)
    if value_cache.device != key_cache.device:
        raise ValueError(
            f"layer_past[2] is on {value_cache.device}, but layer_past[1] on {key_cache.device}"
        )
    if value_cache.shape[:3] != key_cache.shape[:3]:
        raise ValueError(
            f"layer_past[2] has shape {tuple(value_cache.shape)}, which does not go with that of "
            f"layer_past[1], {tuple(key_cache.shape)}"
        )
    if value_cache.dtype != key_cache.dtype:
        raise TypeError(
            f"layer_past[2] is {value_cache.dtype}, but must be {key_cache.dtype}, the dtype of "
            "layer_past[1]"
        )
    _attention.indices("layer_past[3]", beam_idx, 2, key_cache)
    rows, batch = key_cache.shape[:2]
    if beam_idx.dtype != torch.int64 or tuple(beam_idx.shape) != (rows + 2, batch):
        raise ValueError(
            f"layer_past[3] is {beam_idx.dtype} of shape {tuple(beam_idx.shape)}, but must be "
            f"int64 of shape ({rows + 2}, {batch})"
        )
    if past > rows:
        raise ValueError(f"layer_past holds {past} tokens in {rows} rows")
    return key_cache, value_cache, beam_idx.contiguous()


def grown(caches: Caches, length: int) -> Caches:
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


def append(key: Tensor, value: Tensor, caches: Caches, past: int, beams: int) -> None:
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


def columns(beam_idx: Tensor, past: int, length: int) -> Tensor:
    """[length, batch]: in which column of the cache each position of each row lies.

    The positions from `past` on are new, and nobody has reordered them yet.
    """
    own = torch.arange(beam_idx.shape[1])
    batch, (prompt, prompts) = own.numel(), beam_idx[-2:, 0].tolist()
    if not (0 <= prompt <= len(beam_idx) - 2 and 0 < prompts <= batch and batch % prompts == 0):
        raise ValueError(
            f"the beam indices of layer_past record a prompt of {prompt} tokens for a batch of "
            f"{prompts}, which does not fit {len(beam_idx) - 2} rows and a batch of {batch}"
        )
    beams = batch // prompts
    shared = min(prompt, past) if beams > 1 else 0
    columns = own.repeat(length, 1)
    columns[:shared] = own // beams * beams
    column = own
    with suppress(IndexError):  # of what stands in columns by then
        for t in range(past - 1, shared - 1, -1):
            column = columns[t] = beam_idx[t, column]
    check_columns(columns)
    return columns


def check_columns(columns: Tensor, first: int = 0) -> None:
    """Raises unless these, of positions from `first` on, are columns of a cache with as many."""
    batch = columns.shape[1]
    bad = ((columns < 0) | (columns >= batch)).nonzero()
    if len(bad):
        t, i = bad[0].tolist()
        raise ValueError(
            f"the beam indices of layer_past name row {int(columns[t, i])} at position "
            f"{first + t}, but the batch has {batch} rows"
        )
