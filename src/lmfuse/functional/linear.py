"""Linear layers over packed weights, with what follows them fused in: x W^T + bias and on.

Sums are kept in fp32, whatever follows is computed on them in fp32, and the result is rounded once,
to the dtype of x. Each output is one chain of sums over ascending k: its bits depend neither on how
many other rows there are, nor on threads. x may have any strides. Inference only: no backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from lmfuse._library import call, ops, register_fake
from lmfuse.functional import _check
from lmfuse.functional.packed import PackedWeight, _check_packed, alike

_linear = ops.linear.default
_gate_up = ops.linear_gate_up.default
_concat = ops.linear_concat.default

# The numbers of PostOp in csrc/kernels/kernels.h.
_POSTS = {
    None: 0,
    "relu": 1,
    "gelu": 2,
    "gelu_tanh": 3,
    "silu": 4,
    "mul": 5,
    "add": 6,
    "add_add": 7,
    "silu_mul": 8,
}
_OPERANDS = {"mul": 1, "add": 1, "add_add": 2, "silu_mul": 1}
# The same as torch operations on z, for operands that the kernel does not take.
UNFUSED: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "mul": lambda z, u: z * u,
    "add": lambda z, u: z + u,
    "add_add": lambda z, u, v: z + u + v,
    "silu_mul": lambda z, u: F.silu(z) * u,
}


def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    post: str | None = None,
    other: Tensor | None = None,
    other2: Tensor | None = None,
) -> Tensor:
    """post(z), with z = x W^T + bias; u = other, v = other2

    | post      | result                 | post      | result      |
    |-----------|------------------------|-----------|-------------|
    | None      | z                      | mul       | z u         |
    | relu      | max(z, 0)              | add       | z + u       |
    | gelu      | z/2 (1 + erf(z/√2))    | add_add   | z + u + v   |
    | gelu_tanh | z/2 (1 + tanh(√(2/π) (z + 0.044715 z³))) | silu_mul | silu(z) u |
    | silu      | z / (1 + exp(-z))      |           |             |

    Args:
        x: [..., k], of the dtype of weight; or float32 over a bfloat16 weight, which rounds x to
            bfloat16 and keeps the result in float32. Under CPU autocast x takes the dtype of
            weight, and the result that of autocast.
        weight: [n, k], from `pack_linear`.
        bias: [n], any of the three dtypes; None for zeros.
        post: a key of the table.
        other, other2: operands, as many as post has. They broadcast as in torch. If one has another
            dtype than the result, or more elements, z is rounded first and torch does the rest.

    Returns:
        [..., n], in the dtype of x (after autocast).

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    x = _input(x, weight)
    n = weight.out_features
    if post not in _POSTS:
        raise ValueError(f"post is {post!r}, but must be one of {', '.join(map(str, _POSTS))}")
    if post in _OPERANDS or other is not None or other2 is not None:
        return _with_operands(x, weight, bias, cast(str, post), other, other2)
    args = (x, weight.packed, bias, n, _POSTS[post], None, None)
    return _output(call(_linear, *args, check=_check_linear))


