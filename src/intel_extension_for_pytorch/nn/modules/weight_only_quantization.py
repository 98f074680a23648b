"""`ipex.nn.modules.weight_only_quantization` is `lmfuse.quantization.ipex_linear`."""

from lmfuse.quantization.ipex_linear import WeightOnlyQuantizedLinear, WoqWeightFormat

__all__ = ["WeightOnlyQuantizedLinear", "WoqWeightFormat"]
