"""Weight-only quantization: configs, the mathematics, and published checkpoints' tensors."""

from lmfuse.modules import QuantizedLinear
from lmfuse.quantization.codes import Codes, dequantize_codes, quantize_weight
from lmfuse.quantization.compute import choose_compute
from lmfuse.quantization.config import WeightOnlyConfig
from lmfuse.quantization.embedding import QuantizedEmbedding
from lmfuse.quantization.gguf import gguf_tensors, pack_gguf
from lmfuse.quantization.model import Quantization, quantization, quantize
from lmfuse.quantization.published import pack_awq, pack_gptq

__all__ = [
    "Codes",
    "Quantization",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "WeightOnlyConfig",
    "choose_compute",
    "dequantize_codes",
    "gguf_tensors",
    "pack_awq",
    "pack_gguf",
    "pack_gptq",
    "quantization",
    "quantize",
    "quantize_weight",
]