def linear_gate_up(
    x: Tensor,
    gate: PackedWeight,
    up: PackedWeight,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """silu(x G^T + gate_bias) · (x U^T + up_bias), both weights read in one sweep

    Args:
        x: [..., k]; as for `linear`.
        gate, up: G and U, [n, k], from `pack_linear`, of one dtype.
        gate_bias, up_bias: [n]; None for zeros.

    Returns:
        [..., n], in the dtype of x (after autocast).

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    x = _input(x, gate, "gate")
    _check_packed("up", up)
    if up.out_features != gate.out_features or not alike(up, gate):
        raise ValueError(f"up is {up}, but must have the shape and dtypes of gate, {gate}")
    args = (x, gate.packed, up.packed, gate_bias, up_bias, gate.out_features)
    return _output(call(_gate_up, *args, check=_check_gate_up))


def linear_concat(
    x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None] | None = None
) -> tuple[Tensor, ...]:
    """x W^T + bias for each weight: x is read once and the threads share all weights in one walk

    The weights stay where they are: what each gives is what it would give alone, bit for bit.

    Args:
        x: [..., k]; as for `linear`.
        weights: [n_i, k] each, from `pack_linear`, of one dtype; the n_i may differ.
        biases: [n_i] each, or None.

    Returns:
        [..., n_i] for each weight: side by side in one tensor, so not contiguous.

    Raises:
        TypeError, ValueError: an argument that cannot be; see the text of the error.
    """
    if not weights:
        raise ValueError("weights is empty, but must hold at least one weight")
    x = _input(x, weights[0], "weights[0]")
    biases = [None] * len(weights) if biases is None else list(biases)
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        # A frozen graph keeps a list of weights as one constant, out of which the first call of an
        # op of the stable ABI moves the tensors: the second finds none.
        return tuple(linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    if len(biases) != len(weights):
        raise ValueError(f"biases has {len(biases)} entries, but weights has {len(weights)}")
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        _check_packed(f"weights[{i}]", weight)
        if not alike(weight, weights[0]):
            raise ValueError(f"weights[{i}] is {weight}, but the first is {weights[0]}")
        _check.vector(f"biases[{i}]", bias, weight.out_features, "the result")
    sizes = [weight.out_features for weight in weights]
    biased = sum(1 << i for i, bias in enumerate(biases) if bias is not None)
    present = [bias.detach() for bias in biases if bias is not None]  # autograd sees no lists
    result = call(_concat, x, [w.packed for w in weights], present, biased, sum(sizes))
    return tuple(torch.split(_output(result), sizes, -1))


def _input(x: Tensor, weight: PackedWeight, name: str = "weight") -> Tensor:
    """x in the dtype in which it meets `weight`, both checked."""
    if type(weight) is not PackedWeight:
        _check_packed(name, weight)
    dtype = weight.public_dtype
    try:
        if x.dtype is dtype and x.shape[-1] == weight.in_features:
            return x
    except (AttributeError, IndexError, RuntimeError):
        pass
    if _check.row("x", x) != weight.in_features:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but its last dimension must be {weight.in_features}, "
            f"the in_features of {name}"
        )
    if x.dtype is not dtype:
        if torch.is_autocast_enabled("cpu"):
            return x.to(dtype)
        if x.dtype is not torch.float32 or dtype is not torch.bfloat16:
            raise TypeError(f"x is {x.dtype}, but must be {dtype}, the dtype of {name}")
    return x


def _output(result: Tensor) -> Tensor:
    """In the dtype that torch's linear gives under CPU autocast."""
    if torch.is_autocast_enabled("cpu"):
        return result.to(torch.get_autocast_dtype("cpu"))
    return result


def _with_operands(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None,
    post: str,
    other: Tensor | None,
    other2: Tensor | None,
) -> Tensor:
    operands = [o for o in (other, other2) if o is not None]
    count = _OPERANDS.get(post, 0)
    if len(operands) != count or (count == 1 and other is None):
        raise ValueError(f"post {post!r} takes {count} of other and other2, not {len(operands)}")
    shape = (*x.shape[:-1], weight.out_features)
    fits = not torch.is_autocast_enabled("cpu") or x.dtype is torch.get_autocast_dtype("cpu")
    for name, operand in (("other", other), ("other2", other2)):
        if operand is None:
            continue
        _check.tensor(name, operand)
        fits = fits and operand.dtype is x.dtype
        if operand.shape != shape:
            fits = fits and _broadcast(name, operand, shape) == shape
    n = weight.out_features
    if not fits:
        return UNFUSED[post](linear(x, weight, bias), *operands)
    u, v = (None if o is None else o.expand(shape) for o in (other, other2))
    args = (x, weight.packed, bias, n, _POSTS[post], u, v)
    return cast(Tensor, call(_linear, *args, check=_check_linear))


def _check_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, *_: object
) -> None:
    _check.row("x", x)
    _check.vector("bias", bias, out_features, "the result")


def _check_gate_up(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    out_features: int,
) -> None:
    _check.row("x", x)
    _check.vector("gate_bias", gate_bias, out_features, "the result")
    _check.vector("up_bias", up_bias, out_features, "the result")


def _broadcast(name: str, operand: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(operand.shape, shape))  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise ValueError(
            f"{name} has shape {tuple(operand.shape)}, which does not broadcast with that of the "
            f"result, {shape}"
        ) from None


def _fake_result(x: Tensor, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


@register_fake("linear")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_features: int,
    post: int,
    other: Tensor | None,
    other2: Tensor | None,
) -> Tensor:
    _check_linear(x, weight, bias, out_features)
    return _fake_result(x, out_features)


@register_fake("linear_gate_up")
def _(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    out_features: int,
) -> Tensor:
    _check_gate_up(x, gate, up, gate_bias, up_bias, out_features)
    return _fake_result(x, out_features)


@register_fake("linear_concat")
def _(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], biased: int, out_features: int
) -> Tensor:
    return _fake_result(x, out_features)
