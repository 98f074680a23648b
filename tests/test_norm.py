"""rms_norm, layer_norm and their residual forms against float64, on every instruction set."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import BF16, DTYPES, F16, LAYOUTS, assert_close, assert_same_bits
from lmfuse import functional
from lmfuse.reference import norm as reference

KINDS = ("rms", "layer")
SIZES = (*range(1, 131), 255, 576, 1000, 2048, 4095, 4096, 4109)

kinds = pytest.mark.parametrize("kind", KINDS)


def norm(kind: str, x: Tensor, weight: Any = None, bias: Any = None, **options: float) -> Tensor:
    if kind == "rms":
        return functional.rms_norm(x, weight, **options)
    return functional.layer_norm(x, weight, bias, **options)


def add_norm(
    kind: str,
    residual: Tensor | None,
    x: Tensor,
    weight: Any = None,
    bias: Any = None,
    **options: Any,
) -> Tensor:
    if kind == "rms":
        return functional.add_rms_norm(residual, x, weight, None, **options)
    return functional.add_layer_norm(residual, x, weight, bias, **options)


def check(
    kind: str, y: Tensor, s: Tensor, weight: Any = None, bias: Any = None, **options: float
) -> None:
    """y against float64; where terms cancel, relative to the largest value of the row."""
    weight, bias = (None if v is None else v.double() for v in (weight, bias))
    if kind == "rms":
        expected = reference.rms_norm(s.double(), weight, **options)
    else:
        expected = reference.layer_norm(s.double(), weight, bias, **options)
    largest = expected.nan_to_num(posinf=0, neginf=0).abs()
    if largest.numel():
        largest = largest.amax(-1, keepdim=True)
    assert_close(y, expected, ulps=8, scale=largest)


def vectors(n: int, weight: torch.dtype | None, bias: torch.dtype | None) -> tuple[Any, Any]:
    return (
        None if weight is None else (1 + torch.randn(n) / 4).to(weight),
        None if bias is None else torch.randn(n).to(bias),
    )


@kinds
def test_every_size(isa: str, dtype: torch.dtype, kind: str) -> None:
    """Each size with its tails; what lies beyond the row (here 1e30) must not count."""
    for n in SIZES:
        wide = torch.full((3, n + 64), 1e30).to(dtype)
        x, residual = wide.clone()[:, 1 : n + 1], wide.clone()[:, 2 : n + 2]
        x.copy_(torch.randn(3, n))
        residual.copy_(torch.randn(3, n))
        weight, bias = vectors(n, dtype, dtype)
        check(kind, norm(kind, x, weight, bias), x, weight, bias)
        before = residual.double()
        y = add_norm(kind, residual, x, weight, bias, add_back=True)
        s = before + x.double()
        check(kind, y, s, weight, bias)
        assert_close(residual, s, ulps=1)


@kinds
def test_weights_of_every_dtype(isa: str, dtype: torch.dtype, kind: str) -> None:
    x = torch.randn(4, 77).to(dtype)
    biases = (None,) if kind == "rms" else (None, *DTYPES)
    for weight_dtype, bias_dtype in product((None, *DTYPES), biases):
        weight, bias = vectors(77, weight_dtype, bias_dtype)
        check(kind, norm(kind, x, weight, bias), x, weight, bias)


def test_strided_weight(isa: str, dtype: torch.dtype) -> None:
    weight, bias = torch.randn(2, 77).to(dtype).t().contiguous().t()
    assert weight.stride() == (2,)
    x = torch.randn(4, 77).to(dtype)
    check("layer", norm("layer", x, weight, bias), x, weight, bias)


def test_weight_offset(isa: str, dtype: torch.dtype) -> None:
    """Gemma's 1 is added in fp32: in bf16, 1 + w would lose all of a small w."""
    x, residual = torch.randn(2, 3, 130).to(dtype)
    weight = (torch.randn(130) * 1e-3).to(dtype)
    check("rms", norm("rms", x, weight, weight_offset=1.0), x, weight, weight_offset=1.0)
    y = add_norm("rms", residual, x, weight, weight_offset=1.0)
    check("rms", y, x.double() + residual.double(), weight, weight_offset=1.0)


