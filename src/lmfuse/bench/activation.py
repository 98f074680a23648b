"""Gated activations against `act_fn(gate) * up`, as transformers writes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmfuse import functional
from lmfuse.bench.case import Case, Formula, Inputs, random_rows


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    return 2 * random_rows(shape, dtype), random_rows(shape, dtype)


def _silu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gelu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate) * up


def _gelu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


# name, lmfuse, and the formula, which in float64 is the reference too
_OPS: list[tuple[str, Formula, Formula]] = [
    ("silu_mul", functional.silu_mul, _silu),
    ("gelu_mul", functional.gelu_mul, _gelu),
    ("gelu_mul (tanh)", lambda x, y: functional.gelu_mul(x, y, approximate="tanh"), _gelu_tanh),
]


def _cases(kind: str, shape: tuple[int, ...], dtype: torch.dtype, limit: str | None) -> list[Case]:
    return [
        Case(name, kind, shape, dtype, _inputs, run, stock, stock, limit)
        for name, run, stock in _OPS
    ]


CASES = [
    *_cases("stream", (16384, 4096), torch.float32, "copy"),
    *_cases("stream", (32768, 4096), torch.bfloat16, "copy"),
    *_cases("prompt", (512, 4096), torch.bfloat16, None),
    *_cases("row", (1, 2048), torch.bfloat16, None),
]
