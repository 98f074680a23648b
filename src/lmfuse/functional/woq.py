"""Linear layers over quantized weights ("weight-only quantization"): x W^T + bias and on.

W is what `pack_quantized` made. Its codes are widened exactly, sums are kept in fp32 (or are exact,
in int32), what follows is computed on them in fp32, and the result is rounded once, to the dtype of
x. Sums run over blocks of columns of fixed size, in their order: the bits of a row depend neither
on how many other rows there are, nor on threads. Inference only: no backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from lmfuse._library import call, ops, register_fake
from lmfuse.functional import _check
from lmfuse.functional.linear import _OPERANDS, _POSTS, UNFUSED, _broadcast
from lmfuse.functional.quantized import _check_bytes

_woq = ops.woq.default
_gate_up = ops.woq_gate_up.default
_concat = ops.woq_concat.default

# The numbers of WoqCompute in csrc/kernels/kernels.h.
COMPUTE = {"fp32": 0, "fp16": 0, "bf16": 1, "int8": 2}


def woq_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    post: str | None = None,
    other: Tensor | None = None,
    other2: Tensor | None = None,
    *,
    out_features: int,
    compute: str = "bf16",
    block_scales: bool = False,
) -> Tensor:
    """post(z), with z = x W^T + bias, as `lmfuse.functional.linear`

    | compute | x                                     | W                             | products   |
    |---------|---------------------------------------|-------------------------------|------------|
    | fp32    | as it is                              | dequantized in fp32           | fp32       |
    | fp16    | the same: fp32 is no slower here      |                               |            |
    | bf16    | rounded to bfloat16                   | codes; those of nf4 rounded   | fp32       |
    | int8    | s q, s = max |x| / 127, q = round(x/s)| codes (int8 and int4 only)    | int32      |

    With fp32 the result is, bit for bit, that of `linear` over the dequantized weight. Where the
    instruction set multiplies no bfloat16, bf16 is fp32 after x was rounded. With int8 the eight
    largest of each row of x, those that are larger than the ninth, are not quantized, and the scale
    is that of the rest: their columns of W are added in fp32.

    Args:
        x: [..., k], float32, bfloat16 or float16. Under CPU autocast x takes the dtype of autocast
            first.
        weight: the bytes of W, from `pack_quantized`.
        bias: [n], any of the three dtypes; None for zeros.
        post, other, other2: as for `linear`.
        out_features: n.
        compute: a row of the table.
        block_scales: for int8: a scale s for each row and block of columns, rather than for each
            row; a block is a group, or a part of 256 columns of one.

    Returns:
        [..., n], in the dtype of x (after autocast).

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    x = _input(x)
    how = _how(compute, block_scales)
    if post not in _POSTS:
        raise ValueError(f"post is {post!r}, but must be one of {', '.join(map(str, _POSTS))}")
    operands = [o for o in (other, other2) if o is not None]
    count = _OPERANDS.get(post or "", 0)
    if len(operands) != count or (count == 1 and other is None):
        raise ValueError(f"post {post!r} takes {count} of other and other2, not {len(operands)}")
    if operands:
        shape = (*x.shape[:-1], out_features)
        fits = True
        for name, operand in (("other", other), ("other2", other2)):
            if operand is None:
                continue
            _check.tensor(name, operand)
            fits = fits and operand.dtype is x.dtype
            if operand.shape != shape:
                fits = fits and _broadcast(name, operand, shape) == shape
        if not fits:
            z = woq_linear(
                x,
                weight,
                bias,
                out_features=out_features,
                compute=compute,
                block_scales=block_scales,
            )
            return UNFUSED[cast(str, post)](z, *operands)
        other, other2 = (None if o is None else o.expand(shape) for o in (other, other2))
    args = (x, weight, bias, out_features, *how, _POSTS[post], other, other2)
    return cast(Tensor, call(_woq, *args, check=_check_woq))


def woq_linear_gate_up(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    out_features: int,
    compute: str = "bf16",
    block_scales: bool = False,
) -> Tensor:
    """silu(x G^T + gate_bias) · (x U^T + up_bias), both weights read in one sweep

    Args:
        x, out_features, compute, block_scales: as for `woq_linear`.
        gate, up: the bytes of G and U, [n, k], of one format (`quantized_format`), without
            act-order.
        gate_bias, up_bias: [n]; None for zeros.

    Returns:
        [..., n], in the dtype of x (after autocast).

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    args = (_input(x), gate, up, gate_bias, up_bias, out_features, *_how(compute, block_scales))
    return cast(Tensor, call(_gate_up, *args, check=_check_gate_up))


def woq_linear_concat(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    out_features: Sequence[int],
    compute: str = "bf16",
    block_scales: bool = False,
) -> tuple[Tensor, ...]:
    """x W^T + bias for each weight: x is read once and the threads share all weights in one walk

    The weights stay where they are: what each gives is what it would give alone, bit for bit.

    Args:
        x, compute, block_scales: as for `woq_linear`.
        weights: the bytes of each W, [n_i, k], of one kind and group_size, without act-order.
        biases: [n_i] each, or None.
        out_features: the n_i.

    Returns:
        [..., n_i] for each weight: side by side in one tensor, so not contiguous.

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    if not weights:
        raise ValueError("weights is empty, but must hold at least one weight")
    x = _input(x)
    biases = [None] * len(weights) if biases is None else list(biases)
    if not len(biases) == len(weights) == len(out_features):
        raise ValueError(
            f"there are {len(weights)} weights, but {len(biases)} biases and "
            f"{len(out_features)} out_features"
        )
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        _check_bytes(f"weights[{i}]", weight)
        _check.vector(f"biases[{i}]", bias, out_features[i], "the result")
    biased = sum(1 << i for i, bias in enumerate(biases) if bias is not None)
    present = [bias.detach() for bias in biases if bias is not None]  # autograd sees no lists
    how = _how(compute, block_scales)
    result = call(_concat, x, list(weights), present, biased, sum(out_features), *how)
    return tuple(torch.split(result, list(out_features), -1))


def _input(x: Tensor) -> Tensor:
    _check.row("x", x)
    return x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x


def _how(compute: str, block_scales: bool) -> tuple[int, bool]:
    if compute not in COMPUTE:
        raise ValueError(f"compute is {compute!r}, but must be one of {', '.join(COMPUTE)}")
    return COMPUTE[compute], block_scales


def _check_woq(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, *_: object
) -> None:
    _check_bytes("weight", weight)
    _check.vector("bias", bias, out_features, "the result")


def _check_gate_up(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    out_features: int,
    *_: object,
) -> None:
    _check_bytes("gate", gate)
    _check_bytes("up", up)
    _check.vector("gate_bias", gate_bias, out_features, "the result")
    _check.vector("up_bias", up_bias, out_features, "the result")


@register_fake("woq")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_features: int,
    compute: int,
    block_scales: bool,
    post: int,
    other: Tensor | None,
    other2: Tensor | None,
) -> Tensor:
    _check_woq(x, weight, bias, out_features)
    return x.new_empty((*x.shape[:-1], out_features))


@register_fake("woq_gate_up")
def _(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    out_features: int,
    compute: int,
    block_scales: bool,
) -> Tensor:
    _check_gate_up(x, gate, up, gate_bias, up_bias, out_features)
    return x.new_empty((*x.shape[:-1], out_features))


@register_fake("woq_concat")
def _(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    biased: int,
    out_features: int,
    compute: int,
    block_scales: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))
