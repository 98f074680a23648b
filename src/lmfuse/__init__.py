"""lmfuse: fused language-model modules for CPUs, for stock PyTorch and transformers."""

from lmfuse import functional, modules
from lmfuse.hf import optimize, restore
from lmfuse.isa import available_isas, isa, set_isa, use_isa

__version__ = "0.1.0"

__all__ = [
    "available_isas",
    "functional",
    "isa",
    "modules",
    "optimize",
    "restore",
    "set_isa",
    "use_isa",
]
