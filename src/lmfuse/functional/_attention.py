"""The checks that all the attention functions share.

The ops look first; the checks of tensors are made where an op refused, and while tracing.
"""

from __future__ import annotations

import math
from operator import index

import torch
from torch import Tensor, bfloat16, float8_e4m3fn, float8_e5m2, float16, float32, int8

from lmfuse._library import dense
from lmfuse.functional import _check

FP8 = (float8_e5m2, float8_e4m3fn)
KV_DTYPES = (float32, bfloat16, float16, *FP8, int8)
_MASK_DTYPES = (torch.bool, float32, bfloat16, float16)


def traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace looks on."""
    return torch.compiler.is_compiling() or bool(
        torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def cpu(name: str, x: object) -> Tensor:
    """`x`, if it is a tensor on the CPU (or meta)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}, but must be a torch.Tensor")
    if x.layout is not torch.strided or x.is_nested:
        dense(name, x)
    if not (x.is_cpu or x.is_meta):
        raise ValueError(f"{name} is on {x.device}, but lmfuse computes on the CPU")
    return x


def heads(name: str, x: Tensor, layout: str, kv: bool = False) -> None:
    """Raises unless `x` has the dimensions that `layout` names and a dtype that can be."""
    if kv:
        cpu(name, x)
        if x.dtype not in KV_DTYPES:
            raise TypeError(
                f"{name} is {x.dtype}, but must be float32, bfloat16, float16, float8_e5m2, "
                "float8_e4m3fn or int8"
            )
    else:
        _check.tensor(name, x)
    dims = layout.count(",") + 1
    if x.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but must be {layout}")
    if x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but heads must not be empty")


def default_scale(query: Tensor) -> float:
    """1/√dim; 1 where query is none, which its check then says."""
    try:
        return 1.0 / math.sqrt(query.shape[-1])
    except (AttributeError, IndexError, RuntimeError, ZeroDivisionError):
        return 1.0


def groups(query_heads: int, kv_heads: int, of: str) -> None:
    """Raises unless the query heads are divided evenly among those of the tensor called `of`."""
    if kv_heads == 0 or query_heads % kv_heads:
        raise ValueError(
            f"query has {query_heads} heads, which the {kv_heads} of {of} do not divide"
        )


def equal(name: str, is_: int, must: int, what: str, of: str) -> None:
    if is_ != must:
        raise ValueError(f"{name} has {what} {is_}, but must have {must}, that of {of}")


def number(name: str, x: float | Tensor) -> float:
    """`x`, if it is finite."""
    try:
        value = float(x)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{name} is {x!r}, but must be a number") from None
    if isinstance(x, (int, float)) and value - value != 0.0:  # math.isfinite, but traceable
        raise ValueError(f"{name} is {x}, but must be finite")
    return value


def integer(name: str, x: int | Tensor) -> int:
    """`x`, if it is an integer, or a tensor that holds one."""
    try:
        return x if isinstance(x, int) else index(x)
    except (TypeError, RuntimeError):
        raise TypeError(f"{name} is {x!r}, but must be an integer") from None


def softcap(x: float) -> float:
    """0.0 where there is none: for 0 and for -1, which stands for it in the interface."""
    value = number("softcap", x)
    if value in (0.0, -1.0):
        return 0.0
    if value < 0.0:
        raise ValueError(f"softcap is {x}, but must be positive, or 0 or -1 for none")
    return value


def floats(x: Tensor | None) -> Tensor | None:
    """`x` as float32, if it is of another of the three; what else it is, its check says."""
    return x.float() if isinstance(x, Tensor) and x.dtype in (bfloat16, float16) else x


def slopes(name: str, x: Tensor | None, query_heads: int, batch: int | None = None) -> None:
    """Raises unless `x` is None, [heads] or, where `batch` is given, [batch, heads]."""
    if x is None:
        return
    _check.tensor(name, x)
    shapes = [(query_heads,)] if batch is None else [(query_heads,), (batch, query_heads)]
    if tuple(x.shape) not in shapes:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, but must have shape "
            f"{' or '.join(str(s) for s in shapes)}"
        )


def four_dims(x: Tensor | None) -> Tensor | None:
    """A mask with its missing dimensions; more than four, its check says."""
    if isinstance(x, Tensor):
        while x.dim() < 4:
            x = x.unsqueeze(0)
    return x


def mask(
    name: str, x: Tensor | None, batch: int, query_heads: int, queries: int, keys: int
) -> None:
    """Raises unless `x` is None or broadcasts to the four sizes."""
    if x is None:
        return
    cpu(name, x)
    if x.dtype not in _MASK_DTYPES:
        raise TypeError(
            f"{name} is {x.dtype}, but must be bool (True: seen) or float32, bfloat16 or float16 "
            "(added to the scores)"
        )
    sizes = (batch, query_heads, queries, keys)
    if x.dim() > 4 or any(
        n not in (1, m) for n, m in zip(reversed(x.shape), reversed(sizes), strict=False)
    ):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, which cannot broadcast to [batch, heads, queries, "
            f"keys], {sizes}"
        )


def token_scales(name: str, x: Tensor | None, of: str, kv: Tensor) -> None:
    """Raises unless int8 has scales, one for each token and head, and nothing else has."""
    if (kv.dtype is int8) != (x is not None):
        raise TypeError(
            f"{of} is {kv.dtype}; int8, and nothing else, needs {name}, float32, one for each "
            "token and head"
        )
    if x is None:
        return
    cpu(name, x)
    if x.dtype is not float32:
        raise TypeError(f"{name} is {x.dtype}, but must be float32")
    if x.shape != kv.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, but must have {tuple(kv.shape[:-1])}, one for "
            f"each token and head of {of}"
        )


def indices(name: str, x: Tensor, dims: int, like: Tensor) -> None:
    """Raises unless `x` is int32 or int64 of so many dimensions, and where `like` is."""
    _check.integers(name, x)
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, but its neighbours are on {like.device}")
    if x.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but must have {dims} dimension(s)")
