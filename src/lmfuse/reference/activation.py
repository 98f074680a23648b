"""Gated activations in plain torch.

GELU is written so that it keeps its digits at negative x, where torch's own 1 + erf(x/√2) and
1 + tanh(u) have none left below -9, in float64 too.
"""

from __future__ import annotations

from math import pi, sqrt

from torch import Tensor
from torch.nn.functional import silu


def silu_mul(x: Tensor, y: Tensor) -> Tensor:
    """x / (1 + exp(-x)) · y"""
    return silu(x) * y


def gelu_mul(x: Tensor, y: Tensor, approximate: str = "none") -> Tensor:
    """x/2 erfc(-x/√2) · y, or x / (1 + exp(-2u)) · y with u = √(2/π) (x + 0.044715 x³)"""
    if approximate == "none":
        return x / 2 * (x * -sqrt(0.5)).erfc() * y
    return x * (2 * sqrt(2 / pi) * (x + 0.044715 * x**3)).sigmoid() * y
