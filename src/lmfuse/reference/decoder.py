"""Decoder layers in plain torch, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lmfuse.reference.attention import attention
from lmfuse.reference.norm import layer_norm, rms_norm

_ACTIVATIONS: dict[str | None, Any] = {
    None: lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
}


def decoder(
    x: Tensor,
    layers: Sequence[Any],
    cos: Sequence[Tensor] | Tensor | None = None,
    sin: Sequence[Tensor] | Tensor | None = None,
) -> Tensor:
    """[batch, tokens, hidden] through `layers` (see `lmfuse.functional.DecoderLayer`), without a
    cache or padding, in the dtype of x; with tables for all, or for each kind."""
    for layer in layers:
        c, s = (t if t is None or isinstance(t, Tensor) else t[layer.kind] for t in (cos, sin))
        attended = linear(attend(layer, norm(layer.attention_input, x), c, s), layer.output)
        if layer.parallel:
            x = x + attended + mlp(layer, norm(layer.mlp_input, x))
            continue
        x = x + layer.residual_scale * norm(layer.attention_output, attended)
        inner = mlp(layer, norm(layer.mlp_input, x))
        x = x + layer.residual_scale * norm(layer.mlp_output, inner)
    return x


def attend(layer: Any, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Causal attention of x, [batch, tokens, heads * head_dim]."""
    batch, tokens, _ = x.shape
    heads, kv_heads, dim = layer.heads, layer.kv_heads, layer.head_dim
    parts = [linear(x, p) for p in (layer.query, layer.key, layer.value) if p is not None]
    if len(parts) == 1:
        groups = parts[0].reshape(batch, tokens, layer.groups, -1)
        each = [n // layer.groups * dim for n in (heads, kv_heads, kv_heads)]
        parts = [p.flatten(2) for p in torch.split(groups, each, -1)]
        if layer.values_first:
            parts[1:] = parts[:0:-1]
    parts[0] = over(layer.query_norm, parts[0], dim)
    parts[1] = over(layer.key_norm, parts[1], dim)
    q, k, v = (p.reshape(batch, tokens, -1, dim) for p in parts)
    if layer.rotary_dim and cos is not None and sin is not None:
        q, k = (rotated(p, layer, cos, sin) for p in (q, k))
    out = attention(
        q,
        k,
        v,
        causal=True,
        scale=layer.scale,
        softcap=layer.softcap,
        alibi=layer.alibi,
        sinks=layer.sinks,
        window=(layer.window, -1),
    )
    return out.flatten(2)


def mlp(layer: Any, x: Tensor) -> Tensor:
    """down(f(gate(x)) up(x)), or down(f(gate(x))), or some experts that compute the former."""
    if layer.experts is not None:
        return mixture(layer, x)
    return dense(layer, x)


def dense(layer: Any, x: Tensor) -> Tensor:
    """The MLP of a layer, or the expert that all tokens share."""
    inner = linear(x, layer.gate)
    if layer.gated:
        gate, up = (inner, linear(x, layer.up)) if layer.up is not None else inner.chunk(2, -1)
        inner = _ACTIVATIONS[layer.activation](gate) * up
    else:
        inner = _ACTIVATIONS[layer.activation](inner)
    return linear(inner, layer.down)


def mixture(layer: Any, x: Tensor) -> Tensor:
    """Each token through those experts that the router makes the most probable, and through that
    which all share."""
    mixed = layer.experts
    p, index = linear(x, mixed.router).softmax(-1).topk(mixed.chosen)
    if mixed.normalized:
        p = p / p.sum(-1, keepdim=True)
    gate_up, down = (w.unpack().to(x) for w in (mixed.gate_up, mixed.down))
    inner = torch.einsum("btk,enk->bten", x, gate_up)
    if mixed.gate_up_bias is not None:
        inner = inner + mixed.gate_up_bias.to(x)
    gate, up = inner.chunk(2, -1)
    if layer.activation == "clamped_swiglu":
        gate, up = gate.clamp(max=mixed.limit), up.clamp(-mixed.limit, mixed.limit)
        inner = gate * (mixed.slope * gate).sigmoid() * (up + 1)
    else:
        inner = _ACTIVATIONS[layer.activation](gate) * up
    each = torch.einsum("bten,ekn->btek", inner, down)
    if mixed.down_bias is not None:
        each = each + mixed.down_bias.to(x)
    rows = each.gather(2, index.unsqueeze(-1).expand(*index.shape, each.shape[-1]))
    y = (rows * p.unsqueeze(-1)).sum(2)
    if layer.down is None:
        return y
    gate = mixed.shared_gate
    return y + dense(layer, x) * (1.0 if gate is None else linear(x, gate).sigmoid())


def rotated(x: Tensor, layer: Any, cos: Tensor, sin: Tensor) -> Tensor:
    """The first rotary_dim elements of each head, in pairs."""
    n = layer.rotary_dim // 2
    c, s = (t[..., :n].to(x).unsqueeze(2) for t in (cos, sin))
    turned, rest = x[..., : 2 * n], x[..., 2 * n :]
    if layer.rotary_half:
        a, b = turned.chunk(2, -1)
        return torch.cat((a * c - b * s, b * c + a * s, rest), -1)
    a, b = turned[..., ::2], turned[..., 1::2]
    return torch.cat((torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2), rest), -1)


def over(given: Any, x: Tensor, dim: int) -> Tensor:
    """A norm over heads of `dim`, or over the whole row."""
    if given is None or (given.weight is not None and given.weight.numel() != dim):
        return norm(given, x)
    return norm(given, x.reshape(*x.shape[:-1], -1, dim)).flatten(-2)


def norm(given: Any, x: Tensor) -> Tensor:
    """x itself if there is none."""
    if given is None:
        return x
    weight = None if given.weight is None else given.weight.to(x) + given.offset
    if not given.centered:
        return rms_norm(x, weight, given.eps)
    return layer_norm(x, weight, None if given.bias is None else given.bias.to(x), given.eps)


def linear(x: Tensor, given: Any) -> Tensor:
    """x W^T + bias"""
    weight, bias = given.weight, given.bias
    if hasattr(weight, "unpack"):
        weight = weight.unpack()
    return F.linear(x, weight.to(x), None if bias is None else bias.to(x))
