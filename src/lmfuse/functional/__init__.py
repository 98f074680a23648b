"""Fused functions on tensors; each checks its arguments, then calls one compiled op."""

from lmfuse.functional.activation import gelu_mul, silu_mul
from lmfuse.functional.argmax import argmax, top_sums
from lmfuse.functional.attention import attention, varlen_attention
from lmfuse.functional.cache import new_cache, reshape_and_cache
from lmfuse.functional.decoder import (
    DecoderCaches,
    DecoderEnds,
    DecoderStack,
    decoder,
    decoder_logits,
    decoder_stack,
)
from lmfuse.functional.decoder_layer import (
    DecoderExperts,
    DecoderLayer,
    DecoderLinear,
    DecoderNorm,
)
from lmfuse.functional.experts import PackedExperts, expert_rows, experts, pack_experts
from lmfuse.functional.indirect_attention import (
    gather_indirect,
    indirect_access_kv_cache_attention,
    indirect_cache_attention,
)
from lmfuse.functional.indirect_decoder import indirect_cache_decoder
from lmfuse.functional.linear import linear, linear_concat, linear_gate_up
from lmfuse.functional.norm import (
    add_layer_norm,
    add_rms_norm,
    fast_layer_norm,
    layer_norm,
    rms_norm,
)
from lmfuse.functional.packed import PackedWeight, pack_linear, weight_rows
from lmfuse.functional.paged_attention import (
    flash_attn_varlen_func,
    single_query_cached_kv_attention,
)
from lmfuse.functional.quantized import (
    Quantized,
    QuantizedFormat,
    copy_quantized,
    dequantize,
    pack_quantized,
    quantized_format,
    quantized_rows,
    unpack_quantized,
)
from lmfuse.functional.rope import rotary_embedding, rotate, rotate_qk, rotate_qkv
from lmfuse.functional.woq import woq_linear, woq_linear_concat, woq_linear_gate_up

__all__ = [
    "DecoderCaches",
    "DecoderEnds",
    "DecoderExperts",
    "DecoderLayer",
    "DecoderLinear",
    "DecoderNorm",
    "DecoderStack",
    "PackedExperts",
    "PackedWeight",
    "Quantized",
    "QuantizedFormat",
    "add_layer_norm",
    "add_rms_norm",
    "argmax",
    "attention",
    "copy_quantized",
    "decoder",
    "decoder_logits",
    "decoder_stack",
    "dequantize",
    "expert_rows",
    "experts",
    "fast_layer_norm",
    "flash_attn_varlen_func",
    "gather_indirect",
    "gelu_mul",
    "indirect_access_kv_cache_attention",
    "indirect_cache_attention",
    "indirect_cache_decoder",
    "layer_norm",
    "linear",
    "linear_concat",
    "linear_gate_up",
    "new_cache",
    "pack_experts",
    "pack_linear",
    "pack_quantized",
    "quantized_format",
    "quantized_rows",
    "reshape_and_cache",
    "rms_norm",
    "rotary_embedding",
    "rotate",
    "rotate_qk",
    "rotate_qkv",
    "silu_mul",
    "single_query_cached_kv_attention",
    "top_sums",
    "unpack_quantized",
    "varlen_attention",
    "weight_rows",
    "woq_linear",
    "woq_linear_concat",
    "woq_linear_gate_up",
]
