"""Products with quantized weights against float64 over the same codes, on every instruction set."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from helpers import BF16, DTYPES, F16, F32, LAYOUTS, assert_same_bits
from lmfuse import functional
from lmfuse.functional import (
    dequantize,
    pack_quantized,
    woq_linear_concat,
    woq_linear_gate_up,
)
from lmfuse.functional.linear import UNFUSED
from quantizing import COMPUTE, EXTRAS, check, kinds, product, quantized, values

OPERANDS = {"mul": 1, "add": 1, "add_add": 2, "silu_mul": 1}


@kinds
@pytest.mark.parametrize("compute", COMPUTE)
def test_products(isa: str, kind: str, compute: str) -> None:
    """Random N and K, groups, extras, dtypes, layouts of x, and what follows the product."""
    if compute == "int8" and kind in ("nf4", "fp8"):
        packed = pack_quantized(**quantized(kind, 4, 40))
        with pytest.raises(ValueError, match="int8 and int4 weights"):
            product(torch.randn(2, 40), packed, compute=compute)
        return
    pick = random.Random(f"{isa} {kind} {compute}")
    posts = [None, *UNFUSED]
    for round_ in range(24):
        n, k, m = pick.randint(1, 150), pick.randint(1, 700), pick.choice([1, 2, 5, 13, 40])
        dtype = DTYPES[round_ % 3]
        group = pick.choice([-1, 32, 64, 128, 256, 512])
        extra, scale = EXTRAS[kind][round_ % len(EXTRAS[kind])], pick.choice(DTYPES)
        q = quantized(kind, n, k, group, extra, scale)
        place = LAYOUTS[pick.choice(list(LAYOUTS))]
        x = place(torch.randn(m, k).to(dtype))
        bias = pick.choice([None, torch.randn(n).to(pick.choice(DTYPES))])
        post = posts[round_ % len(posts)]
        u = [place(torch.randn(m, n).to(dtype)) for _ in range(OPERANDS.get(post or "", 0))]
        how = {"compute": compute, "block_scales": pick.random() < 0.5}
        y = product(x, pack_quantized(**q), bias, post, *u, **how)
        assert y.dtype is dtype
        check(y, x, q, bias, how["compute"], how["block_scales"], post, *u)


@kinds
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_every_code_is_what_it_stands_for(isa: str, kind: str, compute: str) -> None:
    """One column of the weight at a time, for a few rows (up to 8), some and many (over 32)."""
    codes = (torch.arange(256)[:, None] + torch.arange(40)) % 256
    if kind == "fp8":
        codes = codes.where(codes % 128 != 127, 0).to(torch.uint8).view(torch.float8_e4m3fn)
    else:
        codes = (codes - 128).to(torch.int8) if kind == "int8" else (codes % 16).to(torch.uint8)
    q = {"kind": kind, "codes": codes, "scales": torch.ones(256, 1)}
    expected = values({**q, "group_size": -1}, compute)[0].T.float()
    packed, x = pack_quantized(**q), torch.eye(40)
    for rows in (1, 2, 3, 8, 20, 40):
        y = torch.cat([product(part, packed, compute=compute) for part in x.split(rows)])
        assert torch.equal(y, expected)


@kinds
def test_fp32_is_the_plain_layer_over_the_values(isa: str, kind: str) -> None:
    for extra in EXTRAS[kind]:
        if "g_idx" in extra:  # sums in another order
            continue
        q = quantized(kind, 70, 600, 128, extra, F16)
        packed = pack_quantized(**q)
        plain = functional.pack_linear(dequantize(packed))
        for m in (1, 7, 64):
            x = torch.randn(m, 600)
            assert_same_bits(product(x, packed, compute="fp32"), functional.linear(x, plain))


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_bits_of_a_row_depend_on_nothing_else(isa: str, kind: str, compute: str) -> None:
    for group, extra in ((-1, ""), (32, "zeros"), (128, "")):
        q = quantized(kind, 101, 700, group, extra)
        packed, x, u = pack_quantized(**q), torch.randn(600, 700), torch.randn(600, 101)
        how: dict[str, Any] = {"compute": compute, "block_scales": group == 128}
        torch.set_num_threads(1)
        alone = [product(x[i : i + 1], packed, None, "add", u[i : i + 1], **how) for i in range(40)]
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for m in (2, 13, 40, 600):
                y = product(x[:m], packed, None, "add", u[:m], **how)
                assert_same_bits(y[:40], torch.cat(alone)[:m])
        for m in (513, 530):  # beyond what shares a pass over the weight
            rest = product(x[512:m], packed, None, "add", u[512:m], **how)
            assert_same_bits(product(x[:m], packed, None, "add", u[:m], **how)[512:], rest)


@pytest.mark.parametrize("compute", COMPUTE)
def test_gate_up_and_concat(isa: str, compute: str) -> None:
    for kind, group, extra in (("int8", -1, ""), ("int4", 32, "zeros"), ("int4", 128, "")):
        a, b = (quantized(kind, 70, 200, group, extra) for _ in range(2))
        c = quantized(kind, 7, 200, group, "")
        pa, pb, pc = (pack_quantized(**q) for q in (a, b, c))
        bias = torch.randn(70)
        how: dict[str, Any] = {"compute": compute, "block_scales": group == 32}
        for m in (1, 30):
            x = torch.randn(m, 200)
            y = woq_linear_gate_up(x, pa, pb, bias, out_features=70, **how)
            gate, up = product(x, pa, bias, "silu", **how), product(x, pb, **how)
            torch.testing.assert_close(y, gate * up, rtol=1e-5, atol=1e-6)
            sizes = [70, 7, 70]
            parts = woq_linear_concat(
                x, [pa, pc, pb], [None, None, bias], out_features=sizes, **how
            )
            for part, packed, b_ in zip(parts, (pa, pc, pb), (None, None, bias), strict=True):
                assert_same_bits(part, product(x, packed, b_, **how))
            assert_same_bits(woq_linear_concat(x, [pc], out_features=[7], **how)[0], parts[1])
        x = torch.randn(0, 200)
        assert woq_linear_gate_up(x, pa, pb, out_features=70, **how).shape == (0, 70)


def test_leading_dimensions_and_broadcasting(isa: str) -> None:
    q = quantized("int8", 21, 40)
    packed = pack_quantized(**q)
    for lead in ((), (1,), (2, 3), (2, 1, 3, 2), (0,), (2, 0, 3)):
        x = torch.randn(*lead, 40)
        y = product(x, packed, compute="fp32")
        assert y.shape == (*lead, 21)
        check(y.reshape(-1, 21), x.reshape(-1, 40), q)
    x = torch.randn(2, 3, 40)
    z = product(x, packed, compute="fp32")
    for shape in ((21,), (1, 1, 21), (2, 3, 1), (), (5, 2, 3, 21)):
        u = torch.randn(shape)
        torch.testing.assert_close(product(x, packed, None, "mul", u, compute="fp32"), z * u)
    assert product(x.to(BF16), packed, None, "mul", torch.randn(21)).dtype is F32  # as torch


@pytest.mark.parametrize("compute", COMPUTE)
def test_special_values(isa: str, compute: str) -> None:
    """NaN and infinity of a row stay in it; a row of zeros gives the bias."""
    q = quantized("int8", 40, 300, 64, "zeros")
    packed, x, bias = pack_quantized(**q), torch.randn(20, 300), torch.randn(40)
    x[5] = 0.0
    plain = product(x, packed, bias, compute=compute)
    assert_same_bits(plain[5], bias)
    for value in (torch.nan, torch.inf, -torch.inf):
        x2 = x.clone()
        x2[3, 299] = value
        y = product(x2, packed, bias, compute=compute)
        assert not y[3].isfinite().any()
        others = torch.arange(20) != 3
        assert_same_bits(y[others], plain[others])
        if compute == "int8":
            y = product(x2, packed, bias, compute=compute, block_scales=True)
            assert y[3].isnan().all()


@pytest.mark.parametrize("code", [-128, 127])
def test_the_largest_sums_of_integers(isa: str, code: int) -> None:
    """One scale for 70000 columns: more than int32 holds at once, where all are largest."""
    k = 70000
    packed = pack_quantized("int8", torch.full((2, k), code, dtype=torch.int8), torch.ones(2, 1))
    x = torch.ones(14, k)
    x[:, ::2] = torch.where(torch.arange(14) % 2 == 1, -1.0, 1.0)[:, None]
    expected = torch.where(torch.arange(14) % 2 == 1, 0.0, float(k * code)).expand(2, 14).T
    for m in (1, 14):
        y = product(x[:m], packed, compute="int8")
        torch.testing.assert_close(y, expected[:m], rtol=1e-6, atol=0.02 * abs(code))


@pytest.mark.parametrize(("kind", "group"), [("int8", -1), ("int8", 64), ("int4", 32)])
def test_eight_outliers_leave_the_rest_its_scale(isa: str, kind: str, group: int) -> None:
    """int8 compute is as exact with them as without, and takes them as they are."""
    q = quantized(kind, 70, 300, group, "zeros")
    packed, x = pack_quantized(**q), torch.randn(14, 300)
    w = dequantize(packed).double()
    large = torch.zeros_like(x)
    for row in range(14):
        large[row, torch.randperm(300)[: row % 9]] = 1000 * torch.randn(row % 9)
    y = product(x + large, packed, compute="int8").double()
    plain = product(x, packed, compute="int8").double()
    rounding = 1e-6 * (large.double().abs() @ w.abs().T)
    usual = (plain - x.double() @ w.T).square().mean().sqrt()
    assert ((y - (x + large).double() @ w.T).abs() < 7 * usual + rounding).all()
    assert_same_bits(y[5:7].float(), product((x + large)[5:7], packed, compute="int8"))


def test_autocast() -> None:
    packed, x = pack_quantized(**quantized("int8", 20, 30)), torch.randn(4, 30)
    with torch.autocast("cpu", BF16):
        y = product(x, packed)
    assert_same_bits(y, product(x.to(BF16), packed))