@kinds
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 2.0])
def test_eps(isa: str, dtype: torch.dtype, kind: str, eps: float) -> None:
    x = (torch.randn(4, 67) * 1e-3).to(dtype)
    check(kind, norm(kind, x, eps=eps), x, eps=eps)
    y = add_norm(kind, x.clone(), x, eps=eps)
    check(kind, y, 2 * x.double(), eps=eps)


@kinds
def test_default_eps(kind: str) -> None:
    x = torch.randn(4, 67) * 1e-3
    eps = {"rms": 1e-6, "layer": 1e-5}[kind]
    for y in (norm(kind, x), add_norm(kind, None, x), add_norm(kind, torch.zeros_like(x), x)):
        check(kind, y, x, eps=eps)


@kinds
def test_residual(isa: str, dtype: torch.dtype, kind: str) -> None:
    """y comes from the unrounded sum; the residual receives the rounded one, or stays."""
    x = torch.randn(5, 200).to(dtype)
    residual = (torch.randn(5, 200) * 64).to(dtype)
    s = x.double() + residual.double()
    kept = residual.clone()
    y = add_norm(kind, residual, x)
    check(kind, y, s)
    assert_same_bits(residual, kept)
    written = residual.clone()
    assert_same_bits(add_norm(kind, written, x, add_back=True), y)
    assert_same_bits(written, (x.float() + residual.float()).to(dtype))
    assert_same_bits(add_norm(kind, None, x, add_back=True), norm(kind, x))


def test_residual_that_is_x(isa: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 67).to(dtype)
    s = 2 * x.double()
    y = add_norm("rms", x, x, add_back=True)
    check("rms", y, s)
    assert_close(x, s, ulps=1)


@kinds
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(isa: str, dtype: torch.dtype, kind: str, layout: str) -> None:
    """The bits do not depend on where the rows lie; the result is contiguous."""
    place = LAYOUTS[layout]
    x, residual = torch.randn(2, 2, 1, 3, 2, 2, 2, 2, 2, 21).to(dtype)
    weight, bias = vectors(21, dtype, dtype)
    y = norm(kind, place(x), weight, bias)
    assert y.is_contiguous()
    assert_same_bits(y, norm(kind, x, weight, bias))
    y = add_norm(kind, place(residual), place(x), weight, bias)
    assert_same_bits(y, add_norm(kind, residual, x, weight, bias))


@kinds
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_written_in_place(isa: str, dtype: torch.dtype, kind: str, layout: str) -> None:
    x, residual = torch.randn(2, 3, 2, 1, 4, 21).to(dtype)
    placed = LAYOUTS[layout](residual)
    if placed.stride(-1) != 1:
        with pytest.raises(ValueError, match="residual is written in place, so its last dimension"):
            add_norm(kind, placed, x, add_back=True)
        assert_same_bits(placed, residual)
        return
    y = add_norm(kind, placed, x, add_back=True)
    assert_same_bits(y, add_norm(kind, residual, x, add_back=True))
    assert_same_bits(placed, residual)


@kinds
def test_expanded_rows(isa: str, dtype: torch.dtype, kind: str) -> None:
    x = torch.randn(1, 3, 1, 35).to(dtype).expand(2, 3, 4, 35)
    assert_same_bits(norm(kind, x), norm(kind, x.contiguous()))
    assert_same_bits(add_norm(kind, x, x), add_norm(kind, x.contiguous(), x.contiguous()))


@kinds
@pytest.mark.parametrize("shape", [(0,), (0, 8), (8, 0), (2, 0, 8), (7,), (1, 2, 1, 3, 9)])
def test_shapes(isa: str, dtype: torch.dtype, kind: str, shape: tuple[int, ...]) -> None:
    x, residual = torch.randn(2, *shape).to(dtype)
    weight, bias = vectors(shape[-1], dtype, dtype)
    y = norm(kind, x, weight, bias)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    check(kind, y, x, weight, bias)
    s = x.double() + residual.double()
    check(kind, add_norm(kind, residual, x, weight, bias, add_back=True), s, weight, bias)


@kinds
def test_threads_do_not_change_bits(isa: str, dtype: torch.dtype, kind: str) -> None:
    x, residual = torch.randn(2, 501, 259).to(dtype)
    together = norm(kind, x), add_norm(kind, residual, x)
    torch.set_num_threads(1)
    alone = norm(kind, x), add_norm(kind, residual, x)
    rows = torch.stack([norm(kind, row) for row in x])
    for a, b in zip(together, alone, strict=True):
        assert_same_bits(a, b)
    assert_same_bits(together[0], rows)


