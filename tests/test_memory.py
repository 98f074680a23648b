"""No input, however odd, reads or writes outside its tensors.

Hypothesis makes shapes, strides, offsets and dtypes. Each operand lies flush with the end or the
start of its pages, between two pages that nobody may touch: one byte too far ends the process.
Under `tools/asan`, what the ops allocate themselves is watched as well.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import BF16, DTYPES, F32, assert_same_bits
from lmfuse import functional as F

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


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    lead = draw(st.lists(st.integers(0, 4), max_size=4))
    return (*lead, draw(st.one_of(st.integers(1, 140), st.integers(0, 1100))))


def _operand(
    data: st.DataObject,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    last: tuple[int, ...] = (1, 1, 2),
) -> Placed:
    return Placed(shape, dtype, data.draw(layouts(len(shape), last)))


def _norm(data: st.DataObject, center: bool, add: bool) -> None:
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    dtypes = st.sampled_from((None, *DTYPES))
    add_back = add and data.draw(st.booleans())
    x = _operand(data, shape, dtype)
    vectors = [
        d and _operand(data, shape[-1:], d)
        for d in (data.draw(dtypes), data.draw(dtypes) if center else None)
    ]
    weight, bias = (v and v.tensor for v in vectors)
    residual = _operand(data, shape, dtype, (1,) if add_back else (1, 1, 2)) if add else None
    if residual is None:
        y = F.layer_norm(x.tensor, weight, bias) if center else F.rms_norm(x.tensor, weight)
    else:
        function = F.add_layer_norm if center else F.add_rms_norm
        y = function(residual.tensor, x.tensor, weight, bias, add_back=add_back)
        residual.check(written=add_back)
    assert y.shape == shape
    assert y.isfinite().all() or dtype is not F32
    for operand in (x, *vectors):
        if operand is not None:
            operand.check()


def _gated(data: st.DataObject, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    x, y = _operand(data, shape, dtype), _operand(data, shape, dtype)
    result = function(x.tensor, y.tensor)
    assert result.shape == shape
    x.check()
    y.check()


# Every op: a function that draws operands, calls it and checks them. Other stems add theirs.
CALLS: dict[str, Callable[[st.DataObject], None]] = {
    "rms_norm": lambda data: _norm(data, center=False, add=False),
    "layer_norm": lambda data: _norm(data, center=True, add=False),
    "add_rms_norm": lambda data: _norm(data, center=False, add=True),
    "add_layer_norm": lambda data: _norm(data, center=True, add=True),
    "silu_mul": lambda data: _gated(data, F.silu_mul),
    "gelu_mul": lambda data: _gated(data, F.gelu_mul),
    "gelu_mul tanh": lambda data: _gated(data, lambda x, y: F.gelu_mul(x, y, approximate="tanh")),
}


@pytest.mark.parametrize("call", CALLS)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_nothing_outside_is_touched(isa: str, call: str, data: st.DataObject) -> None:
    with torch.no_grad():
        CALLS[call](data)


@pytest.mark.parametrize("n", range(1, 70))
def test_every_tail(isa: str, n: int) -> None:
    """Rows that end where the page ends, at every length of a tail."""
    for dtype in DTYPES:
        for at_end in (True, False):
            layout: Layout = ([0, 1], [0, 0], 1, at_end)
            x, residual = (Placed((2, n), dtype, layout) for _ in range(2))
            weight = Placed((n,), BF16, ([0], [0], 1, at_end))
            F.rms_norm(x.tensor, weight.tensor)
            F.silu_mul(x.tensor, x.tensor)
            F.add_layer_norm(residual.tensor, x.tensor, weight.tensor, None, add_back=True)
            x.check()
            weight.check()
            residual.check(written=True)


def test_the_fence_holds() -> None:
    """The page behind a guarded buffer cannot be read: the tests above can fail."""
    code = (
        "import ctypes, test_memory as t; g = t.Guarded(8, True);"
        "ctypes.string_at(g.tensor.data_ptr(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=False)
    assert done.returncode != 0
