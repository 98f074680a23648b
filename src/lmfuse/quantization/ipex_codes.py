"""Quantizing and dequantizing as `ipex.quantization` spells it; see `codes` for the formulas.

Codes of four bits lie two in a byte: byte j of a row holds column 2 j in its low half and 2 j + 1
in its high one; a row of odd length ends with a zero code.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from lmfuse.functional import _check
from lmfuse.quantization import codes as plain
from lmfuse.reference.woq import NF4


class WoqWeightDtype(IntEnum):
    """What weights are quantized to."""

    INT8 = 1
    INT4 = 2
    NF4 = 3
    FP8 = 4


KINDS = {
    WoqWeightDtype.INT8: "int8",
    WoqWeightDtype.INT4: "int4",
    WoqWeightDtype.NF4: "nf4",
    WoqWeightDtype.FP8: "fp8",
}
_HELD = {
    "int8": torch.int8,
    "int4": torch.uint8,
    "nf4": torch.uint8,
    "fp8": torch.float8_e4m3fn,
}


def quantize_per_channel(
    t: Tensor,
    dtype: Any,
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    sym_quant: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A weight [n, k], each row on its own.

    Args:
        t: floating.
        dtype: a `WoqWeightDtype`.
        scales, zero_points: [n]; None: from the smallest and the largest of each row.
        sym_quant: without zero points; NF4 and FP8 must say True.

    Returns:
        codes, scales [n] and zero points [n] (int32), or None. Codes are int8 [n, k], uint8
        [n, ⌈k/2⌉] for four bits, or float8_e4m3fn.

    Raises:
        TypeError, ValueError: an argument that cannot be.
    """
    qt, scale, zeros = _quantize("t", t, dtype, -1, scales, zero_points, sym_quant)
    return qt, scale.flatten(), None if zeros is None else zeros.flatten()


