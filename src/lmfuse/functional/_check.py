"""The checks before an op, each of which names the argument, what it is and what it must be.

They look at shapes and dtypes only, so they also hold while torch.compile and torch.export trace.
Functions of a decode step make them only after the op refused (`_library.call`); the others first,
so each asks in one line whether all is well (0.2 us) and only then looks for what is not.
"""

from __future__ import annotations

from torch import (
    Tensor,
    bfloat16,
    dtype,
    float16,
    float32,
    int8,
    int16,
    int32,
    int64,
    strided,
    uint8,
)

from lmfuse._library import dense

FLOATS = (float32, bfloat16, float16)
INTEGERS = (int64, int32, int16, int8, uint8)


def tensor(name: str, x: object) -> None:
    """Raises unless `x` is a CPU (or meta) tensor of float32, bfloat16 or float16."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}, but must be a torch.Tensor")
    if x.layout is not strided or x.is_nested:
        dense(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} is {x.dtype}, but must be float32, bfloat16 or float16")
    if not (x.is_cpu or x.is_meta):
        raise ValueError(f"{name} is on {x.device}, but lmfuse computes on the CPU")


def row(name: str, x: Tensor) -> int:
    """As `tensor`, of at least one dimension; returns the length of the last."""
    try:
        if x.is_cpu and x.dtype in FLOATS and x.layout is strided:
            return x.shape[-1]
    except (AttributeError, IndexError, RuntimeError):
        pass
    tensor(name, x)
    if not x.dim():
        raise ValueError(f"{name} has no dimension, but must have at least one")
    return x.shape[-1]


def vector(name: str, x: Tensor | None, n: int, of: str) -> None:
    """Raises unless `x` is None or has `n` elements, as many as a row of the tensor called `of`."""
    if x is None:
        return
    try:
        if x.is_cpu and x.dtype in FLOATS and x.layout is strided and x.shape == (n,):
            return
    except (AttributeError, RuntimeError):
        pass
    tensor(name, x)
    if x.dim() != 1 or x.shape[0] != n:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, but must have shape ({n},): "
            f"the last dimension of {of}"
        )


def same(name: str, x: Tensor, of: str, like: Tensor) -> None:
    """Raises unless `x` has the shape and dtype of `like`, which is called `of` and was checked."""
    try:
        if x.is_cpu and x.dtype is like.dtype and x.layout is strided and x.shape == like.shape:
            return
    except (AttributeError, RuntimeError):
        pass
    tensor(name, x)
    if x.shape != like.shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, but must have that of {of}, {tuple(like.shape)}"
        )
    if x.dtype != like.dtype:
        raise TypeError(f"{name} is {x.dtype}, but must be {like.dtype}, the dtype of {of}")


def integers(name: str, x: object, dtypes: tuple[dtype, ...] = (int32, int64)) -> None:
    """Raises unless `x` is a CPU (or meta) tensor of one of these dtypes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}, but must be a torch.Tensor")
    if x.layout is not strided or x.is_nested:
        dense(name, x)
    if x.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} is {x.dtype}, but must be {names}")
    if not (x.is_cpu or x.is_meta):
        raise ValueError(f"{name} is on {x.device}, but lmfuse computes on the CPU")


def held(name: str, x: object, dtypes: tuple[dtype, ...] = ()) -> Tensor:
    """`x`, if it is a dense tensor with data, and of one of these dtypes if any are given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}, but must be a torch.Tensor")
    dense(name, x)
    if x.is_complex() or x.is_quantized or (dtypes and x.dtype not in dtypes):
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes) or "real"
        raise TypeError(f"{name} is {x.dtype}, but must be {names}")
    if x.is_meta:
        raise ValueError(f"{name} is on meta, without data")
    return x


def writable(name: str, x: Tensor) -> None:
    """Raises unless an op can write `x` in place: as `apart`, and its rows contiguous."""
    if apart(name, x):
        return
    if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(
            f"{name} is written in place, so its last dimension must be contiguous, "
            f"but it has stride {x.stride(-1)}"
        )


def apart(name: str, x: Tensor) -> bool:
    """Raises unless each element of `x` has a place in memory; returns if `x` is contiguous."""
    try:
        if x.is_contiguous():
            return True
    except RuntimeError:  # of what is not dense
        pass
    dense(name, x)
    dims = sorted(
        (stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1
    )
    reach = 0  # how far the elements of the dimensions so far extend
    for stride, size in dims:
        if stride <= reach:
            raise ValueError(
                f"{name} is written in place, but several of its elements share memory, expanded "
                f"or overlapping: shape {tuple(x.shape)}, strides {x.stride()}"
            )
        reach += stride * (size - 1)
    return False
