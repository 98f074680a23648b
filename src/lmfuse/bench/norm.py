"""Norms against the formulas of transformers and torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmfuse import functional
from lmfuse.bench.case import Case, Formula, Inputs, random_rows

EPS = 1e-6


def _vector(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (1 + 0.1 * torch.randn(shape[-1])).to(dtype)


def _rms_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    return random_rows(shape, dtype), _vector(shape, dtype)


def _add_rms_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    return random_rows(shape, dtype), random_rows(shape, dtype), _vector(shape, dtype)


def _layer_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    return random_rows(shape, dtype), _vector(shape, dtype), _vector(shape, dtype)


def _add_layer_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    return (random_rows(shape, dtype), *_layer_inputs(shape, dtype))


def llama_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers' LlamaRMSNorm computes it."""
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + EPS)
    return weight * x.to(dtype)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def _layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    d = x - x.mean(-1, keepdim=True)
    return d / (d.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


def _cases(kind: str, shape: tuple[int, ...], dtype: torch.dtype, limit: str | None) -> list[Case]:
    def case(name: str, make: object, run: Formula, stock: Formula, reference: Formula) -> Case:
        return Case(name, kind, shape, dtype, make, run, stock, reference, limit)  # type: ignore[arg-type]

    return [
        case(
            "rms_norm",
            _rms_inputs,
            lambda x, w: functional.rms_norm(x, w, EPS),
            llama_rms_norm,
            _rms,
        ),
        case(
            "add_rms_norm",
            _add_rms_inputs,
            lambda r, x, w: functional.add_rms_norm(r, x, w, None, EPS),
            lambda r, x, w: llama_rms_norm(r + x, w),
            lambda r, x, w: _rms(r + x, w),
        ),
        case(
            "layer_norm",
            _layer_inputs,
            lambda x, w, b: functional.layer_norm(x, w, b, EPS),
            lambda x, w, b: F.layer_norm(x, w.shape, w, b, EPS),
            _layer,
        ),
        case(
            "add_layer_norm",
            _add_layer_inputs,
            lambda r, x, w, b: functional.add_layer_norm(r, x, w, b, EPS),
            lambda r, x, w, b: F.layer_norm(r + x, w.shape, w, b, EPS),
            lambda r, x, w, b: _layer(r + x, w, b),
        ),
    ]


CASES = [
    *_cases("stream", (16384, 4096), torch.float32, "copy"),
    *_cases("stream", (32768, 4096), torch.bfloat16, "copy"),
    *_cases("prompt", (512, 4096), torch.bfloat16, None),
    *_cases("row", (1, 2048), torch.bfloat16, None),
]
