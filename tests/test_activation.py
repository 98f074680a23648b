"""silu_mul and gelu_mul against float64, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers import BF16, F16, LAYOUTS, assert_close, assert_same_bits
from lmfuse import functional
from lmfuse.reference import activation as reference

SIZES = (*range(1, 131), 255, 576, 1000, 2048, 4095, 4096, 4109)

Gated = Callable[[Tensor, Tensor], Tensor]
OPS: dict[str, tuple[Gated, Gated]] = {
    "silu": (functional.silu_mul, reference.silu_mul),
    "gelu": (functional.gelu_mul, reference.gelu_mul),
    "gelu tanh": (
        lambda x, y: functional.gelu_mul(x, y, approximate="tanh"),
        lambda x, y: reference.gelu_mul(x, y, approximate="tanh"),
    ),
}

ops = pytest.mark.parametrize("op", OPS)


def check(op: str, result: Tensor, x: Tensor, y: Tensor) -> None:
    """Against float64. The argument of gelu's exponential, about x²/2 or x³/14, carries ulps of
    itself, which the exponential makes relative errors; activations below 1e-36 meet the end of
    fp32, where an exponential times x <= 104 keeps an absolute error only."""
    expected = OPS[op][1](x.double(), y.double())
    size = expected.nan_to_num(posinf=0, neginf=0).abs()
    argument = 0 if op == "silu" else x.double().square().clamp(max=128).nan_to_num(0)
    smallest = y.double().abs().nan_to_num(posinf=0) * 1e-36
    assert_close(result, expected, ulps=4, scale=torch.maximum(size * (1 + argument), smallest))


@ops
def test_every_size(isa: str, dtype: torch.dtype, op: str) -> None:
    for n in SIZES:
        x, y = torch.randn(2, 2, n + 3).mul(3).to(dtype)[..., 1 : n + 1]
        check(op, OPS[op][0](x, y), x, y)


@ops
@pytest.mark.parametrize("half", [BF16, F16])
def test_every_half(isa: str, half: torch.dtype, op: str) -> None:
    """All 65536 gates: infinities, NaN, both zeros, subnormal numbers, results that overflow."""
    x = torch.arange(-32768, 32768, dtype=torch.int16).view(half)
    for up in (1.0, -0.75, 300.0):
        y = torch.full_like(x, up)
        check(op, OPS[op][0](x, y), x, y)


@ops
def test_special_values(isa: str, dtype: torch.dtype, op: str) -> None:
    values = [0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 88.7, -88.7, -88.8, -95.0]
    values += [-104.0, -120.0, 9.1, -9.1, -10.2, -13.0, 1e4, -1e4, 1e-5, -1e-5, 6e-8, 1e-40, -1e-40]
    values += [1e20, -1e20, 3e38, -3e38]
    grid = torch.tensor(values).to(dtype)
    x, y = torch.meshgrid(grid, grid, indexing="ij")
    # An activation that fp32 cannot hold, times infinity, is 0 · ∞.
    vanished = OPS[op][1](x.double(), torch.ones(())).abs() < 1e-36
    known = ~(vanished & (x != 0) & y.isinf())
    x, y = x[known], y[known]
    result = OPS[op][0](x, y)
    check(op, result, x, y)
    zero = (result == 0) & (x.abs() < 5)
    assert torch.equal(result[zero].signbit(), (x[zero].signbit() ^ y[zero].signbit()))


@ops
def test_fp32_over_the_whole_range(isa: str, op: str) -> None:
    x = torch.cat([torch.linspace(-110, 110, 200_001), torch.randn(100_000) * 3])
    y = torch.ones_like(x)
    check(op, OPS[op][0](x, y), x, y)


@ops
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa: str, dtype: torch.dtype, op: str, layout: str) -> None:
    """The bits do not depend on where the rows lie; the result is contiguous."""
    place = LAYOUTS[layout]
    x, y = torch.randn(2, 2, 1, 3, 2, 2, 2, 2, 2, 21).to(dtype)
    result = OPS[op][0](place(x), place(y))
    assert result.is_contiguous()
    assert_same_bits(result, OPS[op][0](x, y))
    assert_same_bits(OPS[op][0](x, place(y)), result)


@ops
def test_halves_of_one_projection(isa: str, dtype: torch.dtype, op: str) -> None:
    both = torch.randn(2, 5, 134).to(dtype)
    gate, up = both.chunk(2, -1)
    check(op, OPS[op][0](gate, up), gate, up)
    expanded = up[:, :1].expand_as(gate)
    check(op, OPS[op][0](gate, expanded), gate, expanded)


@ops
@pytest.mark.parametrize("shape", [(0,), (0, 8), (8, 0), (2, 0, 8), (7,), (1, 2, 1, 3, 9)])
def test_shapes(isa: str, dtype: torch.dtype, op: str, shape: tuple[int, ...]) -> None:
    x, y = torch.randn(2, *shape).to(dtype)
    result = OPS[op][0](x, y)
    assert (result.shape, result.dtype) == (x.shape, dtype)
    check(op, result, x, y)


@ops
def test_threads_do_not_change_bits(isa: str, dtype: torch.dtype, op: str) -> None:
    x, y = torch.randn(2, 501, 259).to(dtype)
    together = OPS[op][0](x, y)
    torch.set_num_threads(1)
    assert_same_bits(together, OPS[op][0](x, y))
    assert_same_bits(together, torch.stack([OPS[op][0](a, b) for a, b in zip(x, y, strict=True)]))


@ops
@pytest.mark.parametrize("n", [4109, 4])
def test_outputs_beyond_the_caches(isa: str, dtype: torch.dtype, op: str, n: int) -> None:
    """From 32 MB on, the result is stored around the caches: the same bits as in small parts."""
    rows = (32 << 20) // dtype.itemsize // n + 1
    x, y = torch.randn(2, 1031, n).to(dtype)
    many = rows // 1031 + 1
    large = OPS[op][0](x.repeat(many, 1), y.repeat(many, 1))
    assert large.nbytes >= 32 << 20
    small = OPS[op][0](x, y)
    for part in large.split(1031):
        assert_same_bits(part, small)


@ops
def test_out(isa: str, op: str) -> None:
    x, y = torch.randn(2, 3, 21)
    out = torch.empty(21, 3).t()
    name = op.split()[0] + "_mul"
    options = {"approximate": "tanh"} if op == "gelu tanh" else {}
    result = getattr(functional, name)(x, y, out=out, **options)
    assert_same_bits(out, result)
    assert_same_bits(result, OPS[op][0](x, y))
    getattr(functional, name)(x, y, out=x, **options)
    assert_same_bits(x, result)
