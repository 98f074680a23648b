"""RMS norm and layer norm, with or without a residual.

All compute in fp32 and round once. Rows may lie anywhere (any leading dimensions, any strides);
only a last dimension that is not contiguous is copied first. Weights may be of another of the three
dtypes than the input. Inference only: a backward raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from lmfuse._library import call, ops, register_fake
from lmfuse.functional import _check

_rms_norm = ops.rms_norm.default
_layer_norm = ops.layer_norm.default
_add_rms_norm = ops.add_rms_norm.default
_add_rms_norm_ = ops.add_rms_norm_.default
_add_layer_norm = ops.add_layer_norm.default
_add_layer_norm_ = ops.add_layer_norm_.default


def rms_norm(
    hidden_states: Tensor, weight: Tensor | None, eps: float = 1e-6, weight_offset: float = 0.0
) -> Tensor:
    """y = x / sqrt(mean(x², -1) + eps) · (weight + weight_offset)

    Args:
        hidden_states: x, [..., n], float32, bfloat16 or float16.
        weight: [n], any of the three dtypes; None for ones.
        eps: added to the mean square.
        weight_offset: 1.0 for Gemma, whose checkpoints store weight - 1.

    Returns:
        y, the shape and dtype of x.

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """
    args = (hidden_states, weight, eps, weight_offset)
    return cast(Tensor, call(_rms_norm, *args, check=_check_rms_norm))


def layer_norm(
    hidden_states: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) · weight + bias, over the last dimension

    Args:
        hidden_states: x, [..., n], float32, bfloat16 or float16.
        weight, bias: [n], any of the three dtypes; None for ones and zeros.
        eps: added to the variance (mean squared deviation, not corrected).

    Returns:
        y, the shape and dtype of x.

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.

    Source: Ba, Kiros and Hinton, Layer Normalization, 2016.
    """
    return cast(
        Tensor, call(_layer_norm, hidden_states, weight, bias, eps, check=_check_layer_norm)
    )


def fast_layer_norm(
    hidden_states: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
) -> Tensor:
    """`layer_norm` over the last `len(normalized_shape)` dimensions, which must be these.

    Args:
        hidden_states: x, [..., *normalized_shape].
        normalized_shape: the shape of one row; weight and bias have it too.
        weight, bias: None for ones and zeros.
        eps: added to the variance.

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    n = _check.row("hidden_states", hidden_states)
    if shape == (n,):
        return layer_norm(hidden_states, weight, bias, eps)
    if not shape or tuple(hidden_states.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"hidden_states has shape {tuple(hidden_states.shape)}, which does not end in "
            f"normalized_shape {shape}"
        )
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        _check.tensor(name, vector)
        if tuple(vector.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)}, but must have normalized_shape {shape}"
            )
    rows = layer_norm(
        hidden_states.flatten(-len(shape)),
        None if weight is None else weight.flatten(),
        None if bias is None else bias.flatten(),
        eps,
    )
    return rows.view(hidden_states.shape)


def _residual(x: Tensor, residual: Tensor, add_back: bool) -> Tensor:
    """x in the dtype of the residual under autocast; the residual is one that can be written."""
    if torch.is_autocast_enabled("cpu"):
        _check.tensor("x", x)
        _check.tensor("residual", residual)
        x = x.to(residual.dtype)
    if add_back:
        _check.tensor("residual", residual)
        _check.writable("residual", residual)
    return x


def add_rms_norm(
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    add_back: bool = False,
    weight_offset: float = 0.0,
) -> Tensor:
    """s = x + residual; y = s / sqrt(mean(s², -1) + eps) · (weight + weight_offset)

    s is kept in fp32 until y is rounded. Under CPU autocast, an x of another dtype takes that of
    the residual.

    Args:
        residual: [..., n], as x; None for zeros.
        x: [..., n].
        weight: [n]; None for ones.
        bias: must be None (RMS norm has none; the argument is part of the interface).
        eps: added to the mean square.
        add_back: also write s, rounded, into residual.
        weight_offset: as in `rms_norm`.

    Returns:
        y, the shape and dtype of x.

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    if bias is not None:
        raise ValueError("bias must be None: RMS norm has none")
    if residual is None:
        return rms_norm(x, weight, eps, weight_offset)
    args = (_residual(x, residual, add_back), residual, weight, eps, weight_offset)
    if not add_back:
        return cast(Tensor, call(_add_rms_norm, *args, check=_check_add_rms_norm))
    return cast(Tensor, call(_add_rms_norm_, *args, written=(1,), check=_check_add_rms_norm))


def add_layer_norm(
    residual: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    add_back: bool = False,
) -> Tensor:
    """s = x + residual; y = layer_norm(s) · weight + bias

    s is kept in fp32 until y is rounded. Under CPU autocast, an x of another dtype takes that of
    the residual.

    Args:
        residual: [..., n], as x; None for zeros.
        x: [..., n].
        weight, bias: [n]; None for ones and zeros.
        eps: added to the variance.
        add_back: also write s, rounded, into residual.

    Returns:
        y, the shape and dtype of x.

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    if residual is None:
        return layer_norm(x, weight, bias, eps)
    args = (_residual(x, residual, add_back), residual, weight, bias, eps)
    if not add_back:
        return cast(Tensor, call(_add_layer_norm, *args, check=_check_add_layer_norm))
    return cast(Tensor, call(_add_layer_norm_, *args, written=(1,), check=_check_add_layer_norm))


def _check_rms_norm(hidden_states: Tensor, weight: Tensor | None, *_: object) -> None:
    n = _check.row("hidden_states", hidden_states)
    _check.vector("weight", weight, n, "hidden_states")


def _check_layer_norm(
    hidden_states: Tensor, weight: Tensor | None, bias: Tensor | None, *_: object
) -> None:
    _check_rms_norm(hidden_states, weight)
    _check.vector("bias", bias, hidden_states.shape[-1], "hidden_states")


def _check_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, *_: object) -> None:
    n = _check.row("x", x)
    _check.vector("weight", weight, n, "x")
    _check.same("residual", residual, "x", x)


def _check_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, *_: object
) -> None:
    _check_add_rms_norm(x, residual, weight)
    _check.vector("bias", bias, x.shape[-1], "x")


def _fake(name: str, check: Callable[..., None]) -> None:
    @register_fake(name)
    def _(x: Tensor, *args: object) -> Tensor:
        check(x, *args)
        return x.new_empty(x.shape)


_fake("rms_norm", _check_rms_norm)
_fake("layer_norm", _check_layer_norm)
_fake("add_rms_norm", _check_add_rms_norm)
_fake("add_rms_norm_", _check_add_rms_norm)
_fake("add_layer_norm", _check_add_layer_norm)
_fake("add_layer_norm_", _check_add_layer_norm)
