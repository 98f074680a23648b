"""The import name of Intel Extension for PyTorch, served by lmfuse: re-exports and nothing else.

    import intel_extension_for_pytorch as ipex

`__version__` is the release of IPEX that the calls follow, then "+lmfuse." and lmfuse's own.
"""

from lmfuse import _alias

_alias.refuse_beside_ipex()

from intel_extension_for_pytorch import cpu, llm, nn, quantization  # noqa: E402  (after the check)
from intel_extension_for_pytorch.cpu._auto_kernel_selection import (  # noqa: E402
    _disable_dnnl,
    _enable_dnnl,
    _using_dnnl,
)
from lmfuse._alias import optimize  # noqa: E402
from lmfuse._auto_kernel_selection import (  # noqa: E402
    FP32MathMode,
    get_fp32_math_mode,
    set_fp32_math_mode,
)

__version__ = _alias.VERSION
__all__ = [
    "FP32MathMode",
    "_disable_dnnl",
    "_enable_dnnl",
    "_using_dnnl",
    "cpu",
    "get_fp32_math_mode",
    "llm",
    "nn",
    "optimize",
    "quantization",
    "set_fp32_math_mode",
]

__getattr__, __dir__ = _alias.names(
    __name__, {"_set_optimized_model_for_generation": "lmfuse.hf.tracing"}
)
