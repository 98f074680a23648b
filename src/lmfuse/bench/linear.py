"""Linear layers of a Llama against torch's, from one row to a prompt.

Weights come from memory, as in a model: each call takes another copy, 512 MB of them in all where
reading them is what counts. Only 576 x 576, a small model's layer, is also timed from the caches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lmfuse import functional
from lmfuse.bench.case import Case, Inputs, walk
from lmfuse.functional.linear import UNFUSED

_COLD_BYTES = 512 << 20
_FEW = 8  # copies for a prompt, whose arithmetic outlasts the reading


def _inputs(n: int, shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    return torch.randn(shape).to(dtype), (torch.randn(n, shape[-1]) / shape[-1] ** 0.5).to(dtype)


def _with_other(n: int, shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    return (*_inputs(n, shape, dtype), torch.randn(*shape[:-1], n).to(dtype))


def case(
    m: int, n: int, k: int, dtype: torch.dtype, post: str | None = None, cold: bool = True
) -> Case:
    item = dtype.itemsize
    copies = max(1, _COLD_BYTES // (n * k * item)) if cold else 1
    copies = min(copies, _FEW) if m > 16 else copies
    stock_post: Callable[..., Tensor] = UNFUSED[post] if post else lambda z: z

    def run(x: Tensor, weight: Tensor, *other: Tensor) -> Tensor:
        packed = walk(weight, copies, functional.pack_linear)
        return functional.linear(x, packed, None, post, *other)  # type: ignore[arg-type]

    def stock(x: Tensor, weight: Tensor, *other: Tensor) -> Tensor:
        return stock_post(F.linear(x, walk(weight, copies, torch.clone)), *other)

    def reference(x: Tensor, weight: Tensor, *other: Tensor) -> Tensor:
        return stock_post(F.linear(x, weight), *other)

    name = f"linear {post or ''}".strip() + f" {n}"
    return Case(
        name if cold else f"{name} (in cache)",
        "decode" if m <= 16 else "prompt",
        (m, k),
        dtype,
        partial(_with_other if post in ("mul", "silu_mul", "add") else _inputs, n),
        run,
        stock,
        reference,
        "roof" if cold else "cached",
        2 * m * n * k,
        # Chains of k sums: their rounding errors grow with the square root.
        accuracy=1.5e-7 * k**0.5,
    )


_LLAMA = [(2048, 2048), (8192, 2048), (2048, 8192)]  # of Llama-3.2-1B
_HEAD = (128256, 2048)
_BF16, _FP32, _FP16 = torch.bfloat16, torch.float32, torch.float16

CASES = [
    *(case(m, n, k, _BF16) for m in (1, 2, 4, 8) for n, k in (*_LLAMA, _HEAD)),
    *(case(m, n, k, _BF16) for m in (16, 64, 512) for n, k in (*_LLAMA, (32064, 2048))),
    *(case(m, 8192, 2048, _FP32) for m in (1, 2, 4, 8, 64, 512)),
    *(case(m, 8192, 2048, _FP16) for m in (1, 8, 512)),
    *(case(512, 8192, 2048, _BF16, post) for post in ("gelu", "gelu_tanh", "silu", "silu_mul")),
    *(case(1, 8192, 2048, _BF16, post) for post in ("gelu", "silu_mul")),
    *(case(m, 576, 576, _BF16, cold=cold) for m in (1, 8) for cold in (False, True)),
]
