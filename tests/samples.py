"""Sample arguments of every op, and every function: for tests that ask the same of all.

A new op adds its entry to SAMPLES, or test_framework.py fails; its function goes to FUNCTIONS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmfuse import functional as F
from lmfuse.functional.experts import ACTIVATIONS


def _x() -> Tensor:
    return torch.randn(3, 5, 36)


def _strided() -> Tensor:
    return torch.randn(5, 3, 40, dtype=torch.bfloat16).transpose(0, 1)[..., 2:38]


def _w() -> Tensor:
    return torch.randn(36)


def _packed() -> Tensor:
    return F.pack_linear(torch.randn(45, 36)).packed


def _quantized_rows(experts: int, n: int, k: int, parts: int = 1) -> Tensor:
    rows = F.expert_rows(torch.randn(experts, n, k), parts)
    return F.pack_quantized("int8", rows.sign().to(torch.int8), torch.ones(len(rows)))


def _quantized(zeros: bool = False, order: bool = False) -> Tensor:
    return F.pack_quantized(
        "int4",
        torch.randint(0, 16, (45, 36), dtype=torch.uint8),
        torch.rand(45, 2),
        torch.ones(45, 2) if zeros else None,
        group_size=32,
        g_idx=torch.arange(36) % 2 if order else None,
    )


def _heads(heads: int) -> Tensor:
    return torch.randn(2, 3, heads, 16)


def _angles() -> tuple[Tensor, Tensor]:
    angles = torch.rand(9, 8)
    return angles.sin(), angles.cos()


# What all attention ops end with: scale, causal, windows, softcap.
_ATTENTION = (0.25, True, 3, -1, 2.0)


def _tokens(count: int, heads: int) -> Tensor:
    return torch.randn(count, heads, 16)


def _pages() -> Tensor:
    return torch.randn(6, 2, 8, 16)


def _columns() -> Tensor:
    """The beam indices of a cache of 7 rows: 2 tokens of one prompt, and 2 beams."""
    index = torch.zeros(9, 2, dtype=torch.long)
    index[2:7, 1], index[7, 0], index[8, 0] = 1, 2, 1
    return index


def _placeholder() -> tuple[Tensor, ...]:
    states = torch.zeros(1, 1, 1, 1)
    none = torch.zeros(1, 0, 0, 1, dtype=torch.long)
    return none, states, states.clone(), torch.zeros(1, 2, dtype=torch.long)


# Name of the op: lists of arguments, made anew at each call as some are written.
SAMPLES: dict[str, Callable[[], list[tuple[Any, ...]]]] = {
    "argmax": lambda: [(_x(),), (_strided(),)],
    "top_sums": lambda: [(_x(), torch.randn(3, 5), 2), (_strided().float(), torch.randn(3, 5), 7)],
    "rms_norm": lambda: [(_x(), _w(), 1e-6, 0.0), (_strided(), None, 1e-6, 1.0)],
    "layer_norm": lambda: [(_x(), _w(), _w(), 1e-5), (_strided(), _w(), None, 1e-5)],
    "add_rms_norm": lambda: [
        (_x(), _x(), _w(), 1e-6, 0.0),
        (_strided(), _strided(), None, 1e-6, 1.0),
    ],
    "add_rms_norm_": lambda: [
        (_x(), _x(), _w(), 1e-6, 0.0),
        (_strided(), _strided(), None, 1e-6, 1.0),
    ],
    "add_layer_norm": lambda: [
        (_x(), _x(), _w(), _w(), 1e-5),
        (_strided(), _strided(), _w(), None, 1e-5),
    ],
    "add_layer_norm_": lambda: [
        (_x(), _x(), _w(), _w(), 1e-5),
        (_strided(), _strided(), _w(), None, 1e-5),
    ],
    "attention": lambda: [
        (_heads(4), _heads(2), _heads(2), None, None, None, None, None, *_ATTENTION, 1.0, 1.0),
        (
            _heads(4),
            _heads(1),
            _heads(1),
            torch.rand(2, 1, 1, 3),
            torch.rand(4),
            torch.rand(4),
            None,
            None,
            *_ATTENTION,
            1.0,
            1.0,
        ),
    ],
    "attention_varlen": lambda: [
        (
            _tokens(5, 4),
            _tokens(9, 2),
            _tokens(9, 2),
            _tokens(5, 4),
            torch.tensor([0, 2, 5]),
            torch.tensor([0, 5, 9]),
            None,
            None,
            *_ATTENTION,
        )
    ],
    "attention_paged": lambda: [
        (
            _tokens(2, 4),
            _pages(),
            _pages(),
            _tokens(2, 4),
            None,
            torch.tensor([9, 16]),
            False,
            torch.tensor([[0, 1], [5, 3]]),
            None,
            None,
            None,
            None,
            *_ATTENTION,
            1.0,
            1.0,
        )
    ],
    "attention_indirect_step": lambda: [
        # Before the first token, for later it writes what it is given, and into a cache that is
        # then full, for the rest is what the memory held.
        (
            _heads(4),
            _heads(2),
            _heads(2),
            *_placeholder(),
            mask,
            None,
            0.25,
            True,
            2,
            cap,
            0,
            cap > 0,
        )
        for mask, cap in ((None, 0.0), (torch.ones(2, 1, 1, 3, dtype=torch.bool), 2.0))
    ],
    "attention_indirect": lambda: [
        (
            _heads(4),
            _heads(2),
            _heads(2),
            torch.randn(7, 2, 2, 16),
            torch.randn(7, 2, 2, 16),
            _columns(),
            4,
            None,
            None,
            0.25,
            True,
        )
    ],
    "cache_write": lambda: [
        (
            _tokens(3, 2),
            _tokens(3, 2),
            _pages(),
            _pages(),
            torch.tensor([3, -1, 47]),
            None,
            None,
            1.0,
            1.0,
        )
    ],
    "linear_pack": lambda: [(_x()[0],), (_strided()[1],)],
    "linear_unpack": lambda: [(_packed(), 45, 36, torch.float32)],
    "linear_rows": lambda: [(_packed(), torch.tensor([[3, 44], [0, 3]]), 36, torch.float32)],
    "linear": lambda: [
        (_x(), _packed(), torch.randn(45), 45, 4, None, None),
        (_x(), _packed(), None, 45, 7, torch.randn(3, 5, 45), torch.randn(3, 5, 45)),
    ],
    "linear_gate_up": lambda: [(_x(), _packed(), _packed(), torch.randn(45), None, 45)],
    "linear_concat": lambda: [(_x(), [_packed(), _packed()], [torch.randn(45)], 1, 90)],
    "experts": lambda: [
        (
            _x()[0],
            torch.tensor([[0, 2], [2, 1], [1, 0], [0, 2], [2, 0]]),
            torch.rand(5, 2),
            *weights,
            *biases,
            20,
            36,
            how,
            act,
            1.7,
            7.0,
        )
        for act, biases in (
            (0, (None, None)),
            (len(ACTIVATIONS) - 1, (torch.randn(3, 40), torch.randn(3, 36))),
        )
        for how, weights in (
            (
                -1,
                [
                    F.pack_experts(torch.randn(3, 2 * 20, 36), 2).packed,
                    F.pack_experts(torch.randn(3, 36, 20)).packed,
                ],
            ),
            (2, [_quantized_rows(3, 40, 36, 2), _quantized_rows(3, 36, 20)]),
        )
    ],
    "woq_pack": lambda: [
        (
            torch.ones(45, 36, dtype=torch.uint8),
            torch.rand(45, 2),
            torch.rand(45, 2),
            torch.randperm(36, dtype=torch.int32),
            1,
            1,
            32,
            torch.float32,
        )
    ],
    "woq_header": lambda: [(_quantized(),)],
    "woq_copy": lambda: [(_quantized(),), (_quantized(zeros=True, order=True),)],
    "woq_unpack": lambda: [
        (_quantized(), 45, 36, 2, False, 0),
        (_quantized(True, True), 45, 36, 2, True, 64),
    ],
    "woq_values": lambda: [
        (_quantized(), None, 45, 36),
        (_quantized(order=True), torch.tensor([[3, 44], [0, 3]]), 45, 36),
    ],
    "woq": lambda: [
        (_x(), _quantized(), torch.randn(45), 45, 1, False, 4, None, None),
        (_x(), _quantized(), None, 45, 2, True, 5, torch.randn(3, 5, 45), None),
    ],
    "woq_gate_up": lambda: [(_x(), _quantized(), _quantized(), None, torch.randn(45), 45, 0, True)],
    "woq_concat": lambda: [
        (_x(), [_quantized(), _quantized()], [torch.randn(45)], 2, 90, 1, False)
    ],
    "rope": lambda: [(_heads(4), *_angles(), None, 16, True, False)],
    "rope_qk": lambda: [
        (_heads(4), _heads(2), *_angles(), torch.tensor([[3, 4, 0], [1, 1, 7]]), 16, True, False),
        (_heads(4), _heads(2), *_angles(), None, 6, False, False),
    ],
    "rope_qk_": lambda: [(_heads(4), _heads(2), *_angles(), torch.tensor([5]), 16, False)],
    "rope_qkv": lambda: [(torch.randn(2, 3, 128), *_angles(), None, 4, 16, 10, True)],
    "silu_mul": lambda: [(_x(), _x()), (_strided(), _strided())],
    "gelu_mul": lambda: [(_x(), _x(), False), (_strided(), _strided(), True)],
}

# Ops whose functions are not there yet; whoever adds the function moves the op to SAMPLES.
PENDING: set[str] = set()

# Functions of x, a tensor [..., n] that does not require grad, and of a weight [n].
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rms_norm": lambda x, w: F.rms_norm(x, w),
    "layer_norm": lambda x, w: F.layer_norm(x, w, w),
    "fast_layer_norm": lambda x, w: F.fast_layer_norm(x, w.shape, w, w),
    "add_rms_norm": lambda x, w: F.add_rms_norm(x + 1, x, w),
    "add_rms_norm add_back": lambda x, w: _with_residual(F.add_rms_norm, x, w),
    "add_layer_norm": lambda x, w: F.add_layer_norm(x + 1, x, w, w),
    "add_layer_norm add_back": lambda x, w: _with_residual(F.add_layer_norm, x, w),
    "silu_mul": lambda x, w: F.silu_mul(x, x * w),
    "gelu_mul": lambda x, w: F.gelu_mul(x, x * w),
    "attention": lambda x, w: _attend(x, w),
    "gelu_mul tanh": lambda x, w: F.gelu_mul(x, x * w, approximate="tanh"),
}


def _with_residual(function: Callable[..., Tensor], x: Tensor, w: Tensor) -> Tensor:
    residual = x + 1
    y = function(residual, x, w, None, add_back=True)
    return y + 2 * residual


def _attend(x: Tensor, w: Tensor) -> Tensor:
    query, key, value = (t.reshape(1, -1, 1, t.shape[-1]) for t in (x, x * w, x))
    return F.attention(query, key, value, causal=True).reshape(x.shape)
