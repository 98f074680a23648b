"""Quantized weights and rows in plain torch: the formulas of `lmfuse.functional.woq_linear`."""

from __future__ import annotations

import torch
from torch import Tensor

# NormalFloat 4: quantiles of the normal distribution (QLoRA, appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def groups_of(k: int, group_size: int, g_idx: Tensor | None = None) -> Tensor:
    """The group of each column."""
    if g_idx is not None:
        return g_idx.long()
    return torch.arange(k) // (k if group_size == -1 else group_size)


def dequantize(
    kind: str,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    offsets: Tensor | None = None,
    group_size: int = -1,
    g_idx: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """[n, k] in the dtype of scales, which is also that of the arithmetic; table: of nf4"""
    n, k = codes.shape
    group = groups_of(k, group_size, g_idx)

    def spread(x: Tensor) -> Tensor:
        return x.to(scales.dtype).reshape(n, -1)[:, group]

    if kind == "nf4":
        values = torch.tensor(NF4, dtype=torch.float32) if table is None else table
        return values.to(scales.dtype)[codes.long()] * spread(scales)
    q = codes.to(scales.dtype)
    if offsets is not None:
        return q * spread(scales) + spread(offsets)
    if zeros is not None:
        return (q - spread(zeros)) * spread(scales)
    return (q - (8 if kind == "int4" else 0)) * spread(scales)


def quantize_rows(x: Tensor, columns: int | None = None) -> Tensor:
    """x as int8 compute sees it, in float64: the eight largest of each row as they are (those that
    are larger than the ninth), and the rest as s round(x / s), s = max |x| / 127 of each row, or of
    each block of so many columns."""
    size = x.float().abs()
    largest = size.topk(min(9, x.shape[-1])).values
    limit = largest[..., 8:] if largest.shape[-1] == 9 else torch.zeros_like(largest[..., :1])
    outlier = size > limit
    rest = torch.where(outlier, 0.0, x.float())
    blocks = [rest] if columns is None else list(torch.split(rest, columns, -1))
    return torch.where(outlier, x.double(), torch.cat([_rounded(part) for part in blocks], -1))


def _rounded(x: Tensor) -> Tensor:
    largest = x.abs().amax(-1, keepdim=True)
    # A number divided by a tensor would be its reciprocal times that number, rounded twice.
    inverse = torch.where(largest > 0, torch.full_like(largest, 127.0) / largest, 0.0)
    return (x * inverse).round().double() * (largest / 127.0).double()
