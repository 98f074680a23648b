"""RMS norm and layer norm in plain torch."""

from __future__ import annotations

from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float = 1e-6, weight_offset: float = 0.0
) -> Tensor:
    """x / sqrt(mean(x², -1) + eps) · (weight + weight_offset)"""
    normal = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return normal if weight is None else normal * (weight + weight_offset)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """(x - mean(x, -1)) / sqrt(var(x, -1) + eps) · weight + bias"""
    centered = x - x.mean(-1, keepdim=True)
    normal = rms_norm(centered, weight, eps)
    return normal if bias is None else normal + bias
