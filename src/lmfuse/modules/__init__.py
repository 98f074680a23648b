"""`nn.Module`s over the fused functions, with the names and arguments of `ipex.llm.modules`."""

from lmfuse.modules.attention import (
    IndirectAccessKVCacheAttention,
    PagedAttention,
    VarlenAttention,
)
from lmfuse.modules.decoder import DecoderLayers, described_linear
from lmfuse.modules.linear import Embedding, Linear
from lmfuse.modules.linear_fusion import (
    ConcatLinear,
    Linear2SiluMul,
    LinearAdd,
    LinearAddAdd,
    LinearGelu,
    LinearMul,
    LinearNewGelu,
    LinearRelu,
    LinearSilu,
    LinearSiluMul,
    linear2SiluMul,
    linearAdd,
    linearAddAdd,
    linearGelu,
    linearMul,
    linearNewGelu,
    linearRelu,
    linearSilu,
    linearSiluMul,
)
from lmfuse.modules.norm import FastLayerNorm, RMSNorm
from lmfuse.modules.quantized_experts import QuantizedExperts
from lmfuse.modules.quantized_linear import QuantizedLinear
from lmfuse.modules.rope import RotaryEmbedding

__all__ = [
    "ConcatLinear",
    "DecoderLayers",
    "Embedding",
    "FastLayerNorm",
    "IndirectAccessKVCacheAttention",
    "Linear",
    "Linear2SiluMul",
    "LinearAdd",
    "LinearAddAdd",
    "LinearGelu",
    "LinearMul",
    "LinearNewGelu",
    "LinearRelu",
    "LinearSilu",
    "LinearSiluMul",
    "PagedAttention",
    "QuantizedExperts",
    "QuantizedLinear",
    "RMSNorm",
    "RotaryEmbedding",
    "VarlenAttention",
    "described_linear",
    "linear2SiluMul",
    "linearAdd",
    "linearAddAdd",
    "linearGelu",
    "linearMul",
    "linearNewGelu",
    "linearRelu",
    "linearSilu",
    "linearSiluMul",
]
