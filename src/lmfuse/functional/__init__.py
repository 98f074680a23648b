"""Fused functions on tensors; each checks its arguments, then calls one compiled op."""

from lmfuse.functional.activation import gelu_mul, silu_mul
from lmfuse.functional.norm import (
    add_layer_norm,
    add_rms_norm,
    fast_layer_norm,
    layer_norm,
    rms_norm,
)

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "fast_layer_norm",
    "gelu_mul",
    "layer_norm",
    "rms_norm",
    "silu_mul",
]
