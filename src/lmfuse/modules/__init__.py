"""`nn.Module`s over the fused functions, with the names and arguments of `ipex.llm.modules`."""

from lmfuse.modules.norm import FastLayerNorm, RMSNorm
from lmfuse.modules.rope import RotaryEmbedding

__all__ = ["FastLayerNorm", "RMSNorm", "RotaryEmbedding"]
