"""What a decoder layer computes, and the numbers by which the op is told.

A layer is a row of integers and a row of numbers, which csrc/ops/decoder_layers.h reads in this
order; its tensors are named by their place in a list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmfuse.functional.experts import ACTIVATIONS, PackedExperts
from lmfuse.functional.linear import _POSTS
from lmfuse.functional.packed import PackedWeight, is_matrix
from lmfuse.functional.woq import _how


@dataclass(frozen=True, eq=False)
class DecoderNorm:
    """A norm over rows; see `rms_norm` and `layer_norm` for the formulas.

    Attributes:
        weight: [n], or None for ones.
        bias: [n], of the dtype of weight, or None.
        eps: added to the mean square.
        centered: subtract the mean: layer norm.
        offset: added to the weight.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    eps: float = 1e-6
    centered: bool = False
    offset: float = 0.0


@dataclass(frozen=True, eq=False)
class DecoderLinear:
    """x W^T + bias, with W [n, k] packed or quantized.

    Attributes:
        weight: from `pack_linear`, or the bytes of `pack_quantized`.
        bias: [n].
        compute, block_scales: of a quantized weight; see `woq_linear`.
    """

    weight: PackedWeight | Tensor
    bias: Tensor | None = None
    compute: str = "bf16"
    block_scales: bool = False


@dataclass(frozen=True, eq=False)
class DecoderExperts:
    """Σ_j p_j · down_e(f(z gate_e^T) · (z up_e^T)), over the experts e with the largest p; see
    `experts`.

    p are the softmax of z R^T, or of those chosen alone, if normalized. If the layer has gate, up
    and down as well, they are of one more expert, which all tokens share: times σ(z s^T), or 1.

    Attributes:
        router: R, [experts, hidden], and perhaps a bias.
        gate_up, down: of `pack_experts`, or of `pack_quantized`, as `experts` is given them.
        inner_features: n.
        chosen: how many experts.
        normalized: whether p of those chosen add up to 1.
        compute, block_scales: of quantized weights; see `woq_linear`.
        shared_gate: s, [1, hidden], or None.
        gate_up_bias, down_bias, slope, limit: see `experts`.
    """

    router: DecoderLinear
    gate_up: PackedExperts | Tensor
    down: PackedExperts | Tensor
    inner_features: int
    chosen: int
    normalized: bool = True
    compute: str = "bf16"
    block_scales: bool = False
    shared_gate: DecoderLinear | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    slope: float = 1.702
    limit: float = 7.0


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """What one layer computes, x being its input and A causal attention:

        q, k, v = rope(nq(z Q^T)), rope(nk(z K^T)), z V^T                 z = n1(x)
        h = x + c · n2(A(q, k, v) O^T)
        y = h + c · n4(mlp(n3(h)))    mlp(z) = (f(z G^T) · (z U^T)) D^T, or f(z G^T) D^T

    or, if it is parallel, y = x + A(q, k, v) O^T + mlp(n3(x)); with the biases of the projections.
    Norms that are None are left out. Packed weights have the dtype of x; quantized ones compute as
    `woq_linear` does, each in a way of its own.

    Attributes:
        heads, kv_heads, head_dim: of attention.
        query, key, value: their projections. If key and value are None, query gives all three:
            one group of heads after the other.
        groups: of heads; each has its queries, its keys and its values, in this order. (1: all
            queries, then all keys, then all values.) Those of separate projections are one.
        values_first: each group has its values before its keys.
        output, gate, up, down: O, G, U, D. If up is None and the MLP gated, G gives both halves.
        experts: a mixture of them for the MLP; gate, up and down are None then, or of an expert
            that all tokens share.
        gated: which of the two forms the MLP has.
        activation: f: relu, gelu, gelu_tanh, silu or (not gated) None; of experts one of theirs.
        attention_input, attention_output, mlp_input, mlp_output: n1, n2, n3, n4.
        query_norm, key_norm: nq, nk, over each head, or over all heads of a token at once.
        rotary_dim: how many elements of a head are rotated; 0 for no RoPE.
        rotary_half: pairs (j, j + rotary_dim/2), else (2j, 2j + 1).
        scale: of the scores.
        softcap: s of s·tanh(score / s); 0 for none.
        window: how many positions a query sees to its left; -1 for all.
        parallel: attention and MLP read the same x.
        residual_scale: c.
        alibi: float32 [heads], or None: slope · distance is subtracted from the scores.
        sinks: float32 [heads], or None: each a score more in the softmax, without a value.
        kind: which of the slots, tables and angles of a call the layer uses: those of one kind see
            the same positions. The first layer has 0, and each new kind the next number.
    """

    heads: int
    kv_heads: int
    head_dim: int
    query: DecoderLinear
    key: DecoderLinear | None
    value: DecoderLinear | None
    output: DecoderLinear
    gate: DecoderLinear | None
    up: DecoderLinear | None
    down: DecoderLinear | None
    scale: float
    gated: bool = True
    activation: str | None = "silu"
    attention_input: DecoderNorm | None = None
    query_norm: DecoderNorm | None = None
    key_norm: DecoderNorm | None = None
    attention_output: DecoderNorm | None = None
    mlp_input: DecoderNorm | None = None
    mlp_output: DecoderNorm | None = None
    groups: int = 1
    values_first: bool = False
    rotary_dim: int = 0
    rotary_half: bool = True
    softcap: float = 0.0
    window: int = -1
    parallel: bool = False
    residual_scale: float = 1.0
    kind: int = 0
    alibi: Tensor | None = None
    sinks: Tensor | None = None
    experts: DecoderExperts | None = None

    @property
    def router(self) -> DecoderLinear | None:
        """That of the experts."""
        return None if self.experts is None else self.experts.router

    @property
    def shared_gate(self) -> DecoderLinear | None:
        """That of the expert which all tokens share."""
        return None if self.experts is None else self.experts.shared_gate

    def linears(self) -> list[DecoderLinear]:
        """Those that there are."""
        return [linear for _, linear in _linears(self) if linear is not None]


