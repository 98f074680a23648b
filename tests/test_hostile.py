"""Hostile arguments of the functions, one at a time, as `hostile` has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hostile import HOSTILE, SAME, Arguments, Call, check_numbers, check_tensors
from lmfuse import functional as F


def _heads(*shape: int) -> Tensor:
    return torch.randn(*shape, 16)


def _bytes(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def _past() -> tuple[Tensor, ...]:
    """A cache of two sequences that holds three tokens."""
    q, kv = _heads(2, 3, 4), _heads(2, 3, 2)
    cache = F.indirect_access_kv_cache_attention(q, kv, kv, 4.0, text_max_length=8)[2]
    assert cache is not None
    return cache


def _placeholder() -> tuple[Tensor, ...]:
    states = torch.zeros(1, 1, 1, 1)
    none = torch.zeros(1, 0, 0, 1, dtype=torch.long)
    return none, states, states.clone(), torch.zeros(4, 4, dtype=torch.long)


def _attention() -> Arguments:
    return {"query": _heads(2, 3, 4), "key": _heads(2, 9, 2), "value": _heads(2, 9, 2)} | {
        "mask": torch.randn(2, 1, 3, 9), "alibi": torch.rand(4), "sinks": torch.randn(4),
        "scale": 0.3, "window": (5, -1), "softcap": 2.0, "key_scale": 1.0, "value_scale": 1.0,
    }  # fmt: skip


def _attention_int8() -> Arguments:
    return {
        "query": _heads(2, 3, 4), "key": _bytes(2, 9, 2, 16), "value": _bytes(2, 9, 2, 16),
        "key_scales": torch.rand(2, 9, 2), "value_scales": torch.rand(2, 9, 2),
    }  # fmt: skip


def _varlen() -> Arguments:
    return {
        "query": _heads(6, 4), "key": _heads(8, 2), "value": _heads(8, 2),
        "out": torch.zeros(6, 4, 16), "seqlen_q": torch.tensor([0, 2, 6]),
        "seqlen_k": torch.tensor([0, 3, 8]).int(), "alibi_slopes": torch.rand(4),
        "max_seqlen_q": 4, "max_seqlen_k": 5, "pdropout": 0.0, "softmax_scale": 0.25,
        "zero_tensors": True, "is_causal": True, "return_softmax": False, "gen_": None,
        "window_size_left": 3, "window_size_right": 3, "softcap": 2.0,
    }  # fmt: skip


def _pages() -> Arguments:
    return {
        "output": torch.zeros(2, 4, 16), "query": _heads(2, 4), "key_cache": _heads(6, 2, 8),
        "value_cache": _heads(6, 2, 8), "block_tables": torch.tensor([[0, 1], [5, 3]]),
        "alibi_slopes": torch.rand(4), "scale": 0.25, "softcap": 2.0, "k_scale": 1.0,
    }  # fmt: skip


def _decode() -> Arguments:
    return _pages() | {
        "head_mapping": None, "context_lens": torch.tensor([9, 16]).int(), "block_size": 8,
        "max_context_len": 16, "window_size": 5,
    }  # fmt: skip


def _prompt() -> Arguments:
    return _pages() | {
        "cu_seqlens_q": torch.tensor([0, 1, 2]), "cu_seqlens_kv": torch.tensor([0, 9, 25]),
        "max_seqlen_q": 2, "max_seqlen_kv": 16, "is_cusal": True, "sinks": torch.randn(4),
        "window_size_left": 3, "window_size_right": 3,
    }  # fmt: skip


def _write() -> Arguments:
    return {
        "key": _heads(3, 2), "value": _heads(3, 2), "key_cache": torch.zeros(4, 2, 8, 16),
        "value_cache": torch.zeros(4, 2, 8, 16), "slot_mapping": torch.tensor([0, 5, 31]),
        "k_scale": 1.0,
    }  # fmt: skip


def _int8(arguments: Arguments) -> Arguments:
    """The same with caches of int8."""
    blocks, heads, size, dim = arguments["key_cache"].shape
    return arguments | {
        "key_cache": _bytes(blocks, heads, size, dim),
        "value_cache": _bytes(blocks, heads, size, dim),
        "key_scales": torch.rand(blocks, heads, size),
        "value_scales": torch.rand(blocks, heads, size),
    }  # fmt: skip


def _indirect() -> Arguments:
    return {
        "query": _heads(2, 1, 4), "key": _heads(2, 1, 2), "value": _heads(2, 1, 2),
        "scale_attn": torch.tensor(4.0), "layer_past": _past(),
        "attention_mask": torch.randn(2, 1, 1, 4), "seq_info": torch.tensor(3),
    }  # fmt: skip


def _indirect_first() -> Arguments:
    return {
        "query": _heads(2, 3, 4), "key": _heads(2, 3, 2), "value": _heads(2, 3, 2),
        "scale_attn": 4.0, "layer_past": _placeholder(),
        "attention_mask": torch.randn(2, 1, 1, 3), "text_max_length": 4,
    }  # fmt: skip


def _cross() -> Arguments:
    info, *_, parents = _past()
    return {
        "query": _heads(2, 3, 4), "key": _heads(2, 1, 2), "value": _heads(2, 1, 2),
        "layer_past": (info, _heads(2, 9, 2), _heads(2, 9, 2), parents), "seq_info": -1,
        "attention_mask": torch.randn(2, 1, 1, 9), "scale_attn": 4.0,
    }  # fmt: skip


def _indirect_cache() -> Arguments:
    return {
        "query": _heads(2, 1, 4), "key": _heads(2, 1, 2), "value": _heads(2, 1, 2),
        "layer_past": _past(), "mask": torch.rand(2, 4) > 0.1, "scale": 0.25,
        "sinks": torch.randn(4), "softcap": 3.0, "window": 2,
    }  # fmt: skip


def _packed(n: int = 64) -> Tensor:
    return F.pack_quantized("int8", _bytes(n, 64), torch.rand(n, 2), group_size=32)


def _pack_quantized() -> Arguments:
    return {
        "kind": "int8", "codes": _bytes(64, 64), "scales": torch.rand(64, 2), "group_size": 32,
        "zeros": torch.randn(64, 2).round(), "g_idx": torch.arange(64) % 2,
    }  # fmt: skip


def _woq() -> Arguments:
    return {
        "x": torch.randn(3, 64), "weight": _packed(), "bias": torch.randn(64), "post": "add_add",
        "other": torch.randn(3, 64), "other2": torch.randn(64), "out_features": 64,
    }  # fmt: skip


def _woq_gate_up() -> Arguments:
    return {
        "x": torch.randn(3, 64), "gate": _packed(), "up": _packed(), "gate_bias": torch.randn(64),
        "up_bias": torch.randn(64), "out_features": 64, "compute": "int8",
    }  # fmt: skip


def _linear() -> Arguments:
    return {
        "x": torch.randn(3, 40), "weight": F.pack_linear(torch.randn(20, 40)), "post": "add_add",
        "bias": torch.randn(20), "other": torch.randn(3, 20), "other2": torch.randn(20),
    }  # fmt: skip


def _gate_up() -> Arguments:
    weights = {name: F.pack_linear(torch.randn(20, 40)) for name in ("gate", "up")}
    biases = {name: torch.randn(20) for name in ("gate_bias", "up_bias")}
    return {"x": torch.randn(3, 40)} | weights | biases


def _experts() -> Arguments:
    return {
        "x": torch.randn(3, 40), "index": torch.tensor([[0, 1], [2, 3], [1, 1]]),
        "weights": torch.rand(3, 2), "gate_up": F.pack_experts(torch.randn(4, 40, 40), 2),
        "down": F.pack_experts(torch.randn(4, 40, 20)),
    }  # fmt: skip


def _quantized_experts() -> Arguments:
    def int8(weight: Tensor, parts: int) -> Tensor:
        rows = F.expert_rows(weight, parts)
        return F.pack_quantized("int8", rows.sign().to(torch.int8), torch.ones(len(rows)))

    gate_up, down = int8(torch.randn(4, 40, 40), 2), int8(torch.randn(4, 40, 20), 1)
    return {**_experts(), "gate_up": gate_up, "down": down, "inner_features": 20}


def _decoder_layer(**options: Any) -> F.DecoderLayer:
    norm = F.DecoderNorm(torch.rand(32))
    q, kv, inner = (F.DecoderLinear(F.pack_linear(torch.randn(n, 32))) for n in (64, 32, 40))
    o, down = (F.DecoderLinear(F.pack_linear(torch.randn(32, k))) for k in (64, 40))
    return F.DecoderLayer(
        4, 2, 16, q, kv, kv, o, inner, inner, down, 0.25,
        attention_input=norm, mlp_input=norm, rotary_dim=16, alibi=torch.rand(4), **options,
    )  # fmt: skip


def _decoder() -> Arguments:
    return {
        "hidden_states": torch.randn(2, 3, 32), "stack": F.decoder_stack([_decoder_layer()]),
        "caches": tuple(torch.zeros(2, 12, 16) for _ in range(2)),
        "slots": torch.tensor([0, 2, 4, 1, 3, 5]), "cu_seqlens": torch.tensor([0, 3, 6]),
        "block_tables": torch.tensor([[0, 2, 4], [1, 3, 5]]).int(),
        "cos": torch.randn(2, 3, 16), "sin": torch.randn(2, 3, 16),
    }  # fmt: skip


def _indirect_decoder(past: Callable[[], tuple[Tensor, ...]] = _past) -> Arguments:
    """One layer, whose cache holds three tokens, or none."""
    length = past()[0].shape[-2] + 3
    given = {k: v for k, v in _decoder().items() if k in ("hidden_states", "stack", "cos", "sin")}
    mask = torch.ones(2, length, dtype=torch.bool)
    return given | {"layer_past": past(), "mask": mask, "text_max_length": 8}


def _decode_indirect(cos: Tensor, sin: Tensor, layer_past: Any, **more: Any) -> Any:
    with torch.no_grad():
        return F.indirect_cache_decoder(layer_past=[layer_past], cos=[cos], sin=[sin], **more)


def _decoder_kinds() -> Arguments:
    """Two kinds of layers."""
    one = _decoder()
    layers = [_decoder_layer(), _decoder_layer(window=1, kind=1)]
    each = ("slots", "block_tables", "cu_seqlens", "cos", "sin")
    caches = {"caches": tuple(torch.zeros(2, 12, 16) for _ in range(4))}
    both = {name: (one[name], one[name].clone()) for name in each}
    return one | caches | both | {"stack": F.decoder_stack(layers)}


def _decoder_experts() -> Arguments:
    router = F.DecoderLinear(F.pack_linear(torch.randn(4, 32)))
    gate_up, down = (
        F.pack_experts(torch.randn(4, 80, 32), 2),
        F.pack_experts(torch.randn(4, 32, 40)),
    )
    mixture = F.DecoderExperts(router, gate_up, down, 40, 2)
    layer = replace(_decoder_layer(), gate=None, up=None, down=None, experts=mixture)
    return _decoder() | {"stack": F.decoder_stack([layer])}


def _decoder_int8() -> Arguments:
    scales = tuple(torch.zeros(2, 12) for _ in range(2))
    return _decoder() | {"caches": (*(_bytes(2, 12, 16) for _ in range(2)), *scales)}


def _logits() -> Arguments:
    """A whole model."""
    head = F.DecoderLinear(F.pack_linear(torch.randn(40, 32)))
    ends = F.DecoderEnds(torch.randn(40, 32), F.DecoderNorm(torch.rand(32)), head)
    one = _decoder()
    return {
        "input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]), "ends": ends, "stack": one["stack"],
        "caches": one["caches"], "tables": (one["block_tables"],), "columns": (3, 0, 0),
        "cos": (torch.randn(9, 16),), "sin": (torch.randn(9, 16),),
        "positions": (0, 3),
    }  # fmt: skip


def _embedded(embedding: Tensor, weight: Tensor, positions: Tensor, before: Tensor) -> Tensor:
    """A whole model whose ends are these."""
    given = _logits()
    norms = F.DecoderNorm(weight), F.DecoderNorm(before)
    with torch.no_grad():
        ends = F.DecoderEnds(embedding, norms[0], given["ends"].head, 1.0, positions, norms[1])
        return F.decoder_logits(**given | {"ends": ends})[0]


def _described(parameters: tuple[Tensor, ...], layout: Tensor, numbers: Tensor) -> Tensor:
    """A decoder whose layers somebody else wrote down."""
    stack = F.DecoderStack(list(parameters), layout, numbers)
    with torch.no_grad():
        return F.decoder(**_decoder() | {"stack": stack})


def _stack(make: Callable[[], Arguments] = _decoder) -> Arguments:
    stack: F.DecoderStack = make()["stack"]
    return {
        "parameters": tuple(stack.parameters), "layout": stack.layout, "numbers": stack.numbers
    }  # fmt: skip


def _angles() -> Arguments:
    return {
        "sin": _heads(10), "cos": _heads(10), "rotary_dim": 16, "rotary_half": True,
        "position_ids": torch.tensor([[0, 1, 2]]),
    }  # fmt: skip


def _rotated() -> Arguments:
    return {"query": _heads(2, 3, 4), "key": _heads(2, 3, 2)} | _angles()


def _qkv() -> Arguments:
    return {"x": torch.randn(2, 3, 128), "num_heads": 4, "head_dim": 16} | _angles()


def _norm(*names: str, **more: Any) -> Arguments:
    return {n: torch.randn(16) if n in ("weight", "bias") else _heads(3) for n in names} | more


CALLS: dict[str, Call] = {
    "attention": (F.attention, _attention),
    "attention int8": (F.attention, _attention_int8),
    "varlen": (F.varlen_attention, _varlen),
    "paged": (F.single_query_cached_kv_attention, _decode),
    "paged int8": (F.single_query_cached_kv_attention, lambda: _int8(_decode())),
    "paged prompt": (F.flash_attn_varlen_func, _prompt),
    "cache": (F.reshape_and_cache, _write),
    "cache int8": (F.reshape_and_cache, lambda: _int8(_write())),
    "indirect": (F.indirect_access_kv_cache_attention, _indirect),
    "indirect first": (F.indirect_access_kv_cache_attention, _indirect_first),
    "indirect cross": (F.indirect_access_kv_cache_attention, _cross),
    "indirect cache": (F.indirect_cache_attention, _indirect_cache),
    "gather": (F.gather_indirect, lambda: {"layer_past": _past()}),
    "pack quantized": (F.pack_quantized, _pack_quantized),
    "unpack quantized": (F.unpack_quantized, lambda: {"packed": _packed()}),
    "dequantize": (F.dequantize, lambda: {"packed": _packed()}),
    "quantized rows": (
        F.quantized_rows,
        lambda: (
            {"packed": _packed(), "rows": torch.tensor([1, 63])}
            | {"out_features": 64, "in_features": 64}
        ),
    ),
    "woq": (F.woq_linear, _woq),
    "woq gate up": (F.woq_linear_gate_up, _woq_gate_up),
    "pack": (F.pack_linear, lambda: {"weight": torch.randn(20, 40)}),
    "pack experts": (F.pack_experts, lambda: {"weight": torch.randn(4, 20, 40), "parts": 2}),
    "linear": (F.linear, _linear),
    "linear gate up": (F.linear_gate_up, _gate_up),
    "weight rows": (
        F.weight_rows,
        lambda: {"weight": F.pack_linear(torch.randn(20, 40)), "rows": torch.tensor([1, 5])},
    ),
    "experts": (F.experts, _experts),
    "quantized experts": (F.experts, _quantized_experts),
    "rows of experts": (F.expert_rows, lambda: {"weight": torch.randn(4, 20, 40), "parts": 2}),
    "decoder": (F.decoder, _decoder),
    "indirect decoder": (_decode_indirect, _indirect_decoder),
    "indirect decoder first": (_decode_indirect, lambda: _indirect_decoder(_placeholder)),
    "decoder int8": (F.decoder, _decoder_int8),
    "decoder kinds": (F.decoder, _decoder_kinds),
    "decoder experts": (F.decoder, _decoder_experts),
    "decoder logits": (F.decoder_logits, _logits),
    "decoder ends": (
        _embedded,
        lambda: {
            "embedding": torch.randn(40, 32),
            "weight": torch.rand(32),
            "positions": torch.randn(9, 32),
            "before": torch.rand(32),
        },
    ),
    "argmax": (F.argmax, lambda: {"x": torch.randn(3, 40)}),
    "top sums": (
        F.top_sums,
        lambda: {"x": torch.randn(2, 3, 40), "add": torch.randn(2, 3), "k": 4},
    ),
    "rms norm": (F.rms_norm, lambda: _norm("hidden_states", "weight", eps=1e-6)),
    "layer norm": (F.layer_norm, lambda: _norm("hidden_states", "weight", "bias")),
    "add rms norm": (F.add_rms_norm, lambda: _norm("residual", "x", "weight", add_back=True)),
    "add layer norm": (F.add_layer_norm, lambda: _norm("residual", "x", "weight", "bias")),
    "silu mul": (F.silu_mul, lambda: _norm("x", "y", "out")),
    "gelu mul": (F.gelu_mul, lambda: _norm("x", "y", "out", approximate="tanh")),
    "rotary": (F.rotary_embedding, _rotated),
    "rotate qk": (F.rotate_qk, _rotated),
    "rotate": (F.rotate, lambda: {"x": _heads(2, 3, 4)} | _angles()),
    "rotate qkv": (F.rotate_qkv, _qkv),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALLS)
def test_tensors(call: str) -> None:
    with torch.no_grad():
        check_tensors(CALLS[call], HOSTILE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALLS)
def test_tensors_where_autograd_looks_on(call: str) -> None:
    check_tensors(CALLS[call], SAME)


@pytest.mark.filterwarnings("ignore")
def test_layers_of_a_decoder() -> None:
    """Of whose parameters the op says which they are of the layer."""
    parts = (
        "norm",
        "query",
        "key",
        "value",
        "output",
        "gate",
        "up",
        "down",
        "alibi",
        "router",
        "experts",
    )
    for make in (_decoder, _decoder_experts):
        check_tensors((_described, partial(_stack, make)), HOSTILE, parts)


@pytest.mark.parametrize("call", CALLS)
def test_numbers(call: str) -> None:
    check_numbers(CALLS[call])


def test_more_blocks_than_an_int32_can_count() -> None:
    caches = {n: torch.zeros(1, 2, 8, 16).expand(2**31, -1, -1, -1) for n in ("key", "value")}
    arguments = _decode() | {f"{n}_cache": cache for n, cache in caches.items()}
    with pytest.raises(ValueError, match="key_cache has 2147483648 blocks"):
        F.single_query_cached_kv_attention(**arguments)


def test_more_slots_than_an_int32_can_count() -> None:
    caches = tuple(torch.zeros(2, 1, 16).expand(-1, 2**31, -1) for _ in range(2))
    with torch.no_grad(), pytest.raises(ValueError, match="caches have 2147483648 slots"):
        F.decoder(**_decoder() | {"caches": caches})


def test_positions_of_a_cache_are_checked_before_they_are_read() -> None:
    """Where beam indices are followed in Python: softcap and sinks gather the cache."""
    for change, text in (
        ((slice(0, 3), 2), "name row 2 at position 2"),
        ((slice(0, 3), -1), "name row -1 at position"),
        ((8, 9), "prompt of 9 tokens"),
        ((9, 0), "batch of 0"),
        ((9, 3), "batch of 3"),
    ):
        past = _past()
        past[3][change[0]] = change[1]
        with pytest.raises(ValueError, match=text):
            F.gather_indirect(past)
        with pytest.raises(ValueError, match=text):
            F.indirect_cache_attention(**_indirect_cache() | {"layer_past": past})
