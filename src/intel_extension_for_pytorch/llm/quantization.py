"""`ipex.llm.quantization`: layers over published weights."""

from lmfuse.quantization.ipex_linear import (
    IPEXWeightOnlyQuantizedLinear,
    QuantDtype,
    QuantMethod,
)

__all__ = ["IPEXWeightOnlyQuantizedLinear", "QuantDtype", "QuantMethod"]
