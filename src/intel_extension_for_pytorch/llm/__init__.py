"""`ipex.llm`: fused modules and functions, and `optimize` for whole models."""

from intel_extension_for_pytorch.llm import functional, modules
from lmfuse import _alias

__all__ = ["functional", "modules"]

__getattr__, __dir__ = _alias.names(__name__, {"optimize": "lmfuse"})
