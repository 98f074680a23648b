"""Tensors between pages that nobody may touch, in every layout: for tests of memory safety.

Each lies flush with the end or the start of its pages: one byte too far ends the process. Under
`tools/asan`, what the ops allocate themselves is watched as well.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from helpers import assert_same_bits

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
PROT_NONE = 0
CANARY = 0xA5


class Guarded:
    """A buffer of some bytes between two inaccessible pages, at the end or the start of its own."""

    def __init__(self, size: int, at_end: bool) -> None:
        page = mmap.PAGESIZE
        pages = max(1, -(-size // page))
        self.map = mmap.mmap(-1, (pages + 2) * page)
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)
        self.bytes.fill_(CANARY)
        base = self.bytes.data_ptr()
        for fence in (base, base + (pages + 1) * page):
            assert _libc.mprotect(fence, page, PROT_NONE) == 0
        inner = self.bytes[page : (pages + 1) * page]
        at = inner.numel() - size if at_end else 0
        self.tensor = inner[at : at + size]
        self.around = inner[:at], inner[at + size :]

    def intact(self) -> bool:
        return all(bool((part == CANARY).all()) for part in self.around)


class Placed:
    """A tensor of given shape and layout in guarded memory, its gaps filled with canaries."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, layout: Layout) -> None:
        order, gaps, last, at_end = layout
        strides = [last] * len(shape)
        step = shape[-1] * last + gaps[-1]
        for d in sorted(range(len(shape) - 1), key=lambda d: order[d]):
            strides[d] = step
            step = step * max(shape[d], 1) + gaps[d]
        empty = 0 in shape
        reach = 0 if empty else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        self.memory = Guarded(reach * dtype.itemsize, at_end)
        self.flat = self.memory.tensor.view(dtype) if reach else torch.empty(0, dtype=dtype)
        self.tensor = self.flat.as_strided(shape, strides)
        self.tensor.copy_(torch.randn(shape))
        self.owned = torch.zeros(reach, dtype=torch.bool)
        self.owned.as_strided(shape, strides).fill_(True)
        self.before = self.flat.clone()

    def check(self, written: bool = False) -> None:
        """The surroundings are untouched; so is the tensor, unless written."""
        assert self.memory.intact()
        still = ~self.owned if written else torch.ones_like(self.owned)
        assert_same_bits(self.flat[still], self.before[still])


Layout = tuple[list[int], list[int], int, bool]


@st.composite
def layouts(draw: st.DrawFn, dims: int, last: tuple[int, ...] = (1, 1, 2)) -> Layout:
    """The order of the leading dimensions, gaps, the last stride, the end or the start."""
    order = draw(st.permutations(range(dims)))
    gaps = draw(st.lists(st.sampled_from((0, 0, 1, 3, 16)), min_size=dims, max_size=dims))
    return order, gaps, draw(st.sampled_from(last)), draw(st.booleans())


def placed(
    data: st.DataObject,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    last: tuple[int, ...] = (1, 1, 2),
) -> Placed:
    return Placed(shape, dtype, data.draw(layouts(len(shape), last)))


# Every op gets so many draws, the same ones each time.
some = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
