"""lmfuse: fused language-model modules for CPUs, for stock PyTorch and transformers."""

from importlib import import_module
from typing import Any

from lmfuse import functional, modules, quantization
from lmfuse._auto_kernel_selection import FP32MathMode, get_fp32_math_mode, set_fp32_math_mode
from lmfuse.hf import from_pretrained, optimize, restore
from lmfuse.isa import available_isas, isa, set_isa, use_isa
from lmfuse.quantization import WeightOnlyConfig, quantize

__version__ = "0.1.0"

__all__ = [
    "FP32MathMode",
    "WeightOnlyConfig",
    "available_isas",
    "from_pretrained",
    "functional",
    "generation",
    "get_fp32_math_mode",
    "isa",
    "modules",
    "optimize",
    "quantization",
    "quantize",
    "restore",
    "set_fp32_math_mode",
    "set_isa",
    "trace_for_generation",
    "use_isa",
]


def __getattr__(name: str) -> Any:
    """What imports transformers, once somebody asks for it."""
    if name == "generation":
        return import_module("lmfuse.generation")
    if name == "trace_for_generation":
        return import_module("lmfuse.hf.tracing").trace_for_generation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
