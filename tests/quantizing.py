"""Quantized weights of every kind, their values in float64, and how near a product must come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lmfuse
from helpers import BF16, F32, assert_close
from lmfuse.functional import quantized_format, woq_linear
from lmfuse.functional.linear import UNFUSED
from lmfuse.reference import woq as reference

KINDS = ("int8", "int4", "nf4", "fp8")
COMPUTE = ("fp32", "bf16", "int8")
# What a weight may have besides codes and scales.
EXTRAS = {
    "int8": ("", "zeros", "offsets", "fractions", "g_idx", "zeros g_idx"),
    "int4": ("", "zeros", "offsets", "fractions", "g_idx", "zeros g_idx"),
    "nf4": ("", "g_idx"),
    "fp8": ("", "g_idx"),
}

kinds = pytest.mark.parametrize("kind", KINDS)


def quantized(
    kind: str, n: int, k: int, group: int = -1, extra: str = "", scale: torch.dtype = F32
) -> dict[str, Any]:
    """Arguments of pack_quantized: every code occurs."""
    if kind == "int8":
        codes = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    elif kind == "fp8":
        codes = (torch.randn(n, k) * 0.01 * 10.0 ** torch.randint(0, 4, (n, k))).clamp(-448, 448)
        codes = codes.to(torch.float8_e4m3fn)
    else:
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    if "g_idx" in extra and group == -1:
        group = 32
    groups = 1 if group == -1 else -(-k // group)
    low, high = (-128, 128) if kind == "int8" else (0, 16)
    q: dict[str, Any] = {"kind": kind, "codes": codes, "group_size": group}
    q["scales"] = (torch.rand(n, groups) + 0.1).div(k**0.5).to(scale)
    if "zeros" in extra:
        q["zeros"] = torch.randint(low, high, (n, groups))
    if "fractions" in extra:
        q["zeros"] = torch.rand(n, groups) * (high - low) + low
    if "offsets" in extra:
        q["offsets"] = torch.randn(n, groups).div(k**0.5).to(scale)
    if "g_idx" in extra:
        q["g_idx"] = (torch.arange(k) // group)[torch.randperm(k)]
    return q


def values(q: dict[str, Any], compute: str = "fp32") -> tuple[Tensor, Tensor]:
    """The weights in float64, and the magnitudes that their parts add up to."""
    wide = {**q, "scales": q["scales"].double()}
    table = torch.tensor(reference.NF4)
    if compute == "bf16" and lmfuse.isa() in ("avx512_bf16", "amx"):
        table = table.to(BF16)
    w = reference.dequantize(**wide, table=table.double())
    group = reference.groups_of(q["codes"].shape[1], q["group_size"], q.get("g_idx"))
    scale = wide["scales"].reshape(len(w), -1)[:, group]
    zeros, offsets = q.get("zeros"), q.get("offsets")
    size = q["codes"].double().abs() * scale if q["kind"] != "nf4" else scale
    if zeros is not None:
        size = size + zeros.double().abs().reshape(len(w), -1)[:, group] * scale
    if offsets is not None:
        size = size + offsets.double().abs().reshape(len(w), -1)[:, group]
    # int8 products work on codes raised by 128, int4 on codes without their middle.
    return w, size + (128 * scale if compute == "int8" else 8 * scale)


def seen(x: Tensor, q: dict[str, Any], compute: str, block_scales: bool = False) -> Tensor:
    """x as the arithmetic sees it, in float64."""
    if compute == "fp32":
        return x.double()
    if compute == "bf16":
        return x.to(BF16).double()
    if not block_scales:
        return reference.quantize_rows(x)
    group, g_idx = q["group_size"], q.get("g_idx")
    order = torch.arange(x.shape[-1]) if g_idx is None else g_idx.argsort(stable=True)
    blocks = min(256, x.shape[-1] if group == -1 else group)
    return reference.quantize_rows(x[..., order], blocks)[..., order.argsort()]


def check(
    y: Tensor,
    x: Tensor,
    q: dict[str, Any],
    bias: Tensor | None = None,
    compute: str = "fp32",
    block_scales: bool = False,
    post: str | None = None,
    *operands: Tensor,
) -> None:
    """As in test_linear.py: sums of K terms err by at most γ_K of their magnitudes."""
    (w, size), s = values(q, compute), seen(x, q, compute, block_scales)
    b = torch.zeros(len(w)).double() if bias is None else bias.double()
    z, scale = s @ w.T + b, s.abs() @ size.T + b.abs()
    u = [t.double() for t in operands]
    expected = UNFUSED[post](z, *u) if post else z
    if post in ("mul", "silu_mul"):
        scale = 1.1 * scale * u[0].abs()
    elif u:
        scale = scale + sum(t.abs() for t in u)
    assert_close(y, expected, ulps=(x.shape[-1] + 32) / 2, scale=1.2 * scale)


def product(x: Tensor, packed: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return woq_linear(
        x, packed, *args, out_features=quantized_format(packed).out_features, **kwargs
    )
