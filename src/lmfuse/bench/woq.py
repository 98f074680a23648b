"""Quantized linear layers of a Llama, from one row to a prompt.

A weight's bytes are its codes and its scales, and come from memory, as in a model: each call takes
another copy. Stock is torch's own linear over the dequantized weight in bfloat16.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import lmfuse
from lmfuse import functional
from lmfuse.bench.case import Case, Inputs, walk
from lmfuse.functional import limits
from lmfuse.reference import woq as reference

_COLD_BYTES = 512 << 20
_FEW = 4  # copies for a prompt, whose arithmetic outlasts the reading
_PAGE = 4096


def copied(packed: Tensor) -> Tensor:
    """In large pages, as pack_quantized gives them."""
    size = packed.numel()
    bytes_ = limits.buffer(-(-size // _PAGE) * _PAGE // 4).view(torch.uint8)[:size]
    return bytes_.copy_(packed)


def _plain(packed: Tensor) -> Tensor:
    return functional.dequantize(packed).bfloat16()


def _inputs(kind: str, group: int, n: int, shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    k = shape[-1]
    if kind == "int8":
        codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    else:
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    groups = 1 if group == -1 else -(-k // group)
    scales = (torch.rand(n, groups) / k**0.5 / 16).half()
    packed = functional.pack_quantized(kind, codes, scales, group_size=group)
    return torch.randn(shape).to(dtype), packed


def _exact(packed: Tensor, compute: str) -> Tensor:
    """The weight in float64, with nf4's table as it is multiplied: in bfloat16, where that is."""
    q = functional.unpack_quantized(packed.to(torch.uint8))
    table = torch.tensor(reference.NF4)
    if compute == "bf16" and lmfuse.isa() in ("avx512_bf16", "amx"):
        table = table.bfloat16()
    return reference.dequantize(
        q.kind, q.codes, q.scales.double(), group_size=q.group_size, table=table.double()
    )


def case(m: int, n: int, k: int, kind: str, group: int, compute: str) -> Case:
    size = n * k // (1 if kind == "int8" else 2)
    copies = _FEW if m > 16 else max(1, _COLD_BYTES // size)

    def run(x: Tensor, packed: Tensor) -> Tensor:
        weight = walk(packed, copies, copied)
        return functional.woq_linear(x, weight, out_features=n, compute=compute)

    def stock(x: Tensor, packed: Tensor) -> Tensor:
        return F.linear(x, walk(packed, max(1, copies // 2), _plain))

    def exact(x: Tensor, packed: Tensor) -> Tensor:
        seen = reference.quantize_rows(x) if compute == "int8" else x
        return F.linear(seen, _exact(packed, compute))

    name = kind if group == -1 else f"{kind} g{group}"
    return Case(
        f"{name}, {compute} {n}",
        "decode" if m <= 16 else "prompt",
        (m, k),
        torch.bfloat16,
        partial(_inputs, kind, group, n),
        run,
        stock,
        exact,
        "roof",
        2 * m * n * k,
        accuracy=3e-7 * k**0.5,
        unit="int8" if compute == "int8" else "bf16",
    )


_LLAMA = [(2048, 2048), (8192, 2048), (2048, 8192)]  # of Llama-3.2-1B
_INT4 = [("int4", 128), ("int4", 32)]

CASES = [
    *(case(m, n, k, "int8", -1, c) for c in ("int8", "bf16") for m in (1, 4) for n, k in _LLAMA),
    *(case(m, 8192, 2048, *form, "int8") for form in _INT4 for m in (1, 2, 4)),
    *(case(m, 8192, 2048, *form, "bf16") for form in (*_INT4, ("nf4", 64)) for m in (1, 2)),
    *(case(1, 128256, 2048, *form, "int8") for form in (("int8", -1), ("int4", 128))),
    *(case(512, 8192, 2048, *form, c) for form in (("int8", -1), *_INT4) for c in ("int8", "bf16")),
    case(512, 8192, 2048, "nf4", 64, "bf16"),
]
