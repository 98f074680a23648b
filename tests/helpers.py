"""Comparison with float64, and tensors laid out in odd ways. All tolerances are here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
ULP32 = 2.0**-23


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbours of `dtype` at `value`, a float64 tensor; the smallest one at 0."""
    info = torch.finfo(dtype)
    return value.abs().clamp(min=info.tiny).log2().floor().exp2() * info.eps


def assert_close(y: Tensor, expected: Tensor, ulps: float = 4, scale: Tensor | float = 0.0) -> None:
    """Asserts that `y` is `expected`, which is float64, computed in fp32 and rounded once.

    Allowed is the half ulp of the rounding to the dtype of y, and before it an error of `ulps` fp32
    ulps, relative to `expected` or to `scale` where that is larger (sums that may cancel).
    Infinities and NaN must be where a conversion of `expected` has them.
    """
    assert expected.dtype is torch.float64
    assert y.shape == expected.shape
    got, rounded = y.double(), expected.to(y.dtype).double()
    size = expected.abs().clamp(min=torch.finfo(torch.float32).tiny)
    before = ulps * ULP32 * torch.maximum(size, torch.as_tensor(scale, dtype=torch.float64))
    allowed = before + (0 if y.dtype is F32 else ulp(expected, y.dtype) / 2)
    good = expected.isfinite() & ((got - expected).abs() <= allowed)
    good |= (got == rounded) | (got.isnan() & rounded.isnan())
    bad = (~good).nonzero()
    if len(bad):
        at = tuple(bad[0].tolist())
        raise AssertionError(
            f"{len(bad)} of {y.numel()} differ; the first, at {at}, is {got[at]:.9g}, "
            f"but must be {expected[at]:.9g} ± {allowed[at]:.3g}"
        )


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    """Asserts equality of every bit, the sign of zeros included."""
    assert a.dtype is b.dtype
    assert a.shape == b.shape
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    assert torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def spread(shape: tuple[int, ...], strides: tuple[int, ...], offset: int, like: Tensor) -> Tensor:
    """`like` in a new storage with these strides, after `offset` elements."""
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    base = torch.full((offset + reach,), 7.0, dtype=like.dtype)
    view = base.as_strided(shape, strides, offset)
    view.copy_(like)
    return view


def _gaps(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), 7.0, dtype=x.dtype)
    view = wide[..., 2:-3]
    return view.copy_(x)


def _permuted(x: Tensor) -> Tensor:
    """The leading dimensions in reverse order in memory."""
    lead = list(range(x.dim() - 1))
    order = [*reversed(lead), x.dim() - 1]
    return x.permute(order).contiguous().permute(order)


def _uncollapsible(x: Tensor) -> Tensor:
    """Every row dimension split in twos and padded: more dimensions than a kernel can index."""
    strides, step = [], x.shape[-1] + 1
    for n in reversed(x.shape[:-1]):
        strides.insert(0, step)
        step = step * n + 3
    return spread(tuple(x.shape), (*strides, 1), 1, x)


# Ways for the same numbers to lie in memory, by name.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(),
    "shifted": lambda x: spread(tuple(x.shape), x.contiguous().stride(), 1, x),
    "gaps": _gaps,
    "permuted": _permuted,
    "uncollapsible": _uncollapsible,
    "columns": lambda x: x.transpose(-1, 0).contiguous().transpose(-1, 0),
    "every other": lambda x: spread(
        tuple(x.shape), tuple(2 * s for s in x.contiguous().stride()), 3, x
    ),
}
