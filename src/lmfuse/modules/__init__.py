"""`nn.Module`s over the fused functions, with the names and arguments of `ipex.llm.modules`."""

from lmfuse.modules.linear import Embedding, Linear
from lmfuse.modules.linear_fusion import (
    ConcatLinear,
    Linear2SiluMul,
    LinearAdd,
    LinearAddAdd,
    LinearGelu,
    LinearMul,
    LinearNewGelu,
    LinearRelu,
    LinearSilu,
    LinearSiluMul,
    linear2SiluMul,
    linearAdd,
    linearAddAdd,
    linearGelu,
    linearMul,
    linearNewGelu,
    linearRelu,
    linearSilu,
    linearSiluMul,
)
from lmfuse.modules.norm import FastLayerNorm, RMSNorm
from lmfuse.modules.rope import RotaryEmbedding

__all__ = [
    "ConcatLinear",
    "Embedding",
    "FastLayerNorm",
    "Linear",
    "Linear2SiluMul",
    "LinearAdd",
    "LinearAddAdd",
    "LinearGelu",
    "LinearMul",
    "LinearNewGelu",
    "LinearRelu",
    "LinearSilu",
    "LinearSiluMul",
    "RMSNorm",
    "RotaryEmbedding",
    "linear2SiluMul",
    "linearAdd",
    "linearAddAdd",
    "linearGelu",
    "linearMul",
    "linearNewGelu",
    "linearRelu",
    "linearSilu",
    "linearSiluMul",
]
