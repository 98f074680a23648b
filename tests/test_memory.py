"""No input, however odd, reads or writes outside its tensors.

Hypothesis makes shapes, strides, offsets and dtypes; the operands are `guarded`. The attentions
and their caches: test_memory_attention.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from guarded import Layout, Placed, placed, some
from helpers import BF16, DTYPES, F32
from lmfuse import functional as F


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    lead = draw(st.lists(st.integers(0, 4), max_size=4))
    return (*lead, draw(st.one_of(st.integers(1, 140), st.integers(0, 1100))))


def _norm(data: st.DataObject, center: bool, add: bool) -> None:
    shape, dtype = data.draw(shapes()), data.draw(st.sampled_from(DTYPES))
    dtypes = st.sampled_from((None, *DTYPES))
    add_back = add and data.draw(st.booleans())
    x = placed(data, shape, dtype)
    vectors = [
        d and placed(data, shape[-1:], d)
        for d in (data.draw(dtypes), data.draw(dtypes) if center else None)
    ]
    weight, bias = (v and v.tensor for v in vectors)
    residual = placed(data, shape, dtype, (1,) if add_back else (1, 1, 2)) if add else None
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
    x, y = placed(data, shape, dtype), placed(data, shape, dtype)
    result = function(x.tensor, y.tensor)
    assert result.shape == shape
    x.check()
    y.check()


def _linear(data: st.DataObject) -> None:
    """The weight is lmfuse's own memory; all else lies between fences."""
    rows, n, k = data.draw(st.integers(0, 40)), *(data.draw(st.integers(1, 100)) for _ in range(2))
    dtype = data.draw(st.sampled_from(DTYPES))
    weights = [F.pack_linear(torch.randn(n, k).to(dtype)) for _ in range(2)]
    x = placed(data, (rows, k), dtype)
    bias = placed(data, (n,), data.draw(st.sampled_from(DTYPES)))
    others = [placed(data, (rows, n), dtype) for _ in range(2)]
    y = F.linear(x.tensor, weights[0], bias.tensor, "add_add", *(o.tensor for o in others))
    assert y.shape == F.linear_gate_up(x.tensor, *weights, bias.tensor).shape == (rows, n)
    assert y.isfinite().all() or dtype is not F32
    for operand in (x, bias, *others):
        operand.check()


def _top_sums(data: st.DataObject) -> None:
    batch, rows, n = (data.draw(st.integers(1, most)) for most in (3, 5, 140))
    x, add = placed(data, (batch, rows, n), F32), placed(data, (batch, rows), F32)
    k = data.draw(st.integers(1, min(12, rows * n)))
    sums, places = F.top_sums(x.tensor, add.tensor, k)
    assert torch.equal((x.tensor + add.tensor.unsqueeze(-1)).flatten(1).gather(1, places), sums)
    assert torch.equal(F.argmax(x.tensor), x.tensor.argmax(-1))
    x.check()
    add.check()


# Every op: a function that draws operands, calls it and checks them. Other stems add theirs.
CALLS: dict[str, Callable[[st.DataObject], None]] = {
    "rms_norm": lambda data: _norm(data, center=False, add=False),
    "layer_norm": lambda data: _norm(data, center=True, add=False),
    "add_rms_norm": lambda data: _norm(data, center=False, add=True),
    "add_layer_norm": lambda data: _norm(data, center=True, add=True),
    "silu_mul": lambda data: _gated(data, F.silu_mul),
    "gelu_mul": lambda data: _gated(data, F.gelu_mul),
    "linear": _linear,
    "top_sums": _top_sums,
    "gelu_mul tanh": lambda data: _gated(data, lambda x, y: F.gelu_mul(x, y, approximate="tanh")),
}


@pytest.mark.parametrize("call", CALLS)
@some
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
        "import ctypes, guarded; g = guarded.Guarded(8, True);"
        "ctypes.string_at(g.tensor.data_ptr(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=False)
    assert done.returncode != 0
