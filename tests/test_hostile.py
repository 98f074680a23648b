"""Hostile arguments, one at a time: each an exception that names an argument, or the right answer.

CALLS holds calls that are right; HOSTILE what takes the place of one of their tensors, and NUMBERS
that of one of their numbers. A crash ends the process; any error but TypeError and ValueError
fails the test, for it comes from somewhere deep inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lmfuse import functional as F

Arguments = dict[str, Any]


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


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], Arguments]]] = {
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


def _strided(x: Tensor, strides: Callable[[int, int], int]) -> Tensor:
    pairs = zip(x.shape, x.stride(), strict=True)
    return x.as_strided(x.shape, [strides(size, stride) for size, stride in pairs])


def _every_other(x: Tensor) -> Tensor:
    wide = torch.zeros(*x.shape, 2, dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def _reversed(x: Tensor) -> Tensor:
    order = list(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def _negated(x: Tensor) -> Tensor:
    return torch._neg_view(-x) if x.dtype in (torch.float32, torch.int64, torch.int32) else x


# The same numbers in other clothes: the same result, or a refusal in words.
SAME: dict[str, Callable[[Tensor], Tensor]] = {
    "a leaf that requires grad": lambda x: (
        x.clone().requires_grad_() if x.is_floating_point() else x
    ),
    "a view that negates": _negated,
    "every other element": _every_other,
    "columns first": _reversed,
    "huge strides where a size is 1": lambda x: _strided(x, lambda n, s: 2**61 if n == 1 else s),
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
}
HOSTILE: dict[str, Callable[[Tensor], Any]] = SAME | {
    "sparse": lambda x: x.to_sparse(),
    "compressed rows": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "quantized by torch": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
    "meta": lambda x: x.to("meta"),
    "complex": lambda x: x.to(torch.complex64),
    "a conjugate": lambda x: x.to(torch.complex64).conj(),
    "bool": lambda x: x.bool(),
    "double": lambda x: x.double(),
    "int64": lambda x: x.long(),
    "uint8": lambda x: x.to(torch.uint8),
    "uint16": lambda x: x.to(torch.uint16),
    "NaN": lambda x: torch.full(x.shape, math.nan),
    "no rows": lambda x: x[:0],
    "no second size": lambda x: x[:, :0],
    "no columns": lambda x: x[..., :0],
    "no rows at huge strides": lambda x: _strided(x[:0], lambda *_: 2**58 + 1),
    "one row again and again": lambda x: x[:1].expand(x.shape),
    "one element again and again": lambda x: x.flatten()[0].expand(x.shape),
    "twice as many rows": lambda x: torch.cat((x, x)),
    "a dimension more": lambda x: x[None],
    "a dimension less": lambda x: x[0],
    "no dimension": lambda x: x.flatten()[0],
    "30 dimensions more": lambda x: x.view(*[1] * 30, *x.shape),
    "70 dimensions more": lambda x: x.as_strided((*[1] * 70, *x.shape), (*[1] * 70, *x.stride())),
    "integers far away": lambda x: torch.full(x.shape, 2**62, dtype=torch.int64),
    "the least integers": lambda x: torch.full(x.shape, -(2**63), dtype=torch.int64),
    "the least of int32": lambda x: torch.full(x.shape, -(2**31), dtype=torch.int32),
    "numpy": lambda x: x.numpy(),
    "a list": lambda _: [1.0],
    "a number": lambda _: 3,
    "a tuple": lambda x: (x,),
    "a word": lambda _: "x",
    "None": lambda _: None,
}
NUMBERS = (math.nan, math.inf, -math.inf, 2**70, -(2**70), 2**62, -(2**63), -1, 0, 2.5, None)


def _places(arguments: Arguments) -> Iterator[tuple[str, Tensor, Callable[[Any], Arguments]]]:
    """Each tensor, those in tuples too: its name, itself, and what puts another in its place."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value, lambda x, name=name: {name: x}
        elif isinstance(value, tuple) and isinstance(value[0], Tensor):
            for i, part in enumerate(value):
                yield f"{name}[{i}]", part, lambda x, name=name, value=value, i=i: {
                    name: (*value[:i], x, *value[i + 1 :])
                }  # fmt: skip


def _made(make: Callable[[], Arguments]) -> Arguments:
    torch.manual_seed(0)
    with torch.no_grad():
        return make()


def _outcome(function: Callable[..., Any], arguments: Arguments, what: str) -> Any:
    """What `function` returns; None if it refuses in words that name an argument."""
    try:
        return function(**arguments)
    except (TypeError, ValueError) as error:
        if not any(name in str(error) for name in arguments):
            raise AssertionError(f"{what}: {error}") from error
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return None


def _tensors(result: Any) -> list[Tensor]:
    parts = result if isinstance(result, (tuple, list)) else (result,)
    return [x.detach() for x in parts if isinstance(x, Tensor) and not x.is_meta]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_tensors(call: str, grad: bool) -> None:
    function, make = CALLS[call]
    with torch.no_grad():
        want = _tensors(function(**_made(make)))
    for place in range(len(list(_places(_made(make))))):
        for hostile, change in (SAME if grad else HOSTILE).items():
            arguments = _made(make)
            name, x, put = list(_places(arguments))[place]
            try:
                changed = put(change(x))
            except (RuntimeError, TypeError, IndexError):  # there is no such tensor
                continue
            with torch.set_grad_enabled(grad):
                found = _outcome(function, arguments | changed, f"{name}: {hostile}")
            if found is not None and hostile in SAME:
                for a, b in zip(_tensors(found), want, strict=True):
                    assert type(a) is not Tensor or torch.equal(a, b), f"{name}: {hostile}"


@pytest.mark.parametrize("call", CALLS)
def test_numbers(call: str) -> None:
    function, make = CALLS[call]
    for name, value in _made(make).items():
        if type(value) in (int, float):
            for number in NUMBERS:
                arguments = _made(make) | {name: number}
                try:
                    function(**arguments)
                except (TypeError, ValueError):  # Python's own words for None and 2.5
                    pass
                except Exception as error:
                    raise AssertionError(f"{name}: {number}: {error}") from error


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
