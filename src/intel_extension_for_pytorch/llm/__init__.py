"""`ipex.llm`: fused modules and functions, and `optimize` for whole models."""

from intel_extension_for_pytorch.llm import functional, modules, quantization
from lmfuse import _alias
from lmfuse._alias import llm_optimize as optimize

__all__ = ["functional", "modules", "optimize", "quantization"]

__getattr__, __dir__ = _alias.names(__name__, {"generation": f"{__name__}.generation"})