def layer_row(layer: DecoderLayer, parameters: list[Tensor]) -> tuple[list[int], list[float]]:
    """The integers and numbers of a layer; its tensors join `parameters`."""
    place = placing(parameters)
    integers: list[int] = []
    numbers: list[float] = []
    for norm in _norms(layer):
        of_norm = norm_row(norm, place)
        integers += of_norm[0]
        numbers += of_norm[1]
    for name, linear in _linears(layer):
        integers += linear_row(name, linear, place)
    of_experts, of_activation = _experts(layer, place)
    integers += of_experts
    numbers += of_activation
    post = _POSTS.get(layer.activation, 5)
    if layer.experts is not None and layer.down is None:
        post = 0
    if post > 4:
        raise ValueError(
            f"activation is {layer.activation!r}, but must be relu, gelu, gelu_tanh, silu or None"
        )
    normalized = layer.experts is not None and layer.experts.normalized
    flags = layer.parallel + 2 * layer.gated + 4 * normalized
    integers += (layer.heads, layer.kv_heads, layer.head_dim, *_columns(layer))
    integers += (layer.rotary_dim, int(layer.rotary_half), layer.window, flags)
    integers += (post, layer.kind, place(layer.alibi), place(layer.sinks))
    numbers += (layer.scale, layer.softcap, layer.residual_scale)
    return integers, numbers


# Where a row of integers has them, from its end.
_KV_HEADS, _HEAD_DIM, _WINDOW, _KIND = -14, -13, -6, -3


def cache_sizes(layout: Tensor) -> list[int]:
    """Of layers with these rows of integers kv_heads and head_dim, and the window of each kind."""
    rows: list[list[int]] = layout.tolist()
    windows = {row[_KIND]: row[_WINDOW] for row in rows}
    return [rows[0][_KV_HEADS], rows[0][_HEAD_DIM], *(windows[k] for k in sorted(windows))]


def placing(parameters: list[Tensor]) -> Callable[[Tensor | None], int]:
    """What lets a tensor join `parameters` and says its place there."""

    def place(tensor: Tensor | None) -> int:
        if tensor is None:
            return -1
        parameters.append(tensor)
        return len(parameters) - 1

    return place


def norm_row(
    norm: DecoderNorm | None, place: Callable[[Tensor | None], int]
) -> tuple[list[int], list[float]]:
    if norm is None:
        return [0, -1, -1], [0.0, 0.0]
    kind = 2 if norm.centered else 1
    return [kind, place(norm.weight), place(norm.bias)], [norm.eps, norm.offset]


def linear_row(
    name: str, linear: DecoderLinear | None, place: Callable[[Tensor | None], int]
) -> list[int]:
    if linear is None:
        return [-1, -1, -1]
    if is_matrix(linear.weight):
        return [place(linear.weight.packed), -1, place(linear.bias)]
    if linear.weight.dtype is not torch.uint8:
        raise TypeError(
            f"the weight of {name} is neither packed nor quantized; see pack_linear and "
            "pack_quantized"
        )
    compute, block_scales = _how(linear.compute, linear.block_scales)
    return [place(linear.weight), 2 * compute + block_scales, place(linear.bias)]


def _norms(layer: DecoderLayer) -> Iterator[DecoderNorm | None]:
    yield from (layer.attention_input, layer.query_norm, layer.key_norm)
    yield from (layer.attention_output, layer.mlp_input, layer.mlp_output)


def _linears(layer: DecoderLayer) -> Iterator[tuple[str, DecoderLinear | None]]:
    for name in ("query", "key", "value", "output", "gate", "up", "down", "router", "shared_gate"):
        yield name, getattr(layer, name)


def _experts(
    layer: DecoderLayer, place: Callable[[Tensor | None], int]
) -> tuple[list[int], tuple[float, float]]:
    """The integers and numbers of a mixture."""
    experts, act = layer.experts, layer.activation
    if experts is None:
        return [-1, -1, -1, 0, 0, 0, -1, -1], (0.0, 0.0)
    if act not in ACTIVATIONS:
        raise ValueError(
            f"activation is {act!r}, but that of experts must be silu or gelu, or one "
            f"of {', '.join(ACTIVATIONS)}"
        )
    weights: list[Any] = [experts.gate_up, experts.down]
    packed = [isinstance(w, PackedExperts) for w in weights]
    if all(packed):
        how, given = -1, [w.packed.view(-1) for w in weights]
    elif not any(packed):
        compute, block_scales = _how(experts.compute, experts.block_scales)
        how, given = 2 * compute + block_scales, weights
    else:
        raise TypeError("gate_up and down of experts must both be packed, or both quantized")
    integers = [*map(place, given), how, experts.inner_features, experts.chosen]
    biases = (experts.gate_up_bias, experts.down_bias)
    flat = (None if b is None else b.detach().contiguous().view(-1) for b in biases)
    return [*integers, ACTIVATIONS.index(act), *map(place, flat)], (experts.slope, experts.limit)


def _columns(layer: DecoderLayer) -> tuple[int, int, int, int]:
    """How many groups there are in a row of the projections, how wide they are, and where in them
    keys and values begin."""
    groups = max(layer.groups, 1)  # the op refuses others
    queries, keys = (n // groups * layer.head_dim for n in (layer.heads, layer.kv_heads))
    first, second = queries, queries + keys
    if layer.values_first:
        first, second = second, first
    return layer.groups, queries + 2 * keys, first, second
