"""Gated activations, computed in fp32 and rounded once. Inference only: a backward raises."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from lmfuse._library import call, ops, register_fake, write
from lmfuse.functional import _check

_silu_mul = ops.silu_mul.default
_gelu_mul = ops.gelu_mul.default


def _gated(op: Any, x: Tensor, y: Tensor, out: Tensor | None, *args: Any) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        _check.tensor("x", x)
        _check.tensor("y", y)
        wider = torch.promote_types(x.dtype, y.dtype)
        x, y = x.to(wider), y.to(wider)
    if out is not None:
        _check_pair(x, y)
        _check.same("out", out, "x", x)
        _check.apart("out", out)
        if out.device != x.device:
            raise ValueError(f"out is on {out.device}, but x is on {x.device}")
    result = cast(Tensor, call(op, x, y, *args, check=_check_pair))
    if out is not None:
        write("out", out, result)
    return result


def _check_pair(x: Tensor, y: Tensor, *_: object) -> None:
    _check.row("x", x)
    _check.same("y", y, "x", x)


def silu_mul(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """x / (1 + exp(-x)) · y

    Args:
        x: the gate, [...], float32, bfloat16 or float16; rows may be strided.
        y: as x. Under CPU autocast two dtypes become the wider one.
        out: also receives the result; as x.

    Returns:
        A new tensor of the shape and dtype of x.

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    return _gated(_silu_mul, x, y, out)


def gelu_mul(x: Tensor, y: Tensor, out: Tensor | None = None, approximate: str = "none") -> Tensor:
    """gelu(x) · y, with gelu(x) = x/2 (1 + erf(x/√2)),
    or x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))) if approximate is "tanh"

    Args:
        x: the gate, [...], float32, bfloat16 or float16; rows may be strided.
        y: as x. Under CPU autocast two dtypes become the wider one.
        out: also receives the result; as x.
        approximate: "none" or "tanh".

    Returns:
        A new tensor of the shape and dtype of x.

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.

    Source: Hendrycks and Gimpel, Gaussian Error Linear Units, 2016.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f'approximate is {approximate!r}, but must be "none" or "tanh"')
    return _gated(_gelu_mul, x, y, out, approximate == "tanh")


@register_fake("silu_mul")
def _(x: Tensor, y: Tensor) -> Tensor:
    _check_pair(x, y)
    return x.new_empty(x.shape)


@register_fake("gelu_mul")
def _(x: Tensor, y: Tensor, tanh: bool) -> Tensor:
    _check_pair(x, y)
    return x.new_empty(x.shape)
