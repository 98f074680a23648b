"""Mixtures of experts in the shape of Qwen3-30B-A3B's, from one token to a prompt.

Weights come from memory, as in a model: each call of few tokens takes other experts. Stock is the
loop of transformers over those that some token chose, in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lmfuse import functional
from lmfuse.bench.case import Case, Inputs, walk
from lmfuse.bench.woq import copied
from lmfuse.quantization.codes import quantize_weight
from lmfuse.reference import woq as reference

N, K, CHOSEN = 768, 2048, 8
_COLD_BYTES = 512 << 20
# What an expert gives to its second product, and its result, are rounded as well: some four times
# the error of one rounding.
_ACCURACY = 2.0**-5.5


def _quantized(kind: str, group: int, weight: Tensor, parts: int) -> Tensor:
    rows = functional.expert_rows(weight, parts)
    dtype = torch.float32 if group == -1 else torch.bfloat16
    q = quantize_weight(rows, kind, group, kind == "int8", "plain", dtype)
    return functional.pack_quantized(kind, q.codes, q.scales, q.zeros, group_size=group)


def _inputs(
    experts: int, kind: str, group: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Inputs:
    index = torch.rand(shape[0], experts).topk(CHOSEN).indices
    weights = torch.rand(shape[0], CHOSEN) / CHOSEN
    gate_up = (torch.randn(experts, 2 * N, K) / K**0.5).to(dtype)
    down = (torch.randn(experts, K, N) / N**0.5).to(dtype)
    x = torch.randn(shape).to(dtype)
    if kind == "bf16":
        return x, index, weights, gate_up, down
    return (
        x,
        index,
        weights,
        _quantized(kind, group, gate_up, 2),
        _quantized(kind, group, down, 1),
    )


def _plain(parts: int, n: int, weight: Tensor) -> Tensor:
    """[experts, parts · n, k] of what `run` is given."""
    if weight.dim() == 3:
        return weight
    values = functional.dequantize(weight.to(torch.uint8))
    return values.view(-1, parts * n, values.shape[1])


_plain_gate_up, _plain_down = partial(_plain, 2, N), partial(_plain, 1, K)


def _stock_gate_up(weight: Tensor) -> Tensor:
    return _plain_gate_up(weight).to(torch.bfloat16, copy=True)


def _stock_down(weight: Tensor) -> Tensor:
    return _plain_down(weight).to(torch.bfloat16, copy=True)


_pack_gate_up = partial(functional.pack_experts, parts=2)


def _as_is(x: Tensor) -> Tensor:
    return x


def _as_int8(x: Tensor) -> Tensor:
    return reference.quantize_rows(x.bfloat16().double())


def _loop(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    seen: Callable[[Tensor], Tensor] = _as_is,
) -> Tensor:
    """As transformers' eager experts; `seen`: what products read of their rows."""
    y = torch.zeros_like(x)
    for expert in sorted(set(index.flatten().long().tolist())):
        token, place = torch.where(index == expert)
        gate, up = F.linear(seen(x[token]), gate_up[expert]).chunk(2, -1)
        found = F.linear(seen(F.silu(gate) * up), down[expert])
        y.index_add_(0, token, (found * weights[token, place, None]).to(y.dtype))
    return y


def case(tokens: int, experts: int, kind: str, group: int = -1, compute: str = "bf16") -> Case:
    """kind "bf16": packed, not quantized."""
    item = {"bf16": 2.0, "int8": 1.0, "int4": 0.5}[kind]
    copies = max(1, round(_COLD_BYTES / (3 * experts * N * K * item)))

    def run(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        if kind == "bf16":
            g, d = (
                walk(gate_up, copies, _pack_gate_up),
                walk(down, copies, functional.pack_experts),
            )
            return functional.experts(x, index, weights, g, d)
        g, d = walk(gate_up, copies, copied), walk(down, copies, copied)
        return functional.experts(x, index, weights, g, d, inner_features=N, compute=compute)

    def stock(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        few = max(1, round(copies * item / 2))
        plain = walk(gate_up, few, _stock_gate_up), walk(down, few, _stock_down)
        return _loop(x, index, weights, *plain)

    def exact(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        plain = _plain_gate_up(gate_up).double(), _plain_down(down).double()
        return _loop(x, index, weights, *plain, _as_int8 if compute == "int8" else _as_is)

    name = kind if group == -1 else f"{kind} g{group}"
    return Case(
        f"{CHOSEN} experts, {name}" + (f", {compute}" if kind != "bf16" else ""),
        "decode" if tokens <= 16 else "prompt",
        (tokens, K),
        torch.bfloat16,
        partial(_inputs, experts, kind, group),
        run,
        stock,
        exact,
        "roof",
        6 * tokens * CHOSEN * N * K,
        accuracy=_ACCURACY,
        unit="int8" if compute == "int8" else "bf16",
    )


_FORMS: list[tuple[str, int, str]] = [
    ("bf16", -1, "bf16"),
    ("int8", -1, "int8"),
    ("int4", 128, "bf16"),
    ("int4", 128, "int8"),
]

CASES = [
    *(case(1, CHOSEN, *form) for form in _FORMS),
    *(case(512, 32, *form) for form in _FORMS),
]
