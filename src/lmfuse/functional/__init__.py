"""Fused functions on tensors; each checks its arguments, then calls one compiled op."""

from lmfuse.functional.activation import gelu_mul, silu_mul
from lmfuse.functional.linear import linear, linear_concat, linear_gate_up
from lmfuse.functional.norm import (
    add_layer_norm,
    add_rms_norm,
    fast_layer_norm,
    layer_norm,
    rms_norm,
)
from lmfuse.functional.packed import PackedWeight, pack_linear, weight_rows
from lmfuse.functional.rope import rotary_embedding, rotate, rotate_qk, rotate_qkv

__all__ = [
    "PackedWeight",
    "add_layer_norm",
    "add_rms_norm",
    "fast_layer_norm",
    "gelu_mul",
    "layer_norm",
    "linear",
    "linear_concat",
    "linear_gate_up",
    "pack_linear",
    "rms_norm",
    "rotary_embedding",
    "rotate",
    "rotate_qk",
    "rotate_qkv",
    "silu_mul",
    "weight_rows",
]
