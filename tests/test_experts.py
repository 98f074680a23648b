"""Mixtures of experts, packed or quantized, against float64, and as parameters of a model."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers import assert_same_bits
from lmfuse import functional
from lmfuse.functional import PackedExperts
from lmfuse.quantization.codes import quantize_weight

E, N, K = 5, 36, 40
SLOPE, LIMIT = 1.2, 1.5


def clamped(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    return gate * (SLOPE * gate).sigmoid() * (up + 1)


ACTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "clamped_swiglu": clamped,
}


def sample(dtype: torch.dtype, tokens: int = 7, chosen: int = 2) -> tuple[Tensor, ...]:
    """x, index, weights, gate_up, down; no token chooses expert 3."""
    x = torch.randn(tokens, K).to(dtype)
    index = torch.tensor([0, 1, 2, 4])[torch.rand(tokens, 4).topk(chosen).indices]
    gate_up, down = torch.randn(E, 2 * N, K) / 6, torch.randn(E, K, N) / 6
    return x, index, torch.rand(tokens, chosen), gate_up.to(dtype), down.to(dtype)


def expected(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    act: str,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """In float64, but for what the kernels round: the product of gate and up."""
    rows = []
    above = torch.zeros(gate_up.shape[:2]) if gate_up_bias is None else gate_up_bias
    below = torch.zeros(down.shape[:2]) if down_bias is None else down_bias
    for t in range(len(x)):
        row = torch.zeros(down.shape[1], dtype=torch.float64)
        for e, w in zip(index[t].tolist(), weights[t].double(), strict=True):
            gate, up = (gate_up[e].double() @ x[t].double() + above[e].double()).chunk(2)
            hidden = ACTS[act](gate, up).to(x.dtype).double()
            row += w * (down[e].double() @ hidden + below[e].double()).to(x.dtype).double()
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("act", ACTS)
@torch.no_grad()
def test_tokens_go_through_their_experts(isa: str, dtype: torch.dtype, act: str) -> None:
    x, index, weights, gate_up, down = sample(dtype)
    packed = functional.pack_experts(gate_up, 2), functional.pack_experts(down)
    y = functional.experts(x, index, weights, *packed, act, slope=SLOPE, limit=LIMIT)
    assert y.dtype is dtype
    close = expected(x, index, weights, gate_up, down, act)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.01}[dtype]
    torch.testing.assert_close(y.double(), close, rtol=tolerance, atol=tolerance)
    for t in range(len(x)):  # a token's bits do not depend on the others
        given = (x[t : t + 1], index[t : t + 1], weights[t : t + 1])
        one = functional.experts(*given, *packed, act, slope=SLOPE, limit=LIMIT)
        assert_same_bits(one[0], y[t])
    assert functional.experts(x[:0], index[:0], weights[:0], *packed).shape == (0, K)


@pytest.mark.parametrize("act", ["silu", "gelu", "clamped_swiglu"])
@pytest.mark.parametrize("kind", [None, "int8"])
@torch.no_grad()
def test_biases(isa: str, dtype: torch.dtype, kind: str | None, act: str) -> None:
    x, index, weights, gate_up, down = sample(dtype)
    biases = torch.randn(E, 2 * N).to(dtype), torch.randn(E, K)
    how: dict[str, Any] = {"slope": SLOPE, "limit": LIMIT, "compute": "fp32"}
    how |= dict(zip(("gate_up_bias", "down_bias"), biases, strict=True))
    packed: list[Tensor]
    if kind is None:
        packed = [functional.pack_experts(gate_up, 2), functional.pack_experts(down)]
    else:
        packed = [quantized_rows(w, p, kind, -1) for w, p in ((gate_up, 2), (down, 1))]
        gate_up, down = values(packed[0], 2, N), values(packed[1], 1, K)
        how["inner_features"] = N
    y = functional.experts(x, index, weights, *packed, act, **how)
    close = expected(x, index, weights, gate_up, down, act, *biases)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.01}[dtype]
    torch.testing.assert_close(y.double(), close, rtol=tolerance, atol=tolerance)
    one = functional.experts(x[3:4], index[3:4], weights[3:4], *packed, act, **how)
    assert_same_bits(one[0], y[3])


@torch.no_grad()
def test_what_is_clamped_may_be_infinite(isa: str) -> None:
    """Infinities are clamped, NaN stays."""
    x, index, weights = torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    x *= torch.tensor([[torch.inf], [-torch.inf], [torch.nan]])
    packed = (
        functional.pack_experts(torch.ones(1, 2, 1), 2),
        functional.pack_experts(torch.ones(1, 1, 1)),
    )
    y = functional.experts(x, index, weights, *packed, "clamped_swiglu", slope=SLOPE, limit=LIMIT)
    assert torch.equal(y.isnan().flatten(), torch.tensor([False, True, True]))
    torch.testing.assert_close(y[0], clamped(x[0], x[0]))


@pytest.mark.parametrize("tokens", [1, 2, 70])
@pytest.mark.parametrize(("experts", "chosen"), [(2, 1), (9, 4), (3, 3)])
@torch.no_grad()
def test_any_number_of_tokens_experts_and_choices(
    isa: str, tokens: int, experts: int, chosen: int
) -> None:
    n, k = 24, 65
    x, weights = torch.randn(tokens, k), torch.rand(tokens, chosen)
    index = torch.rand(tokens, experts).topk(chosen).indices
    index[-1] = index[-1, 0]  # one expert, several times
    gate_up, down = torch.randn(experts, 2 * n, k) / 8, torch.randn(experts, k, n) / 5
    packed = functional.pack_experts(gate_up, 2), functional.pack_experts(down)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = functional.experts(x, index.int(), weights, *packed)
        close = expected(x, index, weights, gate_up, down, "silu").float()
        torch.testing.assert_close(y, close, rtol=1e-5, atol=1e-5)
    strided = functional.experts(
        x.t().contiguous().t(), index.t().contiguous().t(), weights.t().contiguous().t(), *packed
    )
    assert_same_bits(strided, y)


@pytest.mark.parametrize("compute", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("kind", "group"), [("int8", -1), ("int4", 32), ("nf4", 64), ("fp8", -1)])
@torch.no_grad()
def test_quantized_experts(
    isa: str, dtype: torch.dtype, kind: str, group: int, compute: str
) -> None:
    x, index, weights, gate_up, down = sample(dtype)
    quantized = [quantized_rows(gate_up, 2, kind, group), quantized_rows(down, 1, kind, group)]
    how: dict[str, Any] = {"compute": compute, "inner_features": N}
    how |= {"slope": SLOPE, "limit": LIMIT}

    def run(x: Tensor, index: Tensor, weights: Tensor, act: str = "silu") -> Tensor:
        return functional.experts(x, index, weights, *quantized, act, **how)

    if compute == "int8" and kind in ("nf4", "fp8"):
        with pytest.raises(ValueError, match="int8 and int4 weights"):
            run(x, index, weights)
        return
    plain = [values(quantized[0], 2, N), values(quantized[1], 1, K)]
    tolerance = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.05}[compute]
    tolerance = max(tolerance, {torch.float32: 0, torch.bfloat16: 0.04, torch.float16: 0.01}[dtype])
    for act in ACTS:
        y = run(x, index, weights, act)
        assert y.dtype is dtype
        close = expected(x, index, weights, *plain, act)
        torch.testing.assert_close(y.double(), close, rtol=tolerance, atol=tolerance)
    y = run(x, index, weights)
    for t in range(len(x)):  # a token's bits do not depend on the others
        assert_same_bits(run(x[t : t + 1], index[t : t + 1], weights[t : t + 1])[0], y[t])
    del how["inner_features"]  # the bytes say it, too
    assert_same_bits(run(x, index, weights), y)


def quantized_rows(weight: Tensor, parts: int, kind: str, group: int) -> Tensor:
    scale_dtype = torch.float32 if group == -1 else torch.bfloat16
    rows = functional.expert_rows(weight, parts)
    found = quantize_weight(rows, kind, group, kind != "int4", "plain", scale_dtype)
    return functional.pack_quantized(kind, found.codes, found.scales, found.zeros, group_size=group)


def values(packed: Tensor, parts: int, n: int) -> Tensor:
    """[experts, parts n, k]: what quantized experts stand for."""
    plain = functional.dequantize(packed)
    return plain.view(E * parts, -1, plain.shape[1])[:, :n].reshape(E, parts * n, -1)


@torch.no_grad()
def test_packed_experts_are_a_parameter_like_any_other(dtype: torch.dtype) -> None:
    _, _, _, gate_up, down = sample(dtype)
    for plain, parts in ((gate_up, 2), (down, 1), (gate_up[:, :, ::2], 2)):
        packed = functional.pack_experts(plain, parts)
        assert (packed.shape, packed.dtype) == (plain.shape, dtype)
        assert_same_bits(packed.unpack(), plain)
        assert_same_bits(packed + 0, plain + 0)
        assert_same_bits(copy.deepcopy(packed).unpack(), plain)
        half = packed.to(torch.bfloat16)
        assert isinstance(half, PackedExperts)
        assert_same_bits(half.unpack(), plain.bfloat16())
        packed.mul_(2)
        assert_same_bits(packed.unpack(), plain * 2)
        packed.copy_(plain)
        file = io.BytesIO()
        torch.save(packed, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)  # our own file
        assert again.parts == parts
        assert_same_bits(again.unpack(), plain)
        turned = plain.reshape(E, parts, -1, plain.shape[2]).permute(0, 3, 2, 1).flatten(2)
        other = functional.pack_experts(turned, parts, transposed=True)
        assert other.shape == turned.shape
        assert_same_bits(other.packed, packed.packed)
        assert_same_bits(other.unpack(), turned)
        assert_same_bits(copy.deepcopy(other).mul_(2).unpack(), turned * 2)
        assert_same_bits(pickle.loads(pickle.dumps(other)).packed, packed.packed)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_and_a_graph_choose_anew() -> None:
    x, index, weights, gate_up, down = sample(torch.float32)
    g, d = functional.pack_experts(gate_up, 2), functional.pack_experts(down)

    def run(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return functional.experts(x, index, weights, g, d)

    traced = torch.jit.trace(run, (x, index, weights))
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for other in (index, index.flip(0), torch.full_like(index, 3)):
        assert torch.equal(traced(x, other, weights), run(x, other, weights))
        assert torch.equal(compiled(x, other, weights), run(x, other, weights))


def test_what_cannot_be_is_refused_in_words() -> None:
    x, index, weights, gate_up, down = sample(torch.float32)
    g, d = functional.pack_experts(gate_up, 2), functional.pack_experts(down)
    with pytest.raises(ValueError, match=r"weight has shape \(5, 72, 40\), but .* 5 n, k"):
        functional.pack_experts(gate_up, 5)
    with pytest.raises(TypeError, match="gate_up must come from pack_experts with parts 2"):
        functional.experts(x, index, weights, d, d)
    with pytest.raises(ValueError, match=r"down is .* does not fit gate_up"):
        functional.experts(x, index, weights, g, functional.pack_experts(down[:, :, :8]))
    with pytest.raises(ValueError, match=r"x has shape .* but must be \[tokens, 40\]"):
        functional.experts(x[:, :8], index, weights, g, d)
    with pytest.raises(TypeError, match=r"x is torch\.bfloat16, but must be torch\.float32"):
        functional.experts(x.bfloat16(), index, weights, g, d)
    with pytest.raises(ValueError, match="gate_up has 5 experts, but down has 4"):
        functional.experts(x, index, weights, g, functional.pack_experts(down[:4]))
    with pytest.raises(ValueError, match="index has shape"):
        functional.experts(x, index[:3], weights, g, d)
    with pytest.raises(ValueError, match=r"must be \[experts, k, 3 n\]"):
        functional.pack_experts(gate_up, 3, transposed=True)
    for wide in (torch.ones(E, N), torch.ones(2 * N * E), torch.ones(E - 1, 2 * N)):
        with pytest.raises(ValueError, match="gate_up"):
            functional.experts(x, index, weights, g, d, gate_up_bias=wide)
    with pytest.raises(ValueError, match=r"down_bias has shape .* \[experts, 40\]"):
        functional.experts(x, index, weights, g, d, down_bias=torch.ones(E, 2 * N))
    with pytest.raises(ValueError, match="limit is -1"):
        functional.experts(x, index, weights, g, d, "clamped_swiglu", limit=-1)
    with pytest.raises(ValueError, match="act is 'relu'"):
        functional.experts(x, index, weights, g, d, "relu")
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match="but there are 5 experts"):
            functional.experts(x, torch.full_like(index, wrong), weights, g, d)
    with pytest.raises(ValueError, match=r"weight has shape .* must be \[experts, 5 n, k\]"):
        functional.expert_rows(gate_up, 5)
    q, r = quantized_rows(gate_up, 2, "int8", -1), quantized_rows(down, 1, "int8", -1)
    with pytest.raises(TypeError, match="down must come from pack_experts with parts 1"):
        functional.experts(x, index, weights, g, r)
    with pytest.raises(ValueError, match=r"gate_up is 640 by 40, but must be 10 times 96"):
        functional.experts(x, index, weights, q, r, inner_features=72)
    fewer = quantized_rows(down[:4], 1, "int8", -1)
    with pytest.raises(ValueError, match="gate_up is 640 by 40, but must be 8 times 64"):
        functional.experts(x, index, weights, q, fewer, inner_features=N)
    with pytest.raises(TypeError, match=r"gate_up is torch\.float32"):
        functional.experts(x, index, weights, gate_up, r)
    with pytest.raises(ValueError, match="header"):
        functional.experts(x, index, weights, torch.zeros_like(q), r)