def quantize_per_block(
    input: Tensor,
    dtype: Any,
    group_size: int,
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    sym_quant: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `quantize_per_channel`, with scales and zero points [n, ⌈k/group_size⌉].

    Raises:
        TypeError, ValueError: an argument that cannot be.
    """
    _positive(group_size)
    return _quantize("input", input, dtype, group_size, scales, zero_points, sym_quant)


def dequantize_per_channel(
    qt: Tensor,
    scales: Tensor,
    zps: Tensor | None,
    dtype: Any,
    weight_shape: Any = None,
    dequant_nf4_via_int8: bool = False,
) -> Tensor:
    """What the codes stand for, [n, k] in float32.

    Args:
        qt, scales, zps: from `quantize_per_channel`.
        dtype: a `WoqWeightDtype`.
        weight_shape: (n, k), to tell an odd k; None: two columns a byte.
        dequant_nf4_via_int8: the NF4 table as round(127 v) / 127.

    Raises:
        TypeError, ValueError: an argument that cannot be.
    """
    return _dequantize(qt, scales, zps, dtype, -1, weight_shape, dequant_nf4_via_int8)


def dequantize_per_block(
    qt: Tensor,
    scales: Tensor,
    zps: Tensor | None,
    dtype: Any,
    group_size: int,
    weight_shape: Any = None,
    dequant_nf4_via_int8: bool = False,
) -> Tensor:
    """As `dequantize_per_channel`, for what `quantize_per_block` gave.

    Raises:
        TypeError, ValueError: an argument that cannot be.
    """
    _positive(group_size)
    return _dequantize(qt, scales, zps, dtype, group_size, weight_shape, dequant_nf4_via_int8)


def _positive(group_size: object) -> None:
    if type(group_size) is not int or group_size < 1:
        raise ValueError(f"group_size is {group_size!r}, but must be a positive integer")


def weight_kind(dtype: Any) -> str:
    """The kind that a `WoqWeightDtype` (or torch.qint8, torch.quint4x2, as once in IPEX) names."""
    old = {torch.qint8: "int8", torch.quint4x2: "int4"}
    if isinstance(dtype, torch.dtype) and dtype in old:
        return old[dtype]
    if isinstance(dtype, torch.dtype) or dtype not in KINDS:
        raise ValueError(f"dtype is {dtype!r}, but must be WoqWeightDtype INT8, INT4, NF4 or FP8")
    return KINDS[WoqWeightDtype(dtype)]


def unpack_nibbles(qt: Tensor, k: int | None = None) -> Tensor:
    """[n, k] uint8 out of two codes a byte."""
    wide = torch.stack((qt & 15, qt >> 4), -1).flatten(1)
    return wide if k is None else wide[:, :k]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two codes a byte, the even column low; rows of odd length end with a zero."""
    padded = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return padded[:, ::2] | (padded[:, 1::2] << 4)


def _quantize(
    name: str,
    t: Tensor,
    dtype: Any,
    group_size: int,
    scales: Tensor | None,
    zero_points: Tensor | None,
    symmetric: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    kind = weight_kind(dtype)
    if not _check.held(name, t).is_floating_point():
        raise TypeError(f"{name} is {t.dtype}, but must be floating")
    if t.dim() != 2 or not t.numel():
        raise ValueError(f"{name} has shape {tuple(t.shape)}, but must be [n, k], not empty")
    if kind in ("nf4", "fp8") and not symmetric:
        raise ValueError(f"sym_quant must be True: {kind} has no zero points")
    if scales is None:
        found = plain.quantize_weight(t, kind, group_size, symmetric)
        codes, scale, zeros = found.codes, found.scales, found.zeros
    else:
        codes, scale, zeros = _with_scales(t, kind, group_size, scales, zero_points)
    codes = pack_nibbles(codes) if kind in ("int4", "nf4") else codes
    return codes, scale, None if zeros is None else zeros.to(torch.int32)


def _with_scales(
    t: Tensor, kind: str, group_size: int, scales: Tensor, zero_points: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes for given scales: a group that spans -c s … c s has exactly these in the plain rule."""
    n, k = t.shape
    group = k if group_size == -1 else group_size
    groups = -(-k // group)
    scale = _per_group("scales", scales, n, groups)
    zeros = None if zero_points is None else _per_group("zero_points", zero_points, n, groups)
    columns = torch.arange(k) // group
    ratio = t.float() * scale.reciprocal()[:, columns]
    if kind == "nf4":
        table = torch.tensor(NF4)
        return torch.bucketize(ratio, (table[1:] + table[:-1]) / 2).to(torch.uint8), scale, None
    if kind == "fp8":
        return ratio.clamp(-448, 448).to(torch.float8_e4m3fn), scale, None
    low, high = (-128, 127) if kind == "int8" else (0, 15)
    zero = zeros[:, columns] if zeros is not None else (0 if kind == "int8" else 8)
    codes = (ratio.round() + zero).clamp(low, high)
    return codes.to(torch.int8 if low else torch.uint8), scale, zeros


def _dequantize(
    qt: Tensor,
    scales: Tensor,
    zps: Tensor | None,
    dtype: Any,
    group_size: int,
    weight_shape: Any,
    via_int8: bool,
) -> Tensor:
    kind = weight_kind(dtype)
    k = None if weight_shape is None else int(weight_shape[-1])
    if _check.held("qt", qt, (_HELD[kind],)).dim() != 2 or not qt.numel():
        raise ValueError(f"qt has shape {tuple(qt.shape)}, but must be a matrix, not empty")
    codes = unpack_nibbles(qt, k) if kind in ("int4", "nf4") else qt
    n, k = codes.shape
    groups = 1 if group_size == -1 else -(-k // group_size)
    scale = _per_group("scales", scales, n, groups)
    zeros = None if zps is None else _per_group("zps", zps, n, groups)
    if kind == "nf4" and via_int8:
        table = (torch.tensor(NF4) * 127).round() / 127
        return table[codes.long()] * scale[:, torch.arange(k) // (k if groups == 1 else group_size)]
    size = -1 if groups == 1 else group_size
    return plain.dequantize_codes(plain.Codes(kind, codes, scale, zeros, size))


def _per_group(name: str, x: object, n: int, groups: int) -> Tensor:
    x = _check.held(name, x)
    if x.numel() != n * groups or not x.dim() or x.shape[0] != n:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but must have ({n}, {groups})")
    return x.detach().float().reshape(n, groups)
