"""`ipex.nn.modules`: the quantized linear layer."""

from intel_extension_for_pytorch.nn.modules import weight_only_quantization
from lmfuse.quantization.ipex_linear import WeightOnlyQuantizedLinear, WoqWeightFormat

__all__ = ["WeightOnlyQuantizedLinear", "WoqWeightFormat", "weight_only_quantization"]
