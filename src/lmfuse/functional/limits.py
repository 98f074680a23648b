"""The best loops for the limits of this machine; `lmfuse.bench.limits` times them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lmfuse._library import ops, register_fake

_UNITS = ("fp32", "bf16", "int8")


def buffer(elements: int) -> Tensor:
    """Ones, float32, in large pages: those of 4 KB cost a virtual machine a third of its speed."""
    bytes_ = cast(Tensor, ops.limit_buffer(elements))
    return bytes_.view(torch.float32).fill_(1)


def read(x: Tensor) -> None:
    """Reads `x` once: a float32 tensor, contiguous, of a multiple of 1024 elements."""
    ops.limit_read(x)


def copy(x: Tensor, y: Tensor, stream: bool) -> None:
    """Copies `x` to `y`, both as in `read`; `stream` writes around the caches."""
    ops.limit_copy(x, y, stream)


def peak(unit: str, rounds: int) -> int:
    """Keeps the arithmetic unit of each thread busy and returns the operations done in all.

    A multiplication and an addition are two operations.

    Args:
        unit: "fp32" (fused multiply-add), "bf16" or "int8" (dot products, where the active
            instruction set has them; else as fp32).
        rounds: how often each thread runs its loop of some 500 to 130,000 operations.

    Raises:
        ValueError: an unknown unit.
    """
    if unit not in _UNITS:
        raise ValueError(f"unit is {unit!r}, but must be one of {', '.join(_UNITS)}")
    operations = torch.zeros(torch.get_num_threads(), dtype=torch.int64)
    ops.limit_peak(operations, _UNITS.index(unit), rounds)
    return int(operations.sum())


@register_fake("limit_read")
def _(x: Tensor) -> None:
    return None


@register_fake("limit_copy")
def _(x: Tensor, y: Tensor, stream: bool) -> None:
    return None


@register_fake("limit_peak")
def _(operations: Tensor, unit: int, rounds: int) -> None:
    return None
