"""Memory for caches, and keys and values of new tokens into the slots of a paged one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lmfuse._library import call, ops, register_fake
from lmfuse.functional import _attention, _check

_cache_write = ops.cache_write.default

_LAYOUT = "[blocks, kv_heads, block_size, dim]"

_MOST_BYTES = 1 << 62  # so that the op can add to it

# What kv_cache_dtype may be, and which dtypes of the caches it stands for.
_NAMES: dict[str, tuple[torch.dtype, ...]] = {
    "auto": _attention.KV_DTYPES,
    "fp8": _attention.FP8,
    "fp8_e5m2": (torch.float8_e5m2,),
    "fp8_e4m3": (torch.float8_e4m3fn,),
    "int8": (torch.int8,),
}


def new_cache(shape: Sequence[int], dtype: torch.dtype, *, alone: bool = False) -> Tensor:
    """A cache for keys or values, uninitialised, in pages of 2 MB where the system has them.

    Decoding reads it faster in a virtual machine (EPYC: 2 to 17 %, Xeon: 20 to 30 %), which
    otherwise spends that on looking up pages of 4 KB. Memory is taken 2 MB at a time when it is
    first written; small caches share their pages.

    Args:
        shape: any, such as [blocks, kv_heads, block_size, dim].
        dtype: any.
        alone: in a storage of its own, as what an op returns must be; below 8 MB in ordinary pages.

    Raises:
        ValueError: a negative size.
    """
    if _attention.traced():  # a graph takes memory as torch does
        return torch.empty(tuple(shape), dtype=dtype)
    if any(n < 0 for n in shape):
        raise ValueError(f"shape is {tuple(shape)}, but no size may be negative")
    size = math.prod(shape) * dtype.itemsize
    if size >= _MOST_BYTES:
        raise ValueError(f"shape is {tuple(shape)}, which is more than there are addresses")
    memory = cast(Tensor, ops.cache_new(size, alone))
    return memory.view(dtype).view(tuple(shape))


def check_cache_dtype(name: str, kv_cache_dtype: str, cache: Tensor) -> None:
    _attention.cpu(name, cache)
    if kv_cache_dtype not in _NAMES:
        raise TypeError(f"kv_cache_dtype is {kv_cache_dtype!r}, but must be one of {list(_NAMES)}")
    if cache.dtype not in _NAMES[kv_cache_dtype]:
        raise TypeError(f"{name} is {cache.dtype}, which is not kv_cache_dtype {kv_cache_dtype!r}")


def block_size_of(key_cache: Tensor) -> int:
    if not isinstance(key_cache, Tensor) or key_cache.dim() != 4:
        _attention.heads("key_cache", key_cache, _LAYOUT, kv=True)
    return key_cache.shape[2]


def check_caches(key_cache: Tensor, value_cache: Tensor) -> None:
    """Raises unless both are [blocks, kv_heads, block_size, dim] and belong together."""
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        _attention.heads(name, cache, _LAYOUT, kv=True)
        if cache.shape[-1] > 1 and cache.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension")
    if key_cache.shape[:3] != value_cache.shape[:3]:
        raise ValueError(
            f"value_cache has shape {tuple(value_cache.shape)}, which does not go with that of "
            f"key_cache, {tuple(key_cache.shape)}"
        )
    if key_cache.shape[2] == 0:
        raise ValueError("key_cache has block_size 0, but a block must hold at least one token")
    if key_cache.dtype != value_cache.dtype:
        raise TypeError(
            f"value_cache is {value_cache.dtype}, but must be {key_cache.dtype}, the dtype of "
            "key_cache"
        )


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """cache[slot // block_size, h, slot % block_size] = key[t, h], slot = slot_mapping[t]

    Args:
        key, value: [tokens, kv_heads, dim], float32, bfloat16 or float16.
        key_cache, value_cache: [blocks, kv_heads, block_size, dim], of the dtype of key, or fp8 or
            int8; strided, but contiguous in the last dimension. Written in place.
        slot_mapping: [tokens], int32 or int64; a negative slot is padding and skipped.
        kv_cache_dtype: "auto", or what the caches must be: "fp8", "fp8_e5m2", "fp8_e4m3", "int8".
        k_scale, v_scale: of fp8 caches, which then hold key / k_scale, saturated at the largest
            finite value.
        key_scales, value_scales: of int8 caches: float32 [blocks, kv_heads, block_size]; receive
            max |x| / 127 of each token and head.

    Returns:
        key_cache and value_cache themselves.

    Raises:
        TypeError, ValueError: an argument that cannot be, or a slot beyond the cache; see the text
            of the error.
    """
    if kv_cache_dtype != "auto":
        check_cache_dtype("key_cache", kv_cache_dtype, key_cache)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if _attention.number(name, scale) == 0.0:
            raise ValueError(f"{name} is 0, but the cache holds what is divided by it")
    _check_writable(key_cache, value_cache, key_scales, value_scales)
    args = (key, value, key_cache, value_cache, slot_mapping, key_scales, value_scales)
    scales = float(k_scale), float(v_scale)
    call(_cache_write, *args, *scales, written=(2, 3), check=_check_cache_write)
    return key_cache, value_cache


def _check_writable(*caches: Tensor | None) -> None:
    """Which the op does not see: of the caches, and of their scales, in any order."""
    if torch.compiler.is_compiling():  # symbolic strides cannot be sorted
        return
    names = ("key_cache", "value_cache", "key_scales", "value_scales")
    for name, cache in zip(names, caches, strict=True):
        if isinstance(cache, Tensor):
            (_check.apart if "scales" in name else _check.writable)(name, cache)


def _check_cache_write(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    *_: object,
) -> None:
    check_caches(key_cache, value_cache)
    _attention.heads("key", key, "[tokens, kv_heads, dim]")
    _attention.heads("value", value, "[tokens, kv_heads, dim]")
    if value.dtype != key.dtype:
        raise TypeError(f"value is {value.dtype}, but must be {key.dtype}, the dtype of key")
    if key_cache.dtype in _check.FLOATS and key_cache.dtype != key.dtype:
        raise TypeError(
            f"key_cache is {key_cache.dtype}, but must be {key.dtype}, the dtype of key, or fp8 or "
            "int8"
        )
    for name, x, cache in (("key", key, key_cache), ("value", value, value_cache)):
        _attention.equal(name, x.shape[1], cache.shape[1], "number of heads", f"{name}_cache")
        _attention.equal(name, x.shape[2], cache.shape[3], "head dimension", f"{name}_cache")
    _attention.equal("value", value.shape[0], key.shape[0], "length", "key")
    _attention.indices("slot_mapping", slots, 1, key)
    _attention.equal("slot_mapping", slots.shape[0], key.shape[0], "length", "key")
    _attention.token_scales("key_scales", key_scales, "key_cache", key_cache)
    _attention.token_scales("value_scales", value_scales, "value_cache", value_cache)


@register_fake("cache_new")
def _(size: int, alone: bool) -> Tensor:
    return torch.empty(size, dtype=torch.uint8)


@register_fake("cache_write")
def _(*args: Any) -> None:
    _check_cache_write(*args)
