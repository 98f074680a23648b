"""Rotary embedding of query and key against the formulas of transformers."""

from __future__ import annotations

import torch
from torch import Tensor

from lmfuse import functional
from lmfuse.bench.case import Case, Inputs, random_rows

Pair = tuple[Tensor, Tensor]


def _angles(tokens: int, head_dim: int) -> Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    return torch.outer(torch.arange(tokens, dtype=torch.float32), frequencies)


def _table(angles: Tensor, dtype: torch.dtype) -> Pair:
    return angles.sin().to(dtype), angles.cos().to(dtype)


def _half_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    """Query and key [batch, heads, tokens, head_dim] as Llama has them: views of what the linear
    gave, tokens first. sin and cos [1, tokens, head_dim], the half table twice."""
    batch, heads, tokens, head_dim = shape
    memory = (batch, tokens, heads, head_dim)
    angles = _angles(tokens, head_dim)
    sin, cos = _table(torch.cat((angles, angles), -1)[None], dtype)
    query, key = (random_rows(memory, dtype).transpose(1, 2) for _ in range(2))
    return query, key, sin, cos


def _interleaved_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    """Query and key [batch, tokens, heads, head_dim] and a half table, as GPT-J has them."""
    sin, cos = _table(_angles(shape[1], shape[3])[None], dtype)
    return random_rows(shape, dtype), random_rows(shape, dtype), sin, cos


def _run_half(query: Tensor, key: Tensor, sin: Tensor, cos: Tensor) -> Pair:
    return functional.rotate_qk(query, key, sin, cos, query.shape[-1], True, heads_first=True)


def _run_interleaved(query: Tensor, key: Tensor, sin: Tensor, cos: Tensor) -> Pair:
    return functional.rotate_qk(query, key, sin, cos, query.shape[-1], False)


def llama_rope(query: Tensor, key: Tensor, sin: Tensor, cos: Tensor) -> Pair:
    """As apply_rotary_pos_emb of transformers' Llama computes it."""

    def rotate_half(x: Tensor) -> Tensor:
        x1 = x[..., : x.shape[-1] // 2]
        x2 = x[..., x.shape[-1] // 2 :]
        return torch.cat((-x2, x1), dim=-1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin


def gptj_rope(query: Tensor, key: Tensor, sin: Tensor, cos: Tensor) -> Pair:
    """As apply_rotary_pos_emb of transformers' GPT-J computes it."""

    def rotate_every_two(x: Tensor) -> Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    sin = sin[:, :, None, :].repeat_interleave(2, 3)
    cos = cos[:, :, None, :].repeat_interleave(2, 3)
    return query * cos + rotate_every_two(query) * sin, key * cos + rotate_every_two(key) * sin


def _cases(kind: str, batch: int, tokens: int, dtype: torch.dtype, limit: str | None) -> list[Case]:
    heads, head_dim = (16, 128) if kind == "row" else (32, 128)
    half, interleaved = (batch, heads, tokens, head_dim), (batch, tokens, heads, head_dim)
    return [
        Case(
            "rope half", kind, half, dtype, _half_inputs, _run_half, llama_rope, llama_rope, limit
        ),
        Case(
            "rope interleaved",
            kind,
            interleaved,
            dtype,
            _interleaved_inputs,
            _run_interleaved,
            gptj_rope,
            gptj_rope,
            limit,
        ),
    ]


CASES = [
    *_cases("stream", 16, 512, torch.float32, "copy"),
    *_cases("stream", 32, 512, torch.bfloat16, "copy"),
    *_cases("prompt", 1, 512, torch.bfloat16, None),
    *_cases("row", 1, 1, torch.bfloat16, None),
]