@kinds
@pytest.mark.parametrize("n", [4109, 4])
def test_outputs_beyond_the_caches(isa: str, dtype: torch.dtype, kind: str, n: int) -> None:
    """From 32 MB on, y is stored around the caches: the same bits as in small parts."""
    rows = (32 << 20) // dtype.itemsize // n + 1
    row = torch.randn(1031, n).to(dtype)
    x = row.repeat(rows // 1031 + 1, 1)
    small = norm(kind, row)
    large = norm(kind, x)
    assert large.nbytes >= 32 << 20
    for part in large.split(1031):
        assert_same_bits(part, small)
    residual = x.clone()
    assert_same_bits(add_norm(kind, residual, x, add_back=True)[-1031:], add_norm(kind, row, row))
    assert_same_bits(residual, x + x)


@kinds
def test_infinity_and_nan_stay_in_their_row(isa: str, dtype: torch.dtype, kind: str) -> None:
    x = torch.randn(4, 37).to(dtype)
    x[1, 3], x[2, 36] = torch.inf, torch.nan
    check(kind, norm(kind, x), x)
    check(kind, add_norm(kind, torch.zeros_like(x), x), x)


def test_large_mean(isa: str) -> None:
    """The variance is that of the deviations: E[x²] - E[x]² would have no digit left."""
    x = torch.randn(3, 512) + 4096
    # The mean is right to some ulps of 4096, which move every y by as much.
    expected = reference.layer_norm(x.double(), None, None)
    assert_close(norm("layer", x), expected, ulps=4, scale=4096)


def test_overflow_to_infinity(isa: str) -> None:
    x, weight = torch.tensor([[1.0, 8.0, 0.5]], dtype=F16), torch.tensor([6e4] * 3, dtype=F16)
    y = functional.rms_norm(x, weight)
    check("rms", y, x, weight)
    assert y.isinf().tolist() == [[False, True, False]]


@pytest.mark.parametrize("half", [BF16, F16])
def test_all_bit_patterns(isa: str, half: torch.dtype) -> None:
    """x + -0 = x: each of the 65536 values is read and written back; then sums of any two."""
    x = torch.arange(-32768, 32768, dtype=torch.int16).view(half)
    residual = torch.full_like(x, -0.0)
    functional.add_rms_norm(residual, x, None, add_back=True)
    assert torch.equal(residual.isnan(), x.isnan())
    assert_same_bits(residual.nan_to_num(), x.nan_to_num())
    for shift in (1, 4097, 30000, 12345, 63, 32768 + 511):
        other = x.roll(shift)
        s = other.clone()
        functional.add_rms_norm(s, x, None, add_back=True)
        rounded = (x.float() + other.float()).to(half)
        assert torch.equal(s.isnan(), rounded.isnan())
        numbers = ~rounded.isnan()
        assert_same_bits(s[numbers], rounded[numbers])


@pytest.mark.parametrize("half", [BF16, F16])
def test_rounding_to_even(isa: str, half: torch.dtype) -> None:
    """Every tie between two neighbours and the numbers beside it, subnormal and overflowing ones
    included: a row of one element with x = 1, so that y = its weight, in fp32, rounded."""
    bits = torch.arange(0, 32767, dtype=torch.int32).to(torch.int16)
    low, high = bits.view(half).double(), (bits + 1).view(half).double()
    finite = high.isfinite()
    tie = ((low + high) / 2)[finite].float()
    weight = torch.cat(
        [tie, tie.nextafter(torch.zeros(())), tie.nextafter(torch.tensor(torch.inf))]
    )
    weight = torch.cat([weight, -weight])
    x = torch.ones(len(weight), dtype=half)
    y = functional.rms_norm(x, weight, eps=0.0)
    assert_same_bits(y, weight.to(half))


@kinds
def test_residual_that_overlaps_x(isa: str, dtype: torch.dtype, kind: str) -> None:
    """x is read as it was before the call, wherever the residual is written."""
    memory = torch.randn(400).to(dtype)
    x, residual = memory[:300].view(3, 100), memory[7:307].view(3, 100)
    s = x.double() + residual.double()
    y = add_norm(kind, residual, x, add_back=True)
    check(kind, y, s)
    assert_close(residual, s, ulps=1)
