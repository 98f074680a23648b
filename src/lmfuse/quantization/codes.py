"""The mathematics: a weight as codes, scales and zero points, in plain torch.

A row, or a group of its columns, is quantized on its own. With lo = min(0, w), hi = max(0, w):

| kind | scheme     | scale         | zero point         | code q                   | value     |
|------|------------|---------------|--------------------|--------------------------|-----------|
| int8 | asymmetric | (hi - lo)/255 | -round(lo/s) - 128 | round(w/s)+z, -128 … 127 | (q - z) s |
| int8 | symmetric  | max|w|/127    |                    | round(w/s), -128 … 127   | q s       |
| int4 | asymmetric | (hi - lo)/15  | -round(lo/s)       | round(w/s)+z, 0 … 15     | (q - z) s |
| int4 | symmetric  | max|w|/7      |                    | round(w/s)+8, 0 … 15     | (q - 8) s |
| nf4  | symmetric  | max|w|        |                    | the NF4[q] nearest w/s   | NF4[q] s  |
| fp8  | symmetric  | max|w|/448    |                    | w/s as e4m3              | q s       |

"search" tries smaller ranges, too, fits scale and zero point to the codes of each by least squares,
and keeps what has the least squared error. Where there are zero points, these are the ranges of the
weights alone, without 0, and z need not be an integer.

s is at least 2^-23; ties are rounded to even; w/s is w times the rounded 1/s, as in IPEX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lmfuse.functional import _check
from lmfuse.reference.woq import NF4

SMALLEST_SCALE = 2.0**-23
# A slice of rows: 2 MB in float32, about a second-level cache, through which all passes go.
_SLICE = 1 << 19
# Where "search" begins, as fractions of the whole range. With a fit after each, three give 0.3 to
# 1.3 % less error than eleven from 1.0 to 0.8 without, in half of the time.
_FRACTIONS = (1.0, 0.93, 0.86)


class Codes(NamedTuple):
    """A quantized weight: value = (codes - zeros) scales, group by group; see `pack_quantized`."""

    kind: str
    codes: Tensor  # [n, k]: int8, uint8 (4 bits) or float8_e4m3fn
    scales: Tensor  # [n, groups]
    zeros: Tensor | None  # [n, groups]
    group_size: int


def quantize_weight(
    weight: Tensor,
    kind: str,
    group_size: int = -1,
    symmetric: bool = True,
    scales: str = "plain",
    scale_dtype: torch.dtype = torch.float32,
) -> Codes:
    """A weight [n, k] as codes; see the table of the module.

    Args:
        weight: floating, finite.
        kind: "int8", "int4", "nf4" or "fp8".
        group_size: columns that share a scale; -1: all.
        symmetric: without zero points; nf4 and fp8 have none anyway.
        scales: "plain" as in the table, or "search": those with the least squared error of some.
        scale_dtype: scales are rounded to it before codes are chosen.

    Raises:
        ValueError: a weight that is not a matrix, is empty, or holds NaN or infinity.
    """
    _check.held("weight", weight)
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"weight has shape {tuple(weight.shape)}, but must be [n, k], not empty")
    if group_size != -1 and group_size < 1:
        raise ValueError(f"group_size is {group_size}, but must be positive, or -1 for all columns")
    n, k = weight.shape
    group = k if group_size == -1 else min(group_size, k)
    rows = max(1, _SLICE // k)
    parts = []
    for start in range(0, n, rows):
        w = weight[start : start + rows].detach().float()
        pad = -k % group  # zeros change no range: 0 belongs to each
        w = torch.nn.functional.pad(w, (0, pad)) if pad else w
        w = w.view(len(w), -1, group)
        parts.append(_slice(w, kind, symmetric, scales, scale_dtype))
    codes, scale, zeros = zip(*parts, strict=True)
    codes_ = torch.cat([c.flatten(1)[:, :k] for c in codes])
    zeros_ = None if zeros[0] is None else torch.cat([z for z in zeros if z is not None])
    scale_ = torch.cat(scale)
    if not torch.isfinite(scale_).all():
        raise ValueError("weight holds NaN or infinity, or values too large for float32")
    return Codes(kind, codes_, scale_, zeros_, group_size)


def dequantize_codes(quantized: Codes) -> Tensor:
    """[n, k], float32: what the codes stand for."""
    kind, codes, scales, zeros, group_size = quantized
    k = codes.shape[1]
    group = k if group_size == -1 else group_size
    columns = torch.arange(k) // group
    q = nf4_values(codes) if kind == "nf4" else codes.float()
    if zeros is not None:
        q = q - zeros.float()[:, columns]
    elif kind == "int4":
        q = q - 8
    return q * scales.float()[:, columns]


def nf4_values(codes: Tensor) -> Tensor:
    """The NF4 table at `codes`."""
    return torch.tensor(NF4)[codes.long()]


Sliced = tuple[Tensor, Tensor, "Tensor | None"]


def _slice(w: Tensor, kind: str, symmetric: bool, scales: str, scale_dtype: torch.dtype) -> Sliced:
    """Codes of w [rows, groups, group], and scales and zeros [rows, groups]."""
    low, high = w.aminmax(dim=-1)
    lo, hi = low.clamp(max=0), high.clamp(min=0)
    symmetric = symmetric or kind in ("nf4", "fp8")
    encode = _ENCODERS[kind, symmetric]
    plain = encode(w, lo, hi, scale_dtype)
    if scales != "search":
        return plain
    if symmetric:
        top = torch.maximum(-lo, hi)
        top = _best(lambda f: _fit_top(w, encode(w, -top * f, top * f, scale_dtype), kind))[0]
        found = encode(w, -top, top, scale_dtype)
    else:
        middle, half, mean = (high + low) / 2, (high - low) / 2, w.mean(-1)
        lo, hi = _best(lambda f: _fit_range(w, mean, middle - half * f, middle + half * f, kind))
        found = _between(w, lo, hi, scale_dtype, kind)
    return _where(_error(w, kind, found) < _error(w, kind, plain), found, plain)


def _best(fit: Callable[[float], tuple[Tensor, ...]]) -> list[Tensor]:
    """Of what fit gives for each fraction, group by group that with the largest first element."""
    most, *best = fit(_FRACTIONS[0])
    for fraction in _FRACTIONS[1:]:
        gain, *found = fit(fraction)
        better = gain > most
        most = torch.where(better, gain, most)
        best = [torch.where(better, b, a) for a, b in zip(best, found, strict=True)]
    return best


def _fit_top(w: Tensor, found: Sliced, kind: str) -> tuple[Tensor, Tensor]:
    """By how much v s with the least |v s - w|² is better than 0, and the largest s v there is."""
    v = _values(found, kind)
    vw = (v * w).sum(-1)
    scale = (vw / v.square_().sum(-1).clamp_(min=SMALLEST_SCALE)).clamp_(min=0)
    return scale * vw, scale * _STEPS[kind]


def _fit_range(
    w: Tensor, mean: Tensor, lo: Tensor, hi: Tensor, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """By how much s q + m with the least |s q + m - w|² is better than the mean of w, where q are
    the codes of a range, from 0; and from where to where s q + m goes."""
    levels = _RANGES[kind][1]
    inverse = _scale(hi - lo, levels, torch.float32).reciprocal_()
    q = (w - lo[..., None]).mul_(inverse[..., None]).round_().clamp_(0, levels)
    n, middle = w.shape[-1], q.mean(-1)
    qw = (q * w).sum(-1) - n * middle * mean
    scale = qw / (q.square_().sum(-1) - n * middle * middle).clamp_(min=SMALLEST_SCALE)
    scale = scale.clamp_(min=0)
    lo = mean - scale * middle
    return scale * qw, lo, lo + levels * scale


def _values(found: Sliced, kind: str) -> Tensor:
    """What codes without zero points stand for, in units of the scale."""
    codes = found[0]
    return nf4_values(codes) if kind == "nf4" else codes.float() - (8 if kind == "int4" else 0)


def _where(better: Tensor, a: Sliced, b: Sliced) -> Sliced:
    codes = torch.where(better[..., None], a[0].view(torch.uint8), b[0].view(torch.uint8))
    zeros = None if a[2] is None or b[2] is None else torch.where(better, a[2], b[2])
    return codes.view(a[0].dtype), torch.where(better, a[1], b[1]), zeros


def _error(w: Tensor, kind: str, found: Sliced) -> Tensor:
    """The squared error of each group."""
    codes, scales, zeros = found
    q = _values(found, kind) if zeros is None else codes.float() - zeros[..., None]
    return (q * scales.float()[..., None] - w).square_().sum(-1)


def _scale(span: Tensor, steps: float, dtype: torch.dtype) -> Tensor:
    return (span / steps).clamp_(min=SMALLEST_SCALE).to(dtype)


def _steps(w: Tensor, scale: Tensor) -> Tensor:
    """round(w / s)"""
    return (w * scale.float().reciprocal()[..., None]).round_()


def _asymmetric(low: int, levels: int) -> Callable[..., Sliced]:
    dtype = torch.int8 if low else torch.uint8

    def encode(w: Tensor, lo: Tensor, hi: Tensor, scale_dtype: torch.dtype) -> Sliced:
        scale = _scale(hi - lo, levels, scale_dtype)
        zeros = low - _steps(lo[..., None], scale)[..., 0]
        codes = _steps(w, scale).add_(zeros[..., None]).clamp_(low, low + levels)
        return codes.to(dtype), scale, zeros

    return encode


def _between(w: Tensor, lo: Tensor, hi: Tensor, scale_dtype: torch.dtype, kind: str) -> Sliced:
    """Asymmetric codes of a range that need not hold 0, with a zero point that is no integer."""
    low, levels = _RANGES[kind]
    dtype = torch.int8 if kind == "int8" else torch.uint8
    scale = _scale(hi - lo, levels, scale_dtype)
    inverse = scale.float().reciprocal()
    zeros = (low - lo * inverse).to(scale_dtype).float()  # kept in the dtype of the scales
    codes = (w * inverse[..., None] + zeros[..., None]).round_().clamp_(low, low + levels)
    return codes.to(dtype), scale, zeros


def _symmetric(steps: int, low: int, zero: int) -> Callable[..., Sliced]:
    dtype = torch.int8 if low else torch.uint8

    def encode(w: Tensor, lo: Tensor, hi: Tensor, scale_dtype: torch.dtype) -> Sliced:
        scale = _scale(torch.maximum(-lo, hi), steps, scale_dtype)
        codes = _steps(w, scale).add_(zero).clamp_(low, low + (255 if low else 15))
        return codes.to(dtype), scale, None

    return encode


def _nf4(w: Tensor, lo: Tensor, hi: Tensor, scale_dtype: torch.dtype) -> Sliced:
    scale = _scale(torch.maximum(-lo, hi), 1.0, scale_dtype)
    table = torch.tensor(NF4)
    middles = (table[1:] + table[:-1]) / 2
    ratio = w * scale.float().reciprocal()[..., None]
    codes = torch.zeros_like(ratio, dtype=torch.uint8)
    for middle in middles.tolist():  # six times as fast as torch.bucketize
        codes += ratio > middle
    return codes, scale, None


def _fp8(w: Tensor, lo: Tensor, hi: Tensor, scale_dtype: torch.dtype) -> Sliced:
    scale = _scale(torch.maximum(-lo, hi), 448.0, scale_dtype)
    q = (w * scale.float().reciprocal()[..., None]).clamp_(-448, 448)
    return q.to(torch.float8_e4m3fn), scale, None


_STEPS = {"int8": 127.0, "int4": 7.0, "nf4": 1.0, "fp8": 448.0}  # from 0 to the largest, symmetric
_RANGES = {"int8": (-128, 255), "int4": (0, 15)}  # of codes: the first, and how many steps
_ENCODERS: dict[tuple[str, bool], Callable[..., Sliced]] = {
    ("int8", False): _asymmetric(-128, 255),
    ("int8", True): _symmetric(127, -128, 0),
    ("int4", False): _asymmetric(0, 15),
    ("int4", True): _symmetric(7, 0, 8),
    ("nf4", True): _nf4,
    ("fp8", True): _fp8,
}
